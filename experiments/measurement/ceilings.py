"""What this machine can do at best, measured beside what is measured against it: a large matrix product for arithmetic,
a large copy for memory. Utilisation rests on these, never on a printed peak."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
COPIED = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes, several times what caches hold
SECONDS = 0.15  # for each of the two, each time


@dataclass(frozen=True)
class Ceilings:
    """flops_per_s: multiply-adds count as two. bytes_per_s: read and written, each byte counted twice."""

    flops_per_s: float
    bytes_per_s: float


class CeilingsMeter:
    """Holds what it measures with, so that measuring again allocates nothing."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        side = SIDE[device.type]
        self._a, self._b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self._c = torch.empty_like(self._a)
        self._from = torch.ones(COPIED[device.type] // 4, device=device)
        self._to = torch.empty_like(self._from)
        self._taken: list[Ceilings] = []
        self.measure()  # the first one warms up
        self._taken.clear()

    def measure(self) -> None:
        flops = 2 * self._a.shape[0] ** 3
        product = flops / self._median(lambda: torch.mm(self._a, self._b, out=self._c))
        copy = 2 * self._from.nbytes / self._median(lambda: self._to.copy_(self._from))
        self._taken.append(Ceilings(product, copy))

    @property
    def result(self) -> Ceilings:
        """The mean of what was measured before and after."""
        return Ceilings(
            statistics.mean(one.flops_per_s for one in self._taken),
            statistics.mean(one.bytes_per_s for one in self._taken),
        )

    def _median(self, operation: Callable[[], object]) -> float:
        """Seconds."""
        taken: list[float] = []
        end = time.perf_counter() + SECONDS
        while len(taken) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            operation()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)
