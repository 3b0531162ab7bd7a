"""`lab resume` runs what is missing of a run, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import InProcess


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("named", [False, True])
def test_what_is_missing_is_run_and_what_is_there_is_kept(
    in_process: InProcess, small: list[str], tmp_path: Path, named: bool
) -> None:
    out = tmp_path / "runs"
    code, _, stderr = in_process(
        "run", *small, "--seeds", 1, "--set", "measurement.enabled=false", "--out", out, "--json"
    )  # fmt: skip
    assert code == 0, stderr
    (directory,) = out.iterdir()
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    kept = contents(directory / "cells" / "transformer")
    shutil.rmtree(directory / "cells" / "mamba")

    name = [directory.name[-8:]] if named else []
    code, stdout, stderr = in_process("resume", *name, "--out", out, "--json")
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
