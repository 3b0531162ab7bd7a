"""What mixers say of themselves agrees with what they compute."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import ModelConfig
from models.feedforward.moe import MoE, MoEConfig
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.mixers.attention import AttentionConfig
from models.mixers.explanation import LONGEST, AttentionExplanation, MemoryExplanation, half_lives, remaining
from models.mixers.lstm import LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.ops.causal_conv1d import reference as causal_conv1d
from models.ops.experts import reference as experts
from models.ops.impulses import response
from models.ops.selective_scan import reference as selective_scan
from models.ops.ssd import reference as ssd
from models.ops.trapezoid import reference as trapezoid

WIDTH = 24
ATTENTION = {
    "plain": AttentionConfig(heads=3, backend="numba"),
    "grouped": AttentionConfig(heads=4, kv_heads=2, backend="sdpa"),
    "window": AttentionConfig(heads=3, window=4, backend="sdpa"),
    "both-ways": AttentionConfig(heads=3, causal=False),
    "unplaced": AttentionConfig(heads=3, rotary=False, bias=True),
    "convolved": AttentionConfig(heads=4, kv_heads=2, head_width=10, window=5, conv_width=3),
}
SCANS = {
    "mamba": MambaConfig(state=5, backend="numba"),
    "mamba-torch": MambaConfig(state=5, backend="torch", conv_width=2),
    "mamba-negative": MambaConfig(state=5, negative_eigenvalues=True),
    "mamba2": Mamba2Config(state=6, head_width=8, backend="numba"),
    "mamba2-groups": Mamba2Config(state=6, head_width=8, groups=3, backend="torch", grouped_norm=False),
    "mamba2-negative": Mamba2Config(state=6, head_width=8, groups=2, negative_eigenvalues=True),
    "mamba3": Mamba3Config(state=8, head_width=8),
    "mamba3-rotated": Mamba3Config(state=6, head_width=12, groups=2, rotated_fraction=1.0, backend="torch"),
}


def build(config) -> torch.nn.Module:
    """Weights larger than the initial ones, so that steps are of very different sizes."""
    mixer = MIXERS[config.kind](config, WIDTH, torch.device("cpu"))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        mixer.reset_parameters(generator)
        for parameter in mixer.parameters():
            if parameter.ndim == 2 and parameter.dtype is torch.float32 and parameter.shape[0] != 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return mixer


def text(batch: int = 2, time: int = 11, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, WIDTH, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_attention_weights_sum_to_one_and_give_the_output(name):
    mixer, x = build(ATTENTION[name]), text()
    said = mixer.explain(x)
    H, _, P = mixer.config.sizes(WIDTH)
    assert isinstance(said, AttentionExplanation)
    assert said.weights.shape == said.scores.shape == (2, H, 11, 11)
    assert said.mixed.shape == (2, 11, H, P)
    close(said.weights.sum(-1), torch.ones(2, H, 11))
    close(said.output, mixer(x)[0])
    # a hidden key has no weight, a seen one has; who sees whom, counted out
    window = mixer.config.window or 11
    seen = torch.tensor([[not mixer.config.causal or 0 <= t - s < window for s in range(11)] for t in range(11)])
    assert torch.equal(said.weights > 0, seen.expand(2, H, -1, -1))
    assert torch.equal(said.scores == -math.inf, ~seen.expand(2, H, -1, -1))
    close(said.scores.exp() / said.scores.exp().sum(-1, keepdim=True), said.weights)


@pytest.mark.parametrize("name", SCANS)
@torch.no_grad()
def test_the_matrix_of_a_scan_reproduces_it(name):
    mixer, x = build(SCANS[name]), text()
    said = mixer.explain(x)
    assert isinstance(said, MemoryExplanation)
    assert said.matrix is not None
    assert said.inputs is not None
    assert said.skip is not None
    y = torch.einsum("btsu,bsup->btup", said.matrix, said.inputs) + said.skip[:, None] * said.inputs
    close(y, said.scanned)
    close(said.output, mixer(x)[0], 2e-5)
    later = torch.ones(11, 11, dtype=torch.bool).triu(1)
    assert said.matrix.permute(1, 2, 0, 3)[later].abs().max() == 0
    assert said.matrix.abs().max() > 0.01


@pytest.mark.parametrize("name", [name for name in SCANS if SCANS[name].kind != "mamba3"])
@torch.no_grad()
def test_written_and_left_follow_the_state(name):
    """One more token at the end multiplies what was left by its decay; what the last token wrote is all left."""
    mixer, x = build(SCANS[name]), text(1)
    said, before = mixer.explain(x), mixer.explain(x[:, :-1])
    close(said.left[:, -1], said.written[:, -1])
    assert (said.left <= said.written * (1 + 1e-5)).all()
    close(said.written[:, :-1], before.written)
    if said.half_life.shape[-1] == 1:
        kept = 0.5 ** (1 / said.half_life[:, -1:, :, 0])
        close(said.left[:, :-1], before.left * kept, 1e-4)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba3"])
@torch.no_grad()
def test_what_a_lone_token_leaves_is_the_size_of_the_state(kind):
    """A text of one token, then tokens that write nothing: the state's size is what `left` says of the first."""
    mixer, x = build(SCANS[kind]), text(1, 1)
    said = mixer.explain(x)
    _, state = mixer(x, mixer.make_state(1, 1, torch.float32, torch.device("cpu")))
    size = state.ssm.flatten(2).norm(dim=-1)  # (B, U): of a channel's N, of a head's P x N
    close(said.left[:, 0], size)


