"""Analytic cost against what is counted."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from models import cost
from models.config import BlockConfig, HybridConfig, ModelConfig
from models.feedforward import FEEDFORWARDS
from models.feedforward.mlp import MLPConfig
from models.feedforward.moe import MoE, MoEConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.mixers.attention import AttentionConfig
from models.mixers.lstm import LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.norm import RMSNorm
from models.ops.attention import _tables, forget_tables
from models.ops.ssd import CHUNK
from models.presets import PRESETS, SIZES, preset


def odd(mixer=None, feedforward=None, **settings) -> ModelConfig:
    return ModelConfig(
        mixer=mixer, feedforward=feedforward, **{"vocabulary": 300, "width": 40, "layers": 2, **settings}
    )


OTHERS = {
    "grouped": odd(AttentionConfig(heads=6, kv_heads=2), SwiGLUConfig(), width=96, layers=3, tie_embeddings=False),
    "bare-attention": odd(AttentionConfig(heads=4), width=64),
    "window": odd(AttentionConfig(heads=4, window=12), width=64),
    "narrow-heads": odd(AttentionConfig(heads=5, head_width=6, bias=True, conv_width=3), MLPConfig(bias=False)),
    "both-ways": odd(AttentionConfig(heads=4, causal=False), SwiGLUConfig()),
    "odd-mamba": odd(
        MambaConfig(state=7, expand=3, conv_width=5, dt_rank=6), SwiGLUConfig(hidden=50), tie_embeddings=False
    ),
    "odd-mamba2": odd(Mamba2Config(state=7, expand=3, head_width=15, groups=4, conv_width=3)),
    "odd-mamba3": odd(Mamba3Config(state=9, expand=3, head_width=15, groups=4, rotated_fraction=1.0), MLPConfig()),
    "mamba3-rank": odd(Mamba3Config(state=8, head_width=16, rank=3)),
    "odd-lstm": odd(LSTMConfig(hidden=13), MoEConfig(experts=5, top_k=3, hidden=11)),
    "layernorm": odd(
        AttentionConfig(heads=4), MLPConfig(hidden=20), norm="layernorm", positions=33, tie_embeddings=False,
        head_bias=True, padding_index=2,
    ),
    "post-norm": odd(AttentionConfig(heads=4), norm="layernorm", post_norm=True),
    "hybrid": odd(
        layers=5,
        hybrid=HybridConfig(pattern="MAX", blocks={
            "M": BlockConfig(mixer=MambaConfig(state=5)),
            "A": BlockConfig(mixer=AttentionConfig(heads=4, window=6), feedforward=MoEConfig(hidden=9)),
            "X": BlockConfig(mixer=Mamba3Config(state=8, head_width=20), feedforward=MLPConfig()),
        }),
    ),
}  # fmt: skip
CONFIGS = {**PRESETS, **OTHERS}
DECODING = [name for name in CONFIGS if CONFIGS[name].causal]


def test_every_mixer_and_feed_forward_layer_is_counted_here():
    kinds = [block for config in CONFIGS.values() for block in config.kinds]
    assert {block.mixer.kind for block in kinds} == set(MIXERS)
    assert {block.feedforward.kind for block in kinds if block.feedforward} == set(FEEDFORWARDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name):
    config = CONFIGS[name]
    model = LanguageModel(config, seed=None)
    ends = {id(p): p for end in (model.embedding, model.positions, model.head) if end for p in end.parameters()}
    counted = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for module in model.modules():
        if isinstance(module, MoE):
            idle += sum(w[module.config.top_k :].numel() for w in (module.gate_up, module.down))
    expected = cost.parameters(config)
    assert expected.total == counted
    assert expected.active == counted - idle
    assert expected.non_embedding == counted - sum(weight.numel() for weight in ends.values())


# of a size, by the presets' own account
WITHIN = {
    "gpt1": 0.01, "sliding": 0.01, "moe": 0.01, "mamba": 0.01, "mamba2": 0.02, "mamba3": 0.01, "hybrid": 0.01,
    "lstm": 0.01,
}  # fmt: skip


def matched(config: ModelConfig) -> int:
    """Parameters beside the embeddings that a token meets."""
    counted = cost.parameters(config)
    return counted.active - (counted.total - counted.non_embedding)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", WITHIN)
def test_families_are_matched(family, size):
    transformer, other = PRESETS[f"transformer-{size}"], PRESETS[f"{family}-{size}"]
    a, b = matched(transformer), matched(other)
    assert abs(a - b) < WITHIN[family] * min(a, b)
    assert (other.vocabulary, other.width) == (transformer.vocabulary, transformer.width)
    if family in ("mamba", "mamba2"):
        assert other.layers == 2 * transformer.layers
    elif family != "hybrid":
        assert other.layers == transformer.layers


@pytest.mark.parametrize("size", SIZES)
def test_the_letters_of_a_hybrid_fill_its_layers_once(size):
    config = PRESETS[f"hybrid-{size}"]
    assert len(config.hybrid.pattern) == config.layers
    assert {block.mixer.kind for block in config.blocks} == {"mamba", "attention"}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in LanguageModel(config, seed=None).named_parameters()}


def test_gpt1_has_its_published_shapes():
    expected = {"embedding.weight": (1000, 256), "positions.weight": (100, 256), "head.weight": (1000, 256),
                "head.bias": (1000,)}  # fmt: skip
    for i in range(6):
        for name, shape in {
            "mixer.qkv_proj.weight": (768, 256), "mixer.qkv_proj.bias": (768,), "mixer.o_proj.weight": (256, 256),
            "mixer.o_proj.bias": (256,), "mixer_norm.weight": (256,), "mixer_norm.bias": (256,),
            "feedforward.up_proj.weight": (1024, 256), "feedforward.up_proj.bias": (1024,),
            "feedforward.down_proj.weight": (256, 1024), "feedforward.down_proj.bias": (256,),
            "feedforward_norm.weight": (256,), "feedforward_norm.bias": (256,),
        }.items():  # fmt: skip
            expected[f"blocks.{i}.{name}"] = shape
    assert shapes(PRESETS["gpt1"]) == expected
    config = PRESETS["gpt1"]
    assert (config.mixer.heads, config.mixer.rotary, config.mixer.causal) == (8, False, True)
    assert (config.norm, config.post_norm, config.dropout) == ("layernorm", True, 0.1)
    assert (config.feedforward.activation, config.tie_embeddings) == ("relu", False)


def test_phi3_mini_has_its_published_shapes():
    config = PRESETS["phi3-mini"]
    expected = {"embedding.weight": (32064, 3072), "norm.weight": (3072,), "head.weight": (32064, 3072)}
    for i in range(32):
        for name, shape in {
            "mixer_norm.weight": (3072,), "mixer.qkv_proj.weight": (9216, 3072), "mixer.o_proj.weight": (3072, 3072),
            "feedforward_norm.weight": (3072,), "feedforward.gate_up_proj.weight": (16384, 3072),
            "feedforward.down_proj.weight": (3072, 8192),
        }.items():  # fmt: skip
            expected[f"blocks.{i}.{name}"] = shape
    assert shapes(config) == expected
    assert cost.parameters(config).total == 3_821_079_552
    assert config.mixer.sizes(3072) == (32, 32, 96)
    assert (config.mixer.rotary, config.mixer.rotary_base) == (True, 10000)
    assert config.padding_index == 32000
    model = LanguageModel(config, seed=None)
    assert model.embedding.padding_idx == 32000
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert [norm.eps for norm in norms] == [1e-5] * 65
    assert config.dropout == 0.0
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    assert model.hidden(tokens).x.shape == (1, 2, 3072)
    assert model(tokens).shape == (1, 2, 32064)


def test_mixtral_is_loaded_whole_and_touched_in_part():
    config = ModelConfig(
        vocabulary=32000, width=4096, layers=32, mixer=AttentionConfig(heads=32, kv_heads=8),
        feedforward=MoEConfig(experts=8, top_k=2, hidden=14336), tie_embeddings=False,
    )  # fmt: skip
    counted = cost.parameters(config)
    assert counted.total == pytest.approx(46.7e9, rel=2e-3)
    assert counted.active == pytest.approx(12.9e9, rel=2e-3)
    assert cost.weight_bytes(config, 2) == 2 * counted.total


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_bytes_are_those_of_the_model(name, dtype):
    model = LanguageModel(CONFIGS[name], seed=None, dtype=dtype)
    assert cost.weight_bytes(CONFIGS[name], dtype.itemsize) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_len", [1, 17, 700])
def test_state_bytes_are_those_of_the_model(name, dtype, max_len):
    config = CONFIGS[name]
    state = LanguageModel(config, seed=None).make_state(3, max_len, dtype)  # on the meta device: no memory is taken
    assert state.nbytes == cost.state_bytes(config, 3, max_len, dtype.itemsize)


def test_the_state_of_mamba_130m_is_a_cache_of_40_tokens():
    state = cost.state_bytes(PRESETS["mamba-130m"], 1, 10_000, 2)
    assert state == 1_474_560  # 24 blocks x 1536 channels x (16 + 4) x 2 bytes
    assert state == cost.state_bytes(PRESETS["mamba-130m"], 1, 1, 2)
    assert state == cost.state_bytes(PRESETS["transformer-130m"], 1, 40, 2)


def test_the_published_sizes_of_states():
    """At 130M, 16-bit: elements per block, and the length at which a cache weighs as much."""
    D, cache = 768, lambda tokens: cost.state_bytes(PRESETS["transformer-130m"], 1, tokens, 2)
    assert MambaConfig().state_bytes(D, 1, 1) == 40 * D
    mamba2 = Mamba2Config(state=128)
    assert mamba2.state_bytes(D, 1, 1) == 264 * D + 1024
    whole = ModelConfig(vocabulary=8, width=D, layers=24, mixer=mamba2)
    assert cost.state_bytes(whole, 1, 1, 2) == pytest.approx(9.8e6, rel=5e-3)
    assert cache(264) < cost.state_bytes(whole, 1, 1, 2) < cache(266)
    assert PRESETS["mamba2-130m"].mixer == mamba2
    # angles and state in float32, the previous B and x in 16 bits
    assert Mamba3Config().state_bytes(D, 1, 2) == 24 * 32 * 4 + 24 * 64 * 128 * 4 + 24 * 128 * 2 + 24 * 64 * 2


def test_the_cache_of_a_window_stops_growing():
    config = PRESETS["sliding-1m"]
    at = [cost.state_bytes(config, 1, length, 2) for length in (1, 63, 64, 65, 10_000)]
    assert at[1] == 63 * at[0]
    assert at[2:] == [64 * at[0]] * 3
    assert at[1] == cost.state_bytes(PRESETS["transformer-1m"], 1, 63, 2)


def test_crossover_lengths_at_130m():
    """A cache of 16-bit keys and values weighs as much as the state of Mamba-1 at 40 tokens, of Mamba-2 at 265."""
    transformer = PRESETS["transformer-130m"]
    for name, tokens, megabytes in (("mamba-130m", 40, 1.47), ("mamba2-130m", 265, 9.8)):
        state = cost.state_bytes(PRESETS[name], 1, 1, 2)
        assert state / 1e6 == pytest.approx(megabytes, rel=0.01)
        assert cost.outgrows(transformer, state, 2) == tokens + 1
        assert cost.state_bytes(transformer, 1, tokens, 2) <= state < cost.state_bytes(transformer, 1, tokens + 1, 2)


@pytest.mark.parametrize("name", ["transformer-4m", "window", "hybrid", "mamba-4m"])
@pytest.mark.parametrize("size", [0, 1, 10_000, 123_457, 10**12])
def test_outgrows_is_the_first_length_that_does(name, size):
    config = CONFIGS[name]
    at = cost.outgrows(config, size, 4, batch=3)
    if at is None:
        assert cost.state_bytes(config, 3, cost.LONGEST, 4) <= size
    else:
        assert cost.state_bytes(config, 3, at, 4) > size
        assert at == 1 or cost.state_bytes(config, 3, at - 1, 4) <= size


def test_what_has_no_positions_left_outgrows_nothing():
    gpt1 = preset("gpt1")
    full = cost.state_bytes(gpt1, 1, gpt1.positions, 4)
    assert cost.outgrows(gpt1, full - 1, 4) == gpt1.positions
    assert cost.outgrows(gpt1, full, 4) is None


def counted_flops(config: ModelConfig, backend: str, context: int, *, batch: int = 2) -> tuple[int, int]:
    """Of a forward, and of a forward with its backward, on the meta device."""
    model = LanguageModel(config.with_backend(backend), seed=None)
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
    "name",
    ["transformer-tiny", "transformer-4m", "transformer-130m", "grouped", "bare-attention", "window", "sliding-tiny",
     "both-ways", "post-norm", "narrow-heads"],
)  # fmt: skip
def test_attention_flops_against_the_counter(name, context):
    config = CONFIGS[name]
    forward, training = counted_flops(config, "reference", context)
    window = min(config.mixer.window or context, context)
    seen = context
    if config.mixer.causal:
        seen = sum(min(t + 1, window) for t in range(context)) / context
    # the counter sees whole (T, T) products, of which the causal half is work: T against (T + 1) / 2 keys per token
    heads, kv_heads, width = config.mixer.sizes(config.width)
    masked = 4 * heads * width * (context - seen)
    taps = 2 * (config.mixer.conv_width or 0) * (heads + 2 * kv_heads) * width  # of products that the counter passes by
    expected = cost.forward_flops_per_token(config, context) + config.layers * (masked - taps)
    assert forward == pytest.approx(2 * context * expected, rel=1e-12)
    assert training == pytest.approx(3 * forward, rel=1e-12)
    assert cost.training_flops_per_token(config, context) == 3 * cost.forward_flops_per_token(config, context)


def test_a_window_is_no_more_than_twice_its_work():
    """In blocks each query meets 2 W keys where it sees W: counted as executed, not as a whole matrix."""
    config, context = CONFIGS["window"], 512
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LanguageModel(config.with_backend("sdpa"), seed=None)(torch.zeros(1, context, dtype=torch.int64, device="meta"))
    W, own = 12, cost.forward_flops_per_token(config, context)
    scores = config.layers * 4 * config.width
    assert counter.get_total_flops() / context < own + 1.1 * scores * W
    assert own == pytest.approx(cost.forward_flops_per_token(config, 10**6), rel=0.01)


@pytest.mark.parametrize("context", [1, 33, 512])
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba-4m", "mamba-130m", "odd-mamba"])
def test_mamba_flops_against_the_counter(name, context):
    config = CONFIGS[name]
    forward, training = counted_flops(config, "numba", context)
    assert forward == pytest.approx(2 * context * cost.forward_flops_per_token(config, context), rel=1e-12)
    assert training == pytest.approx(2 * context * cost.training_flops_per_token(config, context), rel=1e-12)


@pytest.mark.parametrize("context", [1, 33, 64, 512])
@pytest.mark.parametrize(
    "name", ["mamba2-tiny", "mamba2-4m", "mamba2-130m", "mamba3-tiny", "mamba3-130m", "odd-mamba2", "odd-mamba3"]
)
def test_chunked_flops_against_the_counter(name, context):
    """The counter sees the upper triangle of a chunk too, and does not see Mamba-3's rotation."""
    config = CONFIGS[name]
    mixer, D, Q = config.mixer, config.width, min(CHUNK, context)
    E, H, _ = mixer.sizes(D)
    groups = mixer.groups if mixer.kind == "mamba2" else H
    unseen = (groups * mixer.state + E) * (Q - 1)
    if mixer.kind == "mamba3":
        unseen -= 2 * 6 * H * mixer.pairs
    expected = cost.forward_flops_per_token(config, context) + config.layers * unseen
    forward, training = counted_flops(config, "numba", context)
    assert forward == pytest.approx(2 * context * expected, rel=1e-12)
    # the backward computes the scores once more
    assert training == pytest.approx(3 * forward, rel=0.1)


