"""Ctrl-C keeps what is finished, and the same command goes on from there. What was written is told."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LAB, Finished, InProcess

from experiments import inference, runner


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A process inherits an ignored SIGINT, which is what a shell gives to those it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_the_same_command_continues_an_interrupted_run(
    in_process: InProcess, small: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    command = ["run", *small, "--set", "measurement.enabled=false", "--seeds", "1", "--out", str(out)]
    command += ["--set", "training.steps=60"]
    process = subprocess.Popen(
        [str(LAB), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("*/cells/mamba/seed0/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("lab: interrupted")
    assert "missing: mamba/seed0/train" in last

    (directory,) = out.iterdir()
    finished = directory / "cells/transformer/seed0/evaluation.json"
    partial = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    assert partial["status"] == "partial"
    assert "mamba/seed0/train" in partial["missing"]
    assert "transformer/seed0/train" not in partial["missing"]
    assert "> - interrupted\n" in (directory / "report.md").read_text(encoding="utf-8")
    kept = finished.stat().st_mtime_ns, finished.read_bytes()

    code, _, stderr = in_process(*command)
    assert code == 0, stderr
    assert list(out.iterdir()) == [directory]
    assert (finished.stat().st_mtime_ns, finished.read_bytes()) == kept
    assert "transformer/seed0/train" not in stderr
    complete = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    assert (complete["status"], complete["missing"]) == ("complete", [])
    assert "> - interrupted, and resumed\n" in (directory / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("after_s", [0.0, 1.5, 2.5])
def test_an_interrupt_before_the_first_cell_is_told_in_a_line(
    small: list[str], environment: dict[str, str], tmp_path: Path, after_s: float
) -> None:
    """While the server of the cells imports, and while kernels are compiled."""
    process = subprocess.Popen(
        [str(LAB), "run", *small, "--out", str(tmp_path / "runs")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = ""
    while "compiling kernels" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    said += process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Exception" not in said
    assert said.strip().splitlines()[-1].startswith("lab: interrupted")


@pytest.mark.parametrize(("after", "told"), [(0, ""), (1, "transformer"), (3, "transformer"), (9, "transformer mamba")])
def test_what_was_written_by_then_is_told(
    in_process: InProcess, smoke: Finished, monkeypatch: pytest.MonkeyPatch, after: int, told: str
) -> None:
    """after: steps, of the 6 that each arm makes, before Ctrl-C; a rehearsal makes 2 of its own."""
    arguments, taken, whole = ("generate", "latest", "import ", "--tokens", 6, "--out", smoke.out), 0, inference.steps

    def steps(model, prompt, tokens, *rest, **settings):
        nonlocal taken
        for step in whole(model, prompt, tokens, *rest, **settings):
            if tokens == 6:
                if taken == after:
                    raise KeyboardInterrupt
                taken += 1
            yield step

    _, full, _ = in_process(*arguments)
    monkeypatch.setattr(inference, "steps", steps)
    code, stdout, stderr = in_process(*arguments)
    assert code == 130
    *table, last = stderr.splitlines()
    assert last == "lab: interrupted"
    assert [line.split()[0] for line in table] == (["arm", *told.split()] if told else [])
    assert sum(int(line.split()[4]) for line in table[1:]) == after
    assert full.startswith(stdout.rstrip("\n"))
    taken = 0
    code, stdout, stderr = in_process(*arguments, "--json")
    assert (code, stdout, stderr) == (130, "", "lab: interrupted\n")


def test_before_anything_was_made(in_process: InProcess, small: list[str], tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "prepare_all", interrupted)
    code, _, stderr = in_process("run", *small, "--out", tmp_path / "runs")
    assert (code, stderr) == (130, "lab: interrupted; the same command goes on\n")
