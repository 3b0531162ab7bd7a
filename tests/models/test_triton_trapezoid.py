"""One token of Mamba-3 in one kernel, in Triton's interpreter, against the definition in float64.

B: batch   H: heads   P: head width   G: groups of heads   N: state size   S: rotated pairs
"""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import interpreted

from models.ops import trapezoid

# of the largest entry, or of 1; bfloat16 has 8 bits of significand, and rounds B' and C' too
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
FLOOR = 1e-4


@pytest.fixture(scope="module")
def kernel() -> Iterator[ModuleType]:
    yield from interpreted("trapezoid")


def draw(
    B: int, H: int, P: int, G: int, N: int, S: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Any], trapezoid.State]:
    """x, z, dt, a, trap and angle are columns of one matrix, as the projection leaves them."""
    g = torch.Generator().manual_seed(B + 10 * H + 100 * P + 1000 * S)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, of)

    columns = normal(B, 2 * H * P + 3 * H + S)
    z, x, dt, a, trap, angle = columns.split([H * P, H * P, H, H, H, S], 1)
    inputs = {
        "x": x.unflatten(1, (H, P)), "dt": dt, "a": a, "trap": trap, "angle": angle, "B": normal(B, 1, G, N),
        "C": normal(B, 1, G, N), "z": z.unflatten(1, (H, P)), "D": normal(H, of=torch.float32),
        "dt_bias": normal(H, of=torch.float32) * 3 - 4, "B_bias": normal(1, H, N, of=torch.float32),
        "C_bias": normal(1, H, N, of=torch.float32),
    }  # fmt: skip
    theta = normal(B, H, S, of=torch.float32).remainder(2 * math.pi)
    return inputs, trapezoid.State(theta, normal(B, H, P, N, of=torch.float32), normal(B, 1, H, N), normal(B, H, P))


def agrees(form: Any, inputs: dict[str, Any], state: trapezoid.State, tokens: int = 2) -> None:
    """Token by token, both from the state that the kernel left."""
    dtype = inputs["x"].dtype
    exact = {name: value if value is None else value.double() for name, value in inputs.items()}
    for _ in range(tokens):
        expected, after = trapezoid.step(**exact, A_floor=FLOOR, state=trapezoid.State(*(m.double() for m in state)))
        where = [m.data_ptr() for m in state]
        y, state = form(**inputs, A_floor=FLOOR, state=state)
        assert (y.dtype, y.shape) == (dtype, inputs["x"].shape)
        assert [m.data_ptr() for m in state] == where
        pairs = {
            "y": (y, expected), "h": (state.ssm, after.ssm), "B": (state.previous_B, after.previous_B),
            "x": (state.previous_x, after.previous_x), "cos": (state.angle.cos(), after.angle.cos()),
            "sin": (state.angle.sin(), after.angle.sin()),
        }  # fmt: skip
        for name, (found, wanted) in pairs.items():
            # angles are in float32, which leaves less of some turns
            limit = TOLERANCE[dtype if name in ("y", "h", "B") else torch.float32]
            assert found.shape == wanted.shape
            worst = (found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1)
            assert worst < limit, (name, worst)
        assert state.angle.min() >= 0
        assert state.angle.max() <= 2 * math.pi + 1e-5


SIZES = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 2, 3]), st.sampled_from([1, 6, 64]), st.integers(1, 2),
    st.sampled_from([(16, 4), (16, 8), (128, 32), (6, 1), (2, 1)]),
)  # fmt: skip


@pytest.mark.oracle
@given(sizes=SIZES, dtype=st.sampled_from(list(TOLERANCE)), gated=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_kernel_is_the_definition(kernel, sizes, dtype, gated):
    B, share, P, G, (N, S) = sizes
    inputs, state = draw(B, share * G, P, G, N, S, dtype)
    agrees(kernel.step, inputs if gated else inputs | {"z": None}, state)


@pytest.mark.oracle
@pytest.mark.parametrize("dt", [-60.0, -20.0, -9.0, 0.0, 30.0])
def test_steps_of_any_size(kernel, dt):
    """Relative to the step: a softplus that adds its exponential to 1 is off by a tenth at -14, and 0 below -17."""
    inputs, state = draw(1, 2, 4, 1, 8, 2, torch.float32)
    inputs |= {"dt": torch.full((1, 2), dt), "dt_bias": torch.zeros(2), "D": torch.zeros(2), "z": None,
               "trap": torch.full((1, 2), 50.0), "a": torch.full((1, 2), -3.0)}  # fmt: skip
    state = state._replace(ssm=torch.zeros_like(state.ssm), angle=torch.zeros_like(state.angle))
    exact = {name: value if value is None else value.double() for name, value in inputs.items()}
    expected, _ = trapezoid.step(**exact, A_floor=FLOOR, state=trapezoid.State(*(m.double() for m in state)))
    y, _ = kernel.step(**inputs, A_floor=FLOOR, state=state)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4 if dt > 9 else 3e-6, atol=0)


@pytest.mark.oracle
def test_a_state_that_is_not_in_one_piece_is_refused(kernel):
    inputs, state = draw(2, 2, 4, 1, 8, 2, torch.float32)
    with pytest.raises(AssertionError):
        kernel.step(**inputs, A_floor=FLOOR, state=state._replace(ssm=state.ssm.transpose(2, 3)))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(1, 24, 64, 1, 128, 32), (3, 4, 6, 2, 16, 8), (8, 2, 64, 1, 64, 16)], ids=str)
def test_the_kernel_on_a_gpu(sizes, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    from models.ops.kernels import triton_trapezoid

    agrees(triton_trapezoid.step, *draw(*sizes, dtype, device="cuda"), tokens=5)