def state_after(mixer, x: Tensor, s: int) -> Tensor:
    """h after x when only token s has an input: the recurrence is linear in it, so h is what that one left."""
    config = mixer.config

    def only(u: Tensor) -> Tensor:
        return u * (torch.arange(u.shape[1]) == s).view(-1, *(1,) * (u.ndim - 2))

    if config.kind == "mamba3":
        u, *given = mixer._inputs(x)
        return trapezoid(only(u), *given, *mixer._constants())[1].ssm
    if config.kind == "mamba":
        u = causal_conv1d(mixer.in_proj(x).chunk(2, -1)[0], mixer.conv_weight, mixer.conv_bias)
        dt, B, C = mixer.x_proj(u).split(mixer.split_sizes, -1)
        given = (mixer.dt_proj(dt), mixer.A, B, C, mixer.D, None, mixer.dt_bias, None, config.negative_eigenvalues)
        return selective_scan(only(u), *given)[1]
    _, u, dt = mixer.in_proj(x).split(mixer.split_sizes, -1)
    u, B, C = mixer._heads(causal_conv1d(u, mixer.conv_weight, mixer.conv_bias))
    return ssd(only(u), dt, mixer.A, B, C, mixer.D, mixer.dt_bias, None, config.negative_eigenvalues)[1]


@pytest.mark.parametrize("name", SCANS)
@torch.no_grad()
def test_what_a_token_leaves_is_the_size_of_the_state_without_the_others(name):
    mixer, x = build(SCANS[name]), text(1, 7)
    left = mixer.explain(x).left
    for s in range(7):
        close(left[:, s], state_after(mixer, x, s).flatten(2).norm(dim=-1))


