"""A run directory, read once and checked: every number of a report comes from a `Record`.

Text is made printable on the way in, so that nothing a model wrote or an exception said can drive a terminal or a
browser.
"""

import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import RunFailedError, SpecError
from experiments.printable import clean
from experiments.rows import SCHEMA_VERSION
from experiments.store import (
    NO_STEPS,
    RunDirectory,
    again,
    at_work,
    damaged,
    log_again,
    read_json,
    read_text,
    rebuilt,
    resumes,
    unsealed,
)

VERDICT = (  # what is read of one
    "phase", "metric", "context", "a", "b", "kind", "unit", "estimate", "ci_low", "ci_high", "n", "p", "p_holm",
    "resolved", "better", "more_seeds", "comparable", "reason", "sentence",
)  # fmt: skip
REQUIRED = {
    "schema_version": int, "run_id": str, "experiment": str, "title": str, "status": str, "missing": list,
    "failures": list, "warnings": list, "arms": dict, "rows": list,
}  # fmt: skip
MEASURED_PHASES = ("load", "prefill", "decode")


@dataclass(frozen=True)
class Row:
    """One row of result.json; `seed` None is the mean over `n` seeds with its 95% interval."""

    arm: str
    seed: int | None
    phase: str
    metric: str
    value: float | None
    unit: str
    n: int
    ci_low: float | None
    ci_high: float | None
    p5: float | None
    p95: float | None
    direction: str
    backend: str | None
    comparable: bool
    reason: str | None
    context: int | None
    batch: int | None
    mode: str | None
    dtype: str | None

    @property
    def known(self) -> float:
        """The value of a row that must have one."""
        assert self.value is not None
        return self.value

    @property
    def key(self) -> tuple[Any, ...]:
        return self.arm, self.seed, self.phase, self.metric, self.context, self.batch, self.mode, self.dtype


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Curve:
    """One (arm, seed): loss in nats/token against tokens consumed; S steps, P validation points."""

    tokens: np.ndarray  # (S,)
    loss: np.ndarray  # (S,)
    validation_tokens: np.ndarray  # (P,)
    validation_loss: np.ndarray  # (P,)