@pytest.mark.parametrize("context", [1, 7])
def test_ranked_flops_against_the_counter(context):
    config = CONFIGS["mamba3-rank"]
    forward, training = counted_flops(config, "reference", context)
    rotation = 2 * 6 * 3 * 5 * config.mixer.pairs
    expected = cost.forward_flops_per_token(config, context) - config.layers * rotation
    assert forward == pytest.approx(2 * context * expected, rel=1e-12)
    # what the first token has before it is zeros, of which nobody wants the gradient
    assert training == pytest.approx(3 * forward, rel=0.03)


@pytest.mark.parametrize("name", ["lstm-tiny", "lstm-1m", "lstm-130m"])
def test_lstm_flops_against_the_counter(name):
    config, context = CONFIGS[name], 5
    forward, training = counted_flops(config, "reference", context)
    gates = config.layers * 13 * config.width  # element by element: not in the counter's book
    expected = cost.forward_flops_per_token(config, context) - gates
    assert forward == pytest.approx(2 * context * expected, rel=1e-12)
    assert training == pytest.approx(3 * forward, rel=0.02)


@pytest.mark.parametrize("context", [1, 24])
@pytest.mark.parametrize("name", ["moe-tiny", "gpt1", "layernorm"])
def test_feed_forward_flops_against_the_counter(name, context):
    """On the CPU, where the experts are chosen: each token meets its own and no other."""
    config = CONFIGS[name]
    model = LanguageModel(config.with_backend("sdpa"), seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(2 * context).view(2, context))
    scores = config.layers * 4 * config.width * (context + 1) / 2
    seen = counter.get_flop_counts()["Global"]
    attended = sum(flops for operation, flops in seen.items() if "scaled_dot_product" in str(operation))
    expected = cost.forward_flops_per_token(config, context) - scores
    assert counter.get_total_flops() - attended == pytest.approx(2 * context * expected, rel=1e-12)


