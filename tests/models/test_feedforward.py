"""One contract for every feed-forward layer: each position by itself, in every form, and what it says it costs."""

import pytest
import torch
import torch.nn.functional as F

from models.feedforward import FEEDFORWARDS
from models.feedforward.mlp import MLPConfig
from models.feedforward.moe import MoEConfig
from models.feedforward.swiglu import SwiGLUConfig

CPU = torch.device("cpu")
WIDTH = 10
CASES = {
    "swiglu": SwiGLUConfig(hidden=14),
    "mlp": MLPConfig(hidden=14),
    "mlp-relu": MLPConfig(activation="relu", bias=False),
    "moe": MoEConfig(experts=4, top_k=2, hidden=6),
    "moe-one": MoEConfig(experts=1, top_k=1, hidden=6, balance=0.0),
    "moe-all": MoEConfig(experts=3, top_k=3, hidden=6),
}
each_layer = pytest.mark.parametrize("name", CASES)


def build(name: str, backend: str = "auto", dtype: torch.dtype = torch.float64):
    torch.set_default_dtype(dtype)
    try:
        layer = FEEDFORWARDS[CASES[name].kind](CASES[name], WIDTH, backend, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        layer.reset_parameters(torch.Generator().manual_seed(0))
        for what, parameter in layer.named_parameters():
            if what.endswith("bias"):
                assert parameter.abs().max() == 0
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return layer


def draw(*shape, seed=1):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_layer_has_a_case():
    assert {case.kind for case in CASES.values()} == set(FEEDFORWARDS)


@each_layer
def test_each_position_is_by_itself(name):
    layer, x = build(name), draw(3, 7)
    y, routing = layer(x)
    assert y.shape == x.shape
    assert (routing is not None) == name.startswith("moe")
    for b, t in ((0, 0), (1, 6), (2, 3)):
        torch.testing.assert_close(layer(x[b, t][None])[0][0], y[b, t], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer(x[:, 0])[0], y[:, 0], rtol=1e-11, atol=1e-12)  # as a decode step calls it


@each_layer
@torch.no_grad()
def test_what_a_layer_gives_may_be_written_over(name):
    layer, x = build(name), draw(3, 7)
    y = layer(x)[0].untyped_storage().data_ptr()
    assert y not in {other.untyped_storage().data_ptr() for other in (x, *layer.parameters())}


@each_layer
@pytest.mark.parametrize("backend", ["torch", "numba", "sdpa", "auto"])
def test_every_form_is_the_reference_in_outputs_and_gradients(name, backend):
    found = []
    for form in (backend, "reference"):
        layer, x = build(name, form), draw(3, 7).requires_grad_()
        y, routing = layer(x)
        ((y * draw(3, 7, seed=3)).sum() + (routing.balance if routing else 0)).backward()
        found.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(*found, strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@each_layer
def test_parameters_are_counted(name):
    layer, config = build(name), CASES[name]
    assert sum(parameter.numel() for parameter in layer.parameters()) == config.parameters(WIDTH)
    assert any(layer.output_weight is parameter for parameter in layer.parameters())
    if name.startswith("moe"):
        idle = (config.experts - config.top_k) * 3 * WIDTH * config.hidden
        assert config.active_parameters(WIDTH) == config.parameters(WIDTH) - idle
    else:
        assert config.active_parameters(WIDTH) == config.parameters(WIDTH)


@pytest.mark.parametrize(("name", "activation"), [("mlp", F.gelu), ("mlp-relu", torch.relu)])
def test_the_perceptron_by_hand(name, activation):
    layer, x = build(name), draw(4)
    up, down = layer.up_proj, layer.down_proj
    bias = [m.bias if m.bias is not None else 0 for m in (up, down)]
    expected = activation(x @ up.weight.t() + bias[0]) @ down.weight.t() + bias[1]
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)
    assert (up.bias is None) == (name == "mlp-relu")
    assert up.weight.shape == (14 if name == "mlp" else 40, WIDTH)


def test_swiglu_by_hand():
    layer, x = build("swiglu"), draw(4)
    gate, up = (x @ layer.gate_up_proj.weight.t()).chunk(2, -1)
    expected = (gate / (1 + torch.exp(-gate)) * up) @ layer.down_proj.weight.t()
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_the_router_of_one_expert_per_token_learns_from_the_loss_itself():
    torch.manual_seed(0)
    layer = FEEDFORWARDS["moe"](MoEConfig(experts=4, top_k=1, hidden=6, balance=0.0), WIDTH, "reference", CPU)
    with torch.no_grad():
        layer.reset_parameters(torch.Generator().manual_seed(0))
    y, _ = layer(draw(5, 3).float())
    y.square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-6