@dataclass(frozen=True)
class Record:
    """See `read`."""

    result: dict[str, Any]
    result_text: str
    environment: dict[str, Any]
    spec: dict[str, Any]
    spec_text: str
    events: list[dict[str, Any]]
    rows: list[Row]
    curves: dict[str, dict[int, Curve]]  # arm -> seed
    evaluations: dict[str, dict[int, dict[str, Any]]]  # arm -> seed
    remarks: list[str]  # what the reading itself noticed

    @cached_property
    def arms(self) -> list[str]:
        names = dict.fromkeys(self.result["arms"])
        names.update(dict.fromkeys(row.arm for row in self.rows))
        return list(names)

    @cached_property
    def seeds(self) -> list[int]:
        """Those of which something was finished; others may have curves."""
        return sorted({row.seed for row in self.rows if row.seed is not None})

    @property
    def page(self) -> int:
        """Bytes, in whole ones of which a process's memory is read; older records do not say."""
        return self.environment.get("page_bytes", 4096)

    @property
    def study(self) -> str:
        return self.spec.get("study", "comparison")

    @property
    def findings(self) -> list[dict[str, Any]]:
        return self.result["findings"]

    @property
    def sweep(self) -> bool:
        return bool(self.spec.get("learning_rates"))

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        return self.result["verdicts"]

    @property
    def failures(self) -> list[dict[str, Any]]:
        return self.result["failures"]

    @property
    def missing(self) -> list[str]:
        return self.result["missing"]

    @property
    def split(self) -> str:
        """The split whose loss by position is shown: test, or validation where test was not read."""
        read = {name for arm in self.evaluations.values() for one in arm.values() for name in one["splits"]}
        return "test" if "test" in read else "validation"

    def objective(self, arm: str) -> str:
        """What an arm is trained to; one of a sweep has its rate in its name."""
        arms = self.spec["arms"]
        rate = self.result["arms"].get(arm, {}).get("learning_rate")
        name = arm if arm in arms else arm.removesuffix(f"-lr{rate!r}")
        return arms.get(name, {}).get("objective", "causal")

    @cached_property
    def _index(self) -> dict[tuple, Row]:
        found: dict[tuple, Row] = {}
        usual = self.spec.get("measurement", {}).get("batch")
        for row in self.rows:
            if usual is not None and row.phase in ("prefill", "decode") and row.batch not in (None, usual):
                continue  # a study that measures at more batches asks for them by `over_seeds`
            found.setdefault((row.arm, row.seed, row.phase, row.metric, row.context), row)
        return found

    def over_seeds(self, phase: str, metric: str, arm: str | None = None, **where: Any) -> list[Row]:
        """Rows over all seeds with these fields, where a study varies more than the context."""
        return [
            row for row in self.rows
            if (row.seed, row.phase, row.metric) == (None, phase, metric) and arm in (None, row.arm)
            and all(getattr(row, name) == value for name, value in where.items())
        ]  # fmt: skip

    def row(self, arm: str, phase: str, metric: str, context: int | None = None, seed: int | None = None) -> Row | None:
        return self._index.get((arm, seed, phase, metric, context))

    def per_seed(self, arm: str, phase: str, metric: str, context: int | None = None) -> list[Row]:
        """Rows of the single seeds that carry a value, by seed."""
        found = (self.row(arm, phase, metric, context, seed) for seed in self.seeds)
        return [row for row in found if row is not None and row.value is not None]

    def contexts(self, phase: str, metric: str | None = None) -> list[int]:
        return sorted(
            {
                row.context
                for row in self.rows
                if row.phase == phase and row.context is not None and metric in (None, row.metric)
            }
        )

    def has(self, phase: str, metric: str) -> bool:
        """Whether any arm has a row of it, valued or with a reason for having no value."""
        return any(row.phase == phase and row.metric == metric for row in self.rows)

    @property
    def measured(self) -> bool:
        return any(row.phase in MEASURED_PHASES for row in self.rows)

    @property
    def batch(self) -> int:
        """Sequences of prefill and decode, in the studies that have one batch of them."""
        return self.spec.get("measurement", {}).get("batch") or 1

    def arms_with(self, wanted: Iterable[tuple[str, str]]) -> set[str]:
        """Those with a value over seeds of any of these (phase, metric), at the usual batch."""
        places = {(*one, context) for one in wanted for context in self.contexts(*one)}
        found = (self.row(arm, *place) for arm in self.arms for place in places)
        return {row.arm for row in found if row is not None and row.value}

    def incomplete(self, arm: str) -> bool:
        """Whether something of the arm failed, or is missing."""
        cells = [one["cell"] or "" for one in self.failures] + self.missing
        return any(cell.partition("/")[0] == arm for cell in cells)

    def absence(self, arm: str, phase: str, metric: str, context: int | None = None) -> str:
        """Why there is no number for it: the recorded reason, else the failure or the gap that explains it."""
        row = self.row(arm, phase, metric, context)
        if row is not None and row.reason:
            return row.reason
        own = phase if context is None else f"{phase}-{context}"

        def concerns(cell: str | None) -> bool:
            parts = (cell or "").split("/")
            return parts[0] == arm and (len(parts) < 3 or parts[2] in ("train", own))

        causes = [f"{one['cell']}: {one['message']}" for one in self.failures if concerns(one["cell"])]
        causes = causes or [f"missing from the run: {cell}" for cell in self.missing if concerns(cell)]
        if causes:
            return "; ".join(dict.fromkeys(causes))
        if phase in MEASURED_PHASES and not self.spec.get("measurement", {}).get("enabled", True):
            return "the run did not measure loading, prefill and decode (measurement.enabled = false)"
        if metric == "busiest_expert_load":
            return "this arm has no experts"
        objective = self.objective(arm)
        if phase in ("prefill", "decode") and objective != "causal":
            return "an arm that reads what comes after a token, too, keeps no cache"
        if phase == "quality" and objective == "masked":
            return "a masked model gives no likelihood of a text"
        if phase == "quality" and metric.partition("_")[2].startswith("masked_"):
            return "this arm is not trained to guess hidden tokens"
        return "not recorded by this run"


