"""One comparison on a GPU, from the command to the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcess

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")]
SETTINGS = ("measurement.contexts=[32]", "measurement.seconds=0", "training.steps=12")


@pytest.fixture
def card() -> str:
    return torch.cuda.get_device_name(0)


def test_doctor(in_process: InProcess, card: str) -> None:
    code, stdout, stderr = in_process("doctor", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["environment"]["gpu"] == card
    on_gpu = {one["form"]: one["problem"] for one in found["forms"] if one["device"] == "cuda"}
    assert {form for form, problem in on_gpu.items() if problem is None} == {"reference", "torch", "cuda"}, on_gpu
    assert "numba runs on the CPU" in on_gpu["numba"]
    assert {(row["operation"], row["dtype"]) for row in found["checks"] if row["form"] == "cuda"} >= {
        ("selective scan", "bfloat16"), ("ssd", "float32"), ("trapezoid", "bfloat16"), ("convolution", "float32"),
    }  # fmt: skip


def test_a_comparison(in_process: InProcess, small: list[str], card: str, tmp_path: Path) -> None:
    more = [word for setting in SETTINGS for word in ("--set", setting)]
    arguments = ("--arms", "transformer,mamba", "--seeds", 1, "--device", "cuda", "--out", tmp_path, "--json")
    code, stdout, stderr = in_process("run", *small, *more, *arguments)
    assert code == 0, stderr
    result = json.loads(stdout)
    (directory,) = tmp_path.iterdir()
    assert (result["status"], result["failures"]) == ("complete", [])
    known = ("noisy timing", "the GPU waited for its host", "the test text has only")  # a text of a few kilobytes
    assert [warning for warning in result["warnings"] if not warning.startswith(known)] == []

    def rows(**wanted: Any) -> list[dict[str, Any]]:
        return [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]

    for arm, form in {"transformer": "sdpa", "mamba": "cuda"}.items():  # loading runs no form
        assert {row["backend"] for row in rows(arm=arm, seed=0) if row["phase"] != "load"} == {form}
    assert all(row["comparable"] for row in result["rows"])
    for arm in ("transformer", "mamba"):
        evaluation = json.loads((directory / "cells" / arm / "seed0" / "evaluation.json").read_text())
        assert [gate["name"] for gate in evaluation["gates"] if not gate["passed"]] == []
        for metric in ("device_peak_bytes", "resident_bytes"):
            (row,) = rows(arm=arm, seed=0, phase="load", metric=metric)
            assert row["value"] > 0
        (state,), (formula,) = (
            rows(arm=arm, seed=0, metric=metric, context=32) for metric in ("state_bytes", "state_bytes_analytic")
        )
        assert state["value"] == formula["value"]
    first, second = (result["arms"][arm]["data_sha256"] for arm in ("transformer", "mamba"))
    assert first == second

    environment = json.loads((directory / "environment.json").read_text())
    assert (environment["device"], environment["gpu"]) == ("cuda", card)
    check = environment["kernels"]
    assert check["problem"] is None
    assert [row for row in check["rows"] if row["problem"]] == []
    assert {row["form"] for row in check["rows"]} == {"reference", "torch", "cuda"}
    assert not [name for name in check["absent"] if name.startswith("cuda")]
    for page in ("report.md", "report.html"):
        assert card in (directory / page).read_text(encoding="utf-8")
