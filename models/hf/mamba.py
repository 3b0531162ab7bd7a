"""`MambaForCausalLM` and `Mamba2ForCausalLM`, as `transformers` has them.

Not read: `residual_in_fp32`, which changes nothing in float32 and only rounding in 16 bits (ours is the model's type);
`initializer_range`, `time_step_scale`, `time_step_init_scheme`, `rescale_prenorm_residual`, which are of their
initialisation; `chunk_size`, `use_mambapy`, `use_associative_scan`, which are of how it is computed.

The gated norm of Mamba-2 with several groups runs over each group by itself in `mamba_ssm` and in `transformers` today;
some earlier releases of `transformers` let it run over all channels, which no folder asks for and none can be seen to
mean. So `grouped_norm` comes out true, and false goes nowhere.
"""

from typing import Any

from models.config import ModelConfig
from models.hf.layout import Entry, entries
from models.hf.settings import Settings, plain, refuse
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config

_SHARED = {
    "mixer_norm.weight": "norm.weight",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.conv_weight": "mixer.conv1d.weight",
    "mixer.conv_bias": "mixer.conv1d.bias",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
}
_MAMBA = _SHARED | {
    "mixer.x_proj.weight": "mixer.x_proj.weight",
    "mixer.dt_proj.weight": "mixer.dt_proj.weight",
    "mixer.dt_bias": "mixer.dt_proj.bias",
}
_MAMBA2 = _SHARED | {"mixer.dt_bias": "mixer.dt_bias", "mixer.norm_weight": "mixer.norm.weight"}


def read_mamba(theirs: Settings) -> ModelConfig:
    width, expand = theirs.whole("hidden_size"), theirs.whole("expand", 2)
    theirs.only("intermediate_size", expand * width, ", expand x hidden_size")
    usual = -(-width // 16)
    auto = theirs.get("time_step_rank", "auto") == "auto"
    rank = usual if auto else theirs.whole("time_step_rank")
    mixer = MambaConfig(
        expand=expand,
        state=theirs.whole("state_size", 16),
        dt_rank=None if rank == usual else rank,
        **_mixer(theirs),
    )
    return _read(theirs, mixer, tied=True)


def read_mamba2(theirs: Settings) -> ModelConfig:
    width, expand = theirs.whole("hidden_size"), theirs.whole("expand", 2)
    heads, head_width = theirs.whole("num_heads", 128), theirs.whole("head_dim", 64)
    groups = theirs.whole("n_groups", 8)
    if heads * head_width != expand * width:
        wanted = f"num_heads x head_dim must be expand x hidden_size, {heads} x {head_width} is not {expand} x {width}"
        refuse(theirs.architecture, "num_heads", heads, wanted)
    if heads % groups:
        refuse(theirs.architecture, "n_groups", groups, f"it must divide num_heads = {heads}")
    limit = plain(theirs.get("time_step_limit", [0.0, float("inf")]))
    if limit != [0.0, float("inf")]:
        refuse(theirs.architecture, "time_step_limit", limit, "only (0, infinity), no limit")
    mixer = Mamba2Config(
        expand=expand,
        state=theirs.whole("state_size", 128),
        head_width=head_width,
        groups=groups,
        norm_eps=theirs.number("layer_norm_epsilon", 1e-5),
        **_mixer(theirs),
    )
    return _read(theirs, mixer, tied=False)


def _mixer(theirs: Settings) -> dict[str, Any]:
    theirs.only("hidden_act", "silu")
    theirs.only("use_bias", False)
    theirs.only("use_conv_bias", True)
    low, high = theirs.number("time_step_min", 0.001), theirs.number("time_step_max", 0.1)
    if low > high:
        refuse(theirs.architecture, "time_step_min", low, f"it must be at most time_step_max = {high}")
    return {
        "conv_width": theirs.whole("conv_kernel", 4),
        "dt_min": low,
        "dt_max": high,
        "dt_floor": theirs.number("time_step_floor", 1e-4),
    }


def _read(theirs: Settings, mixer: MambaConfig | Mamba2Config, *, tied: bool) -> ModelConfig:
    theirs.only("rms_norm", True, ": the norms must be RMSNorm")  # folders converted from mamba_ssm's name it
    return ModelConfig(
        vocabulary=theirs.whole("vocab_size"),  # padded as it may be: the embedding has as many rows
        width=theirs.whole("hidden_size"),
        layers=theirs.whole("num_hidden_layers"),
        mixer=mixer,
        norm_eps=theirs.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=theirs.flag("tie_word_embeddings", tied),
    )


def write_mamba(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mixer
    assert isinstance(mixer, MambaConfig)
    E, N, R = mixer.sizes(config.width)
    return _write("MambaForCausalLM", config, mixer) | {
        "state_size": N,
        "intermediate_size": E,
        "time_step_rank": R,
    }


def write_mamba2(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mixer
    assert isinstance(mixer, Mamba2Config)
    if mixer.groups > 1 and not mixer.grouped_norm:
        refuse("Mamba2ForCausalLM", "mixer.grouped_norm", False, "only true, each of its groups normed by itself")
    if mixer.norm_eps != config.norm_eps:
        refuse("Mamba2ForCausalLM", "mixer.norm_eps", mixer.norm_eps, f"only norm_eps = {config.norm_eps}, one for all")
    return _write("Mamba2ForCausalLM", config, mixer) | {
        "state_size": mixer.state,
        "num_heads": mixer.sizes(config.width)[1],
        "head_dim": mixer.head_width,
        "n_groups": mixer.groups,
    }


def _write(architecture: str, config: ModelConfig, mixer: MambaConfig | Mamba2Config) -> dict[str, Any]:
    if config.feedforward is not None:
        refuse(architecture, "feedforward", config.feedforward.kind, "only none between the mixers")
    if mixer.negative_eigenvalues:
        refuse(architecture, "mixer.negative_eigenvalues", True, "only false")
    for name, wanted in (("dropout", 0.0), ("padding_index", None)):
        if getattr(config, name) != wanted:
            refuse(architecture, name, getattr(config, name), f"only {wanted}")
    return {
        "expand": mixer.expand,
        "conv_kernel": mixer.conv_width,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": False,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_floor,
        "pad_token_id": None,
    }


def layout(config: ModelConfig) -> list[Entry]:
    """Of both, in Hugging Face's spelling; `mamba_ssm` says `backbone.embedding`."""
    names = _MAMBA if isinstance(config.mixer, MambaConfig) else _MAMBA2
    found = [
        Entry("embedding.weight", ("backbone.embeddings.weight",)),
        Entry("norm.weight", ("backbone.norm_f.weight",)),
    ]
    if not config.tie_embeddings:
        found.append(Entry("head.weight", ("lm_head.weight",)))
    for i in range(config.layers):
        found += entries(f"blocks.{i}", f"backbone.layers.{i}", names)
    return found
