"""A decode step of a whole residual branch, compiled, against norm, layer and sum one after another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.block import Block, summed
from models.config import BlockConfig, ModelConfig
from models.feedforward import FeedForward
from models.feedforward.moe import MoEConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.mixers import Mixer
from models.mixers.attention import AttentionConfig
from models.mixers.lstm import LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.ops.kernels import load, numba_branch, numba_step

WIDTH = 16
MIXERS = {
    "attention": AttentionConfig(heads=4, kv_heads=2),
    "attention without positions": AttentionConfig(heads=2, rotary=False),
    "attention, odd": AttentionConfig(heads=2, head_width=5, rotary=False),
    "window": AttentionConfig(heads=2, window=3),
    "mamba": MambaConfig(state=5),
    "mamba, negative": MambaConfig(negative_eigenvalues=True),
    "mamba2": Mamba2Config(head_width=8, state=6, groups=2),
    "mamba2, negative": Mamba2Config(head_width=16, state=4, negative_eigenvalues=True),
    "mamba3": Mamba3Config(head_width=8, state=8),
    "mamba3, by groups, all rotated": Mamba3Config(head_width=8, state=6, groups=2, rotated_fraction=1.0, A_floor=0.5),
    "lstm": LSTMConfig(),
    "lstm, wide": LSTMConfig(hidden=21),
}
FEEDFORWARDS = {
    "swiglu": SwiGLUConfig(hidden=11), "experts": MoEConfig(experts=5, top_k=2, hidden=6),
    "one expert": MoEConfig(experts=3, top_k=1, hidden=7), "all experts": MoEConfig(experts=3, top_k=3, hidden=4),
}  # fmt: skip
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def block(mixer, dtype: torch.dtype, feedforward=FEEDFORWARDS["swiglu"], **changes) -> Block:
    one = BlockConfig(mixer=mixer, feedforward=feedforward)
    config = ModelConfig(vocabulary=8, width=WIDTH, layers=1, mixer=mixer, feedforward=one.feedforward, **changes)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = Block(config, one, torch.device("cpu"))
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    finally:
        torch.set_default_dtype(default)
    return made.eval()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiled branches that run, by name, from here on."""
    seen: list[str] = []
    form = load("numba")
    for name in [name for name in form.__all__ if name.endswith("_branch")]:
        real = getattr(form, name)
        monkeypatch.setattr(form, name, lambda *given, real=real, name=name: (seen.append(name), real(*given))[1])
    return seen


@pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"post_norm": True}, {"norm": "layernorm"}])
@pytest.mark.parametrize("feedforward", [*FEEDFORWARDS.values(), None])
@torch.no_grad()
def test_a_step_that_has_no_branch_of_its_own_is_the_sequence(changes, feedforward):
    """Dropout does nothing in decoding, but that such a block steps part by part."""
    made, x = block(MIXERS["mamba2"], torch.float64, feedforward, **changes), torch.randn(2, 5, WIDTH).double()
    state = made.mixer.make_state(2, 5, torch.float64, torch.device("cpu"))
    whole = made(x).stream
    for t in range(5):
        y, state = made.step(x[:, t].clone(), state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-10, atol=1e-10)


