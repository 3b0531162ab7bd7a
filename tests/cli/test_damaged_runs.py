"""A damaged run directory is listed as such, among the others."""

import json
from pathlib import Path

import pytest
from conftest import InProcess

from experiments.errors import RunFailedError
from experiments.spec import load
from experiments.store import Cell, RunDirectory, write_json


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
    assert [line.split()[:2] for line in stdout.splitlines()] == [["a-whole", "complete"], ["b-broken", "damaged"]]
    (note,) = stderr.splitlines()
    assert note.startswith("note: b-broken is damaged: ")
    code, stdout, _ = in_process("runs", "--out", tmp_path, "--json")
    assert code == 0
    assert [one["status"] for one in json.loads(stdout)] == ["complete", "damaged"]


def test_a_damaged_cell_names_the_remedy(tmp_path: Path) -> None:
    run, cell = RunDirectory(tmp_path), Cell("mamba", 0, "load")
    file = run.result_file(cell)
    file.parent.mkdir(parents=True)
    file.write_text('{"ms": ', encoding="utf-8")
    with pytest.raises(RunFailedError, match=r"load\.json is damaged: .*; delete that file and lab resume"):
        run.result(cell)
    file.unlink()
    assert run.result(cell) is None
