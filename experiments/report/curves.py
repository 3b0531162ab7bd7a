"""Series that figures draw and that their descriptions tell, so that both use the same numbers."""

import numpy as np
import pandas as pd

from experiments.report.record import Record, Row
from experiments.statistics import binned

Series = tuple[np.ndarray, np.ndarray]  # x, y


def window(record: Record) -> int:
    """Steps in the moving mean of the training loss: one fiftieth of the longest curve, at least one."""
    longest = max((len(curve.loss) for arm in record.curves.values() for curve in arm.values()), default=1)
    return max(1, longest // 50)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Trailing mean over `width` values (fewer at the start), so that a point knows nothing of its future."""
    return np.asarray(pd.Series(values).rolling(width, min_periods=1).mean())


def training(record: Record, arm: str) -> list[Series]:
    """Smoothed training loss per seed."""
    width = window(record)
    return [(curve.tokens, smoothed(curve.loss, width)) for _, curve in sorted(record.curves.get(arm, {}).items())]


def validation(record: Record, arm: str) -> list[Series]:
    """Validation points per seed."""
    found = sorted(record.curves.get(arm, {}).items())
    return [(curve.validation_tokens, curve.validation_loss) for _, curve in found if len(curve.validation_loss)]


def furthest(series: list[Series]) -> list[Series]:
    """Those of the seeds that came as far as any: one that failed on the way would cut a mean off where it ended."""
    last = max((x[-1] for x, _ in series), default=None)
    return [(x, y) for x, y in series if x[-1] == last]


def mean(series: list[Series]) -> Series | None:
    """Mean over the seeds that came furthest, at the abscissae that all of them have."""
    series = furthest(series)
    if not series:
        return None
    shared = series[0][0]
    for x, _ in series[1:]:
        shared = np.intersect1d(shared, x)
    if not len(shared):
        return None
    return shared, np.mean([y[np.isin(x, shared)] for x, y in series], axis=0)


def mean_validation(record: Record, arm: str) -> Series | None:
    return mean(validation(record, arm))


def positions(record: Record, arm: str) -> list[Series]:
    """Loss by position per seed, averaged within thirds of an octave; x is the middle of each bin."""
    found = []
    for _, evaluation in sorted(record.evaluations.get(arm, {}).items()):
        split = evaluation["splits"].get(record.split)
        if split and split.get("loss_at_position"):
            found.append(binned(np.array(split["loss_at_position"], dtype=float)))
    return found


def mean_position(record: Record, arm: str) -> Series | None:
    return mean(positions(record, arm))


def memory_lines(record: Record) -> list[tuple[str, str, str, int | None]]:
    """(title, phase, metric, context) of every bar, for those quantities that some arm has a value of."""
    lines: list[tuple[str, str, str, int | None]] = [
        ("file on disk", "load", "file_bytes", None),
        ("host peak, loading", "load", "host_peak_bytes", None),
        ("GPU peak, loading", "load", "device_peak_bytes", None),
        ("resident", "load", "resident_bytes", None),
    ]
    for phase in ("prefill", "decode"):
        contexts = record.contexts(phase, "peak_bytes")
        lines += [(f"{phase} peak, {at:,}", phase, "peak_bytes", at) for at in contexts]
    return [line for line in lines if any(_valued(record.row(arm, *line[1:])) for arm in record.arms)]


def _valued(row: Row | None) -> bool:
    return row is not None and row.value is not None


def spread(record: Record, row: Row) -> tuple[float, float]:
    """The whisker of a row over seeds: its 95% interval, or p5 to p95 of the repeats of the only seed."""
    assert row.value is not None
    if row.ci_low is not None and row.ci_high is not None:
        return row.ci_low, row.ci_high
    single = record.per_seed(row.arm, row.phase, row.metric, row.context)
    if len(single) == 1 and single[0].p5 is not None and single[0].p95 is not None:
        return single[0].p5, single[0].p95
    return row.value, row.value


def sweep_rates(record: Record) -> dict[str, dict[float, str]]:
    """base arm -> learning rate (ascending) -> arm."""
    found: dict[str, dict[float, str]] = {}
    for name, arm in record.result["arms"].items():
        rate = arm["learning_rate"]
        found.setdefault(name.removesuffix(f"-lr{rate!r}"), {})[rate] = name
    return {base: dict(sorted(rates.items())) for base, rates in found.items()}


def rate_rows(record: Record, base: str) -> dict[float, Row]:
    """Validation bits per byte over seeds at every rate that has a result, by ascending rate."""
    found = {
        rate: record.row(arm, "quality", "validation_bits_per_byte") for rate, arm in sweep_rates(record)[base].items()
    }
    return {rate: row for rate, row in found.items() if row is not None and row.value is not None}


def whole_rates(record: Record, base: str) -> dict[float, Row]:
    """Those of `rate_rows` with a value at every seed of the specification: a mean without one may lack the hardest."""
    seeds = len(record.spec["seeds"])
    return {rate: row for rate, row in rate_rows(record, base).items() if row.n == seeds}


def best_rate(record: Record, base: str) -> float | None:
    """The rate with the lowest mean validation bits per byte, among those with a value at every seed."""
    values = {rate: row.known for rate, row in whole_rates(record, base).items()}
    return min(values, key=lambda rate: values[rate], default=None)
