"""`result.json`: what the cells' files of a run say, brought together."""

from typing import Any

from experiments.cells import WARM_UP_STEPS, model_configs
from experiments.errors import RunFailedError
from experiments.kernels.check import doubt, kernels_of
from experiments.measurement.memory import SAMPLED
from experiments.numbers import plural
from experiments.rows import SCHEMA_VERSION, UNMATCHED, mean_of
from experiments.spec import Experiment
from experiments.store import Cell, RunDirectory, now
from experiments.studies import STUDIES
from models import cost

UNTOUCHED = {  # metrics that do not depend on the form that ran
    "file_bytes", "state_bytes", "flops_per_token", "flops_per_byte", "tokens_per_byte", "bytes_seen", "parameters",
    "embedding_parameters", "embedding_share", "state_bytes_per_byte", "unigram_bits_per_byte", "state_bytes_analytic",
    "resident_bytes_analytic",
}  # fmt: skip
MATCHED = 0.02  # by which arms may differ in active parameters and count as of one size
LITTLE_TEXT = 10_000  # bytes
TIMINGS = {  # what a cell may say of its samples
    "noisy": "noisy timing (95th percentile over 1.5 times the median)",
    "host_bound": "the GPU waited for its host, whose speed it then is,",
}
Results = dict[Cell, dict[str, Any]]


def build_result(run: RunDirectory, experiment: Experiment, facts: dict[str, Any]) -> dict[str, Any]:
    """`result.json` from the cells' files. `facts`: of the dataset.

    Raises RunFailedError when paired arms consumed different tokens: nothing in such a run compares.
    """
    study = STUDIES[experiment.study]
    cells = study.plan(experiment)
    environment = run.environment()
    made = {cell: result for cell in cells if cell.kind == study.MAKES and (result := run.result(cell))}
    _check_same_data(made, experiment)
    rows = [row for cell in cells if (result := run.result(cell)) for row in study.rows(cell, result, experiment, run)]
    doubts = _doubts(experiment, environment, made)
    for row in rows:
        cell = Cell(row["arm"], row["seed"], study.MAKES)
        reason = _taint(row, made.get(cell)) or doubts.get(cell)
        row["comparable"], row["reason"] = row["comparable"] and reason is None, row["reason"] or reason
    rows += _over_seeds(rows)
    failures = [{"cell": f["cell"], "message": f["message"]} for cell in cells if (f := run.failure(cell))]
    missing = [cell.name for cell in cells if not run.result(cell) and not run.failure(cell)]
    tested = experiment.trains and "test" in experiment.evaluation.splits
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.path.name,
        "experiment": experiment.name,
        "title": experiment.title,
        "profile": experiment.profile,
        "created": environment["created"],
        "finished": run.last_cell_at() or now(),
        "status": "partial" if missing or failures else "complete",
        "missing": missing,
        "failures": failures,
        "warnings": [
            *_warnings(run, cells, environment, made, doubts),
            *_unmatched(experiment),
            *_little_text(experiment, facts),
            *_few_steps(experiment),
        ],
        "baselines": facts["baselines"] if tested else None,
        "arms": _arms(experiment, environment, made),
        "verdicts": study.verdicts(rows, experiment),
        "findings": study.findings(rows, experiment, run),
        "rows": rows,
    }


def _check_same_data(made: Results, experiment: Experiment) -> None:
    """The same tokens for every arm of a seed; with several tokenizers for those that share one, and the same places of
    the text for all."""
    same: dict[tuple, dict[str, str]] = {}
    for cell, result in made.items():
        keys = ("tokens", cell.seed, experiment.vocabulary_of(cell.arm)), ("text", cell.seed)
        for key, name in zip(keys, ("data_sha256", "places_sha256"), strict=True):
            if name in result:
                same.setdefault(key, {})[cell.arm] = result[name]
    for (what, seed, *_), hashes in same.items():
        if len(set(hashes.values())) > 1:
            raise RunFailedError(f"the arms of seed {seed} were trained on different {what}: {hashes}")


def _arms(experiment: Experiment, environment: dict[str, Any], made: Results) -> dict[str, Any]:
    arms, configs = {}, model_configs(experiment)
    for name, arm in experiment.cells().items():
        config = configs[name]
        count = cost.parameters(config)
        hashes = {str(c.seed): r["data_sha256"] for c, r in made.items() if c.arm == name and "data_sha256" in r}
        arms[name] = {
            "model": arm.model,
            "learning_rate": arm.learning_rate,
            "config": config.to_dict(),
            "parameters": count.total,
            "non_embedding_parameters": count.non_embedding,
            "active_parameters": count.active,
            "data_sha256": hashes,
            "backends": {"mixer": environment["backends"][experiment.arm_of(name)]["name"]},
            "state_bytes_formula": cost.state_formula(config),
        }
    return arms