def read(run: Path) -> Record:
    """Read a run directory. Only result.json and spec.toml are indispensable.

    Raises SpecError where `run` is no folder, RunFailedError where its result cannot be used.
    """
    run = Path(run)
    if not run.is_dir():
        raise SpecError(f"no run directory at {run}; `lab runs` lists those there are")
    file = run / "result.json"
    remedy = rebuilt(file)
    if not file.is_file():
        then = "another process is at work on it" if at_work(run) else f"{resumes(file)} finishes it"
        raise RunFailedError(f"no {file.name} in {run}: the run has not written its result; {then}")
    result_text = read_text(file, remedy)
    result = unsealed(result_text, file, remedy)
    for key, kind in REQUIRED.items():
        if key not in result:
            raise damaged(file, f"the key '{key}' is missing", remedy)
        if not isinstance(result[key], kind):
            raise damaged(file, f"'{key}' is of another kind", remedy)
    version = result["schema_version"]
    if version != SCHEMA_VERSION:
        raise RunFailedError(f"{file}: schema_version {version!r}; this version of the lab reads {SCHEMA_VERSION}")
    result = {
        "baselines": None,
        "verdicts": [],
        "findings": [],
        "profile": "",
        "created": "",
        "finished": "",
    } | result
    for kind, keys in (("verdicts", VERDICT), ("failures", ("cell", "message"))):
        if not isinstance(result[kind], list) or not all(isinstance(one, dict) for one in result[kind]):
            raise damaged(file, f"'{kind}' is of another kind", remedy)
        lacking = [key for one in result[kind] for key in keys if key not in one]
        if lacking:
            raise damaged(file, f"one of its {kind} has no '{lacking[0]}'", remedy)
    remarks: list[str] = []
    environment: dict[str, Any] = {}
    if (run / "environment.json").is_file():
        environment = RunDirectory(run).environment()
    else:
        remarks.append("environment.json is missing: machine and versions are unknown")
    RunDirectory(run).check_spec(environment)
    spec_text = read_text(run / "spec.toml")
    try:
        spec = tomllib.loads(spec_text)
    except tomllib.TOMLDecodeError as error:
        raise damaged(run / "spec.toml", f"not valid TOML: {error}") from None
    arms = spec.get("arms")
    if not isinstance(arms, dict) or not all(isinstance(arm, dict) for arm in arms.values()):
        raise damaged(run / "spec.toml", "it has no arms")
    curves: dict[str, dict[int, Curve]] = {}
    evaluations: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in result["arms"]:
        for cell, seed in _cells(run / "cells" / arm):
            log, path = cell / "metrics.jsonl", cell / "evaluation.json"
            curve = _curve(log, f"{arm}/seed{seed}", remarks)
            if curve is not None:
                curves.setdefault(clean(arm), {})[seed] = curve
            elif log.is_file() and path.is_file():  # trained to the end
                raise damaged(log, NO_STEPS, log_again(log))
            if path.is_file():
                remedy = f"delete that file {again(path)}"
                evaluation = read_json(path, remedy)
                if not isinstance(evaluation.get("splits"), dict):
                    raise damaged(path, "it has no 'splits'", remedy)
                evaluations.setdefault(clean(arm), {})[seed] = clean(evaluation)
    return Record(
        result=clean(result),
        result_text=result_text,
        environment=clean(environment),
        spec=clean(spec),
        spec_text=clean(spec_text),
        events=clean(_lines(run / "events.jsonl", remarks, "delete that line")),
        rows=_rows(clean(result["rows"]), run / "result.json", remarks),
        curves=curves,
        evaluations=evaluations,
        remarks=clean(remarks),
    )


