"""Fixtures: the `lab` command as a person runs it, a small corpus, and one real run of the smoke profile."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from experiments.report import figures
from experiments.report.record import read
from experiments.result import build_result
from experiments.store import Cell, RunDirectory, write_json

LAB = Path(sys.executable).with_name("lab")
Lab = Callable[..., subprocess.CompletedProcess]
InProcess = Callable[..., tuple[int, str, str]]

# the smoke profile on a text of a few kilobytes, in seconds
SMALL = (
    "data.corpus=text", "data.vocabulary=300", "data.test_fraction=0.1", "data.validation_fraction=0.1",
    "training.context=16", "training.batch=4", "training.steps=4", "training.warmup_steps=1",
    "training.validate_every=2", "evaluation.sample_tokens=4", "evaluation.curve_sequences=4",
    "measurement.repeats=2", "measurement.seconds=0",
)  # fmt: skip


def legend_names(run: Path, figure: str, without: str | None = None) -> list[str]:
    """Of a run's figure; without: an arm (of a study that varies arms, all of its kind) whose rows are left out."""
    record = read(run)
    rows = [row for row in record.rows if without is None or not row.arm.startswith(without)]
    (legend,) = figures.PLOTS[figure](replace(record, rows=rows), "wide").legends
    return [text.get_text() for text in legend.get_texts()]


@dataclass(frozen=True)
class Finished:
    """A finished command and the folder of runs that it wrote to."""

    process: subprocess.CompletedProcess
    out: Path

    @property
    def directory(self) -> Path:
        (only,) = self.out.iterdir()
        return only


def assigned(settings: Iterable[str]) -> list[str]:
    """`--set` for each of them."""
    return [word for setting in settings for word in ("--set", setting)]


def value(result: dict[str, Any], **wanted: Any) -> Any:
    """Of the only row of seed 0 that has what is wanted."""
    (row,) = [row for row in result["rows"] if all(row[key] == want for key, want in (wanted | {"seed": 0}).items())]
    return row["value"]


def with_a_stand_in(run: Path, arm: str, reason: str) -> dict[str, Any]:
    """The result of a run in which a slow form stood in the place of an arm's kernel, written into the run too. Of the
    studies whose models are built and not trained."""
    directory = RunDirectory(run)
    cell = Cell(arm, 0, "build")
    built = directory.result(cell)
    assert built is not None
    built["backend"]["fallback"] = reason
    directory.finish(cell, built)
    result = build_result(directory, directory.experiment(), directory.environment()["data"])
    write_json(run / "result.json", result)
    return result


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return os.environ | {"LAB_CACHE": str(tmp_path_factory.mktemp("cache")), "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def lab(environment: dict[str, str]) -> Lab:
    """Runs `lab` with arguments; `env` adds variables."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        command = [str(LAB), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment | (env or {}), timeout=500)

    return run


@pytest.fixture(scope="package")
def in_process(environment: dict[str, str]) -> Iterator[InProcess]:
    """Runs `lab` here, which is quick and can be patched: exit code, stdout, stderr. All share one server of cells."""

    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_CACHE", environment["LAB_CACHE"])
        yield run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 short documents of a small grammar."""
    who, does, what = ("the cat", "a dog", "one bird", "my friend"), ("sees", "likes", "hears"), ("rain", "music", "it")
    lines = [
        f"{who[i % 4]} {does[i % 3]} {what[i * i % 3]} and {who[i // 4 % 4]} {does[i // 12 % 3]} the number {i}."
        for i in range(300)
    ]
    path = tmp_path_factory.mktemp("corpus") / "small.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small(corpus: Path) -> list[str]:
    """Arguments of `lab run` for a run of seconds."""
    return ["compare", "--profile", "smoke", *assigned((*SMALL, f"data.path={corpus}"))]


@pytest.fixture(scope="session")
def smoke(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The smoke profile, unchanged. Tests only read it."""
    out = tmp_path_factory.mktemp("smoke") / "runs"
    return Finished(lab("run", "compare", "--profile", "smoke", "--out", out, "--json"), out)
