"""The run directory: what is written where, and how the rows of `result.json` follow from the cells' files.

    runs/<UTC time>-<experiment>-<short hash>/
      spec.toml  tokenizer.json  environment.json  events.jsonl  result.json  report.html  report.md
      cells/<arm>/seed<k>/   metrics.jsonl  evaluation.json  checkpoint/  measure/<phase>[-<context>].json
      cells/<arm>/seed<k>/   failed/<cell>.json where a cell gave no result

docs/result-schema.md describes every field.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import model_config
from experiments.errors import LabError, RunFailedError
from experiments.objectives import SELECTED
from experiments.spec import Experiment, load
from experiments.statistics import Comparison, holm, mean_interval, paired_difference, paired_ratio
from models import cost
from models.config import ModelConfig

SCHEMA_VERSION = 1
RESOLVED = 0.05  # Holm-corrected p below which a difference counts as resolved


@dataclass(frozen=True)
class Cell:
    """One unit of work, in one process. kind: train, load, prefill or decode."""

    arm: str
    seed: int
    kind: str
    context: int | None = None

    @property
    def name(self) -> str:
        return f"{self.group}/{self.part}"

    @property
    def group(self) -> str:
        return f"{self.arm}/seed{self.seed}"

    @property
    def part(self) -> str:
        return self.kind if self.context is None else f"{self.kind}-{self.context}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def plan(experiment: Experiment) -> list[Cell]:
    """Every cell in the order in which it runs. Arms alternate, and swap places from seed to seed, so that a
    machine that slows down in time does not slow down one arm."""
    arms = list(experiment.cells())
    turns = [(seed, arms if i % 2 == 0 else arms[::-1]) for i, seed in enumerate(experiment.seeds)]
    cells = [Cell(arm, seed, "train") for seed, order in turns for arm in order]
    if not experiment.measurement.enabled:
        return cells
    phases: list[tuple[str, int | None]] = [("load", None)]
    phases += [(kind, context) for kind in ("prefill", "decode") for context in experiment.measurement.contexts]
    decodes = {name: model_config(arm, experiment.data.vocabulary).causal for name, arm in experiment.cells().items()}
    cells += [
        Cell(arm, seed, kind, context)
        for seed, order in turns for kind, context in phases for arm in order
        if kind == "load" or decodes[arm]
    ]  # fmt: skip
    return cells


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.group

    def result_file(self, cell: Cell) -> Path:
        folder = self.folder(cell)
        return folder / "evaluation.json" if cell.kind == "train" else folder / "measure" / f"{cell.part}.json"

    def failure_file(self, cell: Cell) -> Path:
        return self.folder(cell) / "failed" / f"{cell.part}.json"

    def finish(self, cell: Cell, result: dict[str, Any]) -> None:
        self.failure_file(cell).unlink(missing_ok=True)
        write_json(self.result_file(cell), result)

    def fail(self, cell: Cell, message: str, detail: str) -> None:
        write_json(self.failure_file(cell), {"cell": cell.name, "message": message, "detail": detail})

    def result(self, cell: Cell) -> dict[str, Any] | None:
        file = self.result_file(cell)
        return read_json(file) if file.is_file() else None

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        file = self.failure_file(cell)
        return read_json(file) if file.is_file() else None

    def event(self, kind: str, message: str, cell: str | None = None) -> None:
        line = json.dumps({"time": now(), "kind": kind, "cell": cell, "message": message})
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def experiment(self) -> Experiment:
        return load(str(self.path / "spec.toml"), device=self.environment()["device"])

    def environment(self) -> dict[str, Any]:
        return read_json(self.path / "environment.json")


def runs(folder: Path) -> list[RunDirectory]:
    """The run directories in `folder`, oldest first."""
    found = sorted(path.parent for path in folder.glob("*/environment.json")) if folder.is_dir() else []
    return [RunDirectory(path) for path in found]


def summary(run: RunDirectory) -> dict[str, Any]:
    """One line of `lab runs`."""
    experiment = run.experiment()
    file = run.path / "result.json"
    status = read_json(file)["status"] if file.is_file() else "unfinished"
    arms = list(experiment.cells())
    return {"run": run.path.name, "status": status, "profile": experiment.profile, "arms": arms}


def find(reference: str | None, folder: Path) -> RunDirectory:
    """A run by its path or by (the start or the end of) its name in `folder`; the latest for None.

    Raises LabError, naming what is there.
    """
    if reference is not None and (Path(reference) / "environment.json").is_file():
        return RunDirectory(Path(reference))
    known = runs(folder)
    if not known:
        raise LabError(f"no runs in '{folder}'; make one with: lab run compare")
    if reference is None:
        return known[-1]
    matching = [run for run in known if run.path.name.startswith(reference) or run.path.name.endswith(reference)]
    if len(matching) != 1:
        what = "no run" if not matching else f"{len(matching)} runs"
        raise LabError(f"{what} named '{reference}' in '{folder}'; there are: {', '.join(r.path.name for r in known)}")
    return matching[0]


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        try:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFailedError(f"{path} is missing: the run did not get that far") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFailedError(f"{path} is damaged: {error}") from None


def build_result(run: RunDirectory, experiment: Experiment, facts: dict[str, Any]) -> dict[str, Any]:
    """`result.json` from the cells' files. `facts`: of the dataset.

    Raises RunFailedError when paired arms consumed different tokens: nothing in such a run compares.
    """
    cells = plan(experiment)
    environment = run.environment()
    trained = {cell: result for cell in cells if cell.kind == "train" and (result := run.result(cell))}
    _check_same_data(trained)
    rows = [row for cell in cells if (result := run.result(cell)) for row in _rows(cell, result, experiment, run)]
    comparable = environment["backends"]
    for row in rows:
        reason = _taint(row, trained, comparable)
        row["comparable"], row["reason"] = reason is None, row["reason"] or reason
    rows += _over_seeds(rows)
    failures = [{"cell": f["cell"], "message": f["message"]} for cell in cells if (f := run.failure(cell))]
    missing = [cell.name for cell in cells if not run.result(cell) and not run.failure(cell)]
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.path.name,
        "experiment": experiment.name,
        "title": experiment.title,
        "profile": experiment.profile,
        "created": environment["created"],
        "finished": now(),
        "status": "partial" if missing or failures else "complete",
        "missing": missing,
        "failures": failures,
        "warnings": _warnings(run, cells, environment, trained),
        "baselines": facts["baselines"] if "test" in experiment.evaluation.splits else None,
        "arms": _arms(experiment, facts["vocabulary"], environment, trained),
        "verdicts": [] if experiment.learning_rates else _verdicts(rows, experiment),
        "rows": rows,
    }


def _check_same_data(trained: dict[Cell, dict[str, Any]]) -> None:
    by_seed: dict[int, dict[str, str]] = {}
    for cell, result in trained.items():
        by_seed.setdefault(cell.seed, {})[cell.arm] = result["data_sha256"]
    for seed, hashes in by_seed.items():
        if len(set(hashes.values())) > 1:
            raise RunFailedError(f"the arms of seed {seed} were trained on different tokens: {hashes}")


def _arms(
    experiment: Experiment, vocabulary: int, environment: dict[str, Any], trained: dict[Cell, dict[str, Any]]
) -> dict[str, Any]:
    arms = {}
    for name, arm in experiment.cells().items():
        config = model_config(arm, vocabulary)
        count = cost.parameters(config)
        base = name if name in environment["backends"] else name.rpartition("-lr")[0]
        arms[name] = {
            "model": arm.model,
            "learning_rate": arm.learning_rate,
            "config": config.to_dict(),
            "parameters": count.total,
            "non_embedding_parameters": count.non_embedding,
            "active_parameters": count.active,
            "data_sha256": {str(c.seed): r["data_sha256"] for c, r in trained.items() if c.arm == name},
            "backends": {"mixer": environment["backends"][base]["name"]},
            "state_bytes_formula": cost.state_formula(config),
        }
    return arms


def _row(cell: Cell, phase: str, metric: str, value: float | None, unit: str, direction: str, **rest: Any) -> dict:
    return {
        "arm": cell.arm, "seed": cell.seed, "phase": phase, "metric": metric, "value": value, "unit": unit,
        "n": 1, "ci_low": None, "ci_high": None, "p5": None, "p95": None, "direction": direction,
        "backend": None, "comparable": True, "reason": None, "context": cell.context, "batch": None, "mode": None,
    } | rest  # fmt: skip


def _rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    if cell.kind == "train":
        yield from _quality_rows(cell, result)
        yield from _training_rows(cell, result, experiment, run)
    elif cell.kind == "load":
        yield from _load_rows(cell, result, experiment)
    else:
        yield from _phase_rows(cell, result)


def _quality_rows(cell: Cell, result: dict[str, Any]) -> Iterator[dict]:
    common = {"backend": result["backend"]["name"]}
    for split, quality in result["splits"].items():
        if "masked_token_loss" in quality:
            common["n"] = quality["tokens"]
            loss, accuracy = quality["masked_token_loss"], quality["masked_accuracy"]
            yield _row(cell, "quality", f"{split}_masked_token_loss", loss, "nats/token", "lower", **common)
            yield _row(cell, "quality", f"{split}_masked_accuracy", accuracy, "share", "higher", **common)
            reason = "a masked model gives no likelihood of a text"
            yield _row(cell, "quality", f"{split}_bits_per_byte", None, "bits/byte", "lower", reason=reason, **common)
    if not any("bits_per_byte" in quality for quality in result["splits"].values()):
        return
    initial = result["initial"]["test_bits_per_byte"]
    if initial is not None:
        yield _row(cell, "quality", "initial_test_bits_per_byte", initial, "bits/byte", "none", **common)
    for split, quality in result["splits"].items():
        common["n"] = quality["tokens"]
        yield _row(
            cell,
            "quality",
            f"{split}_bits_per_byte",
            quality["bits_per_byte"],
            "bits/byte",
            "lower",
            **common,
        )
        if split == "test":
            perplexity = quality["token_perplexity"]
            yield _row(cell, "quality", "test_token_perplexity", perplexity, "perplexity", "lower", **common)
            losses = quality["loss_at_position"]
            positions = sorted(
                {2**i for i in range(len(losses).bit_length())} & {*range(1, len(losses) + 1)} | {len(losses)}
            )
            for position in positions:
                yield _row(
                    cell, "quality", "test_loss_at_position", losses[position - 1], "nats/token", "lower",
                    **common | {"context": position, "n": quality["windows"]},
                )  # fmt: skip


def _training_rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    train, settings = result["train"], experiment.training
    common = {
        "backend": result["backend"]["name"], "context": settings.context,
        "batch": settings.batch * settings.accumulate, "mode": "eager",
    }  # fmt: skip
    times = _percentiles(train["step_ms"])
    yield _row(cell, "train", "step_ms", unit="ms", direction="lower", **times, **common)
    yield _row(
        cell, "train", "tokens_per_s", unit="tokens/s", direction="higher",
        **_rate(times, train["tokens_per_step"]), **common,
    )  # fmt: skip
    yield _row(cell, "train", "peak_bytes", train["peak_bytes"], "bytes", "lower", **common)
    config = read_json(run.folder(cell) / "checkpoint" / "config.json")
    predicted = SELECTED if experiment.cells()[cell.arm].objective == "masked" else 1.0
    flops = cost.training_flops_per_token(ModelConfig.from_dict(config), settings.context, predicted)
    yield _row(cell, "train", "flops_per_token", flops, "FLOP/token", "none", **common)
    loads = result.get("expert_load")
    if loads:
        busiest = max(max(load) * len(load) for load in loads)
        yield _row(cell, "train", "busiest_expert_load", busiest, "x", "lower", **common)


def _load_rows(cell: Cell, result: dict[str, Any], experiment: Experiment) -> Iterator[dict]:
    common = {"batch": None, "mode": "eager"}
    for metric in (
        "file_bytes",
        "host_peak_bytes",
        "device_peak_bytes",
        "resident_bytes",
        "resident_bytes_analytic",
    ):
        reason = "no GPU in this run" if result[metric] is None else None
        direction = "none" if metric.endswith("analytic") else "lower"
        yield _row(cell, "load", metric, result[metric], "bytes", direction, reason=reason, **common)
    yield _row(
        cell,
        "load",
        "load_ms",
        unit="ms",
        direction="lower",
        **_percentiles(result["samples"]["ms"]),
        **common,
    )


def _phase_rows(cell: Cell, result: dict[str, Any]) -> Iterator[dict]:
    common = {"batch": result["batch"], "mode": "eager", "backend": result["backend"]}
    times = _percentiles(result["samples"]["ms"])
    if cell.kind == "prefill":
        per_sample, latency = result["batch"] * result["context"], "time_to_first_token_ms"
    else:
        per_sample, latency = result["batch"] * result["tokens_per_sample"], "ms_per_token"
    yield _row(
        cell,
        cell.kind,
        "tokens_per_s",
        unit="tokens/s",
        direction="higher",
        **_rate(times, per_sample),
        **common,
    )
    steps = result.get("tokens_per_sample", 1)
    latencies = {key: value / steps if key != "n" else value for key, value in times.items()}
    yield _row(cell, cell.kind, latency, unit="ms", direction="lower", **latencies, **common)
    metrics = ["peak_bytes", "working_bytes"]
    if cell.kind == "decode":
        metrics += ["state_bytes", "state_bytes_analytic"]
    for metric in metrics:
        direction = "none" if metric.endswith("analytic") else "lower"
        yield _row(cell, cell.kind, metric, result[metric], "bytes", direction, **common)


def _percentiles(samples: list[float]) -> dict[str, Any]:
    p5, median, p95 = np.percentile(samples, [5, 50, 95])
    return {"value": float(median), "p5": float(p5), "p95": float(p95), "n": len(samples)}


def _rate(times_ms: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Tokens per second from milliseconds: the elapsed time, and its percentiles change places."""
    rate = {key: 1e3 * tokens / times_ms[key] for key in ("value", "p5", "p95")}
    return {"value": rate["value"], "p5": rate["p95"], "p95": rate["p5"], "n": times_ms["n"]}