@torch.no_grad()
def test_half_lives_of_mamba_are_those_of_the_paper():
    """Formed here from the parameters alone: ln 2 / (-dt A), dt = softplus of the projection and its bias."""
    mixer, x = build(SCANS["mamba-torch"]), text(1, 4)
    u = mixer.ops.causal_conv1d(mixer.in_proj(x)[..., : 2 * WIDTH], mixer.conv_weight, mixer.conv_bias, None)
    rank = mixer.dt_proj.weight.shape[1]
    dt = torch.log1p(torch.exp(mixer.dt_proj(mixer.x_proj(u)[..., :rank]) + mixer.dt_bias))
    expected = math.log(2) / (dt[..., None] * mixer.A_log.exp())
    torch.testing.assert_close(mixer.explain(x).half_life, expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_a_recurrent_cell_says_what_its_forget_gate_keeps():
    mixer, x = build(LSTMConfig(hidden=7)), text(1, 6)
    said = mixer.explain(x)
    close(said.output, mixer(x)[0])
    assert said.matrix is None
    h, cell = torch.zeros(1, 7), torch.zeros(1, 7)
    for t in range(6):
        gates = mixer.input_weight @ x[0, t] + mixer.hidden_weight @ h[0] + mixer.bias
        i, f, g, o = gates.chunk(4)
        close(0.5 ** (1 / said.half_life[0, t, :, 0]), f.sigmoid())
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.tanh()
    close(said.left[:, -1], (i.sigmoid() * g.tanh()).abs()[None])


@torch.no_grad()
def test_the_mimo_form_says_nothing():
    assert build(Mamba3Config(state=8, head_width=8, rank=2)).explain(text()) is None


@pytest.mark.parametrize("top_k", [1, 2])
@torch.no_grad()
def test_the_experts_said_to_be_chosen_give_the_output(top_k):
    layer = MoE(MoEConfig(experts=4, top_k=top_k, hidden=8), WIDTH, "auto", torch.device("cpu"))
    layer.reset_parameters(torch.Generator().manual_seed(0))
    x = text()
    said = layer.choice(x)
    assert said.chosen.shape == said.weight.shape == (2, 11, top_k)
    y = experts(
        x.flatten(0, 1), said.chosen.flatten(0, 1), said.weight.flatten(0, 1), layer.gate_up, layer.down
    )  # fmt: skip
    close(y.view(x.shape), layer(x)[0])
    close(said.probability.sum(-1), torch.ones(2, 11))
    if top_k > 1:
        close(said.weight.sum(-1), torch.ones(2, 11))


@pytest.mark.parametrize("post_norm", [False, True])
@torch.no_grad()
def test_a_block_explains_what_it_computes(post_norm):
    """Mixer and experts are asked about what they read in the block, before or after its norms."""
    config = ModelConfig(
        vocabulary=11, width=WIDTH, layers=1, mixer=AttentionConfig(heads=2),
        feedforward=MoEConfig(experts=4, hidden=8), post_norm=post_norm,
    )  # fmt: skip
    block, x = LanguageModel(config, seed=0).blocks[0], text()
    said, choice = block.explain(x)
    y = x + said.output
    y = block.mixer_norm(y) if post_norm else y
    close(choice.probability, block.feedforward.choice(y if post_norm else block.feedforward_norm(y)).probability)
    after = y + block.feedforward(y if post_norm else block.feedforward_norm(y))[0]
    close(block.feedforward_norm(after) if post_norm else after, block(x).stream)


@given(st.lists(st.floats(0, 50) | st.just(math.inf), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_half_lives_and_what_remains(rates):
    rate = torch.tensor(rates, dtype=torch.float64)[None]
    halves = half_lives(rate)
    assert halves.isfinite().all()
    assert (halves <= LONGEST * (1 + 1e-9)).all()
    assert (halves[rate == math.inf] == 0).all()  # all is forgotten at once
    known = (rate > 1e-8) & rate.isfinite()
    torch.testing.assert_close((-rate * halves).exp()[known], torch.full_like(rate, 0.5)[known])
    for t in range(len(rates)):
        assert float(remaining(rate)[0, t]) == pytest.approx(math.exp(-sum(rates[t + 1 :])), rel=1e-9, abs=1e-12)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_response_is_the_matrix_of_a_linear_map(steps, units, seed):
    maps = torch.randn(2, steps, steps, units, generator=torch.Generator().manual_seed(seed))

    def scan(u: Tensor) -> Tensor:
        return torch.einsum("btsu,bsu->btu", maps.repeat_interleave(len(u) // 2, 0), u)

    assert torch.equal(response(scan, 2, steps, units, maps), maps)
