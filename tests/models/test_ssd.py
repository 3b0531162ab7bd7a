"""Every form of Mamba-2's recurrence against the readable one, in outputs and in every gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops import ssd as ops
from models.ops.kernels import load

FORMS = {"reference": ops.reference, "torch": load("torch").ssd, "numba": load("numba").ssd}
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
# rows, T, H, P, G, N: around one chunk of 64 and beyond, odd widths, heads that share B and C and heads that do not
SHAPES = [
    (1, 1, 1, 1, 1, 1), (2, 1, 4, 3, 2, 5), (2, 3, 4, 2, 1, 3), (1, 63, 2, 5, 2, 4), (2, 64, 3, 2, 3, 7),
    (1, 65, 4, 3, 2, 2), (2, 200, 6, 2, 3, 3),
]  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
fast_forms = pytest.mark.parametrize("form", ["torch", "numba"])
all_forms = pytest.mark.parametrize("form", FORMS)
each_sign = pytest.mark.parametrize("negative", [False, True], ids=["positive", "negative"])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def draw(rows, T, H, P, G, N, dtype=torch.float64, *, state=True, seed=0) -> list[Tensor | None]:
    """The inputs in the order of the signature; decays from almost none to almost all."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = [
        normal(rows, T, H, P), 2 * normal(rows, T, H) - 1, -normal(H).exp(), normal(rows, T, G, N),
        normal(rows, T, G, N), normal(H), normal(H), normal(rows, H, P, N) if state else None,
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
    """Largest deviation, relative to the largest entry of what is expected, or to 1 where that is smaller."""
    assert actual.shape == expected.shape, what
    deviation = (actual.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1)
    assert deviation < tolerance, f"{what}: {deviation:.2e}"


def by_hand(x, dt, A, B, C, D, dt_bias, state, negative):
    """In numpy, one number at a time."""
    x, dt, A, B, C, D, dt_bias, h = (m.numpy() for m in (x, dt, A, B, C, D, dt_bias, state.clone()))
    y = np.empty_like(x)
    rows, T, H, P = x.shape
    share = H // B.shape[2]
    for b in range(rows):
        for t in range(T):
            for head in range(H):
                delta = math.log1p(math.exp(dt[b, t, head] + dt_bias[head]))
                a = math.exp(delta * A[head])
                a = 2 * a - 1 if negative else a
                for p in range(P):
                    h[b, head, p] = a * h[b, head, p] + delta * x[b, t, head, p] * B[b, t, head // share]
                    y[b, t, head, p] = h[b, head, p] @ C[b, t, head // share] + D[head] * x[b, t, head, p]
    return torch.from_numpy(y), torch.from_numpy(h)


@all_forms
@each_sign
@pytest.mark.parametrize("shape", [(2, 5, 4, 3, 2, 3), (1, 70, 2, 2, 1, 2)], ids=str)
def test_is_the_recurrence_by_hand(form, shape, negative):
    inputs = draw(*shape)
    for actual, expected in zip(FORMS[form](*inputs, negative), by_hand(*inputs, negative), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@fast_forms
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "plain"])
@each_sign
def test_agrees_with_the_reference(form, dtype, shape, state, negative):
    inputs = draw(*shape, dtype=dtype, state=state)
    outputs, gradients = differentiate(FORMS[form], inputs, dtype, negative)
    expected_outputs, expected_gradients = differentiate(ops.reference, inputs, torch.float64, negative)
    for what, actual, expected in zip(("y", "last_state"), outputs, expected_outputs, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected, TOLERANCE[dtype], what)
    for what, actual, expected in zip(NAMES, gradients, expected_gradients, strict=True):
        assert (actual is None) == (expected is None), what
        if expected is not None:
            # what a decay weighs is a difference of sums; where a state passes zero on its way to the other sign,
            # the logarithm of its decay magnifies the rounding of that
            decays = 50 if negative else 5
            loose = decays if what in ("dt", "A", "dt_bias") else 1
            assert_near(actual, expected, loose * TOLERANCE[dtype], f"gradient of {what}")


@fast_forms
@each_sign
@pytest.mark.parametrize("used", [0, 1], ids=["only-y", "only-state"])
def test_one_output_alone_can_be_differentiated(form, used, negative):
    inputs = draw(2, 70, 4, 3, 2, 3)

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves, negative)[used].sum(), leaves, materialize_grads=True)

    for what, actual, expected in zip(NAMES, gradients(FORMS[form]), gradients(ops.reference), strict=True):
        assert_near(actual, expected, 1e-10, what)


