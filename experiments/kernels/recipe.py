"""How the CUDA kernels are built on this machine, and what stands in the way.

The versions are those that the extra `cuda` of this project pins. PyPI has source archives of them only, whose setup.py
compiles for nine GPU architectures; here it compiles for the architectures that are asked for, and nothing else.
"""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from experiments.errors import EnvironmentLacksError, SpecError
from experiments.limits import available_cores, free_memory

PROJECT, EXTRA = "sequence-lab", "cuda"
OLDEST = (7, 5)  # what the two packages compile for at the least
JOB_BYTES = 2 << 30  # memory of one compilation: nvcc 13.0 took 1.05 GB for the selective scan's backward pass
ROOM_BYTES = 2 << 30  # on disk, while it builds and for what it leaves: an allowance, objects are about 7 MB each
BUILD_TOOLS = ("setuptools", "packaging")  # what the two setup.py import, beside torch and wheel


@dataclass(frozen=True)
class Package:
    """A package of the extra, pinned."""

    name: str
    version: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    def is_wheel(self, file: Path) -> bool:
        """Of this version, for this Python."""
        parts = file.name.removesuffix(".whl").split("-")
        ours = (f"cp{sys.version_info.major}{sys.version_info.minor}", "py3")
        return (
            file.suffix == ".whl" and len(parts) >= 5 and normal(parts[0]) == self.name
            and parts[1].partition("+")[0] == self.version and any(tag in parts[-3].split(".") for tag in ours)
        )  # fmt: skip

    def is_archive(self, file: Path) -> bool:
        name, _, version = file.name.removesuffix(".tar.gz").rpartition("-")
        return file.name.endswith(".tar.gz") and normal(name) == self.name and version == self.version


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit. release: of its nvcc."""

    home: Path
    release: str
    architectures: tuple[str, ...]  # that nvcc compiles for, "9.0"

    @property
    def major(self) -> str:
        return self.release.partition(".")[0]


@dataclass(frozen=True)
class Plan:
    """What an install would do. source: the folder of `--from`, or None for PyPI. wheels: those that need no building.
    beside: what the extra asks for and is not installed."""

    packages: tuple[Package, ...]
    beside: tuple[str, ...]
    architectures: tuple[str, ...]
    toolkit: Toolkit | None
    jobs: int
    source: Path | None
    folder: Path
    wheels: dict[Package, Path]
    archives: dict[Package, Path]

    @property
    def to_build(self) -> tuple[Package, ...]:
        return tuple(package for package in self.packages if package not in self.wheels)

    def shares(self) -> dict[Package, int]:
        """How many compilations of each package run at a time; together `jobs`, but one of each at the least."""
        few = max(1, min(3, self.jobs // 4))  # causal-conv1d has three long files, mamba-ssm nine
        both = {
            package: few if package.name == "causal-conv1d" else max(1, self.jobs - few) for package in self.to_build
        }
        return both if len(both) > 1 else dict.fromkeys(both, self.jobs)

    def sentences(self) -> list[str]:
        """What will be done, a line each."""
        here = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
        cuda = f"CUDA toolkit {self.toolkit.release} in {self.toolkit.home}" if self.toolkit else "no CUDA toolkit"
        said = [f"kernels for compute capability {', '.join(self.architectures) or 'unknown'}; {here}; {cuda}"]
        for package in self.packages:
            wheel, archive = self.wheels.get(package), self.archives.get(package)
            if wheel is not None:
                said.append(f"{package.requirement}: taken ready from {wheel}")
                continue
            origin = archive or (self.source and f"{self.source}, which lacks it") or "PyPI (source archive)"
            said.append(f"{package.requirement}: built from {origin} with MAX_JOBS={self.shares()[package]}")
        if self.to_build:
            side = "" if len(self.to_build) == 1 else "one after the other, " if self.jobs == 1 else "side by side, "
            said.append(f"built {side}wheels and logs kept in {self.folder}")
        if self.beside:
            said.append(f"installed with it: {', '.join(self.beside)}, from {self.source or 'PyPI'}")
        said.append(f"then installed into {sys.prefix} without their dependencies: torch {torch.__version__} stays")
        said.append("then checked, forward and backward, against the float64 reference (lab kernels check)")
        return said


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def extra() -> tuple[tuple[Package, ...], tuple[str, ...]]:
    """The pinned packages of the extra, and the names of the rest."""
    wanted = [line for line in metadata.requires(PROJECT) or () if re.search(rf"extra == ['\"]{EXTRA}['\"]", line)]
    requirements = [line.partition(";")[0].strip() for line in wanted]
    pinned = [line.partition("==") for line in requirements if "==" in line]
    packages = tuple(Package(normal(name.strip()), version.strip()) for name, _, version in pinned)
    return packages, tuple(line for line in requirements if "==" not in line)


def plan(cache: Path, *, architectures: str | None = None, source: Path | None = None, jobs: int | None = None) -> Plan:
    """architectures: compute capabilities, separated by commas; those of the visible GPUs for None. jobs: compilations
    at a time; as many as cores and memory allow for None. Raises SpecError."""
    if source is not None and not os.path.isdir(source):
        raise SpecError(f"--from {source}: no such folder")
    asked = _asked(architectures) if architectures is not None else _visible()
    packages, rest = extra()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    key = f"{python}-torch{torch.__version__}-cuda{torch.version.cuda}-sm{'-'.join(asked) or '?'}-{platform.machine()}"
    folder = cache / "wheels" / key
    files = [*_files(folder), *(_files(source) if source is not None else ())]
    wheels = {p: file for p in packages if (file := next(filter(p.is_wheel, files), None))}
    archives = {p: file for p in packages if p not in wheels and (file := next(filter(p.is_archive, files), None))}
    return Plan(
        packages=packages, beside=tuple(one for one in rest if not _installed(one)), architectures=asked,
        toolkit=find_toolkit(), jobs=jobs or _jobs(), source=source, folder=folder, wheels=wheels, archives=archives,
    )  # fmt: skip


def _asked(architectures: str) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(part.strip() for part in architectures.split(",")))
    for one in asked:
        if not re.fullmatch(r"\d{1,2}\.\d", one):
            raise SpecError(f"--arch {one}: a compute capability reads like 9.0, several like 8.0,9.0")
    return asked


def _visible() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}" for major, minor in sorted(found))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EnvironmentLacksError(f"cannot read {folder}: {error.strerror}") from None


def _installed(requirement: str) -> bool:
    """Whether a version of it is there."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    try:
        metadata.version(match[0] if match else requirement)
    except metadata.PackageNotFoundError:
        return False
    return True


