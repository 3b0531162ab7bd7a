"""One contract for every mixer of the registry: whoever adds a mixer adds a case here."""

import pytest
import torch
from torch import Tensor

from models import cost
from models.config import AttentionConfig, MambaConfig, ModelConfig
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.mixers import MIXERS

CPU = torch.device("cpu")
WIDTH = 72  # expanded to 144: more than one group of channels in the compiled scan and convolution
CASES = {
    "attention-sdpa": AttentionConfig(heads=4, backend="sdpa"),
    "attention-reference": AttentionConfig(heads=4, backend="reference"),
    "attention-grouped-sdpa": AttentionConfig(heads=4, kv_heads=2, backend="sdpa"),
    "attention-grouped-reference": AttentionConfig(heads=4, kv_heads=1, backend="reference"),
    "attention-numba": AttentionConfig(heads=4, backend="numba"),
    "attention-grouped-numba": AttentionConfig(heads=4, kv_heads=2, backend="numba"),
    "mamba-reference": MambaConfig(state=6, backend="reference"),
    "mamba-torch": MambaConfig(state=6, backend="torch"),
    "mamba-numba": MambaConfig(state=6, backend="numba"),
    "mamba-numba-wide": MambaConfig(state=3, expand=3, conv_width=5, dt_rank=7, backend="numba"),
}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
each_mixer = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def config(name: str) -> ModelConfig:
    return ModelConfig(vocabulary=11, width=WIDTH, layers=2, mixer=CASES[name])


def build(name: str, dtype: torch.dtype = torch.float32):
    torch.set_default_dtype(dtype)
    try:
        mixer = MIXERS[CASES[name].kind](config(name), CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        mixer.reset_parameters(torch.Generator().manual_seed(0))
    return mixer


def tokens(batch: int, time: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_every_registered_mixer_and_backend_has_a_case():
    assert {case.kind for case in CASES.values()} == set(MIXERS)
    assert {name: build(name).backend.name for name in CASES} == {name: c.backend for name, c in CASES.items()}


@each_mixer
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (2, 3), (3, 35)])
@torch.no_grad()
def test_shapes(name, batch, time):
    mixer, x = build(name), tokens(batch, time)
    y, state = mixer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert state is None
    state = mixer.make_state(batch, time + 1, torch.float32, CPU)
    assert state.length == 0
    y, state = mixer(x, state)
    assert y.shape == x.shape
    assert state.length == time
    y, state = mixer.step(x[:, 0], state)
    assert y.shape == (batch, WIDTH)
    assert state.length == time + 1


@each_mixer
@pytest.mark.parametrize("t", [0, 1, 16])
@torch.no_grad()
def test_a_token_changes_nothing_before_it(name, t):
    mixer, x = build(name), tokens(2, 37)
    changed = x.clone()
    changed[:, t] += 3
    before, after = mixer(x)[0], mixer(changed)[0]
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t] - after[:, t]).abs().amax(-1).min() > 1e-3
    assert (before[:, -1] - after[:, -1]).abs().max() > 0  # and it is not forgotten


@each_mixer
@each_dtype
@pytest.mark.parametrize("chunk", [1, 3, 17])
@torch.no_grad()
def test_chunks_through_the_state_equal_the_whole(name, dtype, chunk):
    mixer, x = build(name, dtype), tokens(2, 37, dtype)
    state = mixer.make_state(2, 37, dtype, CPU)
    parts = []
    for start in range(0, 37, chunk):
        y, state = mixer(x[:, start : start + chunk], state)
        parts.append(y)
    close(torch.cat(parts, 1), mixer(x)[0])
    assert state.length == 37


@each_mixer
@each_dtype
@pytest.mark.parametrize("prompt", [0, 2, 20])
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole(name, dtype, prompt):
    mixer, x = build(name, dtype), tokens(3, 24, dtype)
    whole = mixer(x)[0]
    state = mixer.make_state(3, 24, dtype, CPU)
    if prompt:
        y, state = mixer(x[:, :prompt], state)
        close(y, whole[:, :prompt])
    for t in range(prompt, 24):
        y, state = mixer.step(x[:, t], state)
        close(y, whole[:, t])


@each_mixer
@torch.no_grad()
def test_steps_then_a_chunk_equal_the_whole(name):
    mixer, x = build(name), tokens(2, 9)
    state = mixer.make_state(2, 9, torch.float32, CPU)
    for t in range(2):
        _, state = mixer.step(x[:, t], state)
    y, state = mixer(x[:, 2:], state)
    close(y, mixer(x)[0][:, 2:])


