"""Who may import whom, and that the tests run this checkout."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "experiments", "cli")
FORBIDDEN = {"models": {"experiments", "cli", "tests", "benchmarks"}, "experiments": {"cli", "tests", "benchmarks"},
             "cli": {"tests", "benchmarks"}}  # fmt: skip
OPTIONAL = {"numba", "triton", "mamba_ssm", "causal_conv1d"}
KERNELS = ROOT / "models" / "ops" / "kernels"


def imported(source: str) -> set[str]:
    """Top-level names of every absolute import, wherever it stands; `.` for a relative one."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").partition(".")[0])
    return names


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


def test_the_parser_sees_every_form_of_import():
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    if True:\n        import i\n"
    assert imported(source) == {"a", "c", "d", ".", "i"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    wrong = {str(path.relative_to(ROOT)): imported(path.read_text(encoding="utf-8")) & FORBIDDEN[package]
             for path in files(package)}  # fmt: skip
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_kernel_libraries_are_imported_in_one_place(package):
    wrong = {str(path.relative_to(ROOT)): imported(path.read_text(encoding="utf-8")) & OPTIONAL
             for path in files(package) if KERNELS not in path.parents}  # fmt: skip
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_under_test_is_this_checkout(package):
    module = __import__(package)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / package / "__init__.py"


@pytest.mark.parametrize("module", ["cli.main", "benchmarks.training"])
def test_idle_threads_are_told_to_sleep_before_torch_is_imported(module):
    """After that it has no effect."""
    source = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module} as module\n"
        "module.app(['models'])\n"
    )
    there = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", source], env=there, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1000\n", "")
