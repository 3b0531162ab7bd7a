"""Every form of the selective scan against the readable one, in outputs and in every gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from models.ops import selective_scan as ops
from models.ops.kernels import load, numba_scan

FORMS = {"reference": ops.reference, "torch": ops.chunked, "numba": load("numba").selective_scan}
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
SHAPES = [(1, 1, 1, 1), (2, 1, 130, 4), (2, 17, 130, 4), (3, 16, 5, 3), (1, 33, 128, 16), (1, 40, 257, 3)]
fast_forms = pytest.mark.parametrize("form", ["torch", "numba"])
all_forms = pytest.mark.parametrize("form", FORMS)
each_sign = pytest.mark.parametrize("negative", [False, True], ids=["positive", "negative"])


def draw(rows, T, E, N, dtype=torch.float64, *, gate=True, state=True, seed=0) -> list[Tensor | None]:
    """The inputs in the order of the signature; decays from almost none to almost all."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = [
        normal(rows, T, E), 2 * normal(rows, T, E) - 1, -normal(E, N).exp(), normal(rows, T, N), normal(rows, T, N),
        normal(E), normal(rows, T, E) if gate else None, normal(E), normal(rows, E, N) if state else None,
    ]  # fmt: skip
    return [None if x is None else x.to(dtype) for x in inputs]


def differentiate(form, inputs, dtype, negative=False):
    """Outputs and the gradients of all inputs, for fixed random weights on y and on the last state."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    y, h = form(*leaves, negative)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype) for out in (y, h)]
    (y * weights[0]).sum().add((h * weights[1]).sum()).backward()
    return [y.detach(), h.detach()], [None if x is None else x.grad for x in leaves]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest deviation, relative to the largest entry of what is expected."""
    assert actual.shape == expected.shape, what
    deviation = (actual.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert deviation < tolerance, f"{what}: {deviation:.2e}"


@fast_forms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("gate", "state"), [(True, True), (False, False)], ids=["gate-state", "plain"])
@each_sign
def test_agrees_with_the_reference(form, dtype, tolerance, shape, gate, state, negative):
    inputs = draw(*shape, dtype=dtype, gate=gate, state=state)
    outputs, gradients = differentiate(FORMS[form], inputs, dtype, negative)
    expected_outputs, expected_gradients = differentiate(ops.reference, inputs, torch.float64, negative)
    for what, actual, expected in zip(("y", "last_state"), outputs, expected_outputs, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected, tolerance, what)
    for what, actual, expected in zip(NAMES, gradients, expected_gradients, strict=True):
        assert (actual is None) == (expected is None), what
        if expected is not None:
            assert_near(actual, expected, tolerance, f"gradient of {what}")


