"""Hugging Face's parameter names, in both directions, for `LlamaForCausalLM` and `MambaForCausalLM`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.config import AttentionConfig, ModelConfig

_MAMBA = {
    "in_proj.weight": "mixer.in_proj.weight",
    "conv1d.bias": "mixer.conv_bias",
    "x_proj.weight": "mixer.x_proj.weight",
    "dt_proj.weight": "mixer.dt_proj.weight",
    "dt_proj.bias": "mixer.dt_bias",
    "A_log": "mixer.A_log",
    "D": "mixer.D",
    "out_proj.weight": "mixer.out_proj.weight",
}


def from_llama(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`LlamaForCausalLM.state_dict()` to ours: q, k, v and gate, up are joined."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
    }
    if not config.tie_embeddings:
        ours["head.weight"] = theirs["lm_head.weight"]
    for i in range(config.layers):
        there, here = f"model.layers.{i}", f"blocks.{i}"
        qkv = [theirs[f"{there}.self_attn.{name}_proj.weight"] for name in "qkv"]
        ours[f"{here}.mixer.qkv_proj.weight"] = torch.cat(qkv)
        ours[f"{here}.mixer.o_proj.weight"] = theirs[f"{there}.self_attn.o_proj.weight"]
        gate_up = [theirs[f"{there}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        ours[f"{here}.feedforward.gate_up_proj.weight"] = torch.cat(gate_up)
        ours[f"{here}.feedforward.down_proj.weight"] = theirs[f"{there}.mlp.down_proj.weight"]
        ours[f"{here}.mixer_norm.weight"] = theirs[f"{there}.input_layernorm.weight"]
        ours[f"{here}.feedforward_norm.weight"] = theirs[f"{there}.post_attention_layernorm.weight"]
    return ours


def to_llama(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_llama`."""
    assert isinstance(config.mixer, AttentionConfig)
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    theirs["lm_head.weight"] = ours["embedding.weight" if config.tie_embeddings else "head.weight"]
    kv = (config.mixer.kv_heads or config.mixer.heads) * (config.width // config.mixer.heads)
    for i in range(config.layers):
        there, here = f"model.layers.{i}", f"blocks.{i}"
        qkv = ours[f"{here}.mixer.qkv_proj.weight"].split([config.width, kv, kv])
        for name, part in zip("qkv", qkv, strict=True):
            theirs[f"{there}.self_attn.{name}_proj.weight"] = part
        theirs[f"{there}.self_attn.o_proj.weight"] = ours[f"{here}.mixer.o_proj.weight"]
        for name, part in zip(("gate", "up"), ours[f"{here}.feedforward.gate_up_proj.weight"].chunk(2), strict=True):
            theirs[f"{there}.mlp.{name}_proj.weight"] = part
        theirs[f"{there}.mlp.down_proj.weight"] = ours[f"{here}.feedforward.down_proj.weight"]
        theirs[f"{there}.input_layernorm.weight"] = ours[f"{here}.mixer_norm.weight"]
        theirs[f"{there}.post_attention_layernorm.weight"] = ours[f"{here}.feedforward_norm.weight"]
    return theirs


def from_mamba(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`MambaForCausalLM.state_dict()` (or `mamba_ssm`'s, which says `embedding`) to ours."""
    embedding = next(name for name in ("embeddings", "embedding") if f"backbone.{name}.weight" in theirs)
    ours = {
        "embedding.weight": theirs[f"backbone.{embedding}.weight"],
        "norm.weight": theirs["backbone.norm_f.weight"],
    }
    if not config.tie_embeddings:
        ours["head.weight"] = theirs["lm_head.weight"]
    for i in range(config.layers):
        there, here = f"backbone.layers.{i}", f"blocks.{i}"
        ours[f"{here}.mixer_norm.weight"] = theirs[f"{there}.norm.weight"]
        ours[f"{here}.mixer.conv_weight"] = theirs[f"{there}.mixer.conv1d.weight"][:, 0]
        for name, mine in _MAMBA.items():
            ours[f"{here}.{mine}"] = theirs[f"{there}.mixer.{name}"]
    return ours


def to_mamba(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_mamba`, in Hugging Face's spelling (`backbone.embeddings`)."""
    theirs = {
        "backbone.embeddings.weight": ours["embedding.weight"],
        "backbone.norm_f.weight": ours["norm.weight"],
    }
    theirs["lm_head.weight"] = ours["embedding.weight" if config.tie_embeddings else "head.weight"]
    for i in range(config.layers):
        there, here = f"backbone.layers.{i}", f"blocks.{i}"
        theirs[f"{there}.norm.weight"] = ours[f"{here}.mixer_norm.weight"]
        theirs[f"{there}.mixer.conv1d.weight"] = ours[f"{here}.mixer.conv_weight"][:, None]
        for name, mine in _MAMBA.items():
            theirs[f"{there}.mixer.{name}"] = ours[f"{here}.{mine}"]
    return theirs