def _taint(row: dict, trained: dict[Cell, dict[str, Any]], backends: dict[str, Any]) -> str | None:
    """Why a number may not be compared: a failed gate taints all of its cell's, a fallback speed and memory."""
    result = trained.get(Cell(row["arm"], row["seed"], "train"))
    failed = [gate["name"] for gate in result["gates"] if not gate["passed"]] if result else []
    if failed:
        return f"failed before timing: {', '.join(failed)}"
    fallback = result["backend"]["fallback"] if result else None
    if fallback and row["phase"] != "quality" and row["metric"] not in {"file_bytes", "state_bytes", "flops_per_token"}:
        return f"runs a fallback form ({fallback})"
    return None


def _over_seeds(rows: list[dict]) -> list[dict]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["phase"], row["metric"], row["context"]), []).append(row)
    summary = []
    for group in groups.values():
        values = [row["value"] for row in group if row["value"] is not None]
        one = dict(group[0]) | {"seed": None, "p5": None, "p95": None, "n": len(values)}
        one["comparable"] = all(row["comparable"] for row in group)
        one["reason"] = next((row["reason"] for row in group if row["reason"]), None)
        if values:
            interval = mean_interval(values)
            one |= {"value": interval.estimate, "ci_low": interval.low, "ci_high": interval.high}
        summary.append(one)
    return summary


