"""A damaged run directory is listed as such, among the others, and what is damaged is named with its remedy."""

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import Finished, InProcess

from experiments.errors import RunFailedError
from experiments.spec import load
from experiments.store import Cell, RunDirectory, resumes, write_json


@pytest.mark.parametrize(("file", "text"), [("result.json", '{"status": '), ("result.json", "[]"), ("spec.toml", "x=")])
def test_other_runs_are_listed_beside_a_damaged_one(
    in_process: InProcess, tmp_path: Path, file: str, text: str
) -> None:
    for name in ("a-whole", "b-broken"):
        write_json(tmp_path / name / "environment.json", {"device": "cpu"})
        (tmp_path / name / "spec.toml").write_text(load("compare", profile="smoke").to_toml(), encoding="utf-8")
        write_json(tmp_path / name / "result.json", {"status": "complete"})
    (tmp_path / "b-broken" / file).write_text(text, encoding="utf-8")
    code, stdout, stderr = in_process("runs", "--out", tmp_path)
    assert code == 0
    assert [line.split() for line in stdout.splitlines()] == [
        ["run", "status", "profile", "arms"],
        ["a-whole", "complete", "smoke", "transformer,", "mamba"],
        ["b-broken", "damaged", "-", "-"],
    ]
    assert (
        len({line.rindex(last) for line, last in zip(stdout.splitlines(), ("arms", "transformer", "-"), strict=True)})
        == 1
    )
    (note,) = stderr.splitlines()
    assert note.startswith("note: b-broken is damaged: ")
    code, stdout, _ = in_process("runs", "--out", tmp_path, "--json")
    assert code == 0
    assert [one["status"] for one in json.loads(stdout)] == ["complete", "damaged"]


