"""What several seeds allow one to say: means with intervals, paired comparisons, how many more seeds it would take.

A difference is paired by seed (same batches in the same order), so the variation that the arms share cancels.
Speeds and sizes compare as ratios, through the logarithm.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from experiments.spec import MOST_SEEDS

CONFIDENCE = 0.95
RESOLVED = 0.05  # Holm-corrected p below which a difference counts as resolved


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% t interval; no interval from fewer than two values."""

    estimate: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """b against a over paired seeds.

    p: two-sided paired t test of no difference. None where there is nothing to test: one seed, or no spread at all.
    exact: what was compared was counted (bytes of state, say) and differs by the same amount in every pair.
    differences: one per pair, in the scale of the test (of logarithms for a ratio). deviation: what is taken for their
    standard deviation, 0 where there is one alone.
    """

    interval: Interval
    p: float | None
    exact: bool
    differences: tuple[float, ...]
    deviation: float

    def p_after(self, more: int) -> float | None:
        """p with `more` further seeds, if estimate and spread stayed as they are."""
        if self.p is None:
            return None
        n = len(self.differences) + more
        return float(2 * stats.t.sf(abs(np.mean(self.differences)) * math.sqrt(n) / self.deviation, n - 1))


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean over seeds. Raises ValueError on no values."""
    if not values:
        raise ValueError("no values to average")
    x = np.asarray(values, dtype=np.float64)
    return _interval(x, float(x.std(ddof=1)) if len(x) > 1 else 0.0)


def _interval(x: np.ndarray, deviation: float) -> Interval:
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, None, None, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * deviation / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, len(x))


def paired_difference(a: Sequence[float], b: Sequence[float], *, resolution: float = 0.0) -> Comparison:
    """b - a, pair by pair. resolution: of a value, in its unit; equal differences then do not pass for no spread."""
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return _comparison(differences, math.sqrt(2) * resolution)


def paired_ratio(a: Sequence[float], b: Sequence[float], resolution: float = 0.0) -> Comparison:
    """b / a, the geometric mean over pairs. All values must be positive. resolution: what a value is read to, in its
    unit; equal readings then do not pass for no spread."""
    both = [np.asarray(values, dtype=np.float64) for values in (a, b)]
    steps = [np.minimum(resolution / values, 1.0) for values in both]  # of logarithms, near enough
    compared = _comparison(np.log(both[1]) - np.log(both[0]), float(np.sqrt(np.square(steps).sum(0).mean())))
    inner = compared.interval
    low, high = (None if bound is None else math.exp(bound) for bound in (inner.low, inner.high))
    return replace(compared, interval=Interval(math.exp(inner.estimate), low, high, inner.n))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for several comparisons; None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def more_seeds(compared: Sequence[Comparison], which: int) -> int | None:
    """How many more seeds would resolve one of `compared`, which is open, after Holm's correction over all of them, if
    estimate and spread of each stayed as they are: an even chance, where they are the true ones. None: cannot be said,
    or beyond MOST_SEEDS."""
    if compared[which].p is None:
        return None
    more = range(1, MOST_SEEDS - len(compared[which].differences) + 1)

    def resolved(seeds: int) -> bool:
        p = holm([one.p_after(seeds) for one in compared])[which]
        return p is not None and p < 1 - CONFIDENCE

    enough = bisect_left(more, True, key=resolved)  # every p falls with the seeds
    return more[enough] if enough < len(more) else None


def _comparison(differences: np.ndarray, resolution: float) -> Comparison:
    """resolution: of a difference, added in squares to their spread."""
    n, spread = len(differences), float(np.ptp(differences))
    deviation, p = 0.0, None
    if n > 1 and (spread or resolution):
        deviation = math.hypot(float(differences.std(ddof=1)) if spread else 0.0, resolution)
        p = float(2 * stats.t.sf(abs(differences.mean()) * math.sqrt(n) / deviation, n - 1))
    exact = bool(n > 1 and p is None and differences[0] != 0)
    return Comparison(_interval(differences, deviation), p, exact, tuple(differences.tolist()), deviation)


def binned(loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T,) -> the means of bins with edges 2^(k/3), position 1 first, at the bins' middles; the last position
    belongs to the bin before it where it would stand alone."""
    T = len(loss)
    edges = np.unique(np.ceil(2 ** (np.arange(0, 3 * np.log2(T) + 4) / 3)).astype(int))
    edges = np.append(edges[(edges < T) | (edges <= min(T, 2))], T + 1)
    edges = np.unique(edges)
    low, high = edges[:-1], edges[1:]
    y = np.array([np.mean(loss[a - 1 : b - 1]) for a, b in zip(low, high, strict=True)])
    return np.sqrt(low * (high - 1.0)), y
