"""Memory for loading against memory for inference and training: models are initialised, written, and each phase is
measured in a fresh process, beside what the shapes alone predict."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments import cells
from experiments.measurement.loading import WAYS
from experiments.numbers import size as shown
from experiments.rows import bytes_row, load_rows, on_card
from experiments.spec import Experiment
from experiments.store import Cell, RunDirectory
from experiments.studies.pairing import comparability
from experiments.training import DTYPES
from models import cost
from models.config import ModelConfig

MAKES = "build"


def plan(experiment: Experiment) -> list[Cell]:
    """Arm by arm within each phase."""
    settings, arms, seeds = experiment.memory, list(experiment.arms), experiment.seeds
    configs = cells.model_configs(experiment)
    planned = [Cell(arm, seed, "build") for seed in seeds for arm in arms]
    planned += [Cell(arm, seed, "load", mode=way) for seed in seeds for way in WAYS for arm in arms]
    planned += [
        Cell(arm, seed, phase, context, batch)
        for seed in seeds for phase in ("prefill", "decode") for batch in settings.batches
        for context in settings.contexts for arm in arms if configs[arm].causal
    ]  # fmt: skip
    planned += [
        Cell(arm, seed, "step", context, settings.train_batch)
        for seed in seeds for context in settings.train_contexts for arm in arms
    ]  # fmt: skip
    return planned


def turns(cell: Cell, experiment: Experiment) -> None:
    """None take turns: memory does not depend on the minute."""


def together(cell: Cell, experiment: Experiment) -> None:
    """Each has a process of its own."""


def lengths(experiment: Experiment, causal: bool) -> dict[str, int]:
    settings = experiment.memory
    needs = {"memory.train_contexts": settings.train_contexts[-1]}
    return needs | (
        {"memory.contexts and decode_tokens": settings.contexts[-1] + settings.decode_tokens} if causal else {}
    )


def work(cell: Cell, experiment: Experiment) -> tuple[Callable[..., Any], tuple]:
    if cell.kind == "build":
        return cells.build_cell, (experiment.arms[cell.arm], cell.seed, experiment.memory.dtype)
    return cells.memory_cell, (cell.kind, cell.context, cell.batch, cell.mode)


def rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    if cell.kind == "build":
        return
    config = cells.kept_config(run.folder(cell))
    if cell.kind == "load":
        yield from load_rows(cell, result, dtype=experiment.memory.dtype)
        return
    common = {"backend": result["backend"], "dtype": experiment.memory.dtype}
    phase = "train" if cell.kind == "step" else cell.kind
    found = _step(config, cell, result) if cell.kind == "step" else _inference(config, cell, result, experiment)
    for metric, value in found.items():
        reason = result.get("unpredicted", "no prediction was made beside the measurement") if value is None else None
        yield bytes_row(cell, phase, metric, value, reason=reason, **common)
    yield from on_card(cell, phase, result, **common)


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """None: memory has no spread over seeds worth testing, and what the study says are lengths, not differences."""
    return []


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """When loading costs more than inference, per arm; from which length on a cache outweighs another arm's state, and
    its own weights."""
    configs = cells.model_configs(experiment)
    table = {
        (r["arm"], r["phase"], r["metric"], r["context"], r["batch"], r["mode"]): r["value"]
        for r in rows if r["seed"] is None and r["value"] is not None
    }  # fmt: skip
    found = [one for arm in configs if (one := _loading_against_inference(arm, table, rows, experiment))]
    element = DTYPES[experiment.memory.dtype].itemsize
    growing = {name for name, config in configs.items() if config.causal and cost.grows(config)}
    for arm in (name for name in configs if name in growing):
        config = configs[arm]
        for other in configs:
            if configs[other].causal and other not in growing:
                size = cost.state_bytes(configs[other], 1, cost.LONGEST, element)  # of a window, when it is full
                at = cost.outgrows(config, size, element)
                text = _outweighs(arm, f"{other}'s state ({shown(size)} a sequence)", at, config)
                found.append({"kind": "cache-outweighs-state", "arm": arm, "against": other, "tokens": at,
                              "sentence": f"{text}, whatever the batch."})  # fmt: skip
        weights = cost.weight_bytes(config, element)
        for batch in experiment.memory.batches:
            at = cost.outgrows(config, weights, element, batch)
            text = _outweighs(arm, f"its own weights ({shown(weights)})", at, config)
            found.append({"kind": "cache-outweighs-weights", "arm": arm, "batch": batch, "tokens": at,
                          "sentence": f"At batch {batch} {text}."})  # fmt: skip
    return found


def _outweighs(arm: str, what: str, at: int | None, config: ModelConfig) -> str:
    if at is None:
        return f"{arm}'s cache never outweighs {what} within its {config.positions:,} positions"
    return f"{arm}'s cache outweighs {what} {'at every length' if at == 1 else f'from {at:,} tokens on'}"


def _loading_against_inference(
    arm: str, table: dict[tuple, float], rows: list[dict], experiment: Experiment
) -> dict | None:
    """At the smallest batch; host memory on a CPU, the GPU's on a GPU, where loading also takes host memory."""
    settings, batch = experiment.memory, experiment.memory.batches[0]
    metric = "host_peak_bytes" if experiment.device == "cpu" else "device_peak_bytes"
    loads = {way: table.get((arm, "load", metric, None, None, way)) for way in WAYS}
    loads = {way: size for way, size in loads.items() if size}
    peaks = {
        phase: {c: v for c in settings.contexts if (v := table.get((arm, phase, "peak_bytes", c, batch, None)))}
        for phase in ("prefill", "decode")
    }
    measured = sorted(peaks["prefill"].keys() | peaks["decode"].keys())
    if not loads or not measured:
        return None
    told = [f"loading takes {', '.join(f'{shown(size)} ({way})' for way, size in loads.items())}"]
    for phase, found in peaks.items():
        if found:
            ends = [f"{shown(found[at])} at {at:,}" for at in dict.fromkeys((min(found), max(found)))]
            told.append(f"{phase} {' to '.join(ends)} tokens")
    inference = {at: max(found[at] for found in peaks.values() if at in found) for at in measured}
    exceeds = {way: [at for at in measured if inference[at] > size] for way, size in loads.items()}
    both = peaks["prefill"].keys() & peaks["decode"].keys()  # else one that was measured may settle it
    undecided = {way: [at for at in settings.contexts if at not in both | set(lengths)]
                 for way, lengths in exceeds.items()}  # fmt: skip
    alike: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for way, lengths in exceeds.items():
        alike.setdefault((tuple(lengths), tuple(undecided[way])), []).append(way)
    parts = [f"{' or '.join(ways)} loading costs {_against(lengths, open_, settings.contexts)}"
             for (lengths, open_), ways in alike.items()]  # fmt: skip
    lost = {"load": [way for way in WAYS if way not in loads]}
    lost |= {phase: [at for at in settings.contexts if at not in found] for phase, found in peaks.items()}
    lost = {phase: those for phase, those in lost.items() if those}
    standing = comparability([r for r in rows if r["arm"] == arm and r["metric"] in (metric, "peak_bytes")])
    outcome = f"So {'; '.join(parts)}" if standing["comparable"] else f"They do not compare: {standing['reason']}"
    return {
        "kind": "loading-against-inference", "arm": arm, "batch": batch, "inference_exceeds_load_at": exceeds,
        "lost": lost, "undecided": {way: lengths for way, lengths in undecided.items() if lengths}, **standing,
        "sentence": f"{arm}, batch {batch}: {'; '.join(told)}. {outcome}.{_without(lost)}",
    }  # fmt: skip


