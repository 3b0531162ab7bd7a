"""What must hold before a number may be believed: a failed gate blocks the numbers it would have tainted.

Run on the model of a cell as it starts, on tokens of the corpus, outside of everything that is timed.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.kernels.check import TOLERANCES, tolerance
from experiments.training import autocast, token_loss
from models.config import ModelConfig
from models.language_model import LanguageModel

TOKENS = {"cpu": 150, "cuda": 272}  # past two chunks of any form of a CPU, past one of any kernel but the scan's
LONGEST = 600  # for the sake of the reference's loops
FEW = 24
STIR = 0.1  # standard deviation
LOSS_TOLERANCE = 0.02  # of ln V
ROUNDING = 1e-5  # absolute, of the same logits
LOGIT_DEVIATION = 0.25  # standard deviation of the first logits
LOGIT_TOLERANCE = 1e-3  # absolute
GRADIENT_TOLERANCE = 1e-3  # of the norm
GRADIENT_FLOOR = 1e-2  # of the norm of all gradients: some are exactly zero but for rounding, of a bias of keys for one


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


def length(config: ModelConfig, device_type: str) -> int:
    """How many tokens a model is checked on: past the chunks of its forms and past its windows, whose borders are where
    a state, or a ring of keys, goes wrong. Few of one with experts: of more tokens some would be sent elsewhere for
    less than rounding."""
    return FEW if _has_experts(config) else _past_borders(config, device_type)


def gradient_shape(config: ModelConfig, device_type: str) -> tuple[int, int]:
    """Rows and tokens that gradients are checked on. With experts too as many on a GPU as its kernels need, where
    what is allowed has room for tokens that are sent elsewhere."""
    if _has_experts(config) and device_type == "cpu":
        return 2, FEW
    return 1, _past_borders(config, device_type)


def _past_borders(config: ModelConfig, device_type: str) -> int:
    windows = [getattr(block.mixer, "window", None) or 0 for block in config.kinds]
    past = max(TOKENS[device_type], min(max(windows) + FEW, LONGEST))
    return min(past, config.positions or past)


@torch.no_grad()
def check(model: LanguageModel, tokens: Tensor, untrained: bool = True) -> list[Gate]:
    """tokens (B, T), T >= 8. A model that starts from given weights is not `untrained`, and its first loss may be
    anything. One that is has weights under which a bias that was left out or a wrong channel does not tell: they are
    stirred, but for the loss."""
    model.eval()
    limit = logit_tolerance((block.mixer.backend.name, block.mixer.operation) for block in model.blocks)
    prejudice = _prejudice(tokens, model(tokens)) if untrained else None
    with _stirred(model) if untrained else nullcontext():
        logits = model(tokens)
        gates = [Gate("fast form = reference", _reference_difference(model, tokens, logits), limit)]
        if prejudice is not None:
            gates.append(Gate("initial loss near ln(vocabulary)", prejudice, LOSS_TOLERANCE))
        # how many tokens share an expert decides how its products are summed: another last token rounds others
        leak = ROUNDING if _has_experts(model.config) else 0.0
        if model.config.causal:  # a model that looks ahead cannot decode either
            gates += [
                Gate("causality", _leak(model, tokens, logits), leak),
                Gate("forward = prefill + steps", _split_difference(model, tokens, logits), limit),
            ]
    model.train()
    return gates


def _has_experts(config: ModelConfig) -> bool:
    return any(block.feedforward is not None and block.feedforward.kind == "moe" for block in config.kinds)


@contextmanager
def _stirred(model: LanguageModel) -> Iterator[None]:
    """What starts alike in all channels, heads or layers (vectors, and matrices of equal rows) differs inside."""
    generator = torch.Generator().manual_seed(0)
    alike = [weight for weight in model.parameters() if weight.ndim < 2 or bool((weight == weight[:1]).all())]
    before = [weight.clone() for weight in alike]
    for weight in alike:
        weight += (STIR * torch.randn(weight.shape, generator=generator)).to(weight)
    try:
        yield
    finally:
        for weight, old in zip(alike, before, strict=True):
            weight.copy_(old)


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
    return (_reference(model)(tokens) - logits).abs().max().item()


def _reference(model: LanguageModel) -> LanguageModel:
    """The same weights, every mixer as its readable loop."""
    reference = LanguageModel(model.config.with_backend("reference"), seed=None, device=model.device)
    reference.load_state_dict(model.state_dict(), assign=True)
    reference.tie()
    return reference.eval()


# ---------------------------------------------------------------------------------------------------- the backward pass


def gradient_tolerance(operations: Iterable[tuple[str, str]], precision: str, experts: bool = False) -> float:
    """For (form, kernel) of every mixer and a number format: twice what the check of the coarsest kernel allows it. In
    bfloat16 on a CPU the presets show up to 0.034; those with experts 0.14, since rounding sends a token to others,
    where it has another gradient altogether. Without any sense it would be 1."""
    shares = [TOLERANCES[precision], *(tolerance(form, kernel, precision) for form, kernel in operations)]
    if experts and max(shares) > TOLERANCES["float32"]:
        return 0.5
    return max(GRADIENT_TOLERANCE, 2 * max(shares))


def check_gradients(model: LanguageModel, inputs: Tensor, targets: Tensor, precision: str) -> Gate:
    """Whether the training loss in a number format has the gradients of the reference in float32. inputs, targets
    (B, T). After training, on weights that it has not touched: so kernels that choose among configurations run in those
    that trained."""
    operations = [(block.mixer.backend.name, block.mixer.operation) for block in model.blocks]
    limit = gradient_tolerance(operations, precision, _has_experts(model.config))
    found = _gradients(model.eval(), inputs, targets, precision)
    expected = _gradients(_reference(model), inputs, targets, "float32")
    floor = GRADIENT_FLOOR * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = [(found[kind] - e).norm() / e.norm().clamp_min(floor) for kind, e in expected.items()]
    return Gate(f"gradients in {precision} = reference", torch.stack(errors).max().item(), limit)


def _gradients(model: LanguageModel, inputs: Tensor, targets: Tensor, precision: str) -> dict[str, Tensor]:
    """Of each parameter, those of all blocks side by side: in one block a sum of both signs may happen to cancel."""
    with autocast(precision, model.device):
        loss, balance = token_loss(model, inputs, targets)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss + balance, list(named.values()), materialize_grads=True)
    kinds: dict[str, list[Tensor]] = {}
    for name, gradient in zip(named, gradients, strict=True):
        kinds.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(gradient.flatten().float())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}