def _jobs() -> int:
    return max(1, min(available_cores(), free_memory() // JOB_BYTES))


def search_path() -> str:
    """PATH with the scripts of this Python first: an environment that is not activated has its ninja there."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def find_toolkit() -> Toolkit | None:
    """The folder that $CUDA_HOME or $CUDA_PATH names, or else that of the nvcc on the PATH, or /usr/local/cuda: the
    first that has both nvcc and the headers."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        homes = [Path(named)]
    else:
        nvcc = shutil.which("nvcc")
        homes = [Path(nvcc).resolve().parent.parent, Path(nvcc).parent.parent] if nvcc else []
        homes.append(Path("/usr/local/cuda"))
    for home in homes:
        if all(os.path.isfile(home / part) for part in ("bin/nvcc", "include/cuda_runtime.h")):
            release = re.search(r"release (\d+\.\d+)", _output(home, "--version"))
            if release:
                listed = re.findall(r"compute_(\d+)(\d)\b", _output(home, "--list-gpu-arch"))
                return Toolkit(home, release[1], tuple(f"{major}.{minor}" for major, minor in listed))
    return None


def _output(home: Path, argument: str) -> str:
    try:
        return subprocess.run([home / "bin" / "nvcc", argument], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# ------------------------------------------------------------------------------------------- what stands in the way


def problems(plan: Plan) -> list[str]:
    """Everything that is known to make the install fail, with the remedy, a line each; none where it can begin."""
    found = []
    if not plan.packages:
        found.append(f"this installation of {PROJECT} does not say which kernels it wants: install it again with pip")
    if util.find_spec("pip") is None:
        found.append("this environment has no pip: run python -m ensurepip")
    if plan.source is not None:
        lacking = [one.requirement for one in plan.to_build if one not in plan.archives]
        if lacking:
            found.append(f"--from {plan.source} has neither a source archive nor a wheel for this Python of "
                         f"{', '.join(lacking)}: put it there, or leave --from out")  # fmt: skip
    if plan.to_build:
        found += _cannot_build(plan)
    return [*found, *_no_room(plan)]


def _cannot_build(plan: Plan) -> Iterator[str]:
    cuda, toolkit = torch.version.cuda, plan.toolkit
    wanted = cuda.partition(".")[0] if cuda else ""
    if sys.platform != "linux":
        yield f"the kernels are built on Linux only, this is {sys.platform}: the torch form runs here without them"
    if cuda is None:
        yield f"torch {torch.__version__} is built without CUDA: install a build of torch for CUDA first"
    if toolkit is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"CUDA_HOME {named} has no bin/nvcc with its headers" if named else "no nvcc with its headers was found"
        yield f"{where}: install the CUDA toolkit {wanted or 'of your torch'} and set CUDA_HOME to its folder"
    elif cuda is not None and toolkit.major != wanted:
        yield (f"nvcc is of CUDA {toolkit.release}, torch of CUDA {cuda}: install the CUDA toolkit {wanted} and set "
               f"CUDA_HOME to its folder, or a torch for CUDA {toolkit.major}")  # fmt: skip
    if not plan.architectures:
        yield "no GPU is visible: say for which compute capability to build, such as --arch 9.0"
    for one in plan.architectures:
        if tuple(map(int, one.split("."))) < OLDEST:
            yield (f"compute capability {one} is not supported, the kernels need {'.'.join(map(str, OLDEST))} or newer:"
                   " use the torch form")  # fmt: skip
        elif toolkit is not None and one not in toolkit.architectures:
            yield (f"nvcc {toolkit.release} does not compile for compute capability {one}, only for "
                   f"{', '.join(toolkit.architectures)}: install a CUDA toolkit that does")  # fmt: skip
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        yield f"no C++ compiler ('{compiler}'): install g++, or set CXX to the one to use"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        yield f"Python's headers are missing: install python{sys.version_info.major}.{sys.version_info.minor}-dev"
    if shutil.which("ninja", path=search_path()) is None:
        yield "no ninja, without which torch compiles one file at a time: pip install ninja"
    tools = [tool for tool in BUILD_TOOLS if util.find_spec(tool) is None]
    if tools:
        yield f"building needs {' and '.join(tools)}: pip install {' '.join(tools)} wheel"
    if not hasattr(tarfile, "data_filter"):
        yield f"Python {sys.version.split()[0]} cannot unpack archives safely: use 3.11.4 or newer"


def _no_room(plan: Plan) -> Iterator[str]:
    if not plan.to_build:
        return
    existing = next(path for path in (plan.folder, *plan.folder.parents) if os.path.exists(path))
    if not os.access(existing, os.W_OK):
        yield f"cannot write {existing}: set LAB_CACHE to a folder of your own"
    free = shutil.disk_usage(existing).free
    if free < ROOM_BYTES:
        yield (f"no room: {existing} has {free / 1e9:.1f} GB free, building needs {ROOM_BYTES / 1e9:.1f} GB: "
               f"set LAB_CACHE to a folder with room")  # fmt: skip


# what a failed step's output says, and its remedy; the first that is found counts
KNOWN = (
    (r"No space left on device|Disk quota exceeded", "no room on the disk: set LAB_CACHE to a folder with room"),
    (r"unsupported GNU version|unsupported clang version",
     "nvcc does not take this C++ compiler: set CC and CXX to an older one that it takes"),
    (r"Killed|signal 9|[Oo]ut of memory|Cannot allocate memory", "memory ran out: repeat with fewer --jobs"),
    (r"Name or service not known|Temporary failure in name resolution|NewConnectionError|ConnectTimeoutError|"
     r"Network is unreachable|Connection refused|Max retries exceeded|ProxyError|SSLError|ReadTimeoutError",
     "the package index cannot be reached: repeat with a network, or with --from and a folder of the source archives"),
    (r"No matching distribution found|Could not find a version",
     "a package was not found: put its archive or wheel into the folder of --from, or repeat with a network"),
    (r"No module named 'wheel'", "building needs wheel: pip install wheel"),
    (r"is not a supported wheel on this platform", "a wheel is for another platform: take it out of the folder"),
)  # fmt: skip


def diagnosis(output: str) -> str | None:
    """What the output of a step that failed is known to mean."""
    return next((remedy for pattern, remedy in KNOWN if re.search(pattern, output)), None)


# ------------------------------------------------------------------------------------------------ the source archives

ONLY = """
for _extension in {extensions}:  # written by lab kernels install: compile for these architectures and no others
    _flags = _extension.extra_compile_args["nvcc"]
    while "-gencode" in _flags:
        del _flags[_flags.index("-gencode") : _flags.index("-gencode") + 2]
    _flags += {flags}
"""


def for_architectures(setup: str, architectures: Sequence[str]) -> str:
    """The text of a setup.py, made to compile for these compute capabilities only, however it came by its own: the
    flags of its extensions are changed before its call of `setup`. Raises EnvironmentLacksError where there is none."""
    try:
        body = ast.parse(setup).body
    except (SyntaxError, ValueError):
        body = []
    calls = [
        statement for statement in body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        and ast.unparse(statement.value.func).split(".")[-1] == "setup"
    ]  # fmt: skip
    named = [
        keyword.value.id for call in calls for keyword in call.value.keywords  # type: ignore[attr-defined]
        if keyword.arg == "ext_modules" and isinstance(keyword.value, ast.Name)
    ]  # fmt: skip
    if len(calls) != 1 or len(named) != 1 or "-gencode" not in setup:
        raise EnvironmentLacksError(
            "a source archive has a setup.py that this recipe does not know: build it with pip (docs/kernels.md)"
        )
    flags = [flag for one in architectures for number in [one.replace(".", "")]
             for flag in ("-gencode", f"arch=compute_{number},code=sm_{number}")]  # fmt: skip
    lines = setup.splitlines(keepends=True)
    at = calls[0].lineno - 1
    return "".join([*lines[:at], ONLY.format(extensions=named[0], flags=flags), *lines[at:]])


def unpack(archive: Path, into: Path) -> Path:
    """Safely. Gives the one folder of a source archive, or raises EnvironmentLacksError."""
    try:
        with tarfile.open(archive) as opened:
            opened.extractall(into, filter="data")
        (folder,) = (path.parent for path in into.glob("*/setup.py"))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise EnvironmentLacksError(f"{archive} is no usable source archive ({error}): fetch it again") from None
    return folder
