"""Ctrl-C keeps what is finished, and the same command goes on from there."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from conftest import LAB


def test_the_same_command_continues_an_interrupted_run(
    small: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    command = [str(LAB), "run", *small, "--set", "measurement.contexts=[8]", "--seeds", "1", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not (finished := list(out.glob("*/cells/transformer/seed0/evaluation.json"))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("lab: interrupted")
    assert "missing: mamba/seed0/train" in last

    (directory,) = out.iterdir()
    partial = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    assert partial["status"] == "partial"
    assert "mamba/seed0/train" in partial["missing"]
    assert "transformer/seed0/train" not in partial["missing"]
    kept = finished[0].stat().st_mtime_ns, finished[0].read_bytes()

    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode == 0, again.stderr
    assert [path for path in out.iterdir()] == [directory]
    assert (finished[0].stat().st_mtime_ns, finished[0].read_bytes()) == kept
    assert "transformer/seed0/train" not in again.stderr
    complete = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    assert (complete["status"], complete["missing"]) == ("complete", [])