@all_forms
@each_sign
@pytest.mark.parametrize(("shape", "state"), [((2, 3, 2, 2, 1, 2), True), ((1, 4, 4, 1, 2, 2), False)])
def test_gradients_are_those_of_finite_differences(form, shape, state, negative):
    inputs = [x if x is None else x.requires_grad_() for x in draw(*shape, state=state)]
    assert torch.autograd.gradcheck(lambda *leaves: FORMS[form](*leaves, negative), inputs)


@fast_forms
def test_gradients_over_a_border_of_chunks_are_those_of_finite_differences(form, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK", 3)
    inputs = [x.requires_grad_() for x in draw(1, 8, 2, 2, 1, 2)]
    assert torch.autograd.gradcheck(FORMS[form], inputs)


def test_it_can_be_compiled_over_a_border_of_chunks():
    """As it is on a GPU without the official kernels: every write has to be one that can be traced."""
    inputs = draw(2, ops.CHUNK + 11, 4, 8, 2, 6, torch.float32)
    torch.compiler.reset()
    traced = torch.compile(FORMS["torch"], backend="aot_eager", dynamic=False)
    found, expected = (differentiate(form, inputs, torch.float32) for form in (traced, FORMS["torch"]))
    torch.compiler.reset()
    for actual, exact in zip(*([*outputs, *gradients] for outputs, gradients in (found, expected)), strict=True):
        assert_near(actual, exact, 1e-6)


@all_forms
@given(
    T=st.integers(1, 140), R=st.integers(1, 3), G=st.integers(1, 3), P=st.integers(1, 4), N=st.integers(1, 4),
    seed=st.integers(0, 1000), negative=st.booleans(), state=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_any_shape(form, T, R, G, P, N, seed, negative, state):
    inputs = draw(2, T, R * G, P, G, N, seed=seed, state=state)
    y, last = FORMS[form](*inputs, negative)
    assert (y.shape, last.shape) == ((2, T, R * G, P), (2, R * G, P, N))
    for actual, expected in zip((y, last), ops.reference(*inputs, negative), strict=True):
        assert_near(actual, expected, 1e-10)


@all_forms
@given(T=st.integers(2, 140), data=st.data(), seed=st.integers(0, 1000), negative=st.booleans())
@settings(max_examples=12, deadline=None)
def test_a_sequence_may_be_split_anywhere(form, T, data, seed, negative):
    t = data.draw(st.integers(1, T - 1))
    x, dt, A, B, C, D, bias, h = draw(2, T, 4, 3, 2, 2, seed=seed)
    y, last = FORMS[form](x, dt, A, B, C, D, bias, h, negative)
    y1, between = FORMS[form](x[:, :t], dt[:, :t], A, B[:, :t], C[:, :t], D, bias, h, negative)
    y2, end = FORMS[form](x[:, t:], dt[:, t:], A, B[:, t:], C[:, t:], D, bias, between, negative)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-10)


@all_forms
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), T=st.integers(1, 90), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_affine_in_the_initial_state(form, a, b, T, seed):
    *inputs, h1 = draw(2, T, 2, 3, 1, 3, seed=seed)
    h2 = h1.flip(1) + 1
    at = [torch.cat([x.flatten() for x in FORMS[form](*inputs, h)]) for h in (h1, h2, None, a * h1 + b * h2)]
    torch.testing.assert_close(at[3] - at[2], a * (at[0] - at[2]) + b * (at[1] - at[2]), rtol=1e-9, atol=1e-9)


@all_forms
@each_dtype
def test_a_later_token_changes_no_bit(form, dtype):
    inputs = draw(2, 100, 4, 3, 2, 3, dtype)
    before = FORMS[form](*inputs)[0]
    for t in (1, 63, 64, 99):
        changed = [x.clone() for x in inputs]
        for i in (0, 1, 3, 4):
            changed[i][:, t:] += 2
        assert torch.equal(FORMS[form](*changed)[0][:, :t], before[:, :t])


@each_dtype
@each_sign
@pytest.mark.parametrize("name", ["reference", "torch", "numba"])
def test_a_step_is_a_forward_of_one_token(name, dtype, negative):
    x, dt, A, B, C, D, bias, state = draw(3, 1, 6, 5, 2, 3, dtype)
    expected_y, expected_state = ops.reference(x, dt, A, B, C, D, bias, state, negative)
    y = load(name).ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, bias, state, negative)
    assert_near(y, expected_y[:, 0], TOLERANCE[dtype], "y")
    assert_near(state, expected_state, TOLERANCE[dtype], "the state, advanced in place")


