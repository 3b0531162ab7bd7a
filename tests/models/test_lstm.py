"""Both forms of the LSTM against the formulas, and against each other in outputs and gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.language_model import LanguageModel
from models.ops import lstm as ops
from models.ops.kernels import load
from models.presets import preset

FORMS = {"reference": ops.reference, "torch": load("torch").lstm}
NAMES = ("x", "W", "U", "b", "hidden", "cell")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def draw(rows, T, D, E, dtype=torch.float64, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, T, D), (4 * E, D), (4 * E, E), (4 * E,), (rows, E), (rows, E)]
    scales = [1, D**-0.5, E**-0.5, 1, 1, 1]
    return [
        (torch.randn(s, generator=g, dtype=torch.float64) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)
    ]


def by_hand(x, W, U, b, hidden, cell):
    """One number at a time; the gates in the order input, forget, candidate, output."""
    x, W, U, b, hidden, cell = (m.numpy().copy() for m in (x, W, U, b, hidden, cell))
    rows, T, _ = x.shape
    E, hs = hidden.shape[1], np.empty((rows, T, hidden.shape[1]))
    sigmoid = lambda v: 1 / (1 + math.exp(-v))  # noqa: E731
    for r in range(rows):
        for t in range(T):
            gates = W @ x[r, t] + U @ hidden[r] + b
            for e in range(E):
                i, f, g, o = gates[e], gates[E + e], gates[2 * E + e], gates[3 * E + e]
                cell[r, e] = sigmoid(f) * cell[r, e] + sigmoid(i) * math.tanh(g)
                hs[r, t, e] = sigmoid(o) * math.tanh(cell[r, e])
            hidden[r] = hs[r, t]
    return [torch.from_numpy(m) for m in (hs, hidden, cell)]


def differentiate(form, inputs, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = form(*leaves)
    g = torch.Generator().manual_seed(9)
    loss = sum((out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)).sum() for out in outputs)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, leaves)]


@each_form
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 7, 4, 5), (2, 65, 6, 3)], ids=str)
def test_is_the_definition(form, shape):
    inputs = draw(*shape)
    for actual, expected in zip(FORMS[form](*inputs), by_hand(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@each_dtype
@pytest.mark.parametrize("T", [1, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("start", ["zeros", "given"])
def test_the_fused_form_agrees_with_the_reference(dtype, T, start):
    inputs = draw(3, T, 6, 5, dtype)
    if start == "zeros":
        inputs[4:] = [torch.zeros_like(x) for x in inputs[4:]]
    actual = differentiate(FORMS["torch"], inputs, dtype)
    expected = differentiate(ops.reference, inputs, torch.float64)
    for what, got, exact in zip(("h", "last hidden", "last cell", *NAMES), actual, expected, strict=True):
        assert got.dtype == dtype
        assert got.shape == exact.shape
        assert (got.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max(), what


@each_form
def test_gradients_are_those_of_finite_differences(form):
    assert torch.autograd.gradcheck(FORMS[form], [x.requires_grad_() for x in draw(2, 4, 2, 3)])


@pytest.fixture
def calls(monkeypatch):
    """What `torch.lstm` is given: its tensors, whether it trains, and whether autocast is on."""
    seen, call = [], torch.lstm

    def lstm(x, before, weights, has_biases, layers, dropout, train, *rest):
        seen.append(([x, *before, *weights], train, torch.is_autocast_enabled("cpu")))
        return call(x, before, weights, has_biases, layers, dropout, train, *rest)

    monkeypatch.setattr(torch, "lstm", lstm)
    return seen


def test_it_trains_wherever_a_gradient_may_be_asked_for(calls):
    """cuDNN's backward pass refuses what its forward pass did not do for training; a CPU's takes either."""
    inputs = draw(2, 5, 4, 3)
    FORMS["torch"](*inputs)
    with torch.no_grad():
        FORMS["torch"](*inputs)
    assert [train for _, train, _ in calls] == [True, False]


def test_under_autocast_it_runs_in_the_type_of_that(calls):
    """Left to itself torch has cuDNN run in float16, whatever autocast's type is."""
    inputs = draw(2, 30, 8, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, *_ = differentiated = differentiate(FORMS["torch"], inputs, torch.float32)
    ((given, _, autocast),) = calls
    assert {x.dtype for x in given} == {h.dtype} == {torch.bfloat16}
    assert not autocast
    expected = differentiate(ops.reference, inputs, torch.float64)
    for what, got, exact in zip(("h", "last hidden", "last cell", *NAMES), differentiated, expected, strict=True):
        assert (got.double() - exact).norm() <= 0.02 * exact.norm(), what
    assert {gradient.dtype for gradient in differentiated[3:]} == {torch.float32}


def test_it_is_the_module_of_torch():
    x, W, U, b, hidden, cell = draw(2, 9, 4, 6)
    theirs = torch.nn.LSTM(4, 6, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for name, value in (("weight_ih_l0", W), ("weight_hh_l0", U), ("bias_ih_l0", b), ("bias_hh_l0", 0 * b)):
            getattr(theirs, name).copy_(value)
        h, (last_hidden, last_cell) = theirs(x, (hidden[None], cell[None]))
    for actual, expected in zip(
        ops.reference(x, W, U, b, hidden, cell), (h, last_hidden[0], last_cell[0]), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@each_form
@given(
    T=st.integers(2, 20), D=st.integers(1, 5), E=st.integers(1, 5), data=st.data(), seed=st.integers(0, 1000)
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_a_sequence_may_be_split_anywhere(form, T, D, E, data, seed):
    t = data.draw(st.integers(1, T - 1))
    x, *weights, hidden, cell = draw(2, T, D, E, seed=seed)
    h, last_hidden, last_cell = FORMS[form](x, *weights, hidden, cell)
    assert h.shape == (2, T, E)
    assert torch.equal(last_hidden, h[:, -1])
    first, *between = FORMS[form](x[:, :t], *weights, hidden, cell)
    second, *end = FORMS[form](x[:, t:], *weights, *between)
    torch.testing.assert_close(torch.cat([first, second], 1), h, rtol=1e-11, atol=1e-12)
    for actual, expected in zip(end, (last_hidden, last_cell), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@each_form
def test_closed_gates_hold_a_cell_and_open_ones_replace_it(form):
    D = E = 1
    cell, zero = torch.tensor([[0.7]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    x, W, U = torch.zeros(1, 5, D, dtype=torch.float64), torch.zeros(4 * E, D).double(), torch.zeros(4 * E, E).double()
    hold = torch.tensor([-100.0, 100.0, 3.0, 100.0], dtype=torch.float64)  # no input, nothing forgotten
    _, _, last = FORMS[form](x, W, U, hold, zero, cell)
    assert last.item() == pytest.approx(0.7, rel=1e-12)
    replace = torch.tensor([100.0, -100.0, 0.5, 100.0], dtype=torch.float64)
    h, _, last = FORMS[form](x, W, U, replace, zero, cell)
    assert last.item() == pytest.approx(math.tanh(0.5), rel=1e-12)
    assert h[0, 0, 0].item() == pytest.approx(math.tanh(math.tanh(0.5)), rel=1e-12)


def test_on_a_gpu_float32_is_not_rounded_for_the_products(monkeypatch):
    """The gate allows logits 1e-3; in tf32 those of lstm-30m differ by 7e-4."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    LanguageModel(preset("lstm-tiny"), seed=None, device="cpu")
    assert torch.backends.cudnn.allow_tf32
    LanguageModel(preset("lstm-tiny"), seed=None, device="cuda")  # without parameters, which would need the GPU
    assert not torch.backends.cudnn.allow_tf32
