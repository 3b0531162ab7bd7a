"""Speed over context length, batch and execution mode: a training step, prefill, decode, and each mixer's operation by
itself, beside the machine's ceilings; and the lengths from which on one arm is faster than another."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments import cells
from experiments.measurement.speed import OPERATORS
from experiments.rows import percentiles, rate, row
from experiments.spec import Experiment
from experiments.store import Cell, RunDirectory, read_json
from models import cost
from models.config import ModelConfig

MAKES = "build"
PHASES = {"step": "train", "prefill": "prefill", "decode": "decode", "forward": "operator", "backward": "operator"}
LATENCY = {"train": "step_ms", "prefill": "time_to_first_token_ms", "decode": "ms_per_token"}
RESAMPLES = 2000  # of the raw samples, for the interval of a crossover


def plan(experiment: Experiment) -> list[Cell]:
    """The arms of one measurement directly after each other, so that a machine that changes changes for all."""
    settings, vocabulary = experiment.speed, experiment.data.vocabulary
    configs = {name: cells.model_config(arm, vocabulary) for name, arm in experiment.arms.items()}
    planned = [Cell(arm, seed, "build") for seed in experiment.seeds for arm in configs]
    for seed in experiment.seeds:
        for mode in settings.modes:
            for context in settings.train_contexts:
                batch = max(1, settings.train_tokens // context)
                planned += [Cell(arm, seed, "step", context, batch, mode) for arm in configs]
            for batch in settings.batches:
                for phase in ("prefill", "decode"):
                    for context in settings.contexts:
                        causal = [arm for arm, config in configs.items() if config.causal]
                        planned += [Cell(arm, seed, phase, context, batch, mode) for arm in causal]
        for context in settings.operator_contexts:
            alone = [arm for arm, config in configs.items() if any(b.mixer.kind in OPERATORS for b in config.kinds)]
            planned += [Cell(arm, seed, kind, context, 1, "eager") for kind in ("forward", "backward") for arm in alone]
    return planned


def lengths(experiment: Experiment, causal: bool) -> dict[str, int]:
    settings = experiment.speed
    needs = {"speed.train_contexts": settings.train_contexts[-1]}
    return needs | (
        {"speed.contexts and decode_tokens": settings.contexts[-1] + settings.decode_tokens} if causal else {}
    )


def work(cell: Cell, experiment: Experiment) -> tuple[Callable[..., dict[str, Any]], tuple]:
    if cell.kind == "build":
        return cells.build_cell, (experiment.arms[cell.arm], cell.seed, experiment.speed.dtype)
    return cells.speed_cell, (cell.kind, cell.context, cell.batch, cell.mode)


def rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    if cell.kind == "build":
        return
    assert cell.context is not None
    assert cell.batch is not None
    phase = PHASES[cell.kind]
    common = {"backend": result["backend"]}
    times = percentiles(result["samples"]["ms"])
    name = "tokens_per_s" if phase != "operator" else f"{cell.kind}_tokens_per_s"
    speed = rate(times, result["tokens_per_sample"])
    yield row(cell, phase, name, unit="tokens/s", direction="higher", **speed, **common)
    if phase == "operator":
        return
    steps = result["tokens_per_sample"] / cell.batch if phase == "decode" else 1
    latency = {key: value / steps if key != "n" else value for key, value in times.items()}
    yield row(cell, phase, LATENCY[phase], unit="ms", direction="lower", **latency, **common)
    yield row(cell, phase, "first_call_ms", result["first_call_ms"], "ms", "none", **common)
    ceilings = result["ceilings"]
    yield row(cell, phase, "ceiling_flops_per_s", ceilings["flops_per_s"], "FLOP/s", "none", **common)
    yield row(cell, phase, "ceiling_bytes_per_s", ceilings["bytes_per_s"], "bytes/s", "none", **common)
    config = ModelConfig.from_dict(read_json(run.folder(cell) / "checkpoint" / "config.json"))
    yield from _achieved(cell, phase, config, speed["value"], ceilings, experiment.speed.dtype, common)


def _achieved(
    cell: Cell,
    phase: str,
    config: ModelConfig,
    tokens_per_s: float,
    ceilings: dict[str, float],
    dtype: str,
    common: dict,
) -> Iterator[dict]:
    """Arithmetic done per second, of decode bytes read, and its share of what the machine can do; of decode also the
    tokens/s that its memory would allow."""
    context, batch = cell.context or 0, cell.batch or 0
    if phase != "decode":
        training = phase == "train"
        flops = cost.training_flops_per_token(config, context) if training else (
            cost.forward_flops_per_token(config, context, predicted=1 / context))  # fmt: skip
        done = tokens_per_s * flops
        yield row(cell, phase, "flops_per_s", done, "FLOP/s", "higher", **common)
        yield row(cell, phase, "flops_utilisation", done / ceilings["flops_per_s"], "share", "higher", **common)
    else:
        size = cost.decode_bytes(config, batch, context, cells.DTYPES[dtype][1])
        moved = tokens_per_s / batch * size
        yield row(cell, phase, "bytes_per_s", moved, "bytes/s", "higher", **common)
        yield row(cell, phase, "bandwidth_utilisation", moved / ceilings["bytes_per_s"], "share", "higher", **common)
        roof = batch * ceilings["bytes_per_s"] / size
        yield row(cell, phase, "roofline_tokens_per_s", roof, "tokens/s", "none", **common)


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """None: what the study says are lengths, with the spread of repeated timings, not differences over seeds."""
    return []


def findings(rows: list[dict], experiment: Experiment, vocabulary: int, run: RunDirectory) -> list[dict]:
    """Per phase, batch and mode: from which length on the other arms are faster than the first."""
    samples: dict[tuple, dict[int, dict[str, np.ndarray]]] = {}
    for cell in plan(experiment):
        result = run.result(cell)
        if cell.kind == "build" or cell.seed != experiment.seeds[0] or result is None:
            continue
        batch = None if cell.kind == "step" else cell.batch  # of training, a matter of the context
        key = (cell.kind, batch, cell.mode)
        speeds = 1e3 * result["tokens_per_sample"] / np.array(result["samples"]["ms"])
        samples.setdefault(key, {}).setdefault(cell.context or 0, {})[cell.arm] = speeds
    first, *others = experiment.arms
    found = []
    for (kind, batch, mode), by_context in samples.items():
        for other in others:
            both = {at: (arms[first], arms[other]) for at, arms in by_context.items() if {first, other} <= arms.keys()}
            if len(both) > 1 and kind != "backward":
                crossing = crossover(both)
                head = {
                    "kind": "crossover",
                    "phase": kind,
                    "batch": batch,
                    "mode": mode,
                    "arm": other,
                    "against": first,
                }
                found.append(head | crossing | {"sentence": _sentence(head, crossing, sorted(both))})
    return found + _drift(rows)


def _drift(rows: list[dict]) -> list[dict]:
    """How far the machine's own ceilings, which each cell measures, moved in the course of the run."""
    told, moved = [], {}
    for metric, unit, what in (("flops_per_s", "GFLOP/s", "matrix products"), ("bytes_per_s", "GB/s", "copies")):
        values = [r["value"] / 1e9 for r in rows if r["metric"] == f"ceiling_{metric}" and r["seed"] is not None]
        if len(values) > 1:
            low, high = min(values), max(values)
            told.append(f"{what} from {low:.3g} to {high:.3g} {unit}")
            moved[metric] = high / low
    if not told:
        return []
    worst = max(moved.values())
    text = (
        f"From cell to cell the machine's own ceilings moved: {' and '.join(told)}. Cells are measured one after "
        f"another, so differences of speed up to {worst:.2f} times may be the machine's."
    )
    return [{"kind": "drift", "ratios": moved, "sentence": text}]


