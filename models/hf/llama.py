"""`LlamaForCausalLM` and `Phi3ForCausalLM`: rotary attention and SwiGLU, as `transformers` has them.

Llama projects to queries, keys, values and to gate, up separately; `attention_bias` there is of all four projections.
Phi-3 joins them as we do, in our order, and has a sliding window in which a token sees `sliding_window` tokens, itself
included, as in our `window`. A padding token's embedding, whose value is used as it is, gets no gradient there, as with
our `padding_index`; in a tied model, where the head still gives it one, we have no such token and train it like others.
"""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.errors import ConfigError
from models.feedforward.swiglu import SwiGLUConfig
from models.hf.layout import Entry, entries
from models.hf.settings import Settings, refuse
from models.mixers.attention import AttentionConfig

_NORMS = {"mixer_norm.weight": "input_layernorm.weight", "feedforward_norm.weight": "post_attention_layernorm.weight"}


def read_llama(theirs: Settings) -> ModelConfig:
    theirs.only("mlp_bias", False)
    theirs.only("sliding_window", None, "; with a window it is a Phi3ForCausalLM")
    bias = theirs.flag("attention_bias", False)
    return _read(theirs, eps=1e-6, bias=bias, window=None, dropout=0.0, padding=None)


def read_phi3(theirs: Settings) -> ModelConfig:
    theirs.only("attention_bias", False)
    window = theirs.whole("sliding_window") if theirs.get("sliding_window") is not None else None
    dropout, embedding = (theirs.share(key) for key in ("resid_pdrop", "embd_pdrop"))
    if dropout != embedding:
        refuse(theirs.architecture, "embd_pdrop", embedding, f"only resid_pdrop = {dropout}, one dropout for both")
    return _read(theirs, eps=1e-5, bias=False, window=window, dropout=dropout, padding=32000)


