"""Every form of Mamba-3's recurrence against the readable one, and that against the paper's formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops import trapezoid as ops
from models.ops.kernels import load
from models.ops.ssd import CHUNK

FORMS = {"reference": ops.reference, "torch": load("torch").trapezoid, "numba": load("numba").trapezoid}
NAMES = (
    "x", "dt", "a", "trap", "angle", "B", "C", "z", "D", "dt_bias", "B_bias", "C_bias", "theta", "h", "previous B",
    "previous x",
)  # fmt: skip
EACH, ALL = 8, 12  # of these: what each token brings, and all but the state
OUTPUTS = ("y", "theta", "h", "previous B", "previous x")
FLOOR = 0.3  # reached by many of the drawn rates
# rows, T, H, P, N, S, G: all of the state rotated, half of it, none but a pair; around one chunk of 64 and beyond;
# heads in one group, in several, in as many
SHAPES = [
    (1, 1, 1, 1, 2, 1), (2, 1, 3, 2, 4, 1), (2, 3, 2, 3, 6, 3, 2), (1, 63, 2, 2, 5, 2), (2, 64, 3, 1, 4, 2, 3),
    (1, 65, 4, 3, 8, 2, 2), (2, 200, 3, 2, 4, 2),
]  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
fast_forms = pytest.mark.parametrize("form", ["torch", "numba"])
all_forms = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def draw(rows, T, H, P, N, S, G=1, dtype=torch.float64, *, state=True, rank=1, seed=0) -> list:
    """The inputs in the order of the signature, without the floor, the state's parts last."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ranks = (rank,) if rank > 1 else ()
    inputs = [
        normal(rows, T, *ranks, H, P), normal(rows, T, H), 2 * normal(rows, T, H) - 1, normal(rows, T, H),
        normal(rows, T, S), normal(rows, T, rank, G, N), normal(rows, T, rank, G, N), normal(rows, T, *ranks, H, P),
        normal(H), normal(H), normal(rank, H, N), normal(rank, H, N),
    ]  # fmt: skip
    initial = [normal(rows, H, S), normal(rows, H, P, N), normal(rows, rank, H, N), normal(rows, *ranks, H, P)]
    return [x.to(dtype) for x in [*inputs, *(initial if state else [])]]


def run(form, *inputs):
    initial = ops.State(*inputs[ALL:]) if len(inputs) > ALL else None
    y, state = form(*inputs[:ALL], FLOOR, initial)
    return [y, *state]


def differentiate(form, inputs, dtype):
    """Outputs and the gradients of all inputs, for fixed random weights on every output but the angle, which is only
    known modulo a turn, and by its gradient's being the same."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = run(form, *leaves)
    g = torch.Generator().manual_seed(9)
    loss = sum((out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)).sum() for out in outputs)
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [out.detach() for out in outputs], gradients


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest deviation, relative to the largest entry of what is expected, or to 1 where that is smaller."""
    assert actual.shape == expected.shape, what
    difference = actual.double() - expected.double()
    if what == "theta":
        difference = (difference + math.pi).remainder(2 * math.pi) - math.pi
    deviation = difference.abs().max() / expected.abs().max().clamp_min(1)
    assert deviation < tolerance, f"{what}: {deviation:.2e}"


