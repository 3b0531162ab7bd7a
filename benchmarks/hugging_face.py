"""What a newcomer would use: Hugging Face's models at the shapes of our presets, with our initial weights."""

from typing import Any

import torch

from benchmarks import common
from models import hf
from models.language_model import LanguageModel

common.needs("transformers")

import transformers  # noqa: E402
from transformers import LlamaForCausalLM, Mamba2ForCausalLM, MambaForCausalLM, PreTrainedModel  # noqa: E402


def counterpart(model: LanguageModel, **settings: Any) -> PreTrainedModel:
    """Their model with our weights, in float32. settings: more of their configuration."""
    values = hf.to_settings(model.config) | settings
    cls = getattr(transformers, values["architectures"][0])
    theirs = cls(cls.config_class.from_dict(values))
    missing, unexpected = theirs.load_state_dict(hf.to_tensors(model.state_dict(), model.config), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()  # the embedding's own tensor
    assert set(missing) == tied, missing
    assert not unexpected, unexpected
    return theirs


def llama(model: LanguageModel, positions: int) -> LlamaForCausalLM:
    return counterpart(model, max_position_embeddings=positions, bos_token_id=0)  # type: ignore[return-value]


def mamba(model: LanguageModel, *, mambapy: bool) -> MambaForCausalLM:
    return counterpart(model, use_mambapy=mambapy, bos_token_id=0)  # type: ignore[return-value]


def mamba2(model: LanguageModel) -> Mamba2ForCausalLM:
    return counterpart(model, bos_token_id=0)  # type: ignore[return-value]


def optimizer(parameters: list[torch.nn.Parameter], rate: float | torch.Tensor = 1e-3) -> torch.optim.Optimizer:
    """The same for both sides, so that the ratio is the model's. rate: a tensor where it is to change
    in a step that is recorded."""
    return torch.optim.AdamW(parameters, lr=rate, fused=True, capturable=isinstance(rate, torch.Tensor))