def _read(
    theirs: Settings, *, eps: float, bias: bool, window: int | None, dropout: float, padding: int | None
) -> ModelConfig:
    """eps, padding: their defaults."""
    theirs.only("hidden_act", "silu")
    theirs.only("attention_dropout", 0.0)
    tied = theirs.flag("tie_word_embeddings", False)
    vocabulary, width, heads = (theirs.whole(key) for key in ("vocab_size", "hidden_size", "num_attention_heads"))
    kv_heads = theirs.whole("num_key_value_heads", heads)
    head_width = theirs.whole("head_dim", max(1, width // heads))
    # transformers wants this even where head_dim is given
    if width % heads:
        refuse(theirs.architecture, "hidden_size", width, f"it must be a multiple of num_attention_heads = {heads}")
    if heads % kv_heads:
        refuse(theirs.architecture, "num_key_value_heads", kv_heads, f"it must divide num_attention_heads = {heads}")
    if head_width % 2:
        refuse(theirs.architecture, "head_dim", head_width, "rotary positions need an even one")
    index = _padding(theirs, vocabulary, padding)
    return ModelConfig(
        vocabulary=vocabulary,
        width=width,
        layers=theirs.whole("num_hidden_layers"),
        mixer=AttentionConfig(
            heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            head_width=None if head_width == width // heads else head_width,
            rotary_base=_rotary_base(theirs),
            window=window,
            bias=bias,
        ),
        feedforward=SwiGLUConfig(hidden=theirs.whole("intermediate_size")),
        norm_eps=theirs.number("rms_norm_eps", eps),
        dropout=dropout,
        tie_embeddings=tied,
        padding_index=None if tied else index,
    )


def _rotary_base(theirs: Settings) -> float:
    """transformers 5 has a table `rope_parameters`; before, `rope_theta`, and `rope_scaling` where it is not plain. An
    older folder's `rope_scaling` goes first in transformers 5 too."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(theirs.get(key, {}), Mapping):
            refuse(theirs.architecture, key, theirs.values[key], "it must be a table or null")
    key = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope = theirs.get(key, {})
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        refuse(theirs.architecture, f"{key}.{nested[0]}", rope[nested[0]], "only one table for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        refuse(theirs.architecture, f"{key}.rope_type", kind, "only 'default', plain rotary positions")
    for where, value in ((f"{key}.", rope.get("partial_rotary_factor")), ("", theirs.get("partial_rotary_factor"))):
        if value not in (None, 1):
            refuse(theirs.architecture, f"{where}partial_rotary_factor", value, "only 1, the whole head rotated")
    named = "rope_theta" if rope.get("rope_theta") is None else f"{key}.rope_theta"
    base = theirs.get("rope_theta", 10000.0) if rope.get("rope_theta") is None else rope["rope_theta"]
    if isinstance(base, bool) or not isinstance(base, int | float) or not 1 < base < float("inf"):
        refuse(theirs.architecture, named, base, "it must be a number above 1")
    return float(base)


def _padding(theirs: Settings, vocabulary: int, default: int | None) -> int | None:
    """Older folders have -1, which torch's embedding counts from the end. Null is none, not the default."""
    if theirs.values.get("pad_token_id", default) is None:
        return None
    index = theirs.whole("pad_token_id", default, least=-vocabulary)
    if index >= vocabulary:
        refuse(theirs.architecture, "pad_token_id", index, f"it must be below vocab_size = {vocabulary}")
    return index % vocabulary


def write_llama(config: ModelConfig) -> dict[str, Any]:
    mixer, _ = _parts("LlamaForCausalLM", config)
    if mixer.window is not None:
        refuse("LlamaForCausalLM", "mixer.window", mixer.window, "only Phi3ForCausalLM has one")
    if config.dropout:
        refuse("LlamaForCausalLM", "dropout", config.dropout, "only 0.0")
    return _write(config) | {"attention_bias": mixer.bias, "mlp_bias": False}


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    mixer, _ = _parts("Phi3ForCausalLM", config)
    if mixer.bias:
        refuse("Phi3ForCausalLM", "mixer.bias", True, "only LlamaForCausalLM has biases, and it has no window")
    dropout = {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout}
    return _write(config) | dropout | {"sliding_window": mixer.window}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer, hidden = _parts("", config)
    _, kv_heads, head_width = mixer.sizes(config.width)
    return {
        "intermediate_size": hidden,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": mixer.rotary_base,  # for transformers before 5
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rotary_base},
        "attention_dropout": 0.0,
        "pad_token_id": config.padding_index,
    }


def _parts(architecture: str, config: ModelConfig) -> tuple[AttentionConfig, int]:
    """The mixer, and the hidden width of the SwiGLU. Raises ConfigError where they are other than theirs."""
    mixer, feedforward = config.mixer, config.feedforward
    assert isinstance(mixer, AttentionConfig)
    if not isinstance(feedforward, SwiGLUConfig):
        refuse(architecture, "feedforward", None if feedforward is None else feedforward.kind, "only 'swiglu'")
    for name, wanted in (("rotary", True), ("causal", True), ("conv_width", None)):
        if getattr(mixer, name) != wanted:
            refuse(architecture, f"mixer.{name}", getattr(mixer, name), f"only {wanted}")
    if config.width % mixer.heads:
        raise ConfigError(f"{architecture} needs a width that is a multiple of mixer.heads, got {config.width}")
    return mixer, feedforward.size(config.width)


def llama_layout(config: ModelConfig) -> list[Entry]:
    mixer, hidden = _parts("LlamaForCausalLM", config)
    H, K, P = mixer.sizes(config.width)
    layout = _ends(config)
    for i in range(config.layers):
        here, there = f"blocks.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias") if mixer.bias else ("weight",):
            qkv = tuple(f"{there}.self_attn.{name}_proj.{kind}" for name in "qkv")
            layout.append(Entry(f"{here}.mixer.qkv_proj.{kind}", qkv, (H * P, K * P, K * P)))
            layout.append(Entry(f"{here}.mixer.o_proj.{kind}", (f"{there}.self_attn.o_proj.{kind}",)))
        gate_up = tuple(f"{there}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        layout.append(Entry(f"{here}.feedforward.gate_up_proj.weight", gate_up, (hidden, hidden)))
        layout += entries(here, there, {"feedforward.down_proj.weight": "mlp.down_proj.weight", **_NORMS})
    return layout


def phi3_layout(config: ModelConfig) -> list[Entry]:
    names = {
        "mixer.qkv_proj.weight": "self_attn.qkv_proj.weight",
        "mixer.o_proj.weight": "self_attn.o_proj.weight",
        "feedforward.gate_up_proj.weight": "mlp.gate_up_proj.weight",
        "feedforward.down_proj.weight": "mlp.down_proj.weight",
        **_NORMS,
    }
    layout = _ends(config)
    for i in range(config.layers):
        layout += entries(f"blocks.{i}", f"model.layers.{i}", names)
    return layout


def _ends(config: ModelConfig) -> list[Entry]:
    ends = [Entry("embedding.weight", ("model.embed_tokens.weight",)), Entry("norm.weight", ("model.norm.weight",))]
    return ends if config.tie_embeddings else [*ends, Entry("head.weight", ("lm_head.weight",))]