def by_hand(*inputs):
    """The published recurrence in numpy, one head at a time; ranks as a sum over r."""
    x, dt, a, trap, angle, B, C, z, D, dt_bias, B_bias, C_bias, theta, h, before_B, before_x = (
        m.detach().numpy().copy() for m in inputs
    )
    siso = x.ndim == 4
    if siso:
        x, z, before_x = x[:, :, None], z[:, :, None], before_x[:, None]
    rows, T, R, H, _ = x.shape
    S, y = angle.shape[-1], np.zeros_like(x)

    def turned(v, by):
        v = v.copy()
        for i in range(S):
            c, s, one, two = math.cos(by[i]), math.sin(by[i]), v[2 * i], v[2 * i + 1]
            v[2 * i], v[2 * i + 1] = c * one - s * two, s * one + c * two
        return v

    softplus = lambda v: math.log1p(math.exp(v))  # noqa: E731
    for b in range(rows):
        for t in range(T):
            for k in range(H):
                g = k * B.shape[3] // H
                delta = softplus(dt[b, t, k] + dt_bias[k])
                A = min(-softplus(a[b, t, k]), -FLOOR)
                mix, alpha = 1 / (1 + math.exp(-trap[b, t, k])), math.exp(delta * A)
                for i in range(S):
                    theta[b, k, i] += math.tanh(angle[b, t, i]) * math.pi * delta
                state = alpha * h[b, k]
                for r in range(R):
                    now = turned(B[b, t, r, g] + B_bias[r, k], theta[b, k])
                    state = state + (1 - mix) * delta * alpha * np.outer(before_x[b, r, k], before_B[b, r, k])
                    state = state + mix * delta * np.outer(x[b, t, r, k], now)
                    before_B[b, r, k], before_x[b, r, k] = now, x[b, t, r, k]
                h[b, k] = state
                for r in range(R):
                    read = state @ turned(C[b, t, r, g] + C_bias[r, k], theta[b, k]) + D[k] * x[b, t, r, k]
                    y[b, t, r, k] = read * z[b, t, r, k] / (1 + np.exp(-z[b, t, r, k]))
    if siso:
        y, before_x = y[:, :, 0], before_x[:, 0]
    return [torch.from_numpy(m) for m in (y, theta, h, before_B, before_x)]


@all_forms
@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 6, 2), (1, CHUNK + 3, 4, 2, 4, 2, 2), (2, 4, 2, 2, 5, 2, 2)], ids=str)
def test_is_the_published_recurrence(form, shape):
    inputs = draw(*shape)
    for what, actual, expected in zip(OUTPUTS, run(FORMS[form], *inputs), by_hand(*inputs), strict=True):
        assert_near(actual, expected, 1e-11, what)


@pytest.mark.parametrize("rank", [2, 3])
def test_with_ranks_it_is_the_published_recurrence(rank):
    inputs = draw(2, 6, 4, 2, 6, 2, G=2, rank=rank)
    for what, actual, expected in zip(OUTPUTS, run(ops.reference, *inputs), by_hand(*inputs), strict=True):
        assert_near(actual, expected, 1e-11, what)


@all_forms
def test_the_first_token_has_none_before_it(form):
    """No initial state is one of zeros."""
    inputs = draw(2, 5, 3, 2, 6, 2)
    zeros = [torch.zeros_like(x) for x in inputs[ALL:]]
    fresh, from_zero = run(FORMS[form], *inputs[:ALL]), run(FORMS[form], *inputs[:ALL], *zeros)
    for actual, expected in zip(fresh, from_zero, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@fast_forms
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "plain"])
def test_agrees_with_the_reference(form, dtype, shape, state):
    inputs = draw(*shape, dtype=dtype, state=state)
    outputs, gradients = differentiate(FORMS[form], inputs, dtype)
    expected_outputs, expected_gradients = differentiate(ops.reference, inputs, torch.float64)
    for what, actual, expected in zip(OUTPUTS, outputs, expected_outputs, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected, TOLERANCE[dtype], what)
    for what, actual, expected in zip(NAMES, gradients, expected_gradients, strict=False):
        # an angle that is summed over the whole text, and so is the rounding of its gradient
        loose = 5 if dtype is torch.float32 else 1
        assert_near(actual, expected, loose * TOLERANCE[dtype], f"gradient of {what}")


@all_forms
def test_without_a_gate_it_gives_what_the_gate_takes(form):
    inputs = draw(2, 70, 3, 2, 4, 2)
    gated, plain = run(FORMS[form], *inputs), run(FORMS[form], *inputs[:7], None, *inputs[8:])
    torch.testing.assert_close(gated[0], plain[0] * torch.nn.functional.silu(inputs[7]), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(gated[1:], plain[1:], strict=True))


