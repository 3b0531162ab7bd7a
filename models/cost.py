"""What a configuration costs, from its shapes alone: parameters, FLOPs, bytes of state.

B: batch   T: tokens of context   D: width   E: expanded width   N: state size   H: heads   K: key-value heads
P: head width   F: hidden width   R: dt rank   W: convolution taps   V: vocabulary

Conventions. A multiply-add is two FLOPs. Attention is counted causally: a token at position t meets t + 1 keys, so
(T + 1) / 2 on average over T. Norms, activations and the rotation are left out (they are not matrix work, and are the
same order in every architecture); the scan and the convolution are counted, since they are Mamba's own work.
The backward pass is twice the forward. Parameters and state bytes are exact.
"""

from dataclasses import dataclass

from models.config import AttentionConfig, MambaConfig, ModelConfig
from models.ops.selective_scan import forward_flops


@dataclass(frozen=True)
class Parameters:
    """total; without embedding and head; and active per token (all of them in a dense model)."""

    total: int
    non_embedding: int
    active: int


def parameters(config: ModelConfig) -> Parameters:
    D = config.width
    block = D + _mixer_parameters(config)
    if config.feedforward_hidden is not None:
        block += D + 3 * D * config.feedforward_hidden
    non_embedding = config.layers * block + D
    total = non_embedding + config.vocabulary * D * (1 if config.tie_embeddings else 2)
    return Parameters(total, non_embedding, total)


def _mixer_parameters(config: ModelConfig) -> int:
    D, mixer = config.width, config.mixer
    if isinstance(mixer, AttentionConfig):
        kv = (mixer.kv_heads or mixer.heads) * (D // mixer.heads)
        return D * (D + 2 * kv) + D * D
    E, N, R = mixer.expand * D, mixer.state, config.dt_rank
    projections = 2 * D * E + E * (R + 2 * N) + R * E + E * D
    return projections + E * (mixer.conv_width + 1) + E * N + 2 * E


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """Mean over the tokens of a sequence of `context` tokens."""
    D = config.width
    block = _mixer_flops(config, context)
    if config.feedforward_hidden is not None:
        block += 2 * 3 * D * config.feedforward_hidden
    return config.layers * block + 2 * D * config.vocabulary


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward and backward."""
    return 3 * forward_flops_per_token(config, context)


def _mixer_flops(config: ModelConfig, context: int) -> float:
    D, mixer = config.width, config.mixer
    if isinstance(mixer, AttentionConfig):
        kv = (mixer.kv_heads or mixer.heads) * (D // mixer.heads)
        scores_and_sum = 2 * 2 * D * (context + 1) / 2
        return 2 * D * (D + 2 * kv) + 2 * D * D + scores_and_sum
    E, N, R = mixer.expand * D, mixer.state, config.dt_rank
    projections = 2 * (2 * D * E + E * (R + 2 * N) + R * E + E * D)
    return projections + 2 * E * mixer.conv_width + forward_flops(E, N)


def state_bytes(config: ModelConfig, batch: int, max_len: int, element_size: int) -> int:
    """Bytes of `LanguageModel.make_state(batch, max_len)` with elements of `element_size` bytes."""
    D, mixer = config.width, config.mixer
    if isinstance(mixer, AttentionConfig):
        per_block = 2 * (mixer.kv_heads or mixer.heads) * (D // mixer.heads) * max_len
    else:
        per_block = mixer.expand * D * (mixer.state + mixer.conv_width)
    return batch * config.layers * per_block * element_size


def state_formula(config: ModelConfig) -> str:
    """`state_bytes` in words, for a report."""
    D, mixer = config.width, config.mixer
    if isinstance(mixer, AttentionConfig):
        kv = (mixer.kv_heads or mixer.heads) * (D // mixer.heads)
        return f"{config.layers} layers x 2 x {kv} elements per token"
    assert isinstance(mixer, MambaConfig)
    size = f"{config.layers} blocks x {mixer.expand * D} x ({mixer.state} + {mixer.conv_width})"
    return f"{size} elements, whatever the length"


def weight_bytes(config: ModelConfig, element_size: int) -> int:
    """Bytes of the parameters; those that Mamba keeps in float32 (A_log, D, dt_bias) are counted as such."""
    count = parameters(config).total
    if isinstance(config.mixer, MambaConfig):
        wide = config.layers * config.mixer.expand * config.width * (config.mixer.state + 2)
        return (count - wide) * element_size + wide * max(4, element_size)
    return count * element_size
