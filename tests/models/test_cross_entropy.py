"""The chunked cross-entropy against the plain one."""

import math

import pytest
import torch

from models.ops import cross_entropy as ops

M, D, V = 23, 6, 50


def draw(dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (M, V))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (M,), generator=g)


def exact(hidden, weight, targets):
    """In float64 throughout, from the definition."""
    logits = hidden.double() @ weight.double().t()
    return (logits.exp().sum(1).log() - logits[torch.arange(len(targets)), targets]).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 22, 23, 1000])
def test_value_and_gradients(monkeypatch, dtype, tolerance, rows):
    monkeypatch.setattr(ops, "CHUNK_BYTES", 4 * V * rows)
    hidden, weight, targets = draw(dtype)
    loss = ops.linear_cross_entropy(hidden, weight, targets)
    (3 * loss).backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = exact(h, w, targets)
    (3 * expected).backward()
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for actual, wanted in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert (actual.double() - wanted).abs().max() < tolerance * wanted.abs().max()


def test_the_reference_is_the_definition():
    hidden, weight, targets = draw(torch.float32)
    assert ops.reference(hidden, weight, targets).item() == pytest.approx(
        exact(hidden, weight, targets).item(), rel=1e-6
    )


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_BYTES", 4 * 5 * 2)
    hidden, weight = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    targets = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda h, w: ops.linear_cross_entropy(h, w, targets), (hidden, weight))


def test_without_gradients_the_value_is_the_same():
    hidden, weight, targets = draw(torch.float32)
    with torch.no_grad():
        assert ops.linear_cross_entropy(hidden, weight, targets) == ops.linear_cross_entropy(hidden, weight, targets)
        plain = ops.linear_cross_entropy(hidden, weight, targets)
    assert plain == ops.linear_cross_entropy(hidden, weight, targets).detach()


def test_huge_logits_do_not_overflow():
    hidden, weight = torch.full((2, 1), 100.0), torch.tensor([[1.0], [-1.0]])
    loss = ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(100.0)


def test_equal_logits_cost_ln_v():
    loss = ops.linear_cross_entropy(torch.zeros(3, D), torch.randn(V, D), torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(math.log(V))


def test_under_autocast_the_loss_stays_in_float32():
    hidden, weight, targets = draw(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact(hidden, weight, targets).item(), rel=1e-2)
    full = torch.autograd.grad(exact(hidden, weight, targets), (hidden, weight))
    for actual, wanted in zip((hidden.grad, weight.grad), full, strict=True):
        assert (actual - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_no_chunk_holds_more_than_it_may(monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_BYTES", 4 * V * 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight, targets = draw(torch.float32)
    with Watch():
        ops.linear_cross_entropy(hidden, weight, targets).backward()
    assert largest <= max(4 * V, V * D, M * D)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [2, 1000])
def test_with_the_bias_of_a_head(monkeypatch, dtype, tolerance, rows):
    monkeypatch.setattr(ops, "CHUNK_BYTES", 4 * V * rows)
    hidden, weight, targets = draw(dtype)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype).requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, targets, bias)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    h, w, b = (x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    logits = h @ w.t() + b
    expected = (logits.exp().sum(1).log() - logits[torch.arange(M), targets]).mean()
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for actual, wanted in zip(gradients, torch.autograd.grad(3 * expected, (h, w, b)), strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - wanted).abs().max() < tolerance * wanted.abs().max()
    assert ops.reference(hidden, weight, targets, bias).item() == pytest.approx(expected.item(), rel=1e-5)
