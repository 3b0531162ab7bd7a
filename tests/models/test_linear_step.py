"""The products of a decode step, compiled, against torch's."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.kernels import load, numba_linear
from models.ops.swiglu import step_reference

form = load("numba")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE[actual.dtype] * expected.abs().max().clamp_min(1)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6), D=st.integers(1, 70), O=st.integers(1, 70), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 9),
)  # fmt: skip
def test_is_a_linear_map(rows: int, D: int, O: int, bias: bool, dtype: torch.dtype, seed: int):
    g = torch.Generator().manual_seed(seed)
    x, weight, offset = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((rows, D), (O, D), (O,)))
    with torch.no_grad():
        near(form.linear_step(x, weight, offset if bias else None), F.linear(x, weight, offset if bias else None))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6), D=st.integers(1, 40), hidden=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 9),
)  # fmt: skip
def test_is_the_feed_forward_layer(rows: int, D: int, hidden: int, dtype: torch.dtype, seed: int):
    g = torch.Generator().manual_seed(seed)
    x, gate_up, down = (torch.randn(*s, generator=g, dtype=dtype) for s in ((rows, D), (2 * hidden, D), (D, hidden)))
    with torch.no_grad():
        near(form.swiglu_step(x, gate_up, down), step_reference(x, gate_up, down))


def test_what_the_kernels_do_not_take_goes_to_torch():
    x, gate_up, down = torch.randn(1, 8), torch.randn(12, 8), torch.randn(8, 6)
    with torch.no_grad():
        wide = torch.randn(1, 16)[:, ::2]
        assert torch.equal(form.linear_step(wide, gate_up), F.linear(wide, gate_up))
        text = torch.randn(1, 3, 8)
        assert torch.equal(form.linear_step(text, gate_up), F.linear(text, gate_up))
        many = torch.randn(numba_linear.FEW_ROWS + 1, 8)
        assert torch.equal(form.linear_step(many, gate_up), F.linear(many, gate_up))
        small = [m.bfloat16() for m in (x, gate_up, down)]
        assert torch.equal(form.linear_step(*small[:2]), F.linear(*small[:2]))
        assert form.swiglu_step(*small).dtype is torch.bfloat16
    weight = gate_up.requires_grad_()
    form.linear_step(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.expand(12, 8))
    down.requires_grad_()
    form.swiglu_step(x, gate_up, down).sum().backward()
    assert down.grad is not None