def _warnings(run: RunDirectory, cells: list[Cell], environment: dict[str, Any], trained: dict) -> list[str]:
    warnings = []
    for arm, backend in environment["backends"].items():
        if backend["fallback"]:
            warnings.append(f"{arm}: speed and memory are not comparable, {backend['fallback']}")
    for cell in cells:
        result = run.result(cell)
        if result and result.get("noisy"):
            warnings.append(f"{cell.name}: noisy timing (95th percentile over 1.5 times the median)")
    warnings += [
        f"{cell.group}: gate '{gate['name']}' failed: {gate['value']:.3g} > {gate['limit']:g}"
        for cell, result in trained.items()
        for gate in result["gates"]
        if not gate["passed"]
    ]
    return warnings


# what the verdict speaks about: phase, metric, kind, noun for a sentence, which context
_QUESTIONS = (
    ("quality", "test_bits_per_byte", "difference", None),
    ("quality", "test_masked_token_loss", "difference", None),
    ("train", "tokens_per_s", "ratio", None),
    ("prefill", "tokens_per_s", "ratio", "longest"),
    ("decode", "tokens_per_s", "ratio", "longest"),
    ("load", "resident_bytes", "ratio", None),
    ("decode", "peak_bytes", "ratio", "longest"),
    ("decode", "state_bytes", "ratio", "longest"),
)