def test_a_model_of_several_kinds_is_the_sum_of_its_blocks():
    config = CONFIGS["hybrid"]
    ends = 2 * config.width * config.vocabulary
    total = 0
    for block in config.blocks:
        one = replace(config, layers=1, hybrid=None, mixer=block.mixer, feedforward=block.feedforward)
        total += cost.forward_flops_per_token(one, 50) - ends
    assert cost.forward_flops_per_token(config, 50) == pytest.approx(total + ends, rel=1e-12)


def test_the_head_works_for_the_tokens_that_are_predicted():
    """2 D V for each, and twice that for its gradients."""
    config = OTHERS["bare-attention"]  # 64 wide, of 300 entries
    unasked = 0.75 * 2 * 64 * 300
    assert cost.forward_flops_per_token(config, 9, 0.25) == cost.forward_flops_per_token(config, 9) - unasked
    assert cost.training_flops_per_token(config, 9, 0.25) == cost.training_flops_per_token(config, 9) - 3 * unasked


def test_the_matrix_work_of_mamba_needs_no_formula_of_ours():
    """With the plain forms the counter sees matrix products only: all but the scan's and convolution's own share."""
    config = PRESETS["mamba-4m"]
    forward, _ = counted_flops(config, "reference", 16)
    E, N, W = 2 * config.width, config.mixer.state, config.mixer.conv_width
    own = config.layers * (7 * E * N + 7 * E + 2 * E * W)
    assert forward == 2 * 16 * (cost.forward_flops_per_token(config, 16) - own)