@all_forms
@pytest.mark.parametrize("where", ["x", "dt", "C", "initial_state"])
def test_nan_propagates_and_stays_in_its_place(form, where):
    """Nothing before its token (in products: before its chunk), nothing in other rows, all of its head after."""
    inputs = draw(2, 110, 4, 3, 2, 3)
    t, head = 83, 2
    place = {"C": (1, t, 1), "initial_state": (1, head)}.get(where, (1, t, head))
    inputs[NAMES.index(where)][place] = float("nan")
    y, last = FORMS[form](*inputs)
    start = 0 if where == "initial_state" else t
    assert not y[0].isnan().any()
    assert not y[1, : start if form == "reference" else start // 64 * 64].isnan().any()
    assert y[1, start, [head, 3] if where == "C" else [head]].isnan().all()
    if where != "C":
        assert y[1, start:, head].isnan().all()
        assert last[1, head].isnan().all()
    assert not last[0].isnan().any()
    assert not last[1, :head].isnan().any()


@all_forms
@each_sign
def test_extreme_steps_stay_finite(form, negative):
    inputs = draw(2, 130, 4, 3, 2, 3, torch.float32)
    inputs[1] = inputs[1] * 60  # softplus from almost 0 to hundreds: decays from 1 to 0
    outputs, gradients = differentiate(FORMS[form], inputs, torch.float32, negative)
    expected, expected_gradients = differentiate(ops.reference, inputs, torch.float64, negative)
    for actual, exact in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert actual.isfinite().all()
        # the logarithms of a chunk's decays add up to 10^5 here, whose last place in float32 is 1/128
        assert_near(actual, exact, 1e-3 if form == "reference" else 1e-2)


@fast_forms
def test_inputs_in_any_layout(form):
    inputs = draw(2, 70, 4, 3, 2, 2)
    strided = [
        x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in inputs
    ]
    assert not strided[0].is_contiguous()
    actual = differentiate(FORMS[form], strided, torch.float64)
    expected = differentiate(ops.reference, inputs, torch.float64)
    for got, exact in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_near(got, exact, 1e-10)


@all_forms
@each_sign
def test_16_bit_inputs_keep_a_wide_state(form, negative):
    """As a 16-bit model has them: x, B, C in bfloat16, the decays in float32."""
    inputs = draw(2, 100, 4, 3, 2, 3, torch.float32)
    rough = [x.to(torch.bfloat16) if i in (0, 3, 4) else x for i, x in enumerate(inputs)]
    expected, expected_last = ops.reference(*[x.double() for x in rough], negative)
    y, last = FORMS[form](*rough, negative)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert_near(y, expected, 0.02, "y")
    assert_near(last, expected_last, 0.02, "last_state")


@all_forms
@each_sign
def test_gradients_of_16_bit_inputs(form, negative):
    """Also where a decay passes zero, and for the decays themselves."""
    inputs = draw(2, 200, 4, 8, 2, 8, torch.float32)
    inputs[1] = inputs[1] / 4
    rough = [x.to(torch.bfloat16) if i in (0, 3, 4) else x for i, x in enumerate(inputs)]
    gradients = []
    for function, kind in ((FORMS[form], None), (ops.reference, torch.float64)):
        leaves = [(x if kind is None else x.to(kind)).detach().requires_grad_() for x in rough]
        y, h = function(*leaves, negative)
        along = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
        gradients.append(torch.autograd.grad((y * along).sum() + h.sum(), leaves))
    for what, actual, expected in zip(NAMES, *gradients, strict=True):
        assert (actual.double() - expected).norm() < 0.03 * expected.norm(), what


@pytest.mark.parametrize(("T", "chunks"), [(1, [(1, 1)]), (64, [(64, 1)]), (128, [(64, 2)]), (256, [(64, 4)])])
def test_flops_count_the_lower_triangle(T, chunks):
    H, P, G, N = 4, 8, 2, 16
    total = 0
    for Q, count in chunks:
        pairs = Q * (Q + 1) // 2
        total += count * (pairs * 2 * (G * N + H * P) + Q * 4 * H * P * N)  # scores, their product; states in and out
    assert ops.forward_flops(H, P, G, N, T) * T == total