def test_a_run_that_lost_its_environment_is_listed_as_damaged(in_process: InProcess, tmp_path: Path) -> None:
    """What a report cannot do without is there; of a folder without it nothing is said."""
    for name, result in (("lost", True), ("something-else", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.toml").write_text(load("compare", profile="smoke").to_toml(), encoding="utf-8")
        if result:
            write_json(tmp_path / name / "result.json", {"status": "complete"})
    code, stdout, stderr = in_process("runs", "--out", tmp_path)
    assert code == 0
    assert [line.split()[:2] for line in stdout.splitlines()[1:]] == [["lost", "damaged"]]
    assert "lost is damaged: no environment.json" in stderr


def test_a_damaged_cell_names_the_remedy(tmp_path: Path) -> None:
    run, cell = RunDirectory(tmp_path), Cell("mamba", 0, "load")
    file = run.result_file(cell)
    file.parent.mkdir(parents=True)
    file.write_text('{"ms": ', encoding="utf-8")
    with pytest.raises(RunFailedError, match=r"load\.json is damaged: .*; delete that file and lab resume "):
        run.result(cell)
    file.unlink()
    assert run.result(cell) is None


CELL, LOG = "delete that file and lab resume ", "delete evaluation.json beside it and lab resume "
MAMBA = "cells/mamba/seed0"


@pytest.mark.parametrize(
    ("command", "file", "text", "said"),
    [
        ("resume", "environment.json", "[]", "it must hold one JSON object"),
        ("report", "environment.json", "[]", "it must hold one JSON object"),
        ("resume", "environment.json", "{}", "it has no 'device'"),
        ("resume", f"{MAMBA}/measure/load.json", '{"a": 1}', f"it has no 'file_bytes'; {CELL}"),
        ("resume", f"{MAMBA}/measure/load.json", "[]", f"it must hold one JSON object; {CELL}"),
        ("resume", f"{MAMBA}/measure/load.json", "null", f"it must hold one JSON object; {CELL}"),
        ("resume", f"{MAMBA}/evaluation.json", '{"a": 1}', f"it has no 'backend'; {CELL}"),
        ("report", f"{MAMBA}/evaluation.json", '{"a": 1}', f"it has no 'splits'; {CELL}"),
        ("resume", f"{MAMBA}/failed/load.json", "3", f"it must hold one JSON object; {CELL}"),
        ("resume", "events.jsonl", "[]", "line 1: it must hold one JSON object; delete that line"),
        ("report", "events.jsonl", "[]", "line 1: it must hold one JSON object; delete that line"),
        ("resume", f"{MAMBA}/metrics.jsonl", "", f"it has no training step; {LOG}"),
        ("report", f"{MAMBA}/metrics.jsonl", "", f"it has no training step; {LOG}"),
        ("report", f"{MAMBA}/metrics.jsonl", "[]", f"line 1: it must hold one JSON object; {LOG}"),
        ("report", f"{MAMBA}/metrics.jsonl", '{"loss": 3, "tokens": 9}', f"a line of it has no 'step'; {LOG}"),
    ],
)
def test_a_file_of_another_kind_is_damaged(
    in_process: InProcess, smoke: Finished, tmp_path: Path, command: str, file: str, text: str, said: str
) -> None:
    run = tmp_path / smoke.directory.name
    shutil.copytree(smoke.directory, run)
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(text, encoding="utf-8")
    code, stdout, stderr = in_process(command, "--out", tmp_path)
    assert (code, stdout) == (1, "")
    if said.endswith((CELL, LOG)):
        said += f"{run}: the cell is done again"
    assert stderr.splitlines()[-1].startswith(f"lab: {run / file} is damaged: {said}")


def test_a_remedy_names_the_run_as_a_shell_takes_it(in_process: InProcess, smoke: Finished, tmp_path: Path) -> None:
    """Wherever it is, and whatever else is there: typed as it is printed, it finishes that run."""
    run = tmp_path / "my runs" / smoke.directory.name
    shutil.copytree(smoke.directory, run)
    (run / MAMBA / "evaluation.json").unlink()
    (run / "result.json").write_text("{", encoding="utf-8")
    code, _, stderr = in_process("report", run)
    assert code == 1
    typed = shlex.split(stderr.partition("; ")[2])
    assert typed[:3] == ["lab", "resume", str(run)]
    code, stdout, stderr = in_process(*typed[1:3], "--json")
    assert (code, json.loads(stdout)["status"]) == (0, "complete"), stderr
    file = run / MAMBA / "measure" / "load.json"
    assert resumes(file) == resumes(run) == f"lab resume '{run}'"


def test_a_result_with_another_number_is_not_reported(in_process: InProcess, smoke: Finished, tmp_path: Path) -> None:
    """Whatever of it changed, if only the last digit; and resuming writes it as it was."""
    run = tmp_path / smoke.directory.name
    shutil.copytree(smoke.directory, run)
    file = run / "result.json"
    written = file.read_text(encoding="utf-8")
    write_json(file, json.loads(written))
    assert file.read_text(encoding="utf-8") == written
    result = json.loads(written)
    row = next(row for row in result["rows"] if row["metric"] == "test_bits_per_byte")
    row["value"] = math.nextafter(row["value"], 0)
    write_json(file, result)
    code, stdout, stderr = in_process("report", run, "--format", "json")
    assert (code, stdout) == (1, "")
    said = f"{file} is damaged: it was changed since it was written; lab resume {run} builds it again"
    assert stderr == f"lab: {said}\n"
    assert f"{run.name} is damaged: {said}" in " ".join(in_process("runs", "--out", tmp_path)[2].split())
    assert in_process("resume", run)[0] == 0
    assert file.read_text(encoding="utf-8") == written


def test_bytes_that_are_no_text_among_the_events_lose_no_run(
    in_process: InProcess, smoke: Finished, tmp_path: Path
) -> None:
    run = tmp_path / smoke.directory.name
    shutil.copytree(smoke.directory, run)
    with (run / "events.jsonl").open("ab") as log:
        log.write(b"\xff\xfe\n")
    assert RunDirectory(run).last_cell_at() == RunDirectory(smoke.directory).last_cell_at()
    code, stdout, stderr = in_process("resume", "--out", tmp_path, "--json")
    assert (code, json.loads(stdout)["status"]) == (0, "complete"), stderr
    with (run / "events.jsonl").open("a") as log:
        log.write('{"time": "", "kind": "note", "cell": null, "message": "one more"}\n')
    code, _, stderr = in_process("report", "--out", tmp_path)
    assert code == 1
    assert stderr.splitlines()[-1].startswith(f"lab: {run / 'events.jsonl'} is damaged: line ")
    assert stderr.splitlines()[-1].endswith("; delete that line")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"loss": '])
def test_losses_of_a_log_without_steps(tmp_path: Path, text: str) -> None:
    run, cell = RunDirectory(tmp_path), Cell("mamba", 0, "train")
    log = run.folder(cell) / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 0, "validation_loss": 3}\n{"step": 1, "loss": 2.5}\n', encoding="utf-8")
    assert run.losses(cell) == [2.5]
    log.write_text(text, encoding="utf-8")
    with pytest.raises(RunFailedError, match=rf"metrics\.jsonl is damaged: .*; {LOG}"):
        run.losses(cell)
