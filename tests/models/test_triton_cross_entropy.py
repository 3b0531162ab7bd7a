"""The loss of a head and its gradient by the Triton kernel, in the interpreter or on a GPU, against the definition.

m: rows   V: vocabulary
"""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import OURS, interpreted

from models.ops import cross_entropy

Pass = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# of the largest entry; a gradient in bfloat16 is rounded to 8 bits
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    yield from interpreted("cross_entropy")


def agrees(form: Pass, rows: int, V: int, scale: float, dtype: torch.dtype, device: str = "cpu") -> None:
    """Of logits that are columns of a wider matrix."""
    g = torch.Generator().manual_seed(rows * 1000 + V)
    logits = (scale * torch.randn(rows, V + 3, generator=g, dtype=torch.float64)).to(dtype)[:, :V]
    targets = torch.randint(0, V, (rows,), generator=g)
    logits[0, targets[0]] = 40 * scale  # one that is all but certain
    log_p = logits.double().log_softmax(1)
    expected = log_p.exp().scatter_add(1, targets[:, None], -torch.ones(rows, 1, dtype=torch.float64))
    written = torch.empty(rows, V + 3, dtype=dtype, device=device)[:, :V].copy_(logits)
    loss, gradient = form(written, targets.to(device))
    assert gradient.data_ptr() == written.data_ptr()
    assert gradient.dtype == dtype
    wanted = -log_p.gather(1, targets[:, None]).sum().item()
    assert abs(loss.item() - wanted) <= 2e-6 * (wanted + rows * (1 + scale))
    assert (gradient.double().cpu() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.oracle
@given(
    rows=st.integers(1, 4), V=st.integers(1, 40) | st.sampled_from([4095, 4096, 4097, 9000]),
    scale=st.sampled_from([0.0, 1.0, 30.0]), dtype=st.sampled_from(list(TOLERANCE)),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_interpreted_kernel_is_the_definition(kernels, rows, V, scale, dtype):
    agrees(kernels.softmax_gradient, rows, V, scale, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "V"), [(1, 7), (5, 4097)])
def test_the_plain_pass_is_the_definition(rows, V, dtype):
    def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = cross_entropy.softmax_gradient(logits.clone(), targets)
        return loss, logits.copy_(gradient)

    agrees(plain, rows, V, 1.0, dtype)


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(("rows", "V"), [(1, 7), (3000, 4097), (33, 50280)])
    def test_the_kernel_is_the_definition(self, rows, V, dtype):
        kernel = importlib.import_module(f"{OURS}cross_entropy").softmax_gradient
        agrees(kernel, rows, V, 1.0, dtype, "cuda")

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_a_head_in_chunks_is_the_whole_one(self, precision, monkeypatch):
        """Loss and both gradients, that of the weight summed in float32 over chunks. Of logits of about 1: those of 30
        are rounded in bfloat16 by up to 0.06, and a gradient then by more than is allowed here."""
        form = importlib.import_module("models.ops.kernels.cuda_form").linear_cross_entropy
        monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cuda", 4 * 501 * 100)
        g = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(270, 64, generator=g), torch.randn(501, 64, generator=g) / 8
        hidden, weight = (x.cuda().requires_grad_() for x in (hidden, weight))
        targets = torch.randint(0, 501, (270,), generator=g).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = form(hidden, weight, targets)
        loss.backward()
        h, w = (x.detach().cpu().double().requires_grad_() for x in (hidden, weight))
        expected = cross_entropy.reference(h, w, targets.cpu())
        expected.backward()
        tolerance = 1e-5 if precision == torch.float32 else 0.02
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        for found, exact in ((hidden.grad, h.grad), (weight.grad, w.grad)):
            assert (found.cpu().double() - exact).abs().max() < tolerance * exact.abs().max()
