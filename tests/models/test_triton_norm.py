"""A sum and its RMSNorm by the Triton kernel, in the interpreter or on a GPU, against the definition.

D: width
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

from models.ops import rms_norm

OfSum = Callable[[Tensor, Tensor | None, Tensor, float, torch.dtype, bool], tuple[Tensor, Tensor]]
EPS = 1e-5
# of the largest term: a few roundings of the type
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
F32, BF16 = torch.float32, torch.bfloat16
AUTOCAST = (F32, BF16, F32, BF16)  # x, branch, weight and what reads the norm
PROCESSORS = 2  # of four programs each, so that some take several rows
on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    yield from interpreted("norm", PROCESSORS)


def outcome(form: OfSum, given: list[Tensor], of_outputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Sum, norm, and the gradients of x, branch and weight, for these gradients of sum and norm: zero where an output
    is not used, or the gradient does not reach."""
    leaves = [m.detach().requires_grad_() for m in given]
    outputs = form(*leaves, EPS, dtype, True)
    used = [(y, d.to(y.dtype)) for y, d in zip(outputs, of_outputs, strict=True) if d is not None]
    gradients = torch.autograd.grad([y for y, _ in used], leaves, [d for _, d in used], materialize_grads=True)
    return [*(y.detach() for y in outputs), *gradients]


def definition(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, own: bool
) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, rms_norm.reference(total, weight, eps)


def overwrites(form: OfSum, given: list[Tensor], found: list[Tensor], dtype: torch.dtype, own: bool) -> None:
    """What no gradient needs gives way to the results where these have its type and layout, and nothing else does."""
    x, branch = (m.clone() for m in given[:2])
    weight = given[2].clone().requires_grad_()
    with torch.no_grad():
        total, normed = form(x, branch, weight, EPS, dtype, own)
    assert torch.equal(total, found[0])
    assert torch.equal(normed, found[1])
    over_x = own and x.dtype == total.dtype and x.is_contiguous()
    over_branch = branch.dtype == dtype and branch.is_contiguous()
    assert (total.data_ptr() == x.data_ptr(), normed.data_ptr() == branch.data_ptr()) == (over_x, over_branch)
    assert over_x or torch.equal(x, given[0])
    assert over_branch or torch.equal(branch, given[1])
    assert torch.equal(weight, given[2])


def agrees(
    form: OfSum, shape: tuple[int, ...], types: tuple[torch.dtype, ...], used: tuple[bool, bool], scale: float = 1.0,
    device: str = "cpu", laid: str = "branch",
) -> None:  # fmt: skip
    """used: whether the sum has a gradient, and its norm. Gradients are laid out with the first axis innermost, and so
    is what `laid` names."""
    g = torch.Generator().manual_seed(sum(shape))
    x, branch, *of_outputs = (scale * torch.randn(shape, generator=g) for _ in range(4))
    weight = 1 + torch.randn(shape[-1], generator=g) / 4
    of_outputs = [m.transpose(0, -1).contiguous().transpose(0, -1) for m in of_outputs]
    if laid == "branch":
        branch = branch.transpose(0, -1).contiguous().transpose(0, -1)
    elif laid == "x":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    given = [m.to(device, dtype) for m, dtype in zip((x, branch, weight), types, strict=False)]
    total = torch.promote_types(*types[:2])
    weights = [m.to(device, dtype) if is_used else None
               for m, dtype, is_used in zip(of_outputs, (total, types[3]), used, strict=True)]  # fmt: skip
    found = outcome(form, given, weights, types[3])
    wide = [None if m is None else m.double() for m in weights]
    expected = outcome(definition, [m.double() for m in given], wide, torch.float64)

    assert [m.dtype for m in found] == [total, types[3], *types[:3]]
    for own in (False, True):
        overwrites(form, given, found, types[3], own)
    normed = rms_norm.reference(found[0].double(), given[2].double(), EPS)  # of the sum as it is rounded
    assert (found[1].double() - normed).abs().max() <= TOLERANCE[types[3]] * normed.abs().max()
    # the gradient of a sum is a difference of two terms, which cancel in narrow rows
    terms = (weight.abs().max() / (expected[0].square().mean(-1) + EPS).sqrt().min()) * scale * 4
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == theirs.shape
        size = (
            torch.maximum(theirs.abs().max(), terms.to(theirs)) if i in (2, 3) else theirs.abs().max().clamp_min(scale)
        )
        assert (ours.double() - theirs).abs().max() <= max(TOLERANCE[ours.dtype], TOLERANCE[total]) * size


