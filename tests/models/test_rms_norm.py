"""Every form of RMSNorm against the readable one, in outputs and gradients."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.norm import LayerNorm, RMSNorm
from models.ops import rms_norm as ops
from models.ops.kernels import load, numba_gated_norm

FORMS = {"reference": ops.reference, "fused": ops.fused, "numba": load("numba").rms_norm}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
EPS = 1e-5
# one row, one column, more rows than a task of the compiled form holds, one axis only
SHAPES = [(1, 1), (7,), (2, 3, 8), (33, 5), (5, 13, 64), (2, 0, 4)]
fast = pytest.mark.parametrize("form", ["fused", "numba"])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def draw(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return x, torch.randn(shape[-1], generator=generator, dtype=torch.float64)


def gradient(shape: torch.Size) -> Tensor:
    """That of the output."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def differentiate(form, x: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    y = form(x, weight, EPS)
    y.backward(gradient(y.shape).to(dtype))
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


def check(form, x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    expected = differentiate(ops.reference, x, weight, torch.float64)
    # the gradient of x is a difference of two terms, which cancel in narrow rows: errors are relative to the terms
    terms = weight.abs() * 4 * x.square().mean(-1, keepdim=True).add(EPS).rsqrt()
    scales = [expected[0].abs(), torch.maximum(expected[1].abs(), terms), expected[2].abs()]
    for what, got, exact, scale in zip(
        ("y", "x", "weight"), differentiate(form, x, weight, dtype), expected, scales, strict=True
    ):
        assert got.dtype == dtype
        assert got.shape == exact.shape
        if exact.numel():
            assert (got.double() - exact).abs().max() <= TOLERANCE[dtype] * scale.max(), what


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_unit_mean_square_and_keeps_its_direction(form):
    x, _ = draw((4, 32), scale=10)
    y = FORMS[form](x, torch.ones(32, dtype=torch.float64), 0.0)
    torch.testing.assert_close(y.square().mean(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(y / y.norm(dim=1, keepdim=True), x / x.norm(dim=1, keepdim=True))


@fast
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(form, dtype, shape):
    check(FORMS[form], *draw(shape), dtype)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 40), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_the_compiled_form_agrees_at_any_shape_and_scale(rows, width, scale, seed):
    x, weight = draw((rows, width), seed, scale)
    terms = gradient(x.shape) * ops.reference(x, torch.ones_like(weight), EPS)
    # the bound is relative to the largest sum over rows: draws in which all of these sums cancel say nothing
    assume(terms.sum(0).abs().max() > 0.05 * terms.abs().sum(0).max())
    check(FORMS["numba"], x, weight, torch.float32)


@fast
def test_strided_input(form):
    x, weight = draw((6, 5, 12))
    for view in (x.transpose(0, 1), x[:, ::2], x[..., ::3]):
        part = weight[: view.shape[-1]]
        check(FORMS[form], view, part, torch.float64)


def test_gradients_by_finite_differences():
    x, weight = (t.requires_grad_() for t in draw((3, 4, 5)))
    torch.autograd.gradcheck(lambda x, weight: FORMS["numba"](x, weight, EPS), (x, weight))


def test_with_and_without_autograd_are_the_same_numbers():
    x, weight = (t.float() for t in draw((40, 24)))
    whole = FORMS["numba"](x, weight, EPS)
    with torch.no_grad():
        assert torch.equal(FORMS["numba"](x, weight, EPS), whole)


def test_bfloat16_is_computed_in_float32():
    x, weight = (t.bfloat16() for t in draw((40, 24)))
    y = FORMS["numba"](x, weight, EPS)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.reference(x.float(), weight.float(), EPS).bfloat16())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_two_types_are_brought_to_the_wider_one(types):
    """torch has no kernel for two, and warns of that: rows of what autocast gave under a weight in float32."""
    given = [m.to(dtype).requires_grad_() for m, dtype in zip(draw((40, 24)), types, strict=True)]
    y = ops.fused(*given, EPS)
    assert y.dtype == types[0]
    y.backward(gradient(y.shape).to(y))
    assert [m.grad.dtype for m in given] == list(types)
    wide = [m.detach().float().requires_grad_() for m in given]
    expected = ops.reference(*wide, EPS)
    expected.backward(gradient(y.shape).to(y).float())
    for ours, theirs in ((y, expected), *((m.grad, w.grad) for m, w in zip(given, wide, strict=True))):
        assert (ours.float() - theirs).abs().max() <= (
            2**-8 if ours.dtype == torch.bfloat16 else 2e-6
        ) * theirs.abs().max()


def test_zeros_stay_zeros():
    for form in FORMS.values():
        assert torch.equal(form(torch.zeros(2, 8), torch.ones(8), EPS), torch.zeros(2, 8))


@pytest.mark.parametrize(("backend", "form"), [("reference", ops.reference), ("auto", FORMS["numba"])])
def test_the_module_takes_the_form_of_its_model(backend, form):
    with torch.device("meta"):
        norm = RMSNorm(24, EPS, backend, torch.device("cpu"))
    norm.to_empty(device="cpu")
    norm.reset_parameters()
    x, _ = draw((40, 24))
    assert torch.equal(norm(x.float()), form(x.float(), torch.ones(24), EPS))


def gated_by_hand(y, z, weight, groups):
    out = torch.empty_like(y)
    width = y.shape[-1] // groups
    for row, (a, b) in enumerate(zip(y, z, strict=True)):
        a = a * b / (1 + torch.exp(-b))
        for g in range(groups):
            part = slice(g * width, (g + 1) * width)
            out[row, part] = a[part] / (a[part].square().mean() + EPS).sqrt() * weight[part]
    return out


GATED = {name: load(name).gated_rms_norm for name in ("reference", "torch", "numba")}
each_gated = pytest.mark.parametrize("form", GATED)


@each_gated
@pytest.mark.parametrize("groups", [1, 2, 3, 12])
def test_the_gated_norm_is_over_each_group(form, groups):
    (y, weight), (z, _) = draw((7, 12)), draw((7, 12), 1, 2.0)
    torch.testing.assert_close(
        GATED[form](y, z, weight, EPS, groups), gated_by_hand(y, z, weight, groups), rtol=1e-10, atol=1e-12
    )


def differentiate_gated(form, inputs, dtype, groups):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = GATED[form](*leaves, EPS, groups)
    along = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    return [out.detach(), *torch.autograd.grad((out * along).sum(), leaves)]


# one row, a row of one, more rows than a task holds, more axes
@pytest.mark.parametrize("form", ["torch", "numba"])
@each_dtype
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 4), 1), ((6, 2), 2), ((70, 24), 3), ((2, 40, 12), 1), ((2, 5, 12), 4)]
)
def test_the_gated_norm_agrees_with_the_reference(form, dtype, shape, groups):
    (y, weight), (z, _) = draw(shape), draw(shape, 1, 3.0)
    expected = differentiate_gated("reference", (y, z, weight), torch.float64, groups)
    for got, exact in zip(differentiate_gated(form, (y, z, weight), dtype, groups), expected, strict=True):
        assert got.dtype == dtype
        assert got.shape == exact.shape
        assert (got.double() - exact).abs().max() <= 2 * TOLERANCE[dtype] * exact.abs().max().clamp_min(1)