def _taint(row: dict, made: dict[str, Any] | None) -> str | None:
    """Why a number may not be compared: a failed gate taints all of its model's, a fallback speed and memory."""
    failed = [gate["name"] for gate in made["gates"] if not gate["passed"]] if made else []
    if failed:
        return f"failed before timing: {', '.join(failed)}"
    fallback = made["backend"]["fallback"] if made else None
    if fallback and row["phase"] != "quality" and row["metric"] not in UNTOUCHED:
        return f"runs a fallback form ({fallback})"
    return None


def _doubts(experiment: Experiment, environment: dict[str, Any], made: Results) -> dict[Cell, str]:
    """Of each model whose kernels were not checked on this GPU, or failed: why no number of it may be compared."""
    doubts, configs = {}, model_configs(experiment)
    for cell, result in made.items():
        reason = doubt(environment, result["backend"]["name"].split("+"), kernels_of(configs[cell.arm]))
        if reason:
            doubts[cell] = reason
    return doubts


def _over_seeds(rows: list[dict]) -> list[dict]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("arm", "phase", "metric", "context", "batch", "mode", "dtype"))
        groups.setdefault(key, []).append(row)
    summary = []
    for group in groups.values():
        values = [row["value"] for row in group if row["value"] is not None]
        one = dict(group[0]) | {"seed": None, "p5": None, "p95": None, "n": len(values)}
        one["comparable"] = all(row["comparable"] for row in group)
        one["reason"] = next((row["reason"] for row in group if row["reason"]), None)
        if values:
            mean = mean_of(values, one["phase"], one["unit"])
            one |= {"value": mean.estimate, "ci_low": mean.low, "ci_high": mean.high}
        summary.append(one)
    return summary


def _warnings(
    run: RunDirectory, cells: list[Cell], environment: dict[str, Any], made: Results, doubts: dict[Cell, str]
) -> list[str]:
    by_arm = {cell.arm: reason for cell, reason in doubts.items()}
    warnings = [f"{arm}: no number of it is comparable, {reason}" for arm, reason in by_arm.items()]
    for arm, backend in environment["backends"].items():
        if backend["fallback"]:
            warnings.append(f"{arm}: speed and memory are not comparable, {backend['fallback']}")
    timed = {cell: result for cell in cells if (result := run.result(cell)) and "noisy" in result}
    for key, what in TIMINGS.items():
        such = [cell.name for cell, result in timed.items() if result.get(key)]  # absent in older runs
        if such:
            warnings.append(f"{what} in {len(such)} of {len(timed)} timed cells: {', '.join(such)}")
    sampled = {method for cell in cells if (result := run.result(cell)) and (method := _sampled(result))}
    warnings += [
        f"memory of processes was {method}, since this system keeps no high-water mark of it, and its allocator may "
        "keep what is freed: peaks are not what they would be on Linux"
        for method in sorted(sampled)
    ]
    warnings += [
        f"{cell.group}: gate '{gate['name']}' failed: {gate['value']:.3g} > {gate['limit']:g}"
        for cell, result in made.items()
        for gate in result["gates"]
        if not gate["passed"]
    ]
    return warnings


def _sampled(result: dict[str, Any]) -> str | None:
    """By which method the memory of a cell was sampled, if it was: in training or in what was measured."""
    method = (result.get("train") or result).get("memory_method", "")
    return method if method.startswith(SAMPLED) else None


def _unmatched(experiment: Experiment) -> list[str]:
    """A comparison claims arms of one size; other studies differ in it on purpose, and say so."""
    if experiment.study != "comparison":
        return []
    sizes = {name: cost.parameters(config).active for name, config in model_configs(experiment).items()}
    low, high = min(sizes, key=lambda name: sizes[name]), max(sizes, key=lambda name: sizes[name])
    if sizes[high] <= (1 + MATCHED) * sizes[low]:
        return []
    return [
        f"{UNMATCHED}: {high} has {sizes[high] / sizes[low]:.3g} times {low}'s active parameters "
        f"({sizes[high]:,} and {sizes[low]:,}), and what differs may be that"
    ]


def _little_text(experiment: Experiment, facts: dict[str, Any]) -> list[str]:
    tested = experiment.trains and "test" in experiment.evaluation.splits
    if not tested or facts["baselines"]["bytes"] >= LITTLE_TEXT:
        return []
    return [f"the test text has only {facts['baselines']['bytes']:,} bytes: its bits per byte say little of other text"]


def _few_steps(experiment: Experiment) -> list[str]:
    steps = experiment.training.steps
    if not experiment.trains or steps > WARM_UP_STEPS:
        return []
    return [f"training has {plural(steps, 'step')}, so its times are of the first ones, which take longer"]
