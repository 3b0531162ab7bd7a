"""`lab resume` runs what is missing of a run, and nothing else; what a finished cell has lost is made again."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Finished, InProcess
from filelock import FileLock

from experiments import runner
from experiments.errors import RunFailedError
from experiments.spec import load
from experiments.store import RunDirectory
from experiments.studies import STUDIES


@pytest.mark.parametrize(
    ("number", "word", "remedy"),
    [
        (None, "Permission denied", "make the folder writable"),
        (errno.EROFS, "Read-only file system", "make the folder writable"),
        (errno.ENOSPC, "No space left on device", "make room there, and the same command goes on"),
    ],
)
def test_a_run_that_cannot_be_written_is_nowhere_else(
    in_process: InProcess, smoke: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    number: int | None, word: str, remedy: str,
) -> None:  # fmt: skip
    directory = tmp_path / smoke.directory.name
    shutil.copytree(smoke.directory, directory)

    def refuse(path: Path, value: object) -> None:
        raise OSError(number, word, str(path))

    if number is None:
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode, **rest: path != directory and access(path, mode, **rest))
    else:
        monkeypatch.setattr(runner, "write_json", refuse)
    code, _, stderr = in_process("resume", "--out", tmp_path)
    assert code == 3
    written = directory if number is None else directory / "result.json"
    assert stderr.splitlines()[-1] == f"lab: cannot write '{written}': {word}; {remedy}"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_what_is_missing_is_run_and_what_is_there_is_kept(
    in_process: InProcess, small: list[str], tmp_path: Path
) -> None:
    """Of the run that is named, and further below of the latest."""
    out = tmp_path / "runs"
    code, _, stderr = in_process(
        "run", *small, "--seeds", 1, "--set", "measurement.enabled=false", "--out", out, "--json"
    )  # fmt: skip
    assert code == 0, stderr
    (directory,) = out.iterdir()
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    kept = contents(directory / "cells" / "transformer")
    shutil.rmtree(directory / "cells" / "mamba")

    code, stdout, stderr = in_process("resume", directory.name[-8:], "--out", out, "--json")
    assert code == 0, stderr
    assert "[1/1] mamba/seed0/train" in stderr
    assert contents(directory / "cells" / "transformer") == kept
    again = json.loads(stdout)
    assert again == json.loads((directory / "result.json").read_text(encoding="utf-8"))
    assert (again["status"], again["missing"]) == ("complete", [])

    def quality(of: dict) -> list[tuple]:
        return [(row["arm"], row["metric"], row["value"]) for row in of["rows"] if row["phase"] == "quality"]

    assert len(quality(result)) > 10
    assert quality(again) == quality(result)  # the same batches and the same weights at the start

    code, stdout, stderr = in_process("resume", "--out", out)
    assert code == 0
    assert f"{directory} has every cell; nothing is left to run" in stderr
    assert "/train" not in stderr
    assert "[1/" not in stderr  # no cell at all
    assert "mamba" in stdout
    assert in_process("report", "latest", "--out", out)[:2] == in_process("report", "--out", out)[:2] == (0, stdout)

    folder = directory / "cells" / "mamba" / "seed0" / "checkpoint"
    made = contents(folder)
    generating = ("generate", directory, "the", "--tokens", 2)
    weights, config = folder / "model.safetensors", folder / "config.json"
    for lose, gone in [
        (weights.unlink, weights), (config.unlink, config), (lambda: shutil.rmtree(folder), config),
        (lambda: os.truncate(weights, 1000), weights), (lambda: os.truncate(config, 10), config),
        (lambda: os.truncate(weights, weights.stat().st_size - 1), weights),
    ]:  # fmt: skip
        lose()
        code, stdout, stderr = in_process(*generating)
        assert (code, stdout) == (2, "")
        assert stderr == f"lab: {gone} is missing or damaged; lab resume {directory} makes the model again\n"
        code, _, stderr = in_process("resume", "--out", out)
        assert code == 0, stderr
        assert f"mamba/seed0: {gone} is missing or damaged: the model and what was measured of it are made" in stderr
        assert "[1/1] mamba/seed0/train" in stderr
        assert contents(folder) == made
    file = directory / "tokenizer.json"
    for lose in (file.unlink, lambda: os.truncate(file, 1000)):
        lose()
        code, _, stderr = in_process(*generating)
        said = f"lab: {file} is missing or damaged; lab resume {directory} puts it there again\n"
        assert (code, stderr) == (2, said)
        code, _, stderr = in_process("resume", "--out", out)
        assert code == 0, stderr
        assert f"{file} was missing or damaged and is there again\n" in stderr
        assert in_process(*generating)[0] == 0


def test_what_was_measured_of_a_lost_model_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, run = load("compare", profile="smoke", device="cpu"), RunDirectory(tmp_path)
    cells = STUDIES[experiment.study].plan(experiment)
    for cell in cells:
        run.finish(cell, {})
    monkeypatch.setattr(runner, "_keep_tokenizers", lambda *given: [])
    lost = {"mamba/seed1": tmp_path / "model.safetensors"}
    monkeypatch.setattr(runner, "_without_model", lambda *given: lost)
    runner._make_good(run, experiment, None, lambda *told: None)  # type: ignore[arg-type]
    left = {cell.group for cell in cells if run.result(cell) is not None}
    assert left == {"transformer/seed0", "transformer/seed1", "mamba/seed0"}
    gone = [cell.kind for cell in cells if run.result(cell) is None]
    assert {*gone} == {"train", "load", "prefill", "decode"}
    assert len(gone) == sum(cell.group == "mamba/seed1" for cell in cells)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("steps = 40\n", "steps = 41\n"), lambda text: text[:200], lambda text: "",
    lambda text: "arms = 3", lambda text: "[arms]\nmamba = 1\n",
])  # fmt: skip
def test_a_run_whose_specification_was_changed_is_not_gone_on_with(
    in_process: InProcess, smoke: Finished, tmp_path: Path, change: Callable[[str], str]
) -> None:
    """Nor is it reported: a report tells what was asked for by it."""
    directory = tmp_path / smoke.directory.name
    shutil.copytree(smoke.directory, directory)
    shutil.rmtree(directory / "cells" / "mamba" / "seed1")
    before, spec = contents(directory), directory / "spec.toml"
    text = spec.read_text(encoding="utf-8")
    assert "steps = 40\n" in text
    spec.write_text(change(text), encoding="utf-8")
    command_of_the_run = json.loads((directory / "environment.json").read_text(encoding="utf-8"))["command"]
    for command in (
        ["resume", directory], ["report", directory], ["generate", directory, "x"], ["trace", directory, "x"],
        ["export", directory, tmp_path / "new", "--arm", "mamba"],
        ["run", "compare", "--profile", "smoke", "--out", tmp_path],  # which would go on with it
    ):  # fmt: skip
        code, stdout, stderr = in_process(*command)
        assert (code, stdout) == (1, ""), stderr
        assert stderr.splitlines()[-1] == (
            f"lab: {spec} was changed since the run began, or is damaged: `lab run {spec}` starts a new run of what it "
            f"says; this one was begun by `{command_of_the_run}`"
        )
    after = contents(directory)
    assert before.keys() == after.keys()
    assert [path for path in before if before[path] != after[path]] == [spec]


def test_a_run_of_an_older_version_is_refused_for_what_has_changed(
    in_process: InProcess, smoke: Finished, tmp_path: Path
) -> None:
    """Not for its relative path, which is read as absolute now, nor for what a new sweep may not read."""
    directory = tmp_path / "older"
    shutil.copytree(smoke.directory, directory)
    spec, environment = directory / "spec.toml", directory / "environment.json"
    text = spec.read_text(encoding="utf-8").replace("learning_rates = []", "learning_rates = [0.001]")
    spec.write_text(text, encoding="utf-8")
    recorded = json.loads(environment.read_text(encoding="utf-8"))
    recorded |= {"spec_sha256": hashlib.sha256(spec.read_bytes()).hexdigest(), "source_sha256": "older"}
    environment.write_text(json.dumps(recorded), encoding="utf-8")
    code, _, stderr = in_process("resume", directory)
    assert code != 0
    assert "source_sha256" in stderr.splitlines()[-1]
    code, _, stderr = in_process("run", spec, "--out", tmp_path / "runs")
    assert code == 2
    assert 'set evaluation.splits=["validation"]' in stderr


@pytest.mark.parametrize("key", runner.SETTLED)
def test_a_run_goes_on_with_what_it_was_begun_with_alone(
    in_process: InProcess, smoke: Finished, tmp_path: Path, key: str
) -> None:
    directory = tmp_path / "moved"
    shutil.copytree(smoke.directory, directory)
    environment = directory / "environment.json"
    recorded = json.loads(environment.read_text(encoding="utf-8"))
    other = {"torch": "0"} if key in ("packages", "cpu_instructions") else "another"
    environment.write_text(json.dumps(recorded | {key: other}), encoding="utf-8")
    code, _, stderr = in_process("resume", directory)
    assert code == 1
    assert f"was begun with {key} = {other}, and here it is " in stderr.splitlines()[-1]


def test_what_a_run_is_begun_with_are_machine_code_and_packages() -> None:
    assert set(runner.SETTLED) == {
        "source_sha256", "cpu", "cpu_instructions", "cores", "gpu", "gpu_driver", "threads", "gomp_spincount",
        "packages", "python",
    }  # fmt: skip


def test_a_run_without_its_specification_is_not_gone_on_with(
    in_process: InProcess, smoke: Finished, tmp_path: Path
) -> None:
    directory = tmp_path / smoke.directory.name
    shutil.copytree(smoke.directory, directory)
    shutil.rmtree(directory / "cells" / "mamba" / "seed1")
    (directory / "spec.toml").unlink()
    before = contents(directory)
    for command in (["resume", directory], ["run", "compare", "--profile", "smoke", "--out", tmp_path]):
        code, stdout, stderr = in_process(*command)
        assert (code, stdout) == (1, "")
        assert f"no spec.toml in {directory}: a run directory keeps its" in stderr.splitlines()[-1]
    assert contents(directory) == before


def test_two_processes_do_not_work_on_one_run(in_process: InProcess, smoke: Finished, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / smoke.directory.name
    shutil.copytree(smoke.directory, directory)
    (directory / "cells" / "mamba" / "seed1" / "evaluation.json").unlink()
    before = contents(directory)
    said = f"lab: another process is at work on {directory}: wait until it has ended, or stop it"
    with FileLock(directory / ".lock"):
        code, stdout, stderr = in_process("resume", directory)
        assert (code, stdout, stderr.splitlines()[-1]) == (1, "", said)
        assert contents(directory) == before
        (directory / "result.json").unlink()
        code, stdout, stderr = in_process("report", directory)
        unwritten = f"lab: no result.json in {directory}: the run has not written its result"
        assert (code, stdout, stderr) == (1, "", f"{unwritten}; another process is at work on it\n")
    assert in_process("report", directory)[2] == f"{unwritten}; lab resume {directory} finishes it\n"


def test_the_same_command_twice_in_a_second_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "datetime", SimpleNamespace(now=lambda zone: datetime(2026, 1, 2, tzinfo=zone)))
    monkeypatch.setattr(runner, "run_hash", lambda *of: "0123abcd")
    experiment = load("compare", profile="smoke", device="cpu")
    made = runner._new_directory(experiment, None, tmp_path)
    assert made.path == tmp_path / "20260102T000000Z-compare-0123abcd"
    with pytest.raises(RunFailedError, match=f"^another process is at work on {made.path}: wait until"):
        runner._new_directory(experiment, None, tmp_path)