@each_gated
@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_of_the_gated_norm_are_those_of_finite_differences(form, groups):
    (y, weight), (z, _) = draw((2, 6)), draw((2, 6), 1)
    leaves = [x.requires_grad_() for x in (y, z, weight)]
    assert torch.autograd.gradcheck(lambda y, z, w: GATED[form](y, z, w, EPS, groups), leaves)


def test_the_compiled_gated_norm_is_well_formed_in_any_layout_and_without_autograd():
    (y, weight), (z, _) = draw((3, 40, 12)), draw((3, 40, 12), 1)
    torch.library.opcheck(numba_gated_norm._norm, (y.requires_grad_(), z.requires_grad_(), weight, EPS, 3))
    expected = GATED["reference"](y, z, weight, EPS, 3)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (y, z)]
    wide = torch.cat([y, z], -1).detach().split(12, -1)  # as a projection gives them
    for inputs in ((y, z), strided, wide):
        torch.testing.assert_close(GATED["numba"](*inputs, weight, EPS, 3), expected, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(GATED["numba"](*inputs, weight, EPS, 3), expected, rtol=1e-10, atol=1e-12)


def test_the_compiled_gated_norm_computes_16_bit_in_float32():
    (y, weight), (z, _) = draw((40, 12)), draw((40, 12), 1)
    y, z, weight = (x.bfloat16() for x in (y, z, weight))
    out = GATED["numba"](y, z, weight, EPS, 2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, GATED["numba"](y.float(), z.float(), weight.float(), EPS, 2).bfloat16())


def test_the_number_of_threads_changes_no_bit_of_the_gated_norm():
    inputs, before, results = (draw((700, 24))[0], draw((700, 24), 1)[0], draw((1, 24))[1]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(differentiate_gated("numba", inputs, torch.float32, 2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, again) for first, again in zip(results[0], other, strict=True))


def test_layer_norm_by_hand():
    norm = LayerNorm(12, EPS, "auto", torch.device("cpu"))
    with torch.no_grad():
        norm.reset_parameters(0.5)
        assert norm.weight.tolist() == [0.5] * 12
        assert norm.bias.tolist() == [0] * 12
        norm.bias += 3
    x = draw((5, 12), scale=4)[0].float() + 7
    y = norm(x)
    torch.testing.assert_close(y.mean(1), torch.full((5,), 3.0))
    centred = x - x.mean(1, keepdim=True)
    expected = 0.5 * centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt() + 3
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