@pytest.mark.parametrize("size", SIZES)
def test_attention_is_never_charged_to_mamba(size):
    transformer = PRESETS[f"transformer-{size}"]
    for family in ("mamba", "mamba2", "mamba3", "lstm"):
        config = PRESETS[f"{family}-{size}"]
        assert cost.forward_flops_per_token(config, 64) == cost.forward_flops_per_token(config, 100_032)
    growth = cost.forward_flops_per_token(transformer, 1001) - cost.forward_flops_per_token(transformer, 1)
    assert growth == 1000 * transformer.layers * 2 * transformer.width


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_in_words_holds_the_numbers(name):
    """Read as a sum of products, it is the bytes of one token's state, in elements."""
    config = CONFIGS[name]
    words = cost.state_formula(config)
    parts = words.split("; ")
    assert sum(int(part.split(" ")[0]) for part in parts) == config.layers
    assert len(parts) == len({block.mixer.state_formula(config.width) for block in config.blocks})
    for block in config.kinds:
        formula = block.mixer.state_formula(config.width)
        assert formula in words
        short = formula.replace(", whatever the length", "").replace(" per token", "").split(", at most")
        conv = short[1].partition(" + ")[2] if len(short) > 1 else ""
        wide, _, narrow = short[0].partition(" elements in float32, ")  # Mamba-3 has both
        count = lambda text: eval(text.replace(" elements", "").replace("x", "*"))  # noqa: E731
        expected = 4 * count(wide) + 2 * count(narrow) if narrow else 2 * count(wide)
        expected += 2 * count(conv) if conv else 0
        assert expected == block.mixer.state_bytes(config.width, 1, 2), formula


