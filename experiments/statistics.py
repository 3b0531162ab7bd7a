"""What several seeds allow one to say: means with intervals, paired comparisons, how many more seeds it would take.

A difference is paired by seed (same batches in the same order), so the variation that the arms share cancels.
Speeds and sizes compare as ratios, through the logarithm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MOST_SEEDS = 1000


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
    exact: every pair gives the same non-zero difference (bytes of state, say).
    differences: one per pair, in the scale of the test (of logarithms for a ratio).
    """

    interval: Interval
    p: float | None
    exact: bool
    differences: tuple[float, ...]

    def more_seeds(self, comparisons: int = 1) -> int | None:
        """How many more seeds would resolve it beside `comparisons - 1` others (Bonferroni's level, which Holm's
        never exceeds), if estimate and spread stayed as they are. None: cannot be said, none, or over MOST_SEEDS."""
        x = np.asarray(self.differences)
        if len(x) < 2 or np.ptp(x) == 0 or x.mean() == 0:
            return None
        effect = abs(x.mean()) / x.std(ddof=1)
        for total in range(len(x), MOST_SEEDS + 1):
            if 2 * stats.t.sf(effect * math.sqrt(total), total - 1) < (1 - CONFIDENCE) / comparisons:
                return total - len(x) or None
        return None


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean over seeds. Raises ValueError on no values."""
    if not values:
        raise ValueError("no values to average")
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Interval(float(x[0]), None, None, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    mean = float(x.mean())
    return Interval(mean, mean - half, mean + half, len(x))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """b - a, pair by pair."""
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return _comparison(differences, mean_interval(differences.tolist()))


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """b / a, the geometric mean over pairs. All values must be positive."""
    logs = np.log(np.asarray(b, dtype=np.float64)) - np.log(np.asarray(a, dtype=np.float64))
    inner = mean_interval(logs.tolist())
    low, high = (None if bound is None else math.exp(bound) for bound in (inner.low, inner.high))
    return _comparison(logs, Interval(math.exp(inner.estimate), low, high, inner.n))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for several comparisons; None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def _comparison(differences: np.ndarray, interval: Interval) -> Comparison:
    spread = bool(len(differences) > 1 and np.ptp(differences) > 0)
    p = float(np.asarray(stats.ttest_1samp(differences, 0.0))[1]) if spread else None
    exact = bool(len(differences) > 1 and not spread and differences[0] != 0)
    return Comparison(interval, p, exact, tuple(differences.tolist()))