@all_forms
@pytest.mark.parametrize("state", [True, False], ids=["state", "plain"])
def test_gradients_are_those_of_finite_differences(form, state):
    inputs = [x.requires_grad_() for x in draw(1, 3, 2, 2, 4, 1, state=state)]
    assert torch.autograd.gradcheck(lambda *leaves: run(FORMS[form], *leaves), inputs)


@fast_forms
def test_gradients_over_a_border_of_chunks_are_those_of_finite_differences(form, monkeypatch):
    monkeypatch.setattr("models.ops.ssd.CHUNK", 3)
    inputs = [x.requires_grad_() for x in draw(1, 7, 1, 2, 2, 1)]
    assert torch.autograd.gradcheck(lambda *leaves: run(FORMS[form], *leaves), inputs)


def test_gradients_with_ranks_are_those_of_finite_differences():
    inputs = [x.requires_grad_() for x in draw(1, 3, 2, 2, 4, 1, rank=2)]
    assert torch.autograd.gradcheck(lambda *leaves: run(ops.reference, *leaves), inputs)


@all_forms
@each_dtype
def test_a_later_token_changes_no_bit(form, dtype):
    inputs = draw(2, 100, 3, 2, 4, 2, dtype=dtype)
    before = run(FORMS[form], *inputs)[0]
    for t in (1, 40, 63, 64, 99):
        changed = [x.clone() for x in inputs]
        for x in changed[:EACH]:
            x[:, t:] += 2
        assert torch.equal(run(FORMS[form], *changed)[0][:, :t], before[:, :t])


