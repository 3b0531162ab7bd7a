"""What a configuration costs, from its shapes alone: parameters, FLOPs, bytes of state. Each mixer and feed-forward
layer counts its own, in its `Config`; here they are added up.

B: batch   T: tokens of context   D: width   V: vocabulary

Conventions. A multiply-add is two FLOPs. Attention is counted causally: a token at position t meets t + 1 keys, so
(T + 1) / 2 on average over T (less with a window, T without a mask); so are the scores within a chunk of Mamba-2.
Norms, activations and rotary positions are left out (they are not matrix work, and are the same order in every
architecture); scan and convolution are counted, since they are a state-space mixer's own work, and Mamba-3's rotation,
which is part of its scan. The backward pass is twice the forward. Parameters and state bytes are exact.
"""

from dataclasses import dataclass

from models.config import ModelConfig
from models.mixers.attention import AttentionConfig
from models.norm import NORMS

LONGEST = 1 << 40  # tokens, beyond which a length is no answer


@dataclass(frozen=True)
class Parameters:
    """total, all of which have to be loaded; without embeddings and head; and active: those that one token meets."""

    total: int
    non_embedding: int
    active: int


def parameters(config: ModelConfig) -> Parameters:
    D, V = config.width, config.vocabulary
    norm = 2 * D if NORMS[config.norm].has_bias else D
    non_embedding, idle = 0 if config.post_norm else norm, 0
    for block in config.blocks:
        non_embedding += norm + block.mixer.parameters(D)
        if block.feedforward is not None:
            non_embedding += norm + block.feedforward.parameters(D)
            idle += block.feedforward.parameters(D) - block.feedforward.active_parameters(D)
    ends = V * D * (1 if config.tie_embeddings else 2) + (config.positions or 0) * D + (V if config.head_bias else 0)
    return Parameters(non_embedding + ends, non_embedding, non_embedding + ends - idle)


def forward_flops_per_token(config: ModelConfig, context: int, predicted: float = 1.0) -> float:
    """Mean over the tokens of a sequence of `context` tokens; the head is asked for a share `predicted` of them."""
    D = config.width
    flops = 2.0 * D * config.vocabulary * predicted
    for block in config.blocks:
        flops += block.mixer.flops_per_token(D, context)
        if block.feedforward is not None:
            flops += block.feedforward.flops_per_token(D)
    return flops


def training_flops_per_token(config: ModelConfig, context: int, predicted: float = 1.0) -> float:
    """Forward and backward."""
    return 3 * forward_flops_per_token(config, context, predicted)


def state_bytes(config: ModelConfig, batch: int, max_len: int, element_size: int) -> int:
    """Bytes of `LanguageModel.make_state(batch, max_len)` with elements of `element_size` bytes."""
    return batch * sum(block.mixer.state_bytes(config.width, max_len, element_size) for block in config.blocks)


def rotary_bytes(config: ModelConfig, positions: int) -> int:
    """Bytes of the float32 tables of rotary angles that a model keeps for so many positions, one for all its layers
    (models.ops.attention.rotary_table)."""
    turning = [m for m in (b.mixer for b in config.kinds) if isinstance(m, AttentionConfig) and m.rotary]
    tables = {(mixer.sizes(config.width)[2], mixer.rotary_base) for mixer in turning}
    return sum(4 * positions * P for P, _ in tables)


def outgrows(config: ModelConfig, size: int, element_size: int, batch: int = 1) -> int | None:
    """The fewest tokens, at least one, whose state takes more than `size` bytes; None where it never grows beyond that,
    or has no positions for so many."""
    longest = config.positions or LONGEST
    if state_bytes(config, batch, longest, element_size) <= size:
        return None
    low, high = 0, longest  # from low + 1 to high is the first one; state_bytes never shrinks with length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if state_bytes(config, batch, middle, element_size) > size else (middle, high)
    return high


def grows(config: ModelConfig) -> bool:
    """Whether its state grows without end: a window is full one day."""
    return state_bytes(config, 1, LONGEST, 2) > state_bytes(config, 1, LONGEST // 2, 2)


def decode_bytes(config: ModelConfig, batch: int, context: int, element_size: int) -> float:
    """Bytes that one decode step of `batch` sequences has to read: the weights that it touches, and the state that
    holds `context` tokens. What is written is left out."""
    return touched_bytes(config, batch, element_size) + state_bytes(config, batch, context, element_size)


def touched_bytes(config: ModelConfig, batch: int, element_size: int) -> float:
    """Bytes of the weights that a decode step of `batch` sequences touches, each once; of an embedding a row per token,
    of experts those that are chosen, the mean where the tokens choose evenly."""
    D, V = config.width, config.vocabulary
    whole = weight_bytes(config, element_size)
    for block in config.blocks:
        layer = block.feedforward
        if layer is not None:
            whole -= (layer.parameters(D) - layer.touched_parameters(D, batch)) * element_size
    if not config.tie_embeddings:
        whole -= (V - min(batch, V)) * D * element_size  # the head is read whole, the embedding by rows
    positions = config.positions or 0
    whole -= (positions - min(1, positions)) * D * element_size
    return whole


def state_formula(config: ModelConfig) -> str:
    """`state_bytes` in words, for a report."""
    formulas = [block.mixer.state_formula(config.width) for block in config.blocks]
    counts = {formula: formulas.count(formula) for formula in formulas}
    return "; ".join(f"{count} block{'s' if count > 1 else ''} x {formula}" for formula, count in counts.items())


def weight_bytes(config: ModelConfig, element_size: int) -> int:
    """Bytes of the parameters; those that a mixer keeps in float32 are counted as such."""
    wide = sum(block.mixer.float32_parameters(config.width) for block in config.blocks)
    return (parameters(config).total - wide) * element_size + wide * max(4, element_size)
