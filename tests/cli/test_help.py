"""Every command says what it does, and help costs no heavy import."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import Finished, Lab

COMMANDS = (
    "run", "resume", "report", "runs", "models", "inspect", "trace", "generate", "export", "doctor", "kernels",
)  # fmt: skip


def test_help_lists_every_command(lab: Lab) -> None:
    process = lab("--help")
    assert process.returncode == 0
    assert all(f"\n  {command} " in process.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(lab: Lab, command: str) -> None:
    process = lab(command, "--help")
    assert process.returncode == 0
    usage, _, rest = process.stdout.partition("Options:")
    assert usage.lstrip().startswith(f"Usage: lab {command}")
    assert len(usage.splitlines()) >= 3  # a sentence follows the usage line
    for option in (line for line in rest.splitlines() if line.lstrip().startswith("--")):
        assert len(option.split()) > 1


def test_help_loads_neither_torch_nor_pandas() -> None:
    code = (
        "import sys\nfrom cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'pandas', 'numba', 'experiments.runner'} & set(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stderr.strip() == "set()"


@pytest.mark.parametrize("arguments", [("--version",), ("--version", "run")])
def test_version(lab: Lab, arguments: tuple[str, ...]) -> None:
    process = lab(*arguments)
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (process.returncode, process.stdout) == (0, f"lab {declared['version']}\n")


@pytest.mark.parametrize(("told", "decoded"), [({}, "utf-8"), ({"PYTHONIOENCODING": "cp1252"}, "cp1252")])
def test_a_report_is_printed_whatever_signs_the_output_lacks(
    smoke: Finished, environment: dict[str, str], told: dict[str, str], decoded: str
) -> None:
    """In UTF-8 where nobody asked for anything else; else with another sign in the place of what is lacking."""
    call = [sys.executable, "-X", "utf8=0", "-c", f"""
import sys
if not {bool(told)}:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252")  # as a pipe has it on Windows
from cli.main import app
app()
""", "report", str(smoke.directory), "--format", "md"]  # fmt: skip
    done = subprocess.run(call, capture_output=True, env=environment | told, check=False)
    assert done.returncode == 0, done.stderr
    text = (smoke.directory / "report.md").read_text(encoding="utf-8")
    assert "↓" in text
    lacking = text.encode(decoded, errors="replace").decode(decoded)
    assert done.stdout.decode(decoded).replace("\r\n", "\n") == lacking
