"""What a newcomer would use: Hugging Face's models at the shapes of our presets, with our initial weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from models import config as ours
from models.hf import to_llama, to_mamba
from models.language_model import LanguageModel


def llama(model: LanguageModel, positions: int) -> LlamaForCausalLM:
    config, mixer = model.config, model.config.mixer
    assert isinstance(mixer, ours.AttentionConfig) and config.feedforward_hidden is not None  # noqa: PT018
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocabulary, hidden_size=config.width, intermediate_size=config.feedforward_hidden,
        num_hidden_layers=config.layers, num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads or mixer.heads, rms_norm_eps=config.norm_eps,
        max_position_embeddings=positions, tie_word_embeddings=config.tie_embeddings,
        bos_token_id=0, eos_token_id=None, pad_token_id=None,
    ))  # fmt: skip
    theirs.load_state_dict(to_llama(model.state_dict(), config))
    return theirs


def mamba(model: LanguageModel, *, mambapy: bool) -> MambaForCausalLM:
    config, mixer = model.config, model.config.mixer
    assert isinstance(mixer, ours.MambaConfig)
    theirs = MambaForCausalLM(MambaConfig(
        vocab_size=config.vocabulary, hidden_size=config.width, state_size=mixer.state,
        num_hidden_layers=config.layers, expand=mixer.expand, conv_kernel=mixer.conv_width,
        time_step_rank=config.dt_rank, layer_norm_epsilon=config.norm_eps, use_mambapy=mambapy,
        tie_word_embeddings=config.tie_embeddings, residual_in_fp32=False,
        bos_token_id=0, eos_token_id=None, pad_token_id=None,
    ))  # fmt: skip
    theirs.load_state_dict(to_mamba(model.state_dict(), config))
    return theirs


def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The same for both sides, so that the ratio is the model's."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)
