"""What a run ran on, as far as a reader needs it to repeat the run or to doubt it."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments.limits import available_cores, total_memory
from experiments.measurement.card import driver
from experiments.rows import PAGE

PACKAGES = (
    "sequence-lab", "torch", "numpy", "numba", "llvmlite", "tokenizers", "safetensors", "scipy", "pandas",
    "triton", "mamba-ssm", "causal-conv1d", "nvidia-ml-py", "transformers", "mambapy",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
_GENERATION = (  # in the words of /proc/cpuinfo on x86 and on Arm, and in a report's
    {"cpu family": "family", "model": "model", "stepping": "stepping"},
    {"CPU implementer": "implementer", "CPU part": "part", "CPU variant": "variant"},
)
_VECTORS = ("sse", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")
_CODE = ("models", "experiments", "cli", "benchmarks", "tests", "pyproject.toml")  # a page beside them changes nothing


def source_sha256() -> str:
    """Of the code that decides numbers: every Python file of `models` and `experiments`, and nothing else."""
    digest = hashlib.sha256()
    for package in ("models", "experiments"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def describe(device: str, asked_threads: int) -> dict[str, Any]:
    """JSON-able. `asked_threads` as in the specification."""
    commit, dirty = _git()
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "lab_version": _version("sequence-lab"),
        "source_sha256": source_sha256(),
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_instructions": cpu_instructions(),
        "cores": available_cores(),
        "threads": threads(asked_threads),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "memory_bytes": total_memory(),
        "page_bytes": PAGE,
        "device": device,
        "gpu": None if gpu is None else gpu.name,
        "gpu_capability": None if gpu is None else f"{gpu.major}.{gpu.minor}",
        "gpu_driver": None if gpu is None else driver(),
        "gpu_memory_bytes": None if gpu is None else gpu.total_memory,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def threads(asked: int) -> int:
    """As the specification asks, where 0 is torch's own choice, which knows no container's share of processor time."""
    return asked or min(torch.get_num_threads(), available_cores())


def cpu_name() -> str:
    """With the numbers of its generation where the system has them: a virtual machine often has no more of a name than
    the maker's, and Linux has none for Arm's processors."""
    told = _cpuinfo()
    name = told.get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    for numbers in _GENERATION:
        if told.keys() >= numbers.keys():
            return f"{name} ({', '.join(f'{short} {told[long]}' for long, short in numbers.items())})"
    return name


def cpu_instructions() -> dict[str, str]:
    """The vector instructions that torch takes and, where the system tells, those that the processor has. The order in
    which sums are rounded depends on them, and processors of one name can differ: a virtual machine may hide some."""
    told = _cpuinfo()
    flags = (told.get("flags") or told.get("Features") or "").split()  # of x86, of Arm
    vectors = sorted(flag for flag in flags if flag.startswith(_VECTORS))
    return {"torch": torch.backends.cpu.get_cpu_capability()} | ({"processor": " ".join(vectors)} if vectors else {})


def _cpuinfo() -> dict[str, str]:
    """What Linux tells of the first core; elsewhere nothing."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _sysctl(name: str) -> str | None:
    """What macOS tells under this name."""
    if sys.platform != "darwin":
        return None
    try:
        command = ["sysctl", "-n", name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]  # another user's, perhaps
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None, None  # installed inside somebody else's repository
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", *_CODE))
    except (OSError, subprocess.SubprocessError):
        return None, None
