"""`lab kernels`: what it says before it does anything, and the exit codes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import InProcess
from typer.testing import CliRunner

from cli.main import app
from experiments.kernels import build, check, recipe


@pytest.mark.parametrize("command", ["install", "check"])
def test_every_option_has_help(in_process: InProcess, command: str) -> None:
    code, out, _ = in_process("kernels", command, "--help")
    assert code == 0
    _, _, options = out.partition("Options:")
    lines = [line for line in options.splitlines() if line.lstrip().startswith("--")]
    assert len(lines) >= 3
    assert all(len(line.split()) > 1 for line in lines)


def test_a_dry_run_says_the_plan_and_what_stands_in_the_way(in_process: InProcess, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(recipe, "find_toolkit", lambda: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    code, out, err = in_process("kernels", "install", "--dry-run", "--arch", "9.0")
    assert code == 3
    assert "mamba-ssm==2.3.2.post1: built from PyPI (source archive)" in out
    assert [line for line in err.splitlines() if not line.startswith("lab: ")] == []
    in_order = CliRunner().invoke(app, ["kernels", "install", "--dry-run", "--arch", "9.0"]).output
    assert in_order == err + out
    assert "is built without CUDA: install a build of torch for CUDA first" in err
    assert "has no bin/nvcc with its headers: install the CUDA toolkit" in err
    assert in_process("kernels", "install", "--arch", "9.0") == (code, out, err)  # as far as it gets


def test_a_dry_run_that_finds_nothing_in_the_way_does_nothing(in_process: InProcess, monkeypatch) -> None:
    monkeypatch.setattr(recipe, "problems", lambda plan: [])
    monkeypatch.setattr(build, "install", lambda *of: pytest.fail("it did something"))
    code, out, err = in_process("kernels", "install", "--dry-run", "--arch", "9.0", "--jobs", "1")
    assert (code, err) == (0, "")
    assert "built one after the other" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "hopper"], "lab: --arch hopper: a compute capability reads like 9.0"),
        (["--from", "nowhere"], "lab: --from nowhere: no such folder"),
    ],
)
def test_what_means_nothing_is_bad_usage(in_process: InProcess, arguments: list[str], said: str) -> None:
    code, out, err = in_process("kernels", "install", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(said)
    assert len(err.splitlines()) == 1


ROW = {"operation": "ssd", "kernel": "ssd", "form": "cuda", "device": "cuda", "dtype": "float32", "shape": "one token",
       "tolerance": 1e-4, "outputs": {"y": None, "last state": 1e-6}, "gradients": {}, "problem": None}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ({"rows": [ROW]}, 0, ""),
        ({"rows": [ROW, ROW | {"problem": "y is off by inf"}]}, 1, "1 of 2 cases failed"),
        ({"rows": [ROW | {"form": "torch"}], "absent": {"cuda": "no mamba_ssm"}}, 3, "not checked: cuda: no mamba_ssm"),
        ({"rows": [], "problem": "killed by SIGSEGV"}, 1, "could not be checked: killed by SIGSEGV"),
    ],
)  # fmt: skip
def test_how_a_check_came_out_is_the_exit_code(in_process: InProcess, monkeypatch, found, code, said) -> None:
    """After an install, as after a check of a GPU."""
    found = {"problem": None, "absent": {}, **found}

    def installing(plan, cache, say, on_row):
        say("building")
        for row in found["rows"]:
            on_row(row)
        return found

    monkeypatch.setattr(recipe, "problems", lambda plan: [])
    monkeypatch.setattr(build, "install", installing)
    status, out, err = in_process("kernels", "install", "--arch", "9.0")
    assert status == code
    assert said in err
    heading, *lines = [line for line in out.splitlines() if line.startswith(("operation ", "ssd "))] or [""]
    assert len(lines) == len(found["rows"])
    names = ["operation", "form", "type", "shape", "outputs", "gradients", "allowed", "result"]
    assert heading.split() == (names if found["rows"] else [])
    monkeypatch.setattr("experiments.runner.resolve_device", lambda asked: "cuda")
    monkeypatch.setattr(check, "of_this_gpu", lambda cache, again, on_row: found)
    status, out, err = in_process("kernels", "check", "--json")
    assert (status, json.loads(out)) == (code, found)
    assert said in err


def test_without_a_gpu_the_install_says_that_nothing_was_checked(in_process: InProcess, monkeypatch) -> None:
    monkeypatch.setattr(recipe, "problems", lambda plan: [])
    monkeypatch.setattr(build, "install", lambda *of: None)
    code, out, _ = in_process("kernels", "install", "--arch", "9.0")
    assert code == 0
    assert out.endswith("installed, not checked: no GPU is visible here; on the GPU run: lab kernels check\n")


def test_the_check_of_a_cpu_is_a_table_of_errors(in_process: InProcess) -> None:
    code, out, _ = in_process("kernels", "check", "--device", "cpu")
    assert code == 0
    assert "numba: all 32 cases agree with the float64 reference" in out
    assert "cuda: not here, the mamba-ssm kernels need a CUDA GPU" in out
    lines = [line for line in out.splitlines() if line.endswith("  ok")]
    assert len(lines) == 3 * 32 + 3  # Mamba-2 as one operation, which only the reference has beside the kernels
    heading = out.splitlines()[0]
    for name, at in (("outputs", -4), ("gradients", -3), ("allowed", -2)):
        end = heading.index(name) + len(name)
        assert all(line[:end].split()[-1] == line.split()[at] for line in lines)
    assert all(float(line.split()[-4]) < 1e-4 for line in lines)
    if not torch.cuda.is_available():
        code, out, err = in_process("kernels", "check", "--device", "cuda")
        assert (code, out) == (3, "")
        assert "torch sees no CUDA GPU" in err
