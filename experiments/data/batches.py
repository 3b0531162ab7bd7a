"""Tokens to batches. Which tokens a step sees depends on (seed, step) and on nothing else.

Legend: B batch, T context in tokens. Targets are inputs shifted by one token.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from experiments.errors import CorpusError

Batch = tuple[torch.Tensor, torch.Tensor]


class Batches:
    """Windows at random places of a token stream, drawn with replacement.

    tokens: (n,) integers, usually memory-mapped. seed: not negative.
    Raises CorpusError where the stream is shorter than one window and its target, T + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, *, context: int, batch: int, seed: int) -> None:
        require_length("token stream", tokens, context)
        self.tokens = tokens
        self.context = context
        self.batch = batch
        self.seed = seed

    def at(self, step: int) -> Batch:
        """(inputs, targets) of step `step` >= 0: int64 (B, T) each."""
        # the modulo favours some places over others by less than n / 2^64
        drawn = words(self.seed, step, self.batch)
        starts = (drawn % np.uint64(len(self.tokens) - self.context)).astype(np.int64)
        window = np.arange(self.context + 1)
        return shifted(self.tokens[starts[:, None] + window])


def words(seed: int, step: int, count: int) -> np.ndarray:
    """(count,) uint64, a function of (seed, step) alone."""
    # Raw words, not Generator.integers: numpy promises that only the former never change.
    return np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(count)


class StreamHash:
    """SHA-256 of the batches that were consumed, in order; blind to device, integer width and layout."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        for tokens in (inputs, targets):
            self._sha256.update(np.array(tokens.shape, dtype="<i8").tobytes())
            self._sha256.update(tokens.cpu().numpy().astype("<i8").tobytes())

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def windows(tokens: np.ndarray, *, context: int, batch: int) -> Iterator[Batch]:
    """Consecutive windows that predict every token after the first exactly once, in order.

    Full windows come as int64 (n, T) with n <= batch; a shorter last one comes alone as (1, t).
    Raises CorpusError where the stream is shorter than T + 1 tokens.
    """
    require_length("token stream", tokens, context)
    return _windows(tokens, context, batch)


def require_length(name: str, tokens: np.ndarray, context: int) -> None:
    """Raises CorpusError where `tokens`, e.g. the "validation split", hold no T tokens and a target."""
    if len(tokens) <= context:
        raise CorpusError(
            f"the {name} has {len(tokens)} tokens, context = {context} needs {context + 1}; "
            f"use more text, a larger fraction for it, or a shorter context"
        )


def _windows(tokens: np.ndarray, context: int, batch: int) -> Iterator[Batch]:
    rows, rest = divmod(len(tokens) - 1, context)
    for row in range(0, rows, batch):
        starts = context * np.arange(row, min(row + batch, rows))
        yield shifted(tokens[starts[:, None] + np.arange(context + 1)])
    if rest:
        yield shifted(tokens[None, -rest - 1 :])


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same there. To a GPU the copy is only asked for, from memory that stays in its place (pinned), without which
    the host would wait for all that the GPU has still to do."""
    inputs, targets = batch
    if device.type == "cuda":
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def shifted(window: np.ndarray) -> Batch:
    """(B, T + 1) -> inputs and targets, (B, T)."""
    whole = torch.from_numpy(np.asarray(window, dtype=np.int64))
    return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
