"""The compiled gate of SwiGLU against its definition, in outputs and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops import swiglu as ops
from models.ops.kernels import load

compiled = load("numba").swiglu
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def draw(shape, seed=0, scale=3.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def differentiate(form, x):
    x = x.detach().clone().requires_grad_()
    y = form(x)
    (y * draw(y.shape, 9).to(x.dtype)).sum().backward()
    return y.detach(), x.grad


def check(x, dtype):
    x = x.to(dtype)
    for actual, expected in zip(differentiate(compiled, x), differentiate(ops.reference, x.double()), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        torch.testing.assert_close(
            actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * expected.abs().max().item()
        )


def test_the_reference_by_hand():
    y = ops.reference(torch.tensor([[2.0, -1.0, 3.0, 4.0]]))
    assert y[0].tolist() == pytest.approx([2 / (1 + math.exp(-2)) * 3, -1 / (1 + math.exp(1)) * 4])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2,), (1, 2), (17, 6), (2, 3, 34), (300, 500)], ids=str)  # the last on threads
def test_agrees_with_the_reference(dtype, shape):
    check(draw(shape), dtype)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-3, 30), st.integers(0, 2**31))
def test_agrees_at_any_shape_and_scale(rows, hidden, scale, seed):
    check(draw((rows, 2 * hidden), seed, scale), torch.float32)


@pytest.mark.parametrize("gate", [-80.0, -51.0, -20.3, -3.0, 0.0, 20.3, 80.0])
def test_a_lone_gate_however_far_from_zero(gate):
    check(torch.tensor([[gate, 3.0]], dtype=torch.float64), torch.float32)


def test_strided_input():
    x = draw((6, 5, 24))
    for view in (x.transpose(0, 1), x[:, ::2], x[..., ::2]):
        check(view, torch.float64)


def test_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(compiled, (draw((3, 2, 10), scale=1).requires_grad_(),))


def test_with_and_without_autograd_are_the_same_numbers():
    x = draw((40, 24)).float()
    whole = compiled(x)
    with torch.no_grad():
        assert torch.equal(compiled(x), whole)


def test_16_bit_is_computed_in_float32():
    x = draw((40, 24)).bfloat16()
    assert torch.equal(compiled(x), compiled(x.float()).bfloat16())


def test_saturated_gates_and_nan():
    x = torch.tensor([[200.0, -200.0, float("nan"), 1.0, 2.0, 3.0, 4.0, float("nan")]])
    y = compiled(x)[0]
    assert y[0].item() == 400
    assert abs(y[1].item()) < 1e-30
    assert y[2].isnan()
    assert y[3].isnan()
