"""Quality on fixed splits, in bits per byte of the original text, so that vocabularies compare."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from experiments.data.batches import Batches, windows
from experiments.data.dataset import TokenSplit
from experiments.training import autocast, token_loss
from models.language_model import LanguageModel


@dataclass(frozen=True)
class Quality:
    """A whole split, every token after the first predicted exactly once in windows of T tokens.

    bits_per_byte: total loss over the UTF-8 bytes of the split's text (document ends cost bits, carry no bytes).
    loss_at_position: nats, mean over the full windows, for position 0 (no context but one token) to T - 1.
    """

    bits_per_byte: float
    nats_per_token: float
    token_perplexity: float
    tokens: int
    bytes: int
    windows: int
    loss_at_position: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(model: LanguageModel, split: TokenSplit, *, context: int, batch: int, precision: str) -> Quality:
    """Raises CorpusError when the split is shorter than one window."""
    was_training = model.training
    model.eval()
    total, count, full = 0.0, 0, 0
    at_position = torch.zeros(context, dtype=torch.float64)
    for inputs, targets in windows(split.tokens, context=context, batch=batch):
        losses = _losses(model, inputs, targets, precision)
        total += losses.sum().item()
        count += losses.numel()
        if losses.shape[1] == context:
            at_position += losses.sum(0)
            full += losses.shape[0]
    model.train(was_training)
    nats = total / count
    return Quality(
        bits_per_byte=total / math.log(2) / split.bytes,
        nats_per_token=nats,
        token_perplexity=math.exp(nats) if nats < 700 else math.inf,
        tokens=count,
        bytes=split.bytes,
        windows=full,
        loss_at_position=(at_position / full).tolist(),
    )


@torch.no_grad()
def mean_loss(model: LanguageModel, split: TokenSplit, *, context: int, sequences: int, precision: str) -> float:
    """Nats per token over `sequences` fixed windows from all over a split: a point of the validation curve."""
    inputs, targets = Batches(split.tokens, context=context, batch=sequences, seed=0).at(0)
    model.eval()
    with autocast(precision, model.device):
        loss = token_loss(model, inputs.to(model.device), targets.to(model.device)).item()
    model.train()
    return loss


def _losses(model: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor, precision: str) -> torch.Tensor:
    """Per token (B, T), float64 on the host; summed there so that the order of windows does not matter much."""
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    with autocast(precision, model.device):
        logits = model(inputs)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).double().cpu()
