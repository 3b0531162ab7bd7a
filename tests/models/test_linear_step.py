"""The products of a decode step, compiled, against torch's."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.kernels import load, numba_linear
from models.ops.projections import added

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
    name=st.sampled_from(["reference", "torch", "numba"]), rows=st.integers(1, 6), D=st.integers(1, 40),
    E=st.integers(1, 40), bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_the_last_of_a_branch_is_added(name: str, rows: int, D: int, E: int, bias: bool, dtype: torch.dtype, seed: int):
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, D), (rows, E), (D, E), (D,))
    x, y, weight, offset = (torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes)
    given = (y, weight, offset if bias else None)
    expected = added(x, *given)
    near(expected, x + (y[:, None] * weight).sum(-1) + (offset if bias else 0))
    with torch.no_grad():
        near(load(name).residual_step(x.clone(), *given), expected)


def test_what_is_added_in_place_is_only_where_nothing_else_may_need_it():
    torch_form = load("torch")
    x, y, weight, bias = torch.randn(2, 3), torch.randn(2, 5), torch.randn(3, 5), torch.randn(3)
    before = x.clone()
    expected = added(x, y, weight)
    for kept in ((y.double(), weight.double()), (y, weight, bias)):
        with torch.no_grad():
            torch_form.residual_step(x, *kept)
        assert torch.equal(x, before)
    leaf = x.clone().requires_grad_()
    torch_form.residual_step(leaf * 1, y, weight).square().sum().backward()
    near(leaf.grad, 2 * expected)
    with torch.no_grad():
        assert torch_form.residual_step(x, y, weight) is x
    near(x, expected)


def test_what_the_kernels_do_not_take_goes_to_torch():
    x, gate_up = torch.randn(1, 8), torch.randn(12, 8)
    with torch.no_grad():
        wide = torch.randn(1, 16)[:, ::2]
        assert torch.equal(form.linear_step(wide, gate_up), F.linear(wide, gate_up))
        text = torch.randn(1, 3, 8)
        assert torch.equal(form.linear_step(text, gate_up), F.linear(text, gate_up))
        many = torch.randn(numba_linear.FEW_ROWS + 1, 8)
        assert torch.equal(form.linear_step(many, gate_up), F.linear(many, gate_up))
        small = x.bfloat16(), gate_up.bfloat16()
        assert torch.equal(form.linear_step(*small), F.linear(*small))
    weight = gate_up.requires_grad_()
    form.linear_step(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.expand(12, 8))
