"""Every form of the mixture of experts against the readable one, and the routing around them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from models.feedforward.moe import MoE, MoEConfig
from models.ops import experts as ops
from models.ops.kernels import load
from models.replay import Allocations

FORMS = {"reference": ops.reference, "torch": load("torch").experts, "numba": load("numba").experts}
NAMES = ("x", "weight", "gate_up", "down")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
each_form = pytest.mark.parametrize("form", FORMS)
CPU = torch.device("cpu")


def draw(M, D, F, X, K, dtype=torch.float64, *, seed=0):
    """x, chosen (K different experts for each token), weight, gate_up, down."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    chosen = torch.rand(M, X, generator=g).argsort(1)[:, :K]
    return [normal(M, D), chosen, normal(M, K).softmax(1), normal(X, 2 * F, D), normal(X, D, F)]


def by_hand(x, chosen, weight, gate_up, down):
    y = torch.zeros_like(x)
    for m in range(len(x)):
        for k in range(chosen.shape[1]):
            gate, up = (gate_up[chosen[m, k]] @ x[m]).chunk(2)
            hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
            y[m] += weight[m, k] * (down[chosen[m, k]] @ torch.tensor(hidden, dtype=x.dtype))
    return y


def differentiate(form, inputs, dtype):
    x, chosen, *rest = inputs
    leaves = [m.detach().to(dtype).requires_grad_() for m in (x, *rest)]
    y = form(leaves[0], chosen, *leaves[1:])
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    return [y.detach(), *torch.autograd.grad((y * along).sum(), leaves)]


def agree(form, inputs, dtype, tolerance):
    actual, expected = differentiate(form, inputs, dtype), differentiate(ops.reference, inputs, torch.float64)
    for what, got, exact in zip(("y", *NAMES), actual, expected, strict=True):
        assert got.dtype == dtype
        assert got.shape == exact.shape
        assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max(), what


# tokens, width, hidden, experts, experts per token: one of all, a few of many (some idle), all of them
SHAPES = [(1, 1, 1, 1, 1), (1, 4, 3, 3, 2), (7, 4, 3, 5, 1), (40, 6, 5, 8, 2), (3, 4, 3, 20, 2), (9, 4, 5, 4, 4)]


@each_form
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_sum_by_hand(form, shape):
    inputs = draw(*shape)
    torch.testing.assert_close(FORMS[form](*inputs), by_hand(*inputs), rtol=1e-12, atol=1e-12)


@each_form
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(form, dtype, shape):
    agree(FORMS[form], draw(*shape, dtype), dtype, TOLERANCE[dtype])


@each_form
@each_dtype
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_every_token_to_one_expert(form, dtype, expert):
    inputs = draw(11, 4, 3, 5, 1, dtype)
    inputs[1] = torch.full_like(inputs[1], expert)
    agree(FORMS[form], inputs, dtype, TOLERANCE[dtype])
    gradients = differentiate(FORMS[form], inputs, dtype)[3:]
    for gradient in gradients:  # those that nobody asked learn nothing
        touched = gradient.flatten(1).abs().amax(1) > 0
        assert touched.tolist() == [i == expert for i in range(5)]


@each_form
def test_gradients_are_those_of_finite_differences(form):
    x, chosen, *rest = draw(4, 3, 2, 3, 2)
    leaves = [m.requires_grad_() for m in (x, *rest)]
    assert torch.autograd.gradcheck(lambda x, *rest: FORMS[form](x, chosen, *rest), leaves)


