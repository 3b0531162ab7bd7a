"""Tiny models of transformers, drawn at random in everything that we take, saved as transformers saves them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'transformers>=5'"
)

TOKENS = {"bos_token_id": None, "eos_token_id": None}


@st.composite
def shared(draw: st.DrawFn, padding: bool) -> dict[str, Any]:
    vocabulary = draw(st.integers(5, 70))
    index = st.none() | st.integers(0, vocabulary - 1) if padding else st.none()
    return TOKENS | {
        "vocab_size": vocabulary,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": draw(index),
    }


@st.composite
def attention(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    heads, head_width = kv_heads * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    return draw(shared(padding=True)) | {
        "hidden_size": heads * head_width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.integers(1, 40)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 500000.0, 100.0]))},
    }


@st.composite
def llama(draw: st.DrawFn) -> dict[str, Any]:
    theirs = draw(attention()) | {"attention_bias": draw(st.booleans())}
    if draw(st.booleans()):
        theirs["head_dim"] = 2 * draw(st.integers(1, 8))
    return theirs


@st.composite
def phi3(draw: st.DrawFn) -> dict[str, Any]:
    return draw(attention()) | {"sliding_window": draw(st.none() | st.integers(1, 80))}


@st.composite
def state_space(draw: st.DrawFn) -> dict[str, Any]:
    return draw(shared(padding=False)) | {
        "conv_kernel": draw(st.integers(2, 5)),
        "state_size": draw(st.integers(1, 9)),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "residual_in_fp32": draw(st.booleans()),
        "time_step_min": draw(st.sampled_from([0.001, 0.01])),
    }


@st.composite
def mamba(draw: st.DrawFn) -> dict[str, Any]:
    return draw(state_space()) | {
        "hidden_size": draw(st.integers(2, 24)),
        "expand": draw(st.integers(1, 3)),
        "time_step_rank": draw(st.just("auto") | st.integers(1, 5)),
    }


@st.composite
def mamba2(draw: st.DrawFn) -> dict[str, Any]:
    groups, expand = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    heads, head_width = groups * draw(st.integers(1, 2)) * expand, draw(st.integers(2, 8))
    return draw(state_space()) | {
        "hidden_size": heads * head_width // expand,
        "expand": expand,
        "num_heads": heads,
        "head_dim": head_width,
        "n_groups": groups,
        "chunk_size": draw(st.sampled_from([16, 64, 256])),
    }


DRAWN = {
    "LlamaForCausalLM": llama(),
    "Phi3ForCausalLM": phi3(),
    "MambaForCausalLM": mamba(),
    "Mamba2ForCausalLM": mamba2(),
}
PLAIN: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    },
    "Phi3ForCausalLM": {
        "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
        "sliding_window": 5, "pad_token_id": 3,
    },
    "MambaForCausalLM": {"hidden_size": 12, "state_size": 4, "tie_word_embeddings": True},
    "Mamba2ForCausalLM": {
        "hidden_size": 16, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "tie_word_embeddings": False,
    },
}  # fmt: skip
PLAIN = {
    name: TOKENS | {"vocab_size": 40, "num_hidden_layers": 2, "pad_token_id": None} | theirs
    for name, theirs in PLAIN.items()
}


def build(architecture: str, settings: dict[str, Any]) -> nn.Module:
    """With every weight perturbed, so that norms, D and biases are not all equal and attention is not flat."""
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(architecture: str, folder: Path, **settings: Any) -> nn.Module:
    model = build(architecture, PLAIN[architecture] | settings)
    model.save_pretrained(folder)
    return model
