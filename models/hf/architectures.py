"""The architectures that both sides have, and which of them a configuration of ours is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.config import ModelConfig
from models.errors import ConfigError, nearest
from models.hf import llama, mamba
from models.hf.layout import Entry, to_ours, to_theirs
from models.hf.settings import Settings, refuse
from models.mixers.attention import AttentionConfig

SPELLINGS = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # mamba_ssm's -> Hugging Face's
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Architecture:
    """read: their settings to our configuration. write: the inverse, but for what all share. layout: where the
    parameters are. All raise ConfigError where one side cannot do what the other does."""

    model_type: str
    mixer: str
    read: Callable[[Settings], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    layout: Callable[[ModelConfig], list[Entry]]


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", "attention", llama.read_llama, llama.write_llama, llama.llama_layout),
    "Phi3ForCausalLM": Architecture("phi3", "attention", llama.read_phi3, llama.write_phi3, llama.phi3_layout),
    "MambaForCausalLM": Architecture("mamba", "mamba", mamba.read_mamba, mamba.write_mamba, mamba.layout),
    "Mamba2ForCausalLM": Architecture("mamba2", "mamba2", mamba.read_mamba2, mamba.write_mamba2, mamba.layout),
}


def named(values: Mapping[str, Any]) -> str:
    """The architecture that a `config.json` names. Raises ConfigError with the nearest one that we have."""
    names, model_type = values.get("architectures"), values.get("model_type")
    if names is not None and (not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str)):
        raise ConfigError(f"architectures = {names!r} must name one: known: {', '.join(sorted(ARCHITECTURES))}")
    if names is None and model_type is None:
        raise ConfigError(f"neither architectures nor model_type is given: known: {', '.join(sorted(ARCHITECTURES))}")
    if names is None:
        by_type = {one.model_type: name for name, one in ARCHITECTURES.items()}
        if not isinstance(model_type, str) or model_type not in by_type:
            raise ConfigError(f"unknown model_type {model_type!r}: {nearest(str(model_type), by_type)}")
        return by_type[model_type]
    name = names[0]
    if name not in ARCHITECTURES:
        raise ConfigError(f"unknown architecture {name!r}: {nearest(name, ARCHITECTURES)}")
    if model_type not in (None, ARCHITECTURES[name].model_type):
        refuse(name, "model_type", model_type, f"only '{ARCHITECTURES[name].model_type}'")
    return name


def from_settings(values: Mapping[str, Any]) -> ModelConfig:
    """Their `config.json` as our configuration. Raises ConfigError."""
    name = named(values)
    theirs = Settings(values, name)
    theirs.only("quantization_config", None, ": weights must be floating point")
    return ARCHITECTURES[name].read(theirs)


def counterpart(config: ModelConfig) -> str:
    """Which of theirs this is. Attention with a window, a padding token or dropout is Phi-3, which has places for them,
    else Llama. Raises ConfigError, naming the setting that stands in the way."""
    if config.hybrid is not None:
        raise ConfigError(f"no Hugging Face model has hybrid.pattern = '{config.hybrid.pattern}': only like blocks")
    assert config.mixer is not None
    known = {one.mixer for one in ARCHITECTURES.values()}
    if config.mixer.kind not in known:
        raise ConfigError(
            f"no Hugging Face model that we know has the mixer '{config.mixer.kind}': known: {', '.join(sorted(known))}"
        )
    if isinstance(config.mixer, AttentionConfig):
        # only Llama has biases, only Phi-3 a window
        fits = not config.mixer.bias and (config.padding_index is not None or config.dropout > 0)
        return "Phi3ForCausalLM" if fits or config.mixer.window is not None else "LlamaForCausalLM"
    return next(name for name, one in ARCHITECTURES.items() if one.mixer == config.mixer.kind)


def to_settings(config: ModelConfig, architecture: str | None = None) -> dict[str, Any]:
    """Our configuration as their `config.json`: of `architecture`, or of its `counterpart`. Raises ConfigError."""
    name = architecture or counterpart(config)
    if name not in ARCHITECTURES:
        raise ConfigError(f"unknown architecture {name!r}: {nearest(name, ARCHITECTURES)}")
    one = ARCHITECTURES[name]
    if config.mixer is None or config.mixer.kind != one.mixer:
        refuse(name, "mixer", None if config.mixer is None else config.mixer.kind, f"only '{one.mixer}'")
    for setting, wanted in (("norm", "rmsnorm"), ("post_norm", False), ("positions", None), ("head_bias", False)):
        if getattr(config, setting) != wanted:
            refuse(name, setting, getattr(config, setting), f"only {wanted!r}")
    return {
        "architectures": [name],
        "model_type": one.model_type,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "tie_word_embeddings": config.tie_embeddings,
        # theirs have defaults, which would end a text at a token that means something else here
        "bos_token_id": None,
        "eos_token_id": None,
        **one.write(config),
    }


def from_tensors(
    theirs: Mapping[str, Tensor], config: ModelConfig, architecture: str | None = None
) -> dict[str, Tensor]:
    """Their parameters by name (or what belongs to them, as gradients) as ours. Joined ones are copied, others not."""
    theirs = {SPELLINGS.get(name, name): tensor for name, tensor in theirs.items()}
    return to_ours(theirs, ARCHITECTURES[architecture or counterpart(config)].layout(config))


def to_tensors(ours: Mapping[str, Tensor], config: ModelConfig, architecture: str | None = None) -> dict[str, Tensor]:
    """The inverse of `from_tensors`, in Hugging Face's spelling; views. A tied head is absent."""
    return to_theirs(ours, ARCHITECTURES[architecture or counterpart(config)].layout(config))
