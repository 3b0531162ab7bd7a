"""The run directory: what is written where.

    runs/<UTC time>-<experiment>-<short hash>/
      spec.toml  tokenizer.json  environment.json  events.jsonl  result.json  report.html  report.md
      cells/<arm>/seed<k>/   metrics.jsonl  evaluation.json  checkpoint/  measure/<cell>.json
      cells/<arm>/seed<k>/   failed/<cell>.json where a cell gave no result

docs/result-schema.md describes every field.
"""

import hashlib
import json
import os
import shlex
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.data.prepared import tokens_per_byte
from experiments.errors import LabError, RunFailedError, SpecError
from experiments.spec import Experiment, load

NO_STEPS = "it has no training step"
LOCK = ".lock"  # held by the process that is at work on the run
SEAL = "sha256"  # the field of a sealed object that holds the hash
INTERRUPTED = "interrupted"  # the event of a run that was


@dataclass(frozen=True)
class Cell:
    """One unit of work, in one process. kind: train or build, which make the model, or what is done with it: load,
    prefill, decode, step, forward, backward (measured), judge, blanks (experiments.scoring); then context, batch, mode
    and dtype say how, where the study varies them."""

    arm: str
    seed: int
    kind: str
    context: int | None = None
    batch: int | None = None
    mode: str | None = None
    dtype: str | None = None

    @property
    def name(self) -> str:
        return f"{self.group}/{self.part}"

    @property
    def group(self) -> str:
        return f"{self.arm}/seed{self.seed}"

    @property
    def part(self) -> str:
        batch = "" if self.batch is None else f"b{self.batch}"
        parts = (self.kind, self.context, batch, self.mode, self.dtype)
        return "-".join(str(part) for part in parts if part not in (None, ""))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
        return read_json(file, f"delete that file {again(file)}") if file.is_file() else None

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        file = self.failure_file(cell)
        return read_json(file, f"delete that file {again(file)}") if file.is_file() else None

    def losses(self, cell: Cell) -> list[float]:
        """Of every step of its training."""
        log = self.folder(cell) / "metrics.jsonl"
        lines = [parsed(line, log, log_again(log)) for line in read_text(log, log_again(log)).splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        if not losses:
            raise damaged(log, NO_STEPS, log_again(log))
        return losses

    def forget(self, cell: Cell) -> None:
        """Its result, if it has one."""
        self.result_file(cell).unlink(missing_ok=True)

    def event(self, kind: str, message: str, cell: str | None = None) -> None:
        line = json.dumps({"time": now(), "kind": kind, "cell": cell, "message": message})
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def last_cell_at(self) -> str | None:
        """When the last of the cells ended: a run that is only looked at again has not lasted longer."""
        try:
            lines = (self.path / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return None
        times = [event["time"] for line in lines if (event := _event(line)) and event.get("cell")]
        return times[-1] if times else None

    def experiment(self) -> Experiment:
        """Raises RunFailedError where it is not the one that the run was begun with."""
        environment = self.environment()
        self.check_spec(environment)
        return load(str(self.path / "spec.toml"), device=environment["device"])

    def spec_sha256(self) -> str:
        return hashlib.sha256((self.path / "spec.toml").read_bytes()).hexdigest()

    def check_spec(self, environment: dict[str, Any]) -> None:
        """Raises RunFailedError: it is gone, or not the one that `environment` is of; older ones do not tell."""
        spec = self.path / "spec.toml"
        if not spec.is_file():
            raise RunFailedError(f"no spec.toml in {self.path}: a run directory keeps its resolved specification there")
        begun = environment.get("spec_sha256")
        if begun is not None and begun != self.spec_sha256():
            raise RunFailedError(
                f"{spec} was changed since the run began, or is damaged: `lab run {spec}` starts a new run of what it "
                f"says; this one was begun by `{environment['command']}`"
            )

    def tokenizer_file(self, arm: str) -> Path:
        """The tokenizer that the arm reads with. Raises SpecError where it is gone or damaged."""
        experiment, data = self.experiment(), self.environment()["data"]
        file = self.path / experiment.tokenizer_file(arm)
        facts = data.get("vocabularies", {}).get(str(experiment.vocabulary_of(arm)), data)
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != facts["tokenizer_sha256"]:
            raise SpecError(f"{file} is missing or damaged; {resumes(self.path)} puts it there again")
        return file

    def seen_by(self, arm: str) -> Experiment:
        """The experiment with the lengths in tokens that the arm's tokenizer makes of them."""
        experiment = self.experiment()
        vocabulary = experiment.vocabulary_of(arm)
        return experiment.seen_with(tokens_per_byte(self.environment()["data"], vocabulary))

    def environment(self) -> dict[str, Any]:
        file = self.path / "environment.json"
        found = read_json(file)
        for table, key in ((found, "data"), (found, "packages"), (found, "backends"), (found.get("data"), "overlap")):
            if isinstance(table, dict) and not isinstance(table.get(key, {}), dict):
                raise damaged(file, f"'{key}' is of another kind")
        return found


def at_work(run: Path) -> bool:
    """Whether another process is, as far as can be told."""
    file = run / LOCK
    if not file.is_file():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to lock
        return False


def runs(folder: Path) -> list[RunDirectory]:
    """The run directories in `folder`, oldest first. Raises SpecError where that is a file."""
    if folder.is_file():
        raise SpecError(f"'{folder}' is a file; name the folder that runs are in")
    return [RunDirectory(path) for path in sorted(folder.iterdir()) if is_run(path)] if folder.is_dir() else []


def summary(run: RunDirectory) -> dict[str, Any]:
    """One line of `lab runs`; problem: why a run is damaged, or None."""
    try:
        experiment = run.experiment()
        file = run.path / "result.json"
        remedy = rebuilt(file)
        status = unsealed(read_text(file, remedy), file, remedy)["status"] if file.is_file() else "unfinished"
    except LabError as error:
        return {"run": run.path.name, "status": "damaged", "profile": "", "arms": [], "problem": str(error)}
    arms = list(experiment.cells())
    return {"run": run.path.name, "status": status, "profile": experiment.profile, "arms": arms, "problem": None}


def is_run(folder: Path) -> bool:
    """Begun, so that it knows its machine; or what a report cannot do without is there."""
    names = ("environment.json",), ("spec.toml", "result.json")
    return any(all((folder / name).is_file() for name in of) for of in names)


def resumes(path: Path) -> str:
    """The command that finishes the run at `path`, or of which `path` is a file."""
    run = next((folder for folder in (path, *path.parents) if is_run(folder)), path.parent)
    return f"lab resume {shlex.quote(str(run))}"


def again(path: Path) -> str:
    return f"and {resumes(path)}: the cell is done again"


def log_again(log: Path) -> str:
    return f"delete evaluation.json beside it {again(log)}"


def rebuilt(result: Path) -> str:
    return f"{resumes(result)} builds it again"


def find(reference: str | None, folder: Path) -> RunDirectory:
    """A run by its path or by (the start or the end of) its name in `folder`; the latest for None and 'latest'.

    Raises SpecError, naming what is there.
    """
    if reference == "latest":
        reference = None
    if reference is not None and is_run(Path(reference)):
        return RunDirectory(Path(reference))
    if reference is not None and "/" in reference and Path(reference).exists():
        raise SpecError(f"{reference} is no run: it has neither environment.json nor spec.toml and result.json")
    known = runs(folder)
    if not known:
        raise SpecError(f"no runs in '{folder}'; make one with: lab run compare")
    if reference is None:
        return known[-1]
    matching = [run for run in known if run.path.name.startswith(reference) or run.path.name.endswith(reference)]
    if len(matching) != 1:
        what, there = ("no run", known) if not matching else (f"{len(matching)} runs", matching)
        latest = ", ".join(run.path.name for run in there[:-6:-1]) + (", ..." if len(there) > 5 else "")
        raise SpecError(f"{what} named '{reference}' in '{folder}'; latest first: {latest}")
    return matching[0]


def _event(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:  # cut off when its process was killed
        return None
    return found if isinstance(found, dict) and "time" in found else None


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, with the folders that it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old file or the new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")  # readable by whom the umask says
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """With the hash of all the rest of it, by which `unsealed` sees a later change."""
    return value | {SEAL: _hash(value)}


def _hash(value: dict[str, Any]) -> str:
    rest = {key: one for key, one in value.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Table(dict[str, Any]):
    """A JSON object in a file. One that lacks what is asked for is damaged."""

    def __init__(self, values: dict[str, Any], path: Path, remedy: str) -> None:
        super().__init__(values)
        self._path, self._remedy = path, remedy

    def __missing__(self, key: str) -> Any:
        raise damaged(self._path, f"it has no '{key}'", self._remedy)


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file; it and those within it are each a `Table`. remedy: where it is damaged. Raises
    RunFailedError."""
    return parsed(read_text(path, remedy), path, remedy)


def read_text(
    path: Path, remedy: str = "", missing: str = "the run did not get that far", errors: str = "strict"
) -> str:
    """remedy: where the file is damaged; missing: why it may not be there; errors: of the decoding. Raises
    RunFailedError."""
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except FileNotFoundError:
        raise RunFailedError(f"no {path.name} in {path.parent}: {missing}") from None
    except OSError as error:
        raise RunFailedError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise damaged(path, "not UTF-8 text", remedy) from None


def parsed(text: str, path: Path, remedy: str = "") -> Table:
    """The JSON object that stands in text, of the file at path. Raises RunFailedError."""
    try:
        found = json.loads(text, object_hook=lambda values: Table(values, path, remedy))
    except json.JSONDecodeError as error:
        raise damaged(path, f"not valid JSON: {error}", remedy) from None
    if not isinstance(found, Table):
        raise damaged(path, "it must hold one JSON object", remedy)
    return found


def unsealed(text: str, path: Path, remedy: str = "") -> Table:
    """As `parsed`, of an object that was `sealed`; older ones were not. Raises RunFailedError where it changed, too."""
    found = parsed(text, path, remedy)
    if SEAL in found and found[SEAL] != _hash(found):
        raise damaged(path, "it was changed since it was written", remedy)
    return found


def damaged(path: Path, what: object, remedy: str = "") -> RunFailedError:
    return RunFailedError(f"{path} is damaged: {what}" + (f"; {remedy}" if remedy else ""))
