"""What a phase does, made ready to be repeated: the same for every study that measures it."""

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.training import autocast, token_loss
from models.language_model import LanguageModel
from models.recorded import RecordedDecode, RepeatableStep
from models.state import ModelState

Operation = Callable[[], object]
PIECE = 2048  # tokens, of a prompt that is read to be decoded from


def training_step(
    model: LanguageModel, inputs: Tensor, targets: Tensor, precision: str, *, to_record: bool = False
) -> tuple[Operation, torch.optim.Optimizer]:
    """Forward, loss, backward, clipping, AdamW: what `experiments.training.train` does between two batches, and the
    optimizer, by whose `zero_grad` the caller ends the step. inputs, targets (B, T). to_record: the step is to be one
    that a `models.recorded.Recording` takes; the arithmetic is the same."""
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-4, fused=True, capturable=to_record)

    def step() -> None:
        with autocast(precision, model.device):
            loss, balance = token_loss(model, inputs, targets)
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, optimizer


def prefill(model: LanguageModel, prompt: Tensor) -> Operation:
    """Read a prompt (B, T) into an empty state and name the next token."""

    @torch.inference_mode()
    def read() -> Tensor:
        logits, _ = model.prefill(prompt, model.make_state(prompt.shape[0], prompt.shape[1]))
        return logits.argmax(1)

    return read


def decode(model: LanguageModel, prompt: Tensor, tokens: int, mode: str = "eager") -> tuple[Operation, ModelState]:
    """Write `tokens` tokens greedily after a prompt (B, T), and the state that holds the prompt. mode: as in the
    settings of speed; of all but `eager` the position stands on the device (models.recorded, whose errors it raises).
    The blocks' steps are compiled already where it says so.

    Every call starts from the same position: a cache is written over beyond it; a recurrent state just goes on, which
    costs the same.
    """
    with torch.inference_mode():
        state = model.make_state(prompt.shape[0], prompt.shape[1] + tokens)
        for piece in prompt.split(PIECE, 1):
            logits, state = model.prefill(piece.contiguous(), state)
        first = logits.argmax(1)

    limit = prompt.shape[1] + tokens
    if mode != "eager":
        with torch.inference_mode():
            step = RepeatableStep(model, state, limit) if mode == "compiled" else RecordedDecode(model, state, limit)

        @torch.inference_mode()
        def repeat() -> Tensor:
            step.rewind()
            step.step(first)
            for _ in range(tokens - 1):
                step.step()
            return step.token

        return repeat, state

    @torch.inference_mode()
    def write() -> Tensor:
        token, now = first, state
        for _ in range(tokens):
            logits, now = model.step(token, now)
            token = logits.argmax(1)
        return token

    return write, state
