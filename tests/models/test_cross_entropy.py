"""The chunked cross-entropy against the plain one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from models.ops import cross_entropy as ops
from models.ops.kernels import load, numba_cross_entropy

M, D, V = 23, 6, 50
FORMS = {"torch": ops.linear_cross_entropy, "numba": load("numba").linear_cross_entropy}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def draw(dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (M, V))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (M,), generator=g)


def exact(hidden, weight, targets):
    """In float64 throughout, from the definition."""
    logits = hidden.double() @ weight.double().t()
    return (logits.exp().sum(1).log() - logits[torch.arange(len(targets)), targets]).mean()


@each_form
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 22, 23, 1000])
def test_value_and_gradients(monkeypatch, form, dtype, tolerance, rows):
    monkeypatch.setitem(ops.CHUNK_BYTES, "cpu", 4 * V * rows)
    hidden, weight, targets = draw(dtype)
    loss = form(hidden, weight, targets)
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


@each_form
def test_gradients_are_those_of_finite_differences(monkeypatch, form):
    monkeypatch.setitem(ops.CHUNK_BYTES, "cpu", 4 * 5 * 2)
    hidden, weight = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    targets = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda h, w: form(h, w, targets), (hidden, weight))


@each_form
def test_without_gradients_the_value_is_the_same(form):
    hidden, weight, targets = draw(torch.float32)
    with torch.no_grad():
        assert form(hidden, weight, targets) == form(hidden, weight, targets)
        plain = form(hidden, weight, targets)
    assert plain == form(hidden, weight, targets).detach()


@each_form
def test_without_gradients_only_the_logits_are_multiplied_out(form):
    """Validation runs on parameters that require gradients, under `no_grad`."""
    hidden, weight, targets = draw(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        form(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * M * D * V


@each_form
def test_huge_logits_do_not_overflow(form):
    hidden, weight = torch.full((2, 1), 100.0), torch.tensor([[1.0], [-1.0]])
    loss = form(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(100.0)


@each_form
def test_equal_logits_cost_ln_v(form):
    loss = form(torch.zeros(3, D), torch.randn(V, D), torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(math.log(V))


@each_form
def test_under_autocast_the_loss_stays_in_float32(form):
    hidden, weight, targets = draw(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = form(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact(hidden, weight, targets).item(), rel=1e-2)
    full = torch.autograd.grad(exact(hidden, weight, targets), (hidden, weight))
    for actual, wanted in zip((hidden.grad, weight.grad), full, strict=True):
        assert (actual - wanted).abs().max() < 0.02 * wanted.abs().max()


@each_form
def test_no_chunk_holds_more_than_it_may(monkeypatch, form):
    monkeypatch.setitem(ops.CHUNK_BYTES, "cpu", 4 * V * 4)
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
        form(hidden, weight, targets).backward()
    assert largest <= max(4 * V, V * D, M * D)


@each_form
@pytest.mark.parametrize("wrong", [-1, V])
def test_a_target_outside_the_vocabulary_is_refused(form, wrong):
    hidden, weight, targets = draw(torch.float32)
    targets[3] = wrong
    with pytest.raises((IndexError, RuntimeError), match=r"whole numbers from 0 to 49|out of bounds"):
        form(hidden, weight, targets)


@each_form
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_loss(form, bad):
    hidden, weight, targets = draw(torch.float32)
    with torch.no_grad():
        hidden[5, 2] = bad
    assert math.isnan(form(hidden, weight, targets).item())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5), entries=st.integers(1, 70), scale=st.floats(0, 300), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_the_compiled_pass_over_logits_is_the_plain_one(rows, entries, scale, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, entries, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(entries, (rows,), generator=g)
    loss, gradient = numba_cross_entropy.softmax_gradient(logits.clone(), targets)
    expected_loss, expected = ops.softmax_gradient(logits.double(), targets)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance, abs=tolerance)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance)


@each_form
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [2, 1000])
def test_with_the_bias_of_a_head(monkeypatch, form, dtype, tolerance, rows):
    monkeypatch.setitem(ops.CHUNK_BYTES, "cpu", 4 * V * rows)
    hidden, weight, targets = draw(dtype)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype).requires_grad_()
    loss = form(hidden, weight, targets, bias)
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


ON_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 10_000, 24_576])
def test_the_mean_over_rows_is_rounded_with_its_gradient_and_not_before(rows, dtype, device):
    """1 / rows in 16 bits is off by up to 0.2%, and so would be all gradients alike."""
    gradient = torch.randn(40, 9, generator=torch.Generator().manual_seed(rows)).to(device, dtype)
    scale = torch.ones((), device=device) / rows
    got = ops._scaled(gradient, scale)
    assert got.dtype == dtype
    assert torch.equal(got, (gradient.float() * (torch.ones(1, 1, device=device) / rows)).to(dtype))
