"""`lab resume` runs what is missing of a run, and nothing else; what a finished cell has lost is made again."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import Finished, InProcess

from experiments import runner


@pytest.mark.parametrize(
    ("number", "word", "remedy"),
    [
        (None, "permission denied", "make the folder writable"),
        (errno.EROFS, "Read-only file system", "make the folder writable"),
        (errno.ENOSPC, "No space left on device", "make room there"),
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
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert "train" not in stderr
    assert "mamba" in stdout
    assert in_process("report", "latest", "--out", out)[:2] == in_process("report", "--out", out)[:2] == (0, stdout)

    folder = directory / "cells" / "mamba" / "seed0" / "checkpoint"
    made = contents(folder)
    generating = ("generate", directory, "the", "--tokens", 2)
    for lost in (folder / "model.safetensors", folder / "config.json", folder):
        shutil.rmtree(lost) if lost == folder else lost.unlink()
        gone = folder / "config.json" if lost == folder else lost
        code, stdout, stderr = in_process(*generating)
        assert (code, stdout) == (2, "")
        assert stderr == f"lab: {gone} is missing; lab resume {directory} makes the model again\n"
        code, _, stderr = in_process("resume", "--out", out)
        assert code == 0, stderr
        assert f"mamba/seed0: {gone} is missing: the model and its measurements are made again\n" in stderr
        assert "[1/1] mamba/seed0/train" in stderr
        assert contents(folder) == made
    file = directory / "tokenizer.json"
    file.unlink()
    code, _, stderr = in_process(*generating)
    assert (code, stderr) == (2, f"lab: {file} is missing; lab resume {directory} puts it there again\n")
    code, _, stderr = in_process("resume", "--out", out)
    assert code == 0, stderr
    assert f"{file} was missing and is there again\n" in stderr
    assert in_process(*generating)[0] == 0