_QUALIFIED = {"peak_bytes", "state_bytes", "test_masked_token_loss"}  # a second question about their phase


def _verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """Every arm against the first, on every question; Holm's correction over all of them."""
    first, *others = experiment.arms
    longest = experiment.measurement.contexts[-1]
    drafts: list[tuple[dict, Comparison]] = []
    for other in others:
        for phase, metric, kind, where in _QUESTIONS:
            context = longest if where else None
            a, b = (_by_seed(rows, arm, phase, metric, context) for arm in (first, other))
            seeds = [seed for seed in a if seed in b]
            values = [[side[seed]["value"] for seed in seeds] for side in (a, b)]
            if not seeds or any(v is None for side in values for v in side):
                continue
            if kind == "ratio" and any(v <= 0 for side in values for v in side):
                continue
            compare = paired_difference if kind == "difference" else paired_ratio
            pairs = [side[seed] for side in (a, b) for seed in seeds]
            head = {
                "id": phase if metric not in _QUALIFIED else f"{phase}-{metric}",
                "phase": phase, "metric": metric, "context": context, "a": first, "b": other, "kind": kind,
                "unit": pairs[0]["unit"] if kind == "difference" else "x", "direction": pairs[0]["direction"],
                "comparable": all(row["comparable"] for row in pairs),
                "reason": next((row["reason"] for row in pairs if not row["comparable"]), None),
            }  # fmt: skip
            drafts.append((head, compare(*values)))
    corrected = holm([comparison.p for _, comparison in drafts])
    tested = sum(p is not None for p in corrected)
    return [_verdict(head, comparison, p, tested) for (head, comparison), p in zip(drafts, corrected, strict=True)]


