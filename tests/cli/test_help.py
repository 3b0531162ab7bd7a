"""Every command says what it does, and help costs no heavy import."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import Lab

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