@fast_forms
@pytest.mark.parametrize("used", [0, 1], ids=["only-y", "only-state"])
def test_one_output_alone_can_be_differentiated(form, used):
    inputs = draw(2, 19, 7, 3)

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves)[used].sum(), leaves, materialize_grads=True)

    for what, actual, expected in zip(NAMES, gradients(FORMS[form]), gradients(ops.reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=what)


@pytest.mark.parametrize(
    ("form", "shape"),
    [("reference", (2, 3, 2, 2)), ("torch", (1, 5, 2, 2)), ("numba", (2, 3, 3, 2)), ("numba", (1, 18, 2, 2))],
)
@pytest.mark.parametrize("gate", [True, False])
@each_sign
def test_gradients_are_those_of_finite_differences(form, shape, gate, negative):
    inputs = [x if x is None else x.requires_grad_() for x in draw(*shape, gate=gate)]
    assert torch.autograd.gradcheck(lambda *leaves: FORMS[form](*leaves, negative), inputs)


@all_forms
def test_a_negative_decay_by_hand(form):
    """One channel, one state, dt_bias so large that softplus is the identity: h <- (2 exp(dt A) - 1) h + dt B u."""
    dt, A, bias, h, expected = [0.1, 2.0, 0.5, 30.0], -0.7, 40.0, 1.5, []
    for t, step in enumerate(dt):
        h = (2 * math.exp((bias + step) * A / 40) - 1) * h + (bias + step) * 0.25 * (t + 1)
        expected.append(h * 0.5 + 2.0 * (t + 1))
    column = lambda *values: torch.tensor(values, dtype=torch.float64).view(1, -1, 1)  # noqa: E731
    ones = column(1, 1, 1, 1)
    one = torch.ones(1, dtype=torch.float64)
    y, last = FORMS[form](
        column(1, 2, 3, 4), column(*dt), A / 40 * one[:, None], 0.25 * ones, 0.5 * ones, 2 * one, None, bias * one,
        1.5 * one.view(1, 1, 1), True,
    )  # fmt: skip
    assert y.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert last.item() == pytest.approx(h, rel=1e-12)


def test_the_compiled_operators_are_well_formed():
    u, dt, A, B, C, D, z, dt_bias, h = [x.requires_grad_() for x in draw(2, 18, 5, 3)]
    h = h.detach().transpose(1, 2).contiguous().requires_grad_()
    torch.library.opcheck(numba_scan.scan, (u, dt, A, B, C, D, z, dt_bias, h, False, True))
    torch.library.opcheck(numba_scan.scan, (u, dt, A, B, C, D, None, dt_bias, None, True, True))


@pytest.mark.parametrize("form", FORMS)
@given(T=st.integers(2, 40), data=st.data(), seed=st.integers(0, 1000), negative=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_sequence_may_be_split_anywhere(form, T, data, seed, negative):
    t = data.draw(st.integers(1, T - 1))
    u, dt, A, B, C, D, z, dt_bias, h = draw(2, T, 5, 3, seed=seed)
    y, last = FORMS[form](u, dt, A, B, C, D, z, dt_bias, h, negative)
    y1, between = FORMS[form](u[:, :t], dt[:, :t], A, B[:, :t], C[:, :t], D, z[:, :t], dt_bias, h, negative)
    y2, end = FORMS[form](u[:, t:], dt[:, t:], A, B[:, t:], C[:, t:], D, z[:, t:], dt_bias, between, negative)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(end, last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), T=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_affine_in_the_initial_state(form, a, b, T, seed):
    *inputs, h1 = draw(2, T, 4, 3, seed=seed)
    h2 = h1.flip(1) + 1
    at = [torch.cat([x.flatten() for x in FORMS[form](*inputs, h)]) for h in (h1, h2, None, a * h1 + b * h2)]
    torch.testing.assert_close(at[3] - at[2], a * (at[0] - at[2]) + b * (at[1] - at[2]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", [True, False])
@each_sign
def test_a_step_is_a_forward_of_one_token(dtype, gate, negative):
    u, dt, A, B, C, D, z, dt_bias, state = draw(3, 1, 130, 5, dtype, gate=gate)
    expected_y, expected_state = ops.reference(u, dt, A, B, C, D, z, dt_bias, state, negative)
    z = None if z is None else z[:, 0]
    y = ops.step_reference(u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z, dt_bias, state, negative)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    assert_near(y, expected_y[:, 0], tolerance, "y")
    assert_near(state, expected_state, tolerance, "the state, advanced in place")


@all_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["u", "dt", "B", "C", "z", "initial_state"])
def test_nan_propagates_and_stays_in_its_place(form, dtype, where):
    inputs = draw(2, 40, 6, 3, dtype)
    t, e = 19, 2
    place = {"B": (1, t, 1), "C": (1, t, 1), "initial_state": (1, e, 1)}.get(where, (1, t, e))
    inputs[NAMES.index(where)][place] = float("nan")
    y, last = FORMS[form](*inputs)
    poisoned = torch.zeros(2, 40, 6, dtype=torch.bool)
    times = {"C": slice(t, t + 1), "z": slice(t, t + 1), "initial_state": slice(0, None)}.get(where, slice(t, None))
    poisoned[1, times, slice(None) if where in "BC" else e] = True
    assert torch.equal(y.isnan(), poisoned)
    assert last.isnan().any() == (where not in ("C", "z"))


@all_forms
def test_extreme_steps_and_gates_stay_finite(form):
    inputs = draw(2, 33, 9, 4, torch.float32)
    inputs[1] = inputs[1] * 60  # softplus from almost 0 to hundreds: decays from 1 to 0
    inputs[6] = inputs[6] * 60
    outputs, gradients = differentiate(FORMS[form], inputs, torch.float32)
    expected, expected_gradients = differentiate(ops.reference, inputs, torch.float64)
    for actual, exact in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert actual.isfinite().all()
        assert_near(actual, exact, 1e-4)


def test_the_number_of_threads_changes_no_bit():
    inputs = draw(3, 37, 300, 5, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs, gradients = differentiate(FORMS["numba"], inputs, torch.float32)
            results.append(outputs + gradients)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for what, first, again in zip(("y", "last_state", *NAMES), results[0], other, strict=True):
            assert torch.equal(first, again), what


def test_where_arrays_lie_changes_no_bit():
    """The compiler asks at run time whether arrays overlap, from bounds that are too wide for neighbours in memory, and
    has a second loop for those that might, which must round as the first does."""
    R, T, E, N, groups, chunks = 1, 3, 300, 5, 2, 1
    results = {
        "d_state": (R, N, E), "d_u": (R, T, E), "d_dt": (R, T, E), "d_A": (R, N, E), "d_B": (groups, R, T, N),
        "d_C": (groups, R, T, N), "d_D": (R, E), "d_z": (R, T, E), "d_dt_bias": (R, E),
    }  # fmt: skip
    shapes = results | {
        "u": (R, T, E), "dt": (R, T, E), "A2": (N, E), "B": (R, T, N), "C": (R, T, N), "D": (E,), "z": (R, T, E),
        "dt_bias": (E,), "kept": (R, chunks, N, E), "d_out": (R, T, E),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    values = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    values["A2"] = -np.abs(values["A2"])

    def differentiated(order: list[str], gaps: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([values[name].size + gap for name, gap in zip(order, gaps, strict=True)])
        whole = np.empty(ends[-1], np.float32)
        a = {name: part[: values[name].size] for name, part in zip(order, np.split(whole, ends[:-1]), strict=True)}
        a = {name: part.reshape(shapes[name]) for name, part in a.items()}
        for name, part in a.items():
            part[...] = values[name]
        numba_scan._backward(
            a["u"], a["dt"], a["A2"], a["B"], a["C"], a["D"], a["z"], a["dt_bias"], True, False, a["kept"], a["d_out"],
            a["d_state"], a["d_u"], a["d_dt"], a["d_A"], a["d_B"], a["d_C"], a["d_D"], a["d_z"], a["d_dt_bias"], 0,
            R * groups,
        )  # fmt: skip
        return {name: a[name] for name in results}

    apart = differentiated(list(shapes), np.full(len(shapes), 1000))
    for _ in range(4000):
        between = [np.empty(size, np.float32) for size in generator.integers(1, 3000, generator.integers(8))]
        gaps = generator.choice([0, 0, 0, 1, 4, 16], len(shapes))
        found = differentiated(list(generator.permutation(list(shapes))), gaps)
        for name, expected in apart.items():
            assert np.array_equal(found[name], expected), name
        del between  # what the kernel allocates itself then lies elsewhere


@pytest.mark.parametrize("T", [1, 16, 17, 100])
def test_the_forward_keeps_one_state_in_sixteen(T):
    rows, E, N = 2, 24, 8
    u, dt, A, B, C, D, z, dt_bias, _ = draw(rows, T, E, N, torch.float32)
    kept = numba_scan.scan(u, dt, A, B, C, D, z, dt_bias, None, False, True)[2]
    assert kept.shape == (rows, -(-T // 16), N, E)
    assert numba_scan.scan(u, dt, A, B, C, D, z, dt_bias, None, False, False)[2].numel() == 0

    saved: dict[int, int] = {}
    leaves = [x.requires_grad_() for x in (u, dt, A, B, C, D, z, dt_bias)]

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        FORMS["numba"](*leaves)
    assert sum(saved.values()) == kept.nbytes + sum(x.nbytes for x in leaves)


def test_inputs_in_any_layout():
    inputs = draw(2, 21, 10, 4)
    expected = ops.reference(*inputs)
    strided = [
        x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in inputs
    ]
    assert not strided[0].is_contiguous()
    for actual, exact in zip(FORMS["numba"](*strided), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
    _, gradients = differentiate(FORMS["numba"], strided, torch.float64)
    _, expected_gradients = differentiate(ops.reference, inputs, torch.float64)
    for actual, exact in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


def test_inputs_that_are_slices_of_one_projection():
    inputs = draw(2, 20, 12, 3)
    expected = differentiate(ops.reference, inputs, torch.float64)
    wide = torch.cat([inputs[0], inputs[1], inputs[6]], -1)  # as a block computes them: rows of a larger array
    u, dt, z = wide.split(12, -1)
    actual = differentiate(FORMS["numba"], [u, dt, *inputs[2:6], z, *inputs[7:]], torch.float64)
    for got, exact in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_near(got, exact, 1e-12)


def test_16_bit_inputs_are_computed_in_float32():
    inputs = [x if i in (2, 5, 7) else x.to(torch.bfloat16) for i, x in enumerate(draw(2, 20, 6, 3, torch.float32))]
    expected, _ = ops.reference(*[x.double() for x in inputs])
    y, last = FORMS["numba"](*inputs)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert_near(y, expected, 2**-8, "y")
