"""Analytic cost against what is counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import cost
from models.config import AttentionConfig, MambaConfig, ModelConfig, SwiGLUConfig
from models.language_model import LanguageModel
from models.presets import PRESETS

SIZES = sorted({name.partition("-")[2] for name in PRESETS})
OTHERS = {
    "grouped": ModelConfig(
        vocabulary=300, width=96, layers=3, mixer=AttentionConfig(heads=6, kv_heads=2), feedforward=SwiGLUConfig(),
        tie_embeddings=False,
    ),
    "bare-attention": ModelConfig(vocabulary=300, width=64, layers=2, mixer=AttentionConfig(heads=4)),
    "odd-mamba": ModelConfig(
        vocabulary=300, width=40, layers=2, feedforward=SwiGLUConfig(hidden=50), tie_embeddings=False,
        mixer=MambaConfig(state=7, expand=3, conv_width=5, dt_rank=6),
    ),
}  # fmt: skip
CONFIGS = {**PRESETS, **OTHERS}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name):
    config = CONFIGS[name]
    model = LanguageModel(config, seed=None)
    ends = {id(model.embedding.weight): model.embedding.weight, id(model.head.weight): model.head.weight}
    counted = sum(parameter.numel() for parameter in model.parameters())
    expected = cost.parameters(config)
    assert expected.total == expected.active == counted
    assert expected.non_embedding == counted - sum(weight.numel() for weight in ends.values())


@pytest.mark.parametrize("size", SIZES)
def test_pairs_are_matched(size):
    transformer, mamba = PRESETS[f"transformer-{size}"], PRESETS[f"mamba-{size}"]
    a, b = cost.parameters(transformer).non_embedding, cost.parameters(mamba).non_embedding
    assert abs(a - b) < 0.01 * min(a, b)
    assert mamba.layers == 2 * transformer.layers
    assert (mamba.vocabulary, mamba.width) == (transformer.vocabulary, transformer.width)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_bytes_are_those_of_the_model(name, dtype):
    model = LanguageModel(CONFIGS[name], seed=None, dtype=dtype)
    assert cost.weight_bytes(CONFIGS[name], dtype.itemsize) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_those_of_the_model(name, dtype):
    config = CONFIGS[name]
    state = LanguageModel(config, seed=None).make_state(3, 17, dtype)  # on the meta device: no memory is taken
    assert state.nbytes == cost.state_bytes(config, 3, 17, dtype.itemsize)


def test_the_state_of_mamba_130m_is_a_cache_of_40_tokens():
    state = cost.state_bytes(PRESETS["mamba-130m"], 1, 10_000, 2)
    assert state == 1_474_560  # 24 blocks x 1536 channels x (16 + 4) x 2 bytes
    assert state == cost.state_bytes(PRESETS["mamba-130m"], 1, 1, 2)
    assert state == cost.state_bytes(PRESETS["transformer-130m"], 1, 40, 2)


def counted_flops(config: ModelConfig, backend: str, context: int, *, batch: int = 2) -> tuple[int, int]:
    """Of a forward, and of a forward with its backward, on the meta device."""
    model = LanguageModel(config.with_overrides({"mixer.backend": backend}), seed=None)
    tokens = torch.zeros(batch, context, dtype=torch.int64, device="meta")
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            logits = model(tokens)
            if backward:
                logits.sum().backward()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


@pytest.mark.parametrize("context", [1, 33, 512])
@pytest.mark.parametrize(
    "name", ["transformer-tiny", "transformer-4m", "transformer-130m", "grouped", "bare-attention"]
)
def test_attention_flops_against_the_counter(name, context):
    config = CONFIGS[name]
    forward, training = counted_flops(config, "reference", context)
    # the counter sees whole (T, T) products, of which the causal half is work: T against (T + 1) / 2 keys per token
    masked = config.layers * 4 * config.width * (context - (context + 1) / 2)
    expected = cost.forward_flops_per_token(config, context) + masked
    assert forward == pytest.approx(2 * context * expected, rel=1e-12)
    assert training == pytest.approx(3 * forward, rel=1e-12)
    assert cost.training_flops_per_token(config, context) == 3 * cost.forward_flops_per_token(config, context)


@pytest.mark.parametrize("context", [1, 33, 512])
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba-4m", "mamba-130m", "odd-mamba"])
def test_mamba_flops_against_the_counter(name, context):
    config = CONFIGS[name]
    forward, training = counted_flops(config, "numba", context)
    assert forward == pytest.approx(2 * context * cost.forward_flops_per_token(config, context), rel=1e-12)
    assert training == pytest.approx(2 * context * cost.training_flops_per_token(config, context), rel=1e-12)


def test_the_matrix_work_of_mamba_needs_no_formula_of_ours():
    """With the plain forms the counter sees matrix products only: all but the scan's and convolution's own share."""
    config = PRESETS["mamba-4m"]
    forward, _ = counted_flops(config, "reference", 16)
    E, N, W = 2 * config.width, config.mixer.state, config.mixer.conv_width
    own = config.layers * (7 * E * N + 7 * E + 2 * E * W)
    assert forward == 2 * 16 * (cost.forward_flops_per_token(config, 16) - own)


@pytest.mark.parametrize("size", SIZES)
def test_attention_is_never_charged_to_mamba(size):
    mamba, transformer = PRESETS[f"mamba-{size}"], PRESETS[f"transformer-{size}"]
    assert cost.forward_flops_per_token(mamba, 1) == cost.forward_flops_per_token(mamba, 100_000)
    growth = cost.forward_flops_per_token(transformer, 1001) - cost.forward_flops_per_token(transformer, 1)
    assert growth == 1000 * transformer.layers * 2 * transformer.width


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_in_words_holds_the_numbers(name):
    config = CONFIGS[name]
    words = cost.state_formula(config)
    assert words.startswith(f"{config.layers} ")
    if isinstance(config.mixer, MambaConfig):
        assert f"x {config.mixer.expand * config.width} x ({config.mixer.state} + {config.mixer.conv_width})" in words
    else:
        assert f"x {cost.state_bytes(config, 1, 1, 1) // config.layers // 2} elements per token" in words