@each_form
@given(
    M=st.integers(1, 30), D=st.integers(1, 6), F=st.integers(1, 6), X=st.integers(1, 9), data=st.data(),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_any_shape(form, M, D, F, X, data, seed):
    K = data.draw(st.integers(1, X))
    inputs = draw(M, D, F, X, K, seed=seed)
    torch.testing.assert_close(FORMS[form](*inputs), ops.reference(*inputs), rtol=1e-11, atol=1e-11)


@each_form
def test_tokens_do_not_see_each_other(form):
    x, chosen, *rest = draw(12, 4, 3, 5, 2)
    whole = FORMS[form](x, chosen, *rest)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    weight, *matrices = rest
    torch.testing.assert_close(
        FORMS[form](x[order], chosen[order], weight[order], *matrices), whole[order], rtol=1e-12, atol=1e-12
    )


class WholeGradients(TorchDispatchMode):
    """Counts the operations whose result has a shape of interest."""

    def __init__(self, *shapes: torch.Size) -> None:
        super().__init__()
        self.made = dict.fromkeys(shapes, 0)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if isinstance(result, torch.Tensor) and result.shape in self.made:
            self.made[result.shape] += 1
        return result


def test_the_gradient_of_all_experts_is_written_once():
    """Not once for each of them, which would cost more than their products do."""
    x, chosen, weight, gate_up, down = draw(40, 6, 5, 8, 2)
    leaves = [m.requires_grad_() for m in (x, weight, gate_up, down)]
    y = ops.by_expert(x, chosen, weight, gate_up, down)
    with WholeGradients(gate_up.shape, down.shape) as seen:
        torch.autograd.grad(y.sum(), leaves)
    assert seen.made == {gate_up.shape: 1, down.shape: 1}


def test_reading_holds_no_more_than_three_times_what_goes_to_the_experts():
    """The copies in their order, what comes of them, and that in one piece; not the copies in another order as well."""
    x, chosen, weight, gate_up, down = draw(512, 64, 8, 8, 2)
    with torch.no_grad(), Allocations() as seen:
        ops.by_expert(x, chosen, weight, gate_up, down)
    assert seen.peak < 3.2 * chosen.shape[1] * x.nbytes


# widths that a GPU takes, rows of 16 bytes, and some that are filled up to them
@pytest.mark.parametrize("shape", [(40, 16, 8, 4, 2), (5, 16, 24, 6, 2), (9, 8, 16, 3, 3), (30, 13, 11, 5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_form_agrees_within_16_bits(shape, dtype):
    agree(ops.grouped, draw(*shape, dtype), dtype, 0.03)


def test_weights_that_need_no_filling_up_are_not_copied():
    """A decode step reads those of the chosen experts alone."""
    x, chosen, weight, gate_up, down = draw(2, 64, 64, 8, 2, torch.bfloat16)
    with torch.no_grad(), Allocations() as seen:
        ops.grouped(x, chosen, weight, gate_up, down)
    assert 0 < seen.peak < down.nbytes / 2
    gate_up, down = gate_up[..., :60].contiguous(), down[:, :60].contiguous()
    with torch.no_grad(), Allocations() as seen:
        ops.grouped(x[:, :60], chosen, weight, gate_up, down)
    assert seen.peak > gate_up.nbytes + down.nbytes


def test_the_grouped_form_with_idle_experts():
    inputs = draw(24, 16, 8, 6, 1, torch.float32)
    inputs[1] = torch.where(inputs[1] < 3, 1, 4)
    agree(ops.grouped, inputs, torch.float32, 0.03)


def build(dtype=torch.float32, backend="auto", width=12, **settings) -> MoE:
    torch.set_default_dtype(dtype)
    try:
        layer = MoE(MoEConfig(**{"experts": 5, "top_k": 2, "hidden": 7, **settings}), width, backend, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        layer.reset_parameters(torch.Generator().manual_seed(0))
    return layer


def tokens(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_the_layer_is_the_sum_of_its_best_experts(backend):
    layer, x = build(torch.float64, backend, top_k=3), tokens(2, 9, dtype=torch.float64)
    y, routing = layer(x)
    counts = torch.zeros(5)
    for b in range(2):
        for t in range(9):
            scores = layer.router.weight @ x[b, t]
            best = scores.sort(descending=True).indices[:3]
            shares = scores[best].exp() / scores[best].exp().sum()
            counts[best] += 1
            expected = torch.zeros_like(x[b, t])
            for share, i in zip(shares, best, strict=True):
                gate, up = (layer.gate_up[i] @ x[b, t]).chunk(2)
                expected += share * (layer.down[i] @ (F.silu(gate) * up))
            torch.testing.assert_close(y[b, t], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(routing.load, counts / counts.sum())


@given(experts=st.integers(1, 9), data=st.data(), M=st.integers(1, 40), balance=st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_the_load_sums_to_one(experts, data, M, balance):
    layer = build(experts=experts, top_k=data.draw(st.integers(1, experts)), balance=balance)
    y, routing = layer(tokens(M))
    assert y.shape == (M, 12)
    assert routing.load.shape == (experts,)
    assert routing.load.sum().item() == pytest.approx(1, abs=1e-6)
    assert routing.load.min() >= 0
    assert routing.load.max() <= 1 / layer.config.top_k + 1e-6
    # never below that of an even load with even probabilities, were the two in step; X at most
    assert 0 <= routing.balance.item() <= balance * experts * (1 + 1e-5)


def test_the_balance_of_an_even_load_is_its_weight():
    """Tokens along the axes of an identity for a router: each expert is the best of as many."""
    layer = build(experts=12, top_k=1, balance=0.03)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(12) * 4)
    _, routing = layer(torch.eye(12).repeat(3, 1))
    torch.testing.assert_close(routing.load, torch.full((12,), 1 / 12))
    assert routing.balance.item() == pytest.approx(0.03, rel=1e-5)


def test_the_balance_of_a_collapsed_router_is_as_many_times_its_weight_as_it_has_experts():
    layer = build(experts=5, top_k=1, balance=0.03)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[3] = 100
    _, routing = layer(torch.ones(6, 12))
    assert routing.load.tolist() == [0, 0, 0, 1, 0]
    assert routing.balance.item() == pytest.approx(5 * 0.03, rel=1e-5)


def test_the_balance_pushes_a_busy_expert_down():
    layer = build(experts=4, top_k=1, balance=1.0)
    x = tokens(64) + 1
    with torch.no_grad():
        layer.router.weight[2] += 0.2  # the favourite
    losses = []
    for _ in range(20):
        _, routing = layer(x)
        losses.append(routing.balance.item())
        (gradient,) = torch.autograd.grad(routing.balance, layer.router.weight)
        with torch.no_grad():
            layer.router.weight -= gradient
    assert losses[0] > 1.3
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("balance", [0.0, 0.01])
def test_gradients_reach_the_router_and_every_expert(backend, balance):
    layer, x = build(backend=backend, balance=balance), tokens(40).requires_grad_()
    y, routing = layer(x)
    ((y * tokens(40, seed=2)).sum() + routing.balance).backward()
    assert x.grad.abs().max() > 0
    assert layer.router.weight.grad.abs().amax(1).min() > 0
    for weight in (layer.gate_up, layer.down):
        assert weight.grad.flatten(1).abs().amax(1).min() > 0


def test_the_balance_alone_reaches_the_router_alone():
    layer, x = build(), tokens(40)
    layer(x)[1].balance.backward()
    assert layer.router.weight.grad.abs().max() > 0
    assert layer.gate_up.grad is None
    assert layer.down.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_is_computed_in_float32(autocast):
    """Its scores may differ by less than 16 bits can say: a token goes where the full model sends it."""
    layer, x = build(torch.float32 if autocast else torch.bfloat16, top_k=1), tokens(2, 200, dtype=torch.bfloat16)
    full = build(torch.float32, top_k=1)
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight[:1] + 1e-3 * layer.router.weight)  # all much alike
        full.load_state_dict(layer.state_dict())
        expected, wanted = full(x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, routing = layer(x)
    assert y.dtype == torch.bfloat16
    assert routing.balance.dtype == torch.float32
    assert torch.equal(routing.load, wanted.load)
    assert routing.load.max() < 0.9
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
