"""The rows of `result.json`: one number each, with all that is needed to read it (docs/result-schema.md)."""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.statistics import Interval, mean_interval
from experiments.store import Cell

SCHEMA_VERSION = 1  # of result.json
PAGE = mmap.PAGESIZE  # bytes: what a process holds is read in whole ones
UNMATCHED = "the arms are not of one size"  # how the warning of that begins
SEES = "the model saw the token that it was to predict"
# why a loss says nothing beside that of predicting the next token from what is before it, by objective
OTHER_LOSS = {"unmasked": SEES, "masked": "the loss of selected tokens, most of them hidden, guessed from both sides"}
READ_IN_PAGES = {"resident_bytes", "peak_bytes"}  # on a CPU; a GPU's allocator counts to the byte

_RANGE = {  # of what is counted, where it does not begin at 0
    ("quality", "share"): (0.0, 1.0), ("quality", "perplexity"): (1.0, None),
    ("train", "x"): (1.0, None),  # the busiest expert's share over an even one
}  # fmt: skip


def mean_of(values: Sequence[float], phase: str, unit: str) -> Interval:
    """The mean over seeds with its interval, cut off where what is counted ends: nothing is below 0."""
    mean = mean_interval(values)
    if mean.low is None or mean.high is None:
        return mean
    least, most = _RANGE.get((phase, unit), (0.0, None))
    return replace(mean, low=max(least, mean.low), high=mean.high if most is None else min(most, mean.high))


def row(cell: Cell, phase: str, metric: str, value: float | None, unit: str, direction: str, **rest: Any) -> dict:
    return {
        "arm": cell.arm, "seed": cell.seed, "phase": phase, "metric": metric, "value": value, "unit": unit,
        "n": 1, "ci_low": None, "ci_high": None, "p5": None, "p95": None, "direction": direction,
        "backend": None, "comparable": True, "reason": None, "context": cell.context, "batch": cell.batch,
        "mode": cell.mode, "dtype": cell.dtype,
    } | rest  # fmt: skip


def bytes_row(cell: Cell, phase: str, metric: str, value: float | None, **rest: Any) -> dict:
    """Of memory, of which less is better; of a prediction neither is."""
    direction = "none" if metric.endswith("analytic") else "lower"
    return row(cell, phase, metric, value, "bytes", direction, **rest)


def load_rows(cell: Cell, result: dict[str, Any], **rest: Any) -> Iterator[dict]:
    """Of what `measure_load` (experiments/measurement/phases.py) gives."""
    metrics = ("file_bytes", "host_peak_bytes", "device_peak_bytes", "resident_bytes", "resident_bytes_analytic")
    for metric in metrics:
        reason = "no GPU in this run" if result[metric] is None else None
        yield bytes_row(cell, "load", metric, result[metric], reason=reason, **rest)
    yield from on_card(cell, "load", result, **rest)
    times = percentiles(result["samples"]["ms"])
    yield row(cell, "load", "load_ms", unit="ms", direction="lower", **times, **rest)


def on_card(cell: Cell, phase: str, result: dict[str, Any], **rest: Any) -> Iterator[dict]:
    """What was held on the GPU beside tensors, see `PeakMemory.on_card`; no rows on a CPU."""
    if "process_bytes" in result:
        yield bytes_row(cell, phase, "reserved_peak_bytes", result["reserved_peak_bytes"], **rest)
        process = result["process_bytes"]
        reason = result["process_method"] if process is None else None
        yield bytes_row(cell, phase, "process_bytes", process, reason=reason, **rest)


def turn_ms(result: dict[str, Any]) -> np.ndarray:
    """Of each turn the median of its samples: a turn counts once, however many calls it had time for."""
    borders = np.cumsum(result["turns"])[:-1]
    return np.array([np.median(turn) for turn in np.split(np.array(result["samples"]["ms"]), borders)])


def percentiles(samples: list[float]) -> dict[str, Any]:
    p5, median, p95 = np.percentile(samples, [5, 50, 95])
    return {"value": float(median), "p5": float(p5), "p95": float(p95), "n": len(samples)}


def rate(times_ms: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Tokens per second from milliseconds: the elapsed time, and its percentiles change places."""
    value, p95, p5 = (1e3 * tokens / times_ms[key] for key in ("value", "p5", "p95"))
    return {"value": value, "p5": p5, "p95": p95, "n": times_ms["n"]}


def per_step(times_ms: dict[str, Any], steps: float) -> dict[str, Any]:
    """Milliseconds of one step, from those of samples of `steps` steps each."""
    return {key: value if key == "n" else value / steps for key, value in times_ms.items()}