@all_forms
@given(
    T=st.integers(1, 140), H=st.integers(1, 3), P=st.integers(1, 3), N=st.integers(2, 6), data=st.data(),
    seed=st.integers(0, 1000), state=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_any_shape(form, T, H, P, N, data, seed, state):
    S, G = data.draw(st.integers(1, N // 2)), data.draw(st.sampled_from([1, H]))
    inputs = draw(2, T, H, P, N, S, G, seed=seed, state=state)
    outputs = run(FORMS[form], *inputs)
    shapes = [(2, T, H, P), (2, H, S), (2, H, P, N), (2, 1, H, N), (2, H, P)]
    assert [tuple(out.shape) for out in outputs] == shapes
    for what, actual, expected in zip(OUTPUTS, outputs, run(ops.reference, *inputs), strict=True):
        assert_near(actual, expected, 1e-10, what)


@all_forms
@given(T=st.integers(2, 140), data=st.data(), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_a_sequence_may_be_split_anywhere(form, T, data, seed):
    t = data.draw(st.integers(1, T - 1))
    inputs = draw(2, T, 2, 3, 4, 1, seed=seed)
    whole = run(FORMS[form], *inputs)
    cut = [[x[:, part] for x in inputs[:EACH]] for part in (slice(0, t), slice(t, None))]
    first = run(FORMS[form], *cut[0], *inputs[EACH:])
    second = run(FORMS[form], *cut[1], *inputs[EACH:ALL], *first[1:])
    assert_near(torch.cat([first[0], second[0]], 1), whole[0], 1e-10)
    for what, actual, expected in zip(OUTPUTS[1:], second[1:], whole[1:], strict=True):
        assert_near(actual, expected, 1e-10, what)


@each_dtype
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["reference", "torch", "numba"])
def test_a_step_is_a_forward_of_one_token(name, rank, dtype):
    inputs = draw(3, 1, 4, 4, 6, 2, 2, dtype, rank=rank)
    expected = run(ops.reference, *inputs)
    y, state = load(name).trapezoid_step(
        *(x[:, 0] for x in inputs[:EACH]), *inputs[EACH:ALL], FLOOR, ops.State(*inputs[ALL:])
    )  # fmt: skip
    for what, actual, exact in zip(OUTPUTS, [y, *state], [expected[0][:, 0], *expected[1:]], strict=True):
        assert_near(actual, exact, TOLERANCE[dtype], what)


@given(S=st.integers(1, 3), rest=st.integers(0, 3), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_rotation_turns_neighbours_and_leaves_the_rest(S, rest, seed):
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(2, 3, 1, 2, 2 * S + rest, generator=g, dtype=torch.float64)
    theta = 10 * torch.randn(2, 3, 2, S, generator=g, dtype=torch.float64)
    y = ops.rotated(m, theta)
    pairs, turned = (v[..., : 2 * S].unflatten(-1, (S, 2)) for v in (m, y))
    there = torch.view_as_complex(turned.contiguous()) / torch.view_as_complex(pairs.contiguous())
    expected = torch.polar(torch.ones_like(theta), theta)[:, :, None]
    torch.testing.assert_close(there, expected.expand_as(there), rtol=1e-9, atol=1e-9)
    assert torch.equal(y[..., 2 * S :], m[..., 2 * S :])


@all_forms
def test_the_decay_is_at_least_its_floor(form):
    """A rate whose softplus is almost nothing still forgets: with no input the state shrinks by exp(-delta floor)."""
    x, dt, a, *others = draw(1, 1, 1, 1, 2, 1)
    zero, (theta, h, before_B, before_x) = torch.zeros_like, others[ALL - 3 :]
    state = ops.State(zero(theta), h, zero(before_B), zero(before_x))
    _, after = FORMS[form](zero(x), dt, torch.full_like(a, -50), *others[: ALL - 3], FLOOR, state)
    delta = torch.nn.functional.softplus(dt[0, 0, 0] + others[6][0])
    torch.testing.assert_close(after.ssm, h * torch.exp(-FLOOR * delta), rtol=1e-12, atol=0)


@all_forms
def test_angles_keep_their_precision_over_a_long_text(form):
    """Hundreds of turns in float32."""
    inputs = draw(1, 2_000, 1, 1, 2, 1)
    inputs[4] = inputs[4].abs() + 1  # always the same way round
    rough = [x.float() for x in inputs]
    exact = [x.double() for x in rough]
    delta = torch.nn.functional.softplus(exact[1] + exact[9])
    theta = exact[ALL] + math.pi * (torch.tanh(exact[4])[:, :, None] * delta[..., None]).sum(1)
    assert theta.min() > 2000
    assert_near(run(FORMS[form], *rough)[1], theta.remainder(2 * math.pi), 3e-4, "theta")


@fast_forms
def test_16_bit_inputs_keep_a_wide_state(form):
    inputs = draw(2, 100, 3, 2, 4, 2, dtype=torch.float32)
    narrow = (*range(EACH), ALL + 2, ALL + 3)
    rough = [x.to(torch.bfloat16) if i in narrow else x for i, x in enumerate(inputs)]
    expected = run(ops.reference, *(x.double() for x in rough))
    actual = run(FORMS[form], *rough)
    assert [x.dtype for x in actual] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for what, got, exact in zip(OUTPUTS, actual, expected, strict=True):
        assert_near(got, exact, 0.03, what)


def test_flops_with_ranks_are_those_of_the_steps():
    assert ops.forward_flops(4, 8, 16, 2, 100) == 3 * 2 * 2 * 4 * 8 * 16


@pytest.mark.parametrize("name", ["reference", "torch", "numba"])
def test_angles_stay_within_a_turn_however_long_a_text_is_decoded(name):
    """Beyond, float32 loses their precision bit by bit."""
    inputs = draw(1, 1, 1, 1, 2, 1, dtype=torch.float32)
    inputs[4] = inputs[4].abs() + 1  # always the same way round
    state = ops.State(*inputs[ALL:])
    for _ in range(20):
        _, state = load(name).trapezoid_step(*(x[:, 0] for x in inputs[:EACH]), *inputs[EACH:ALL], FLOOR, state)
    assert state.angle.min() >= 0
    assert state.angle.max() < 2 * math.pi + 1e-6
