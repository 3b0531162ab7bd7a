"""Quality on fixed splits, in bits per byte of the original text, so that vocabularies compare."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from experiments.data.batches import Batch, Batches, windows
from experiments.data.dataset import TokenSplit
from experiments.objectives import IGNORED, Objective
from experiments.training import autocast, token_loss
from models.language_model import LanguageModel


@dataclass(frozen=True)
class Quality:
    """A whole split, every token after the first predicted exactly once in windows of T tokens.

    bits_per_byte: total loss over the UTF-8 bytes of the split's text (document ends cost bits, carry no bytes).
    token_perplexity: None where it is too large for a number.
    loss_at_position: nats, mean over the full windows, for position 0 (no context but one token) to T - 1.
    """

    bits_per_byte: float
    nats_per_token: float
    token_perplexity: float | None
    tokens: int
    bytes: int
    windows: int
    loss_at_position: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(nats: float) -> float | None:
    """None beyond e^700, about 1e304: a float64 still holds the sum of several below that."""
    return math.exp(nats) if nats < 700 else None


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Without dropout and without gradients; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(model: LanguageModel, split: TokenSplit, *, context: int, batch: int, precision: str) -> Quality:
    """Raises CorpusError when the split is shorter than one window."""
    total, count, full = 0.0, 0, 0
    at_position = torch.zeros(context, dtype=torch.float64)
    with _evaluating(model):
        for inputs, targets in windows(split.tokens, context=context, batch=batch):
            losses = _losses(model, inputs, targets, precision)
            total += losses.sum().item()
            count += losses.numel()
            if losses.shape[1] == context:
                at_position += losses.sum(0)
                full += losses.shape[0]
    nats = total / count
    return Quality(
        bits_per_byte=total / math.log(2) / split.bytes,
        nats_per_token=nats,
        token_perplexity=perplexity(nats),
        tokens=count,
        bytes=split.bytes,
        windows=full,
        loss_at_position=(at_position / full).tolist(),
    )


@dataclass(frozen=True)
class MaskedQuality:
    """A whole split in windows of T tokens, in each of which the same 15% are hidden behind [MASK] for every model. No
    likelihood of a text follows from it, so it has no bits per byte.

    masked_token_loss: nats per hidden token. masked_accuracy: share of the hidden tokens that were guessed.
    """

    masked_token_loss: float
    masked_accuracy: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_masked(
    model: LanguageModel, split: TokenSplit, objective: Objective, *, context: int, batch: int, precision: str
) -> MaskedQuality:
    """Raises CorpusError when the split is shorter than one window."""
    total, right, count = 0.0, 0, 0
    with _evaluating(model):
        for step, (text, _) in enumerate(windows(split.tokens, context=context, batch=batch)):
            inputs, targets = (x.to(model.device) for x in replace(objective, seed=0).hidden(text, step))
            with autocast(precision, model.device):
                logits = model(inputs)[targets != IGNORED].float()
            targets = targets[targets != IGNORED]
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            right += int((logits.argmax(1) == targets).sum())
            count += len(targets)
    return MaskedQuality(total / count, right / count, count)


def _curve_batch(split: TokenSplit, objective: Objective, context: int, sequences: int) -> Batch:
    """(sequences, T): the same windows from all over the split, and the same tokens hidden, whatever the seed."""
    inputs, targets = Batches(split.tokens, context=context, batch=sequences, seed=0).at(0)
    return replace(objective, seed=0).batch(inputs, targets, 0)


def mean_loss(
    model: LanguageModel, split: TokenSplit, objective: Objective, *, context: int, sequences: int, precision: str
) -> float:
    """Nats per predicted token over `sequences` fixed windows from all over a split: a point of the curve."""
    inputs, targets = (x.to(model.device) for x in _curve_batch(split, objective, context, sequences))
    with _evaluating(model), autocast(precision, model.device):
        loss, _ = token_loss(model, inputs, targets, with_ignored=objective.name == "masked")
    return loss.item()


def expert_load(
    model: LanguageModel, split: TokenSplit, objective: Objective, *, context: int, sequences: int
) -> list[list[float]]:
    """For each layer of experts the share of assignments that goes to each, on the windows of `mean_loss`."""
    inputs, _ = _curve_batch(split, objective, context, sequences)
    with _evaluating(model):
        routing = model.hidden(inputs.to(model.device)).routing
    return [used.load.tolist() for used in routing]


def _losses(model: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor, precision: str) -> torch.Tensor:
    """Per token (B, T), float64 on the host; summed there so that the order of windows does not matter much."""
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    with autocast(precision, model.device):
        logits = model(inputs)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).double().cpu()
