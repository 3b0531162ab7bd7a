"""Every form of RMSNorm against the readable one, in outputs and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import AttentionConfig, ModelConfig
from models.norm import RMSNorm
from models.ops import rms_norm as ops
from models.ops.kernels import load

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


def differentiate(form, x: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    y = form(x, weight, EPS)
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    (y * along).sum().backward()
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
    check(FORMS["numba"], *draw((rows, width), seed, scale), torch.float32)


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


def test_zeros_stay_zeros():
    for form in FORMS.values():
        assert torch.equal(form(torch.zeros(2, 8), torch.ones(8), EPS), torch.zeros(2, 8))


@pytest.mark.parametrize(("backend", "form"), [("reference", ops.reference), ("auto", FORMS["numba"])])
def test_the_module_takes_the_form_of_its_model(backend, form):
    config = ModelConfig(vocabulary=8, width=24, layers=1, mixer=AttentionConfig(heads=2, backend=backend))
    with torch.device("meta"):
        norm = RMSNorm(config, torch.device("cpu"))
    norm.to_empty(device="cpu")
    norm.reset_parameters()
    x, _ = draw((40, 24))
    assert torch.equal(norm(x.float()), form(x.float(), torch.ones(24), config.norm_eps))
