"""One training loop for every arm.

B: batch   T: time   D: width   V: vocabulary
"""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.data.batches import Batches, StreamHash, on_device
from experiments.objectives import IGNORED, Objective
from experiments.spec import Training
from models.language_model import LanguageModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by their names in a specification


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite. The message says at which step and learning rate."""


@dataclass(frozen=True)
class Step:
    """One optimizer step. loss: nats per predicted token before the update. tokens: consumed so far, with this step."""

    step: int
    tokens: int
    loss: float
    learning_rate: float
    gradient_norm: float
    step_ms: float


def learning_rate_at(step: int, peak: float, settings: Training) -> float:
    """Linear warm-up to `peak`, then a cosine down to its final fraction at the last step. Steps count from 1."""
    if step <= settings.warmup_steps:
        return peak * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    floor = settings.final_learning_rate_fraction
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def dropout_seed(seed: int) -> int:
    """Of the 32 bits that a CPU's generator keeps of any; hashed, since beside `seed` lie those that initialise."""
    return int.from_bytes(hashlib.sha256(f"dropout {seed}".encode()).digest()[:4], "little")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def token_loss(
    model: LanguageModel, inputs: Tensor, targets: Tensor, *, with_ignored: bool = False
) -> tuple[Tensor, Tensor | float]:
    """Mean cross-entropy in nats over the tokens that are to be predicted; and what balancing the load of experts adds
    to the training loss, 0 without any. inputs and targets (B, T); with_ignored: some targets may be IGNORED."""
    hidden = model.hidden(inputs)
    x, targets = hidden.x.flatten(0, 1), targets.flatten()
    if with_ignored:
        x, targets = x[targets != IGNORED], targets[targets != IGNORED]
    loss = model.ops.linear_cross_entropy(x, model.head.weight, targets, model.head.bias)
    return loss, sum(used.balance for used in hidden.routing)


def train(
    model: LanguageModel, batches: Batches, settings: Training, peak_learning_rate: float, stream: StreamHash,
    objective: Objective,
) -> Iterator[Step]:  # fmt: skip
    """Train in place, yielding after every optimizer step. `stream` sees every token of the batches.

    A step's time runs from fetching its batches to the end of the update; what the caller does between steps is
    not in it. Raises NonFiniteLossError before the update that would spread it.
    """
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameter_groups(settings.weight_decay), betas=(settings.beta1, settings.beta2), fused=True
    )
    tokens_per_step = settings.accumulate * settings.batch * settings.context
    torch.manual_seed(dropout_seed(objective.seed))  # torch's own generator: nothing but dropout draws from it
    model.train()
    for step in range(1, settings.steps + 1):
        start = time.perf_counter()
        rate = learning_rate_at(step, peak_learning_rate, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=device)
        for micro in range(settings.accumulate):
            index = (step - 1) * settings.accumulate + micro
            inputs, targets = batches.at(index)
            stream.update(inputs, targets)
            inputs, targets = on_device(objective.batch(inputs, targets, index), device)
            with autocast(settings.precision, device):
                loss, balance = token_loss(model, inputs, targets, with_ignored=objective.name == "masked")
            ((loss + balance) / settings.accumulate).backward()
            total += loss.detach() / settings.accumulate
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        # .item() waits for the device: the one synchronisation of the step
        mean_loss, gradient_norm = total.item(), norm.item()
        if not math.isfinite(mean_loss) or not math.isfinite(gradient_norm):
            raise NonFiniteLossError(
                f"loss {mean_loss:g}, gradient norm {gradient_norm:g} at step {step}, learning rate {rate:.3g}"
            )
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed_ms = (time.perf_counter() - start) * 1e3
        yield Step(step, step * tokens_per_step, mean_loss, rate, gradient_norm, elapsed_ms)