def test_a_sum_takes_the_place_of_what_is_narrower_than_it_nowhere():
    narrow, wide = torch.ones(2, 3).bfloat16(), torch.full((2, 3), 2**-12)
    assert torch.equal(summed(narrow, wide, True), torch.ones(2, 3) + 2**-12)
    assert torch.equal(narrow, torch.ones(2, 3).bfloat16())
    assert summed(wide, narrow, True) is wide


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(MIXERS)), other=st.sampled_from(list(FEEDFORWARDS)), rows=st.integers(1, 6),
    before=st.integers(0, 5), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 9),
)  # fmt: skip
def test_is_the_layer_between_norm_and_sum(
    name: str, other: str, rows: int, before: int, dtype: torch.dtype, seed: int
):
    made = block(MIXERS[name], dtype, FEEDFORWARDS[other])
    drawn = torch.randn(rows, before + 3, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        state = made.mixer.make_state(rows, before + 3, dtype, torch.device("cpu"))
        if before:
            _, state = made.mixer(made.mixer_norm(drawn[:, :before]), state)
        apart = state.clone()
        for t in range(before, before + 3):
            x = drawn[:, t].contiguous()
            together, state = made.step(x, state)
            y, apart = Mixer.branch_step(made.mixer, x, made.mixer_norm, apart)
            assert made.feedforward is not None
            assert made.feedforward_norm is not None
            y = FeedForward.branch_step(made.feedforward, y, made.feedforward_norm)
            scale = y.abs().max().clamp_min(1)
            assert (together - y).abs().max() <= TOLERANCE[dtype] * scale
            assert state.length == apart.length == t + 1
            for field, buffer in state.buffers.items():
                other = apart.buffers[field]
                assert (buffer - other).abs().max() <= TOLERANCE[dtype] * other.abs().max().clamp_min(1), field


@pytest.mark.parametrize("name", list(MIXERS))
def test_runs_compiled_where_it_can_and_only_there(name: str, monkeypatch: pytest.MonkeyPatch):
    seen = calls(monkeypatch)
    own = MIXERS[name].kind + "_branch"
    x = torch.randn(1, WIDTH)

    def step(made: Block, x: torch.Tensor, dtype: torch.dtype | None = None) -> list[str]:
        seen.clear()
        made.step(x, made.mixer.make_state(x.shape[0], 4, dtype or x.dtype, torch.device("cpu")))
        return seen

    made = block(MIXERS[name], torch.float32)
    with torch.no_grad():
        assert step(made, x) == [own, "swiglu_branch"]
        assert step(made, torch.randn(4, WIDTH)) == [own, "swiglu_branch"]
        assert step(made, torch.randn(5, WIDTH)) == []  # a product of its own for each part is faster then
        assert step(made, x, torch.bfloat16) == ["swiglu_branch"]  # a cache in another type
        assert step(block(MIXERS[name], torch.float32, norm="layernorm"), x) == []
        assert step(block(MIXERS[name], torch.float32, post_norm=True), x) == []
        assert step(block(MIXERS[name], torch.float32, dropout=0.5), x) == []
        experts = [own, "experts_branch"]
        assert step(block(MIXERS[name], torch.float32, FEEDFORWARDS["experts"]), x) == experts
        assert step(block(MIXERS[name], torch.float32, FEEDFORWARDS["experts"]), torch.randn(5, WIDTH)) == []
    if MIXERS[name].kind != "attention":
        return
    with torch.no_grad():
        assert step(block(AttentionConfig(heads=2, bias=True), torch.float32), x) == ["swiglu_branch"]
        assert step(block(AttentionConfig(heads=2, conv_width=3), torch.float32), x) == ["swiglu_branch"]


def test_a_gradient_is_never_lost():
    """With autograd on, a branch goes its parts' way, which has a gradient."""
    made = block(MIXERS["mamba"], torch.float64)
    plain = block(MambaConfig(state=5, backend="reference"), torch.float64)
    plain.load_state_dict(made.state_dict())
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    gradients = []
    for one in (plain, made):
        given = x.clone().requires_grad_()
        assert one.feedforward is not None
        assert one.feedforward_norm is not None
        one.feedforward.branch_step(given, one.feedforward_norm).square().sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert torch.allclose(*gradients, atol=1e-12)


def test_a_long_cache_is_split_over_threads_with_the_same_result(monkeypatch: pytest.MonkeyPatch):
    made = block(MIXERS["attention"], torch.float64)
    x, text = torch.randn(1, WIDTH, dtype=torch.float64), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    found = []
    with torch.no_grad():
        for limit in (1 << 21, 1):
            monkeypatch.setattr(numba_branch, "WORK_PER_THREAD", limit)
            monkeypatch.setattr(numba_step, "WORK_PER_THREAD", limit)
            _, state = made.mixer(text, made.mixer.make_state(1, 10, torch.float64, torch.device("cpu")))
            found.append(made.step(x, state)[0])
    assert torch.allclose(*found, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["mamba2", "mamba3", "lstm"])
def test_a_state_of_other_sequences_is_refused(name: str):
    made = block(MIXERS[name], torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match="the state is of 2 sequences"):
        made.step(torch.randn(1, WIDTH), made.mixer.make_state(2, 4, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scores_of_any_size_choose_and_weigh_experts(dtype: torch.dtype):
    """Far apart, a softmax is 1 and 0; equal ones share, and the first is taken."""
    made = block(MIXERS["lstm"], dtype, FEEDFORWARDS["experts"])
    experts, norm = made.feedforward, made.feedforward_norm
    x = torch.randn(1, WIDTH, dtype=dtype)
    with torch.no_grad():
        for scale in (1e-3, 1.0, 1e3):
            experts.router.weight.mul_(scale)
            expected = FeedForward.branch_step(experts, x, norm)
            assert torch.allclose(experts.branch_step(x, norm), expected, rtol=1e-5, atol=1e-6)
            experts.router.weight.div_(scale)
        experts.router.weight.zero_()
        parts = [load("reference").experts(norm(x), torch.tensor([[e]]), torch.ones(1, 1, dtype=dtype), experts.gate_up,
                                           experts.down) for e in (0, 1)]  # fmt: skip
        assert torch.allclose(experts.branch_step(x, norm), x + (parts[0] + parts[1]) / 2, rtol=1e-5, atol=1e-6)
