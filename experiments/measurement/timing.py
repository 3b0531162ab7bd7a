"""Warm up, synchronise, repeat, keep every sample; turn by turn where others are to have theirs in between."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

WARM_UP = 2
NOISY = 1.5  # p95 over median
MOST_REPEATS = 2000
MOST_TURNS = 40  # unless more are asked for
LONG_MS = 100.0  # beside which what a cold cache costs is nothing
# What a GPU has left to do when its host has asked for everything: less than both, and it had nothing queued. A full
# queue, a thousand kernels, is more milliseconds; of a very long operation it may be a small share.
IDLE_SHARE, IDLE_MS = 0.1, 2.0


@dataclass(frozen=True)
class Samples:
    """Raw times of one operation, in milliseconds; on a GPU also how long its host took to ask for it."""

    ms: list[float]
    asked_ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.ms))

    @property
    def p5(self) -> float:
        return float(np.percentile(self.ms, 5))

    @property
    def p95(self) -> float:
        return float(np.percentile(self.ms, 95))

    @property
    def noisy(self) -> bool:
        return self.p95 > NOISY * self.median

    @property
    def host_bound(self) -> bool:
        """Whether a GPU waited for its host, whose time this is then."""
        if not self.asked_ms:
            return False
        left = float(np.median(np.subtract(self.ms, self.asked_ms)))
        return left < min(IDLE_SHARE * self.median, IDLE_MS)

    def to_dict(self) -> dict[str, Any]:
        return {"ms": self.ms} | ({"asked_ms": self.asked_ms} if self.asked_ms else {})


def timed(
    operation: Callable[[], object], *, repeats: int, seconds: float, device: torch.device, warm_up: int = WARM_UP
) -> Samples:
    """Run `operation` `warm_up` times unmeasured, then until both `repeats` and `seconds` are reached."""
    for _ in range(warm_up):
        operation()
    samples, asked = [], []
    begun = time.perf_counter()
    while len(samples) < MOST_REPEATS:
        _synchronise(device)
        start = time.perf_counter()
        operation()
        if device.type == "cuda":
            asked.append((time.perf_counter() - start) * 1e3)
        _synchronise(device)
        end = time.perf_counter()
        samples.append((end - start) * 1e3)
        if len(samples) >= repeats and end - begun >= seconds:
            break
    return Samples(samples, asked)


def timed_in_turns(
    operation: Callable[[], object], *, repeats: int, seconds: float, device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> Generator[None, None, dict[str, Any]]:  # fmt: skip
    """Time `operation` in turns, each of them `before` and one sample or more, until there are `repeats` turns and
    `seconds` of samples. It warms up at once, and yields before each turn. Returns `samples`, how many of them each of
    the `turns` has, whether they are `noisy`, and whether a GPU waited for its host (`host_bound`)."""
    again = timed(operation, repeats=1, seconds=0, device=device, warm_up=1)
    # whoever had the turn in between has filled the caches, which a short operation would find warm in use
    warm_up = 1 if again.median < LONG_MS else 0
    all_turns, turns = Samples([]), []
    while len(turns) < repeats or sum(all_turns.ms) < seconds * 1e3:
        yield
        before()
        turn = timed(operation, repeats=1, seconds=seconds / MOST_TURNS, device=device, warm_up=warm_up)
        all_turns = Samples(all_turns.ms + turn.ms, all_turns.asked_ms + turn.asked_ms)
        turns.append(len(turn.ms))
    return {
        "samples": all_turns.to_dict(), "turns": turns, "noisy": all_turns.noisy, "host_bound": all_turns.host_bound,
    }  # fmt: skip


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
