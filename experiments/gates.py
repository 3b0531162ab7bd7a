"""What must hold before a number may be believed: a failed gate blocks the numbers it would have tainted.

Run on the untrained model of a cell, on tokens of the corpus, before anything is timed.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.kernels.check import TOLERANCES, tolerance
from models.language_model import LanguageModel

LOSS_TOLERANCE = 0.02  # of ln V
ROUNDING = 1e-5  # absolute, of the same logits
LOGIT_DEVIATION = 0.25  # standard deviation of the first logits
LOGIT_TOLERANCE = 1e-3  # absolute


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


def logit_tolerance(operations: Iterable[tuple[str, str]]) -> float:
    """For (form, kernel) of every mixer. Kernels that multiply in 16 bits whatever they are given, Mamba-3's, may err
    by what their own check allows them, as a share of logits that start with standard deviation 1/4. What several
    blocks round is independent, and adds up by its squares: rounding x, B, C and y to bfloat16 changes logits by up to
    0.006 in one block, 0.013 in four, 0.019 in nine. What tf32 rounds stays far below LOGIT_TOLERANCE, at 0.0002 in
    eighteen blocks of Mamba-2."""
    allowed = [tolerance(form, kernel, "float32") for form, kernel in operations]
    narrow = [share for share in allowed if share == TOLERANCES["bfloat16"]]
    return max(LOGIT_TOLERANCE, LOGIT_DEVIATION * math.hypot(*narrow))


@torch.no_grad()
def check(model: LanguageModel, tokens: Tensor, untrained: bool = True) -> list[Gate]:
    """tokens (B, T), T >= 8, from the training split. A model that starts from given weights is not `untrained`, and
    its first loss may be anything."""
    model.eval()
    logits = model(tokens)
    limit = logit_tolerance((block.mixer.backend.name, block.mixer.operation) for block in model.blocks)
    gates = [Gate("fast form = reference", _reference_difference(model, tokens, logits), limit)]
    if untrained:
        gates.append(Gate("initial loss near ln(vocabulary)", _prejudice(tokens, logits), LOSS_TOLERANCE))
    # how many tokens share an expert decides how its products are summed: another last token rounds others otherwise
    leak = ROUNDING if any(block.feedforward is not None and block.feedforward.kind == "moe"
                           for block in model.config.kinds) else 0.0  # fmt: skip
    if model.config.causal:  # a model that looks ahead cannot decode either
        gates += [
            Gate("causality", _leak(model, tokens, logits), leak),
            Gate("forward = prefill + steps", _split_difference(model, tokens, logits), limit),
        ]
    model.train()
    return gates


def _prejudice(tokens: Tensor, logits: Tensor) -> float:
    """How far the loss is from that of a model that finds every entry equally likely, as a share of ln V; over all
    entries that the text does not hold. With tied embeddings a token that was read has a head start, and a text of
    bytes repeats itself: that is no defect."""
    V = logits.shape[-1]
    held = torch.zeros(len(tokens), 1, V, dtype=torch.bool, device=tokens.device).scatter_(2, tokens[:, None], True)
    logits = logits.float()
    normaliser = logits.masked_fill(held, -math.inf).logsumexp(-1, keepdim=True)
    losses = (normaliser - logits).masked_fill(held, 0.0).sum(-1) / (~held).sum(-1)  # (B, T)
    return ((losses - (~held).sum(-1).log()).mean() / math.log(V)).abs().item()


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
    reference = LanguageModel(model.config.with_backend("reference"), seed=None, device=model.device)
    reference.load_state_dict(model.state_dict(), assign=True)
    reference.tie()
    reference.eval()
    return (reference(tokens) - logits).abs().max().item()
