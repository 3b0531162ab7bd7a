"""What must hold before a number may be believed: a failed gate blocks the numbers it would have tainted.

Run on the untrained model of a cell, on tokens of the corpus, before anything is timed.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.language_model import LanguageModel

LOSS_TOLERANCE = 0.02  # of ln V
LOGIT_TOLERANCE = 1e-3  # absolute; logits start with standard deviation 1/4


@dataclass(frozen=True)
class Gate:
    """value <= limit passes."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # NaN fails

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@torch.no_grad()
def check(model: LanguageModel, tokens: Tensor) -> list[Gate]:
    """tokens (B, T), T >= 8, from the training split."""
    model.eval()
    logits = model(tokens)
    expected = math.log(model.config.vocabulary)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).item()
    gates = [
        Gate("initial loss near ln(vocabulary)", abs(loss / expected - 1), LOSS_TOLERANCE),
        Gate("causality", _leak(model, tokens, logits), 0.0),
        Gate("forward = prefill + steps", _split_difference(model, tokens, logits), LOGIT_TOLERANCE),
        Gate("fast form = reference", _reference_difference(model, tokens, logits), LOGIT_TOLERANCE),
    ]
    model.train()
    return gates


def _leak(model: LanguageModel, tokens: Tensor, logits: Tensor) -> float:
    """Change the last token: nothing before it may change at all."""
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.config.vocabulary
    return (model(changed)[:, :-1] - logits[:, :-1]).abs().max().item()


def _split_difference(model: LanguageModel, tokens: Tensor, logits: Tensor) -> float:
    T = tokens.shape[1]
    state = model.make_state(tokens.shape[0], T)
    last, state = model.prefill(tokens[:, : T // 2], state)
    worst = (last - logits[:, T // 2 - 1]).abs().max().item()
    for t in range(T // 2, T):
        last, state = model.step(tokens[:, t], state)
        worst = max(worst, (last - logits[:, t]).abs().max().item())
    return worst


def _reference_difference(model: LanguageModel, tokens: Tensor, logits: Tensor) -> float:
    plain = replace(model.config, mixer=replace(model.config.mixer, backend="reference"))
    reference = LanguageModel(plain, seed=None, device=model.device)
    reference.load_state_dict(model.state_dict(), assign=True)
    reference.tie()
    return (reference(tokens) - logits).abs().max().item()