def _lines(path: Path, remarks: list[str], remedy: str) -> list[dict[str, Any]]:
    """One JSON object a line. A torn last line, left by an interruption, is dropped and remarked; others are errors."""
    if not path.is_file():
        return []
    text = read_text(path, remedy, errors="surrogateescape")  # the torn line may be no text
    lines = [(at, line) for at, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = []
    for position, (at, line) in enumerate(lines):
        try:
            one = json.loads(line)
            if not isinstance(one, dict):
                raise damaged(path, f"line {at}: it must hold one JSON object", remedy)
            found.append(one)
        except json.JSONDecodeError as error:
            if position + 1 < len(lines):
                raise damaged(path, f"line {at}: not valid JSON: {error}", remedy) from None
            remarks.append(f"{path.parent.name}/{path.name}: the last line is torn and was left out")
    return found


def _cells(folder: Path) -> Iterable[tuple[Path, int]]:
    found = []
    if folder.is_dir():
        for cell in folder.iterdir():
            number = cell.name.removeprefix("seed")
            if cell.is_dir() and cell.name.startswith("seed") and number.isdecimal():
                found.append((cell, int(number)))
    return sorted(found, key=lambda one: one[1])


def _curve(path: Path, cell: str, remarks: list[str]) -> Curve | None:
    steps: dict[int, tuple[float, float]] = {}  # a resumed run may write a step twice: the last one counts
    points: dict[int, float] = {}
    for line in _lines(path, remarks, log_again(path)):
        try:
            if "loss" in line:
                steps[line["step"]] = (line["tokens"], _finite(line["loss"], math.nan))
            if "validation_loss" in line:
                points[line["step"]] = _finite(line["validation_loss"], math.nan)
        except KeyError as error:
            raise damaged(path, f"a line of it has no {error}", log_again(path)) from None
    if not steps:
        return None
    at = np.array(sorted(steps))
    tokens = np.array([steps[step][0] for step in at], dtype=float)
    loss = np.array([steps[step][1] for step in at], dtype=float)
    if np.isnan(loss).any():
        first = int(at[np.isnan(loss)][0])
        remarks.append(f"{cell}: the training loss is not finite at step {first} ({np.isnan(loss).sum()} steps)")
    validated = np.array(sorted(points))
    return Curve(
        tokens=tokens,
        loss=loss,
        validation_tokens=np.interp(validated, np.append(0, at), np.append(0, tokens)),
        validation_loss=np.array([points[step] for step in validated], dtype=float),
    )


def _rows(raw: list[dict[str, Any]], path: Path, remarks: list[str]) -> list[Row]:
    rows = []
    seen = set()
    for at, one in enumerate(raw):
        for key in ("arm", "phase", "metric"):
            if not isinstance(one, dict) or key not in one:
                raise damaged(path, f"rows[{at}] has no '{key}'", rebuilt(path))
        values: dict[str, Any] = {name: one.get(name) for name in COLUMNS}
        for name in ("value", "ci_low", "ci_high", "p5", "p95"):
            if not isinstance(values[name], int | float | None):
                raise damaged(path, f"rows[{at}]: '{name}' is no number", rebuilt(path))
            values[name] = _finite(values[name], None)
        if one.get("value") is not None and values["value"] is None:
            values["reason"] = values["reason"] or "the recorded value is not a finite number"
            remarks.append(f"{one['arm']}, {one['phase']} {one['metric']}: {values['reason']}")
        values |= {
            "unit": values["unit"] or "",
            "n": values["n"] or 0,
            "direction": values["direction"] or "none",
            "comparable": values["comparable"] is not False,
        }
        row = Row(**values)
        if row.key in seen:
            raise damaged(path, f"two rows for {row.key}", rebuilt(path))
        seen.add(row.key)
        rows.append(row)
    return rows


def _finite(value: Any, otherwise: float | None) -> Any:
    return otherwise if value is None or not math.isfinite(value) else value