@pytest.mark.oracle
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 3, 31, 64, 65, 200]))
    | st.sampled_from([(9, 24), (2, 4096), (40, 3)]),
    types=st.sampled_from([AUTOCAST, (F32,) * 4, (BF16,) * 4, (torch.float16,) * 4, (F32, torch.float16, F32, F32),
                           (BF16, F32, BF16, F32), (BF16, BF16, BF16, F32)]),
    used=st.sampled_from([(True, True), (False, True), (True, False)]), scale=st.sampled_from([1e-3, 1.0, 30.0]),
    laid=st.sampled_from(["x", "branch", "neither"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_interpreted_kernel_is_the_definition(kernels, shape, types, used, scale, laid):
    agrees(kernels.of_sum, shape, types, used, scale, laid=laid)


@pytest.mark.oracle
@pytest.mark.parametrize("which", range(3))
def test_one_of_three_may_be_what_learns(kernels, which):
    """Of x, branch and weight; where none does, with gradients enabled too, what was read gives way."""
    given = [torch.randn(3, 8), torch.randn(3, 8), torch.rand(8) + 0.5]
    expected = definition(*given, EPS, F32, True)
    given[which].requires_grad_()
    learned = given[which].detach().double().requires_grad_()
    wide = [learned if at == which else m.double() for at, m in enumerate(given)]
    gradients = []
    for form, leaves in ((kernels.of_sum, given), (definition, wide)):
        total, normed = form(*leaves, EPS, F32, True)
        gradients.append(torch.autograd.grad((total * normed).sum(), leaves[which])[0].double())
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[1].abs().max()
    x, branch, weight = (m.detach() for m in given)
    total, normed = kernels.of_sum(x, branch, weight, EPS, F32, True)
    assert (total.data_ptr(), normed.data_ptr()) == (x.data_ptr(), branch.data_ptr())
    torch.testing.assert_close((total, normed), expected)


def agrees_alone(
    form: OfSum, shape: tuple[int, ...], types: tuple[torch.dtype, ...], used: tuple[bool, bool], device: str = "cpu"
) -> None:
    """Of x without a branch: as with a branch of zeros, and x itself is the sum. types: of x, weight and the norm."""
    g = torch.Generator().manual_seed(sum(shape))
    x, *of_outputs = (torch.randn(shape, generator=g).transpose(0, -1).contiguous().transpose(0, -1) for _ in range(3))
    weight = 1 + torch.randn(shape[-1], generator=g) / 4
    x, weight = (m.to(device, dtype) for m, dtype in zip((x, weight), types, strict=False))
    of_outputs = [d.to(device, dtype) for d, dtype in zip(of_outputs, (types[0], types[2]), strict=True)]
    found = []
    for branch in (None, torch.zeros_like(x)):
        leaves = [m.detach().clone().requires_grad_() for m in (x, weight)]
        total, normed = form(leaves[0], branch, leaves[1], EPS, types[2], False)
        wanted = [(y, d) for y, d, is_used in zip((total, normed), of_outputs, used, strict=True) if is_used]
        gradients = torch.autograd.grad([y for y, _ in wanted], leaves, [d for _, d in wanted], materialize_grads=True)
        found.append([total.detach(), normed.detach(), *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    kept = x.clone()
    with torch.no_grad():
        total, normed = form(x, None, weight, EPS, types[2], True)
    assert total is x
    assert torch.equal(x, kept)
    assert torch.equal(normed, found[0][1])


@pytest.mark.oracle
@pytest.mark.parametrize("types", [(F32, F32, BF16), (F32,) * 3, (BF16,) * 3, (BF16, F32, BF16)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 31), (9, 24), (3, 200)])
@pytest.mark.parametrize("used", [(True, True), (False, True), (True, False)])
def test_a_stream_without_a_branch_is_its_own_sum(kernels, shape, types, used):
    agrees_alone(kernels.of_sum, shape, types, used)


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("types", [AUTOCAST, (F32,) * 4, (BF16,) * 4], ids=["autocast", "float32", "bfloat16"])
    @pytest.mark.parametrize("shape", [(1, 1), (2, 37, 200), (8, 300, 768), (3, 8192)])
    @pytest.mark.parametrize("used", [(True, True), (False, True), (True, False)])
    def test_the_kernel_is_the_definition(self, shape, types, used):
        agrees(importlib.import_module(f"{OURS}norm").of_sum, shape, types, used, device="cuda")

    @pytest.mark.parametrize("types", [(F32, F32, BF16), (F32,) * 3, (BF16,) * 3])
    @pytest.mark.parametrize("shape", [(1, 1), (2, 37, 200), (8, 300, 768)])
    @pytest.mark.parametrize("used", [(True, True), (False, True), (True, False)])
    def test_a_stream_without_a_branch_is_its_own_sum(self, shape, types, used):
        agrees_alone(importlib.import_module(f"{OURS}norm").of_sum, shape, types, used, device="cuda")
