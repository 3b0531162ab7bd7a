"""Every form of the causal convolution against the readable one and against torch's own convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops import causal_conv1d as ops
from models.ops.kernels import load, numba_conv

FORMS = {"reference": ops.reference, "numba": load("numba").causal_conv1d}
SHAPES = [(1, 1, 1, 1), (2, 1, 65, 4), (2, 2, 70, 4), (1, 3, 64, 4), (3, 33, 130, 4), (2, 7, 5, 2), (2, 9, 3, 6)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def draw(rows, T, E, W, dtype=torch.float64, *, before=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, T, E), (E, W), (E,), (rows, E, W)]
    x, weight, bias, past = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x, weight, bias, past if before else None]


def differentiate(form, inputs, dtype):
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    y = form(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (y * weights.to(dtype)).sum().backward()
    return [y.detach(), *(None if x is None else x.grad for x in leaves)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("before", [True, False], ids=["continued", "fresh"])
def test_agrees_with_the_reference(dtype, shape, before):
    inputs = draw(*shape, dtype=dtype, before=before)
    actual = differentiate(FORMS["numba"], inputs, dtype)
    expected = differentiate(ops.reference, inputs, torch.float64)
    for what, got, exact in zip(("y", "x", "weight", "bias", "before"), actual, expected, strict=True):
        assert (got is None) == (exact is None), what
        if exact is None:
            continue
        assert got.dtype == dtype
        scale = exact.abs().max().clamp_min(1e-30)
        assert (got.double() - exact).abs().max() / scale < TOLERANCE[dtype], what


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_a_depthwise_convolution_with_silu(form, shape):
    x, weight, bias, _ = draw(*shape)
    W = weight.shape[1]
    expected = F.conv1d(F.pad(x.transpose(1, 2), (W - 1, 0)), weight[:, None], bias, groups=x.shape[2])
    torch.testing.assert_close(FORMS[form](x, weight, bias), F.silu(expected).transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 6, 2, 3)], ids=str)
def test_gradients_are_those_of_finite_differences(form, shape):
    assert torch.autograd.gradcheck(FORMS[form], [x.requires_grad_() for x in draw(*shape)])


def test_the_compiled_operator_is_well_formed():
    torch.library.opcheck(numba_conv.conv, tuple(x.requires_grad_() for x in draw(2, 5, 3, 4)))
    torch.library.opcheck(numba_conv.conv, (*(x.requires_grad_() for x in draw(2, 5, 3, 4)[:3]), None))


@pytest.mark.parametrize("form", FORMS)
@given(T=st.integers(2, 20), W=st.integers(1, 6), data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_sequence_may_be_split_anywhere(form, T, W, data):
    t = data.draw(st.integers(1, T - 1))
    x, weight, bias, before = draw(2, T, 5, W, seed=T)
    between = ops.last_inputs(x[:, :t], W, before)
    parts = [FORMS[form](x[:, :t], weight, bias, before), FORMS[form](x[:, t:], weight, bias, between)]
    torch.testing.assert_close(torch.cat(parts, 1), FORMS[form](x, weight, bias, before), rtol=1e-12, atol=1e-12)
    whole = torch.cat([before.transpose(1, 2), x], 1)[:, -W:].transpose(1, 2)
    assert torch.equal(ops.last_inputs(x[:, t:], W, between), whole)
    assert torch.equal(ops.last_inputs(x, W, before), whole)


@each_dtype
def test_steps_are_the_forward(dtype):
    x, weight, bias, state = draw(2, 7, 66, 4, dtype)
    expected, last = ops.reference(x, weight, bias, state), ops.last_inputs(x, 4, state)
    for t in range(7):
        y = ops.step_reference(x[:, t], weight, bias, state)
        torch.testing.assert_close(y, expected[:, t], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(state, last)


@pytest.mark.parametrize("form", FORMS)
@each_dtype
def test_nan_reaches_its_window_and_no_further(form, dtype):
    x, weight, bias, before = draw(2, 9, 3, 4, dtype)
    x[1, 3, 2] = float("nan")
    poisoned = torch.zeros(2, 9, 3, dtype=torch.bool)
    poisoned[1, 3:7, 2] = True
    assert torch.equal(FORMS[form](x, weight, bias, before).isnan(), poisoned)


def test_the_number_of_threads_changes_no_bit():
    inputs, before, results = draw(3, 19, 200, 4, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(differentiate(FORMS["numba"], inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)
