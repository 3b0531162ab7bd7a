"""What this machine can do at best, measured beside what is measured against it: a large matrix product for arithmetic,
a large copy for memory. Utilisation rests on these, never on a printed peak."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from experiments.measurement.timing import timed

# On a GPU so large that what it takes to begin and to notice the end, some 20 microseconds, is no percent of it
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
REPEATS = 3  # of each, each time
COPIED = {"cpu": 64 << 20, "cuda": 2 << 30}  # bytes, several times what caches hold; every cell of a group keeps two


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
        self.measure()  # the first time is the warm-up

    def measure(self) -> Ceilings:
        flops = 2 * self._a.shape[0] ** 3
        product = flops / self._seconds(lambda: torch.mm(self._a, self._b, out=self._c))
        copy = 2 * self._from.nbytes / self._seconds(lambda: self._to.copy_(self._from))
        return Ceilings(product, copy)

    def _seconds(self, operation: Callable[[], object]) -> float:
        """Median of `REPEATS`."""
        ms = timed(operation, repeats=REPEATS, seconds=0, device=self.device, warm_up=0).median
        return ms / 1e3