# operations that cost no matrix arithmetic: elementwise, copies, sums, choices; everything else must have a formula
WITHOUT_FLOPS = {
    "aten._safe_softmax", "aten._softmax_backward_data", "aten._to_copy", "aten._unsafe_view", "aten.arange",
    "aten.cat", "aten.constant_pad_nd", "aten.copy_", "aten.cumsum", "aten.embedding",
    "aten.embedding_dense_backward", "aten.flip", "aten.new_empty_strided", "aten.new_zeros", "aten.ones",
    "aten.ones_like", "aten.promote_types", "aten.scalar_tensor", "aten.select_backward", "aten.slice_backward",
    "aten.softplus_backward", "aten.stack", "aten.sum", "aten.tril", "aten.triu", "aten.unfold_backward",
    "aten.zeros", "aten.zeros_like", "lab.gated_rms_norm_cpu", "lab.gated_rms_norm_cpu_backward", "lab.rms_norm_cpu",
    "lab.rms_norm_cpu_backward", "lab.rotary_qkv_cpu", "lab.rotary_qkv_cpu_backward", "lab.ssd_carry_cpu",
    "lab.ssd_carry_gradient_cpu", "lab.ssd_gather_cpu", "lab.ssd_gather_gradient_cpu", "lab.ssd_masked_cpu",
    "lab.ssd_masked_gradient_cpu", "lab.ssd_spread_cpu", "lab.swiglu_cpu", "lab.swiglu_cpu_backward",
}  # fmt: skip


