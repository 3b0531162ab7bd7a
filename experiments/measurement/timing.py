"""Warm up, synchronise, repeat, keep every sample; turn by turn where others are to have theirs in between."""

import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

WARM_UP = 2
NOISY = 1.5  # p95 over median
MOST_REPEATS = 2000
MOST_TURNS = 40  # unless more are asked for
LONG_MS = 100.0  # beside which what a cold cache costs is nothing


@dataclass(frozen=True)
class Samples:
    """Raw times of one operation, in milliseconds."""

    ms: list[float]

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def timed(
    operation: Callable[[], object], *, repeats: int, seconds: float, device: torch.device, warm_up: int = WARM_UP
) -> Samples:
    """Run `operation` `warm_up` times unmeasured, then until both `repeats` and `seconds` are reached."""
    for _ in range(warm_up):
        operation()
    samples: list[float] = []
    begun = time.perf_counter()
    while len(samples) < MOST_REPEATS:
        _synchronise(device)
        start = time.perf_counter()
        operation()
        _synchronise(device)
        end = time.perf_counter()
        samples.append((end - start) * 1e3)
        if len(samples) >= repeats and end - begun >= seconds:
            break
    return Samples(samples)


def timed_in_turns(
    operation: Callable[[], object], *, repeats: int, seconds: float, device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> Generator[None, None, dict[str, Any]]:  # fmt: skip
    """Time `operation` in turns, each of them `before` and one sample or more, until there are `repeats` turns and
    `seconds` of samples. It warms up at once, and yields before each turn. Returns `samples`, how many of them each of
    the `turns` has, and whether they are `noisy`."""
    again = timed(operation, repeats=1, seconds=0, device=device, warm_up=1)
    # whoever had the turn in between has filled the caches, which a short operation would find warm in use
    warm_up = 1 if again.median < LONG_MS else 0
    turns: list[list[float]] = []
    while len(turns) < repeats or sum(map(sum, turns)) < seconds * 1e3:
        yield
        before()
        turns.append(timed(operation, repeats=1, seconds=seconds / MOST_TURNS, device=device, warm_up=warm_up).ms)
    samples = Samples([ms for turn in turns for ms in turn])
    return {"samples": samples.to_dict(), "turns": [len(turn) for turn in turns], "noisy": samples.noisy}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