def crossover(speeds: dict[int, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The length from which on b is faster than a, for (a, b) samples of tokens/s by context length: where the ratio of
    the medians crosses 1 for the last time, straight in logarithms between measured lengths. 0: at every measured
    length; None: not at the longest. The 95% interval resamples the timings of every length."""
    contexts = sorted(speeds)
    generator = np.random.default_rng(0)
    estimate = _crossing(contexts, [np.log(np.median(b) / np.median(a)) for a, b in (speeds[at] for at in contexts)])
    resampled = [[_medians(side, generator) for side in speeds[at]] for at in contexts]
    ahead = np.array([np.log(b / a) for a, b in resampled])  # (contexts, RESAMPLES)
    drawn = [_crossing(contexts, list(one)) for one in ahead.T]
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest")
    return {"tokens": _finite(estimate), "ci_low": _finite(low), "ci_high": _finite(high)}


def _medians(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Of RESAMPLES draws with replacement."""
    return np.median(samples[generator.integers(len(samples), size=(RESAMPLES, len(samples)))], axis=1)


def _crossing(contexts: list[int], ahead: list[float]) -> float:
    """ahead: log of b's speed over a's. Infinity where b is not ahead at the longest length."""
    if ahead[-1] <= 0:
        return np.inf
    behind = [i for i, value in enumerate(ahead) if value <= 0]
    if not behind:
        return 0.0
    i = behind[-1]
    share = -ahead[i] / (ahead[i + 1] - ahead[i])
    return float(contexts[i] * (contexts[i + 1] / contexts[i]) ** share)


def _finite(value: float) -> float | None:
    return None if np.isinf(value) else float(value)


def _sentence(head: dict[str, Any], crossing: dict[str, Any], contexts: list[int]) -> str:
    doing = {"step": "trains", "prefill": "prefills", "decode": "decodes", "forward": "mixes (its operation alone)"}
    batch = f" at batch {head['batch']}" if head["batch"] and head["phase"] != "forward" else ""
    what = f"{head['arm']} {doing[head['phase']]} faster than {head['against']}{batch}, {head['mode']},"
    ends = f"{contexts[0]:,} to {contexts[-1]:,} tokens"
    low, high = (_length(crossing[key], contexts) for key in ("ci_low", "ci_high"))
    spread = "" if low == high else f" (95% interval over the timings: {low} to {high})"
    if crossing["tokens"] is None:
        return f"{what} at no length from {ends}{spread}."
    if crossing["tokens"] == 0:
        return f"{what} at every length from {ends}{spread}."
    return f"{what} from about {crossing['tokens']:,.0f} tokens on{spread}."


def _length(value: float | None, contexts: list[int]) -> str:
    if value is None:
        return f"beyond {contexts[-1]:,}"
    return f"below {contexts[0]:,}" if value == 0 else f"{value:,.0f}"
