"""What is predicted to be allocated, against what real tensors allocate."""

import pytest
import torch
from torch import Tensor

from models import cost, replay
from models.language_model import LanguageModel
from models.ops.cross_entropy import linear_cross_entropy
from models.ops.kernels import without_data
from models.presets import preset
from models.replay import Allocations

FAMILIES = ("transformer", "sliding", "mamba", "mamba2", "mamba3", "hybrid", "moe")
B, T = 2, 40


def test_allocations_by_hand():
    outside = torch.zeros(500)
    with Allocations() as seen:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        b.mul_(2)  # in place
        part = a[10:20]  # a view
        del a  # its memory lives on in the view
        assert (seen.live, seen.peak) == (8000, 8000)
        outside.add_(1)  # made before
        del part
        assert (seen.live, seen.peak) == (4000, 8000)
        c = torch.cat([b, b])  # 4000 + 8000
        del b, c
        assert (seen.live, seen.peak) == (0, 12000)


def kept_by_autograd(model: LanguageModel, tokens: Tensor) -> int:
    """Storages that the forward pass keeps, each once, without those of parameters."""
    seen, total = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

    def see(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        hidden = model.hidden(tokens)
        loss = linear_cross_entropy(hidden.x.flatten(0, 1), model.head.weight, tokens.flatten(), model.head.bias)
        (loss + sum(used.balance for used in hidden.routing)).backward()
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_autograd_keeps(family: str):
    config = preset(f"{family}-tiny")
    model = LanguageModel(config, seed=0)
    tokens = torch.randint(0, config.vocabulary, (B, T), generator=torch.Generator().manual_seed(0))
    predicted = replay.training(config, B, T)
    # loads of experts are predicted as even; everything else differs by scalars only
    assert predicted.activations == pytest.approx(
        kept_by_autograd(model, tokens), rel=0.03 if family == "moe" else 0.01
    )
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert predicted.gradients == pytest.approx(gradients, rel=1e-3)
    assert predicted.peak >= max(predicted.activations, predicted.gradients)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "moe"])
def test_the_peak_of_prefill_is_that_of_real_tensors(family: str):
    config = preset(f"{family}-tiny")
    model = LanguageModel(config, seed=0).eval().requires_grad_(False)
    tokens = torch.zeros(B, T, dtype=torch.int64)
    model.prefill(tokens, model.make_state(B, T))
    with Allocations() as seen:
        model.prefill(tokens, model.make_state(B, T))
    predicted = replay.prefill(config, B, T)
    assert predicted == seen.peak
    assert predicted > cost.state_bytes(config, B, T, 4)


def test_the_scan_without_data_returns_what_the_kernels_do():
    """Of the types and shapes in the source of `selective_scan_cuda`; on a GPU: tests/cuda/test_paths.py."""
    u, delta, z = (torch.empty(2, 4097, 6, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(3))
    A, D = torch.empty(6, 3, device="meta"), torch.empty(6, device="meta")
    B, C = (torch.empty(2, 1, 3, 4097, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out, states, gated = without_data.scan(u, delta, A, B, C, D, z, D, True)
    assert (states.shape, states.dtype) == ((2, 6, 3, 6), torch.float32)
    for made in (out, gated):
        assert (made.shape, made.dtype, made.stride()) == (delta.shape, delta.dtype, delta.stride())
    assert len(without_data.scan(u, delta, A, B, C, D, None, D, True)) == 2
    given = (u, delta, A, B, C, D, D, z)
    gradients = without_data.scan_backward(u, delta, A, B, C, D, z, D, out, states, out, None, True, False)
    for gradient, x in zip(gradients, given, strict=True):
        assert gradient is not None
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
    assert without_data.scan_backward(u, delta, A, B, C, None, None, None, out)[5:] == [None, None]


def test_what_is_replaced_for_a_replay_is_put_back():
    class Owner:
        kernel = "its own"

    def fail() -> None:
        with without_data._in_place_of(Owner, "kernel", "shapes"):
            raise ValueError(Owner.kernel)

    with pytest.raises(ValueError, match="shapes"):
        fail()
    assert Owner.kernel == "its own"


def test_what_cannot_be_predicted_says_so():
    assert "workspace" in (replay.unpredictable(preset("lstm-tiny")) or "")
    assert replay.unpredictable(preset("mamba-tiny")) is None


def test_memory_grows_with_what_it_should():
    config = preset("transformer-tiny")
    once, twice = (replay.training(config, 1, T) for T in (256, 512))
    assert 1.6 < twice.activations / once.activations < 2.1
    assert once.gradients == twice.gradients
    assert replay.prefill(config, 2, 256) > 1.6 * replay.prefill(config, 1, 256)


def test_nothing_without_data_stays_behind():
    config = preset("transformer-tiny")
    replay.prefill(config, 1, 16)
    model = LanguageModel(config, seed=0)
    assert torch.isfinite(model(torch.zeros(1, 16, dtype=torch.int64))).all()