def _against(exceeding: Sequence[int], undecided: Sequence[int], planned: Sequence[int]) -> str:
    """exceeding: the lengths at which inference takes more than loading; undecided: those at which that is not
    known."""
    below = [at for at in planned if at not in exceeding and at not in undecided]
    if len(undecided) == len(planned):
        return "more than inference or less, which is open at every measured length"
    if undecided:
        each = (("more than inference at", below), ("less at" if below else "less than inference at", exceeding))
        told = [f"{what} {', '.join(f'{at:,}' for at in lengths)}" for what, lengths in each if lengths]
        return f"{', '.join(told)} (open at {', '.join(f'{at:,}' for at in undecided)})"
    if not exceeding:
        return "more than inference at every measured length"
    if not below:
        return "less than inference at every measured length"
    if below[-1] < exceeding[0]:
        return f"more than inference up to {below[-1]:,} tokens and less from {exceeding[0]:,} on"
    return f"less than inference at {', '.join(f'{at:,}' for at in exceeding)} tokens and more at the other lengths"


def _without(lost: dict[str, list]) -> str:
    """What has no result, as a sentence after another."""
    told = []
    for phase, those in lost.items():
        named = ", ".join(f"{one:,}" if isinstance(one, int) else one for one in those)
        told.append(f"loading ({named})" if phase == "load" else f"{phase} at {named} tokens")
    return f" Without a result: {'; '.join(told)}." if told else ""


def _inference(
    config: ModelConfig, cell: Cell, result: dict[str, Any], experiment: Experiment
) -> dict[str, int | None]:
    assert cell.context is not None
    assert cell.batch is not None
    dtype = DTYPES[experiment.memory.dtype]
    element = dtype.itemsize
    weights = cost.weight_bytes(config, element)
    found = {"peak_bytes": result["peak_bytes"], "working_bytes": result["working_bytes"]}
    if cell.kind == "prefill":
        predicted, length = result.get("predicted"), cell.context
        working = None if predicted is None else predicted["peak"]
    else:
        length = cell.context + experiment.memory.decode_tokens
        found["state_bytes"] = result["state_bytes"]
        found["state_bytes_analytic"] = cost.state_bytes(config, cell.batch, length, element)
        working = found["state_bytes_analytic"] + cell.batch * config.vocabulary * element  # and the logits
    kept = weights + cost.rotary_bytes(config, length)
    return found | {"peak_bytes_analytic": None if working is None else kept + working}


def _step(config: ModelConfig, cell: Cell, result: dict[str, Any]) -> dict[str, int | None]:
    assert cell.context is not None
    assert cell.batch is not None
    measured = ("peak_bytes", "weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
    predicted, weights = result.get("predicted"), cost.weight_bytes(config, 4)
    tables = cost.rotary_bytes(config, cell.context)
    return {part: result[part] for part in measured} | {
        "activation_bytes_analytic": None if predicted is None else predicted["activations"],
        # the optimizer keeps two numbers per parameter
        "peak_bytes_analytic": None if predicted is None else 3 * weights + tables + predicted["peak"],
    }