@each_mixer
@each_dtype
def test_gradients_are_finite_and_reach_everything(name, dtype):
    mixer, x = build(name, dtype), tokens(2, 21, dtype).requires_grad_()
    mixer(x)[0].square().sum().backward()
    for what, tensor in [("x", x), *mixer.named_parameters()]:
        assert tensor.grad is not None, what
        assert tensor.grad.isfinite().all(), what
        assert tensor.grad.abs().max() > 0, what


@each_mixer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "max_len"), [(1, 1), (3, 50)])
def test_state_bytes_are_counted(name, dtype, batch, max_len):
    expected = cost.state_bytes(config(name), batch, max_len, dtype.itemsize)
    state = LanguageModel(config(name), seed=0).make_state(batch, max_len, dtype)
    assert state.nbytes == expected
    assert sum(block.nbytes for block in state.blocks) == expected
    one = build(name).make_state(batch, max_len, dtype, CPU)
    assert one.nbytes * 2 == expected


@each_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_16_bit_state_changes_only_the_precision(name, dtype):
    mixer, x = build(name), tokens(2, 12)
    whole = mixer(x)[0]
    state = mixer.make_state(2, 12, dtype, CPU)
    nbytes = state.nbytes
    y, state = mixer(x[:, :5], state)
    parts = [y]
    for t in range(5, 8):
        y, state = mixer.step(x[:, t], state)
        parts.append(y[:, None])
    y, state = mixer(x[:, 8:], state)
    got = torch.cat([*parts, y], 1)
    assert got.dtype == torch.float32
    assert (got - whole).abs().max() < 0.02 * whole.abs().max()
    assert state.nbytes == nbytes


@each_mixer
@torch.no_grad()
def test_a_clone_is_independent(name):
    mixer, x = build(name), tokens(2, 8)
    _, state = mixer(x[:, :5], mixer.make_state(2, 8, torch.float32, CPU))
    clone = state.clone()
    expected, _ = mixer(x[:, 5:], state.clone())
    mixer(-x[:, 5:], state)  # writes into the buffers of `state`
    for t in range(5, 8):
        y, clone = mixer.step(x[:, t], clone)
        close(y, expected[:, t - 5])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attention")])
@torch.no_grad()
def test_a_full_cache_is_a_user_error(name):
    mixer, x = build(name), tokens(1, 6)
    with pytest.raises(ConfigError, match=r"holds 5 tokens, 6 were asked for"):
        mixer(x, mixer.make_state(1, 5, torch.float32, CPU))
    _, state = mixer(x, mixer.make_state(1, 6, torch.float32, CPU))
    with pytest.raises(ConfigError, match=r"holds 6 tokens, 7 were asked for"):
        mixer.step(x[:, 0], state)


@each_mixer
@pytest.mark.parametrize("feedforward", [False, True])
@torch.no_grad()
def test_the_model_continues_its_own_state(name, feedforward):
    given = config(name).to_dict() | {"feedforward": {"kind": "swiglu"} if feedforward else None}
    model = LanguageModel(ModelConfig.from_dict(given), seed=3)
    text = torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0))
    whole = model(text)
    logits, state = model.prefill(text[:, :3], model.make_state(2, 15))
    close(logits, whole[:, 2])
    logits, state = model.prefill(text[:, 3:8], state)
    close(logits, whole[:, 7])
    for t in range(8, 15):
        logits, state = model.step(text[:, t], state)
        close(logits, whole[:, t])
    assert state.length == 15


@each_mixer
@torch.no_grad()
def test_a_16_bit_model_runs_and_resembles_the_full_one(name):
    full = LanguageModel(config(name), seed=3)
    half = LanguageModel(config(name), seed=None, dtype=torch.bfloat16).to_empty(device="cpu")
    half.tie()
    half.load_state_dict(full.state_dict())
    text = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = full(text)
    got = half(text)
    assert got.dtype == torch.bfloat16
    assert (got - whole).abs().max() < 0.05 * whole.abs().max()
    logits, state = half.prefill(text[:, :7], half.make_state(2, 9))
    assert (logits - whole[:, 6]).abs().max() < 0.05 * whole.abs().max()
    for t in (7, 8):
        logits, state = half.step(text[:, t], state)
        assert (logits - whole[:, t]).abs().max() < 0.05 * whole.abs().max()
