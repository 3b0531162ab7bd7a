"""Warm up, synchronise, repeat, keep every sample."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

WARM_UP = 2
NOISY = 1.5  # p95 over median
MOST_REPEATS = 2000


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


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