def _by_seed(rows: list[dict], arm: str, phase: str, metric: str, context: int | None) -> dict[int, dict]:
    return {
        row["seed"]: row for row in rows
        if (row["arm"], row["phase"], row["metric"]) == (arm, phase, metric) and row["seed"] is not None
        and (context is None or row["context"] == context)
    }  # fmt: skip


def _verdict(head: dict, comparison: Comparison, p_holm: float | None, tested: int) -> dict:
    interval = comparison.interval
    resolved = head["comparable"] and (comparison.exact or (p_holm is not None and p_holm < RESOLVED))
    neutral = 0.0 if head["kind"] == "difference" else 1.0
    better = None
    if resolved and head["direction"] != "none":
        b_is_lower = interval.estimate < neutral
        better = head["b"] if b_is_lower == (head["direction"] == "lower") else head["a"]
    verdict = head | {
        "estimate": interval.estimate, "ci_low": interval.low, "ci_high": interval.high, "n": interval.n,
        "p": comparison.p, "p_holm": p_holm, "resolved": resolved, "better": better,
        "exact": comparison.exact, "tested": tested,
        "more_seeds": None if resolved else comparison.more_seeds(tested),
    }  # fmt: skip
    return verdict | {"sentence": _sentence(verdict)}


def _sentence(v: dict) -> str:
    """One honest sentence; the same words for every arm."""
    at = f" at {v['context']} tokens of context" if v["context"] else ""
    what = {
        "test_bits_per_byte": "test bits per byte",
        "test_masked_token_loss": "the loss of hidden test tokens",
        "resident_bytes": "memory after loading",
        "peak_bytes": f"peak memory in {v['phase']}{at}",
        "state_bytes": f"cache or state in {v['phase']}{at}",
        "tokens_per_s": f"{v['phase']} tokens/s{at}",
    }[v["metric"]]
    seeds = f"{v['n']} paired seed{'s' if v['n'] > 1 else ''}"
    if v["kind"] == "difference":
        size = f"{v['b']} differs from {v['a']} in {what} by {v['estimate']:+.4f}"
        interval = f"95% interval {v['ci_low']:+.4f} to {v['ci_high']:+.4f}, {seeds}" if v["n"] > 1 else seeds
    else:
        size = f"{v['b']} has {v['estimate']:.3g} times {v['a']}'s {what}"
        interval = f"95% interval {v['ci_low']:.3g} to {v['ci_high']:.3g}, {seeds}" if v["n"] > 1 else seeds
    if not v["comparable"]:
        return f"{v['a']} and {v['b']} do not compare in {what}: {v['reason']}. For the record: {size} ({interval})."
    if v["n"] < 2:
        return f"{size} ({interval}): not resolved, one seed says nothing about the spread over seeds."
    if v["exact"]:
        interval = "the same for every seed"
    if v["resolved"] and v["better"]:
        slight = ", by less than 5%" if v["kind"] != "difference" and abs(v["estimate"] - 1) < 0.05 else ""
        return f"{size} ({interval}): {v['better']} is better here{slight}."
    if v["resolved"]:
        return f"{size} ({interval})."
    if v["p"] is None:
        return f"{size}: no difference at any seed."
    after = f" after correcting for {v['tested']} comparisons" if v["p"] < RESOLVED else ""
    seeds_word = "seed" if v["more_seeds"] == 1 else "seeds"
    more = f"about {v['more_seeds']} more {seeds_word} would" if v["more_seeds"] else "more seeds might"
    return f"{size} ({interval}): not resolved{after}; {more} resolve it if the difference is real."