class Recognised(TorchDispatchMode):
    """Raises on an operation that has neither a FLOP formula nor a place above."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        packet = function.overloadpacket
        free = torch.Tag.pointwise in function.tags or function.is_view or str(packet) in WITHOUT_FLOPS
        if packet not in flop_registry and not free:
            raise AssertionError(f"nobody has said what {function} costs")
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("name", ["transformer-tiny", "sliding-tiny", "mamba-tiny", "mamba2-tiny", "mamba3-tiny"])
def test_every_operation_is_recognised(name):
    model = LanguageModel(CONFIGS[name].with_backend("numba"), seed=None)
    with Recognised():
        model(torch.zeros(2, 70, dtype=torch.int64, device="meta")).sum().backward()


def test_an_unrecognised_operation_fails():
    @torch.library.custom_op("lab_test::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    @mystery.register_fake
    def _(x):
        return torch.empty_like(x)

    with pytest.raises(AssertionError, match=r"nobody has said what lab_test\.mystery\.default costs"), Recognised():
        mystery(torch.zeros(3, 3, device="meta"))


@pytest.mark.parametrize(
    "name", ["transformer-tiny", "gpt1-tiny", "hybrid-tiny", "mamba-tiny", "mamba3-tiny", "sliding-tiny"]
)
def test_bytes_of_rotary_tables_are_those_that_a_state_brings(name: str):
    forget_tables()
    LanguageModel(preset(name), seed=0).make_state(1, 24)
    kept = sum(table.nbytes for tables in _tables.values() for table in tables)
    forget_tables()
    assert cost.rotary_bytes(preset(name), 24) == kept
    assert (kept > 0) is not name.startswith(("mamba", "gpt1"))  # of which GPT learns its positions
