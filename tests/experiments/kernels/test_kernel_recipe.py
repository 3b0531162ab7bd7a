"""The recipe of the CUDA kernels without a GPU: the plan, each diagnosis, and the whole way with a made-up compiler."""

import io
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from experiments.errors import EnvironmentLacksError, LabError, SpecError
from experiments.kernels import build, recipe
from experiments.kernels.recipe import (
    Package,
    Plan,
    diagnosis,
    extra,
    for_architectures,
    plan,
    problems,
    unpack,
)

ROOT = Path(__file__).resolve().parents[3]
CONV, MAMBA = extra()[0]
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"

# in the shape of the real ones: flags gathered one by one, some for some versions of nvcc only, and passed on in a list
# of more; instead of compiling it writes down what it would have told the compiler
SETUP = """
import json, os
from pathlib import Path
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

flags = []
flags.append("-gencode")
flags.append("arch=compute_75,code=sm_75")
if os.environ.get("NVCC", "13.0") >= "12.8":
    flags.append("-gencode")
    flags.append("arch=compute_100,code=sm_100")
extensions = []
if os.environ["FORCE_SWITCH_SKIP_CUDA_BUILD"] == "FALSE":
    extension = Extension("NAME_cuda", ["NAME.cu"])
    extension.extra_compile_args = {"cxx": ["-O3"], "nvcc": ["-O3"] + flags + ["--threads", "4"]}
    extensions.append(extension)


class Recording(build_ext):
    def run(self):
        told = {name: os.environ.get(name) for name in ("FORCE_SWITCH_FORCE_BUILD", "MAX_JOBS", "CUDA_HOME", "TMPDIR")}
        told["nvcc"] = self.extensions[0].extra_compile_args["nvcc"]
        Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        Path(self.build_lib, "NAME_told.json").write_text(json.dumps(told))


setup(
    name="NAME",
    version="VERSION",
    ext_modules=extensions,
    cmdclass={"build_ext": Recording},
)
"""


def setup_text(package: Package) -> str:
    switch = "CAUSAL_CONV1D" if package is CONV else "MAMBA"
    underscored = package.name.replace("-", "_")
    text = SETUP.replace("FORCE_SWITCH", switch).replace("NAME", underscored)
    return text.replace("VERSION", package.version)


def archive(folder: Path, package: Package, setup: str | None = None) -> Path:
    stem = f"{package.name.replace('-', '_')}-{package.version}"
    folder.mkdir(parents=True, exist_ok=True)
    content = (setup or setup_text(package)).encode()
    with tarfile.open(folder / f"{stem}.tar.gz", "w:gz") as made:
        member = tarfile.TarInfo(f"{stem}/setup.py")
        member.size = len(content)
        made.addfile(member, io.BytesIO(content))
    return folder / f"{stem}.tar.gz"


def wheel(folder: Path, package: Package, python: str = PYTHON, version: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = package.name.replace("-", "_")
    file = folder / f"{name}-{version or package.version}-{python}-{python}-linux_x86_64.whl"
    file.touch()
    return file


def executable(file: Path, script: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def toolkit(home: Path, release: str = "13.0", architectures: tuple[str, ...] = ("75", "80", "90", "100")) -> None:
    listed = "\\n".join(f"compute_{one}" for one in architectures)
    script = f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.88";; '
    script += f'--list-gpu-arch) printf "{listed}\\n";; esac'
    executable(home / "bin" / "nvcc", script)
    (home / "include").mkdir(exist_ok=True)
    (home / "include" / "cuda_runtime.h").touch()


@pytest.fixture
def able(monkeypatch, tmp_path: Path):
    """A machine on which the kernels could be built: torch for CUDA 13, its toolkit, a compiler, ninja, room."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    tools = tmp_path / "tools"
    for name in ("c++", "ninja"):
        executable(tools / name, "exit 0")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "headers"))
    monkeypatch.setattr(recipe, "_installed", lambda requirement: True)
    return tmp_path


def planned(folder: Path, **settings: Any) -> Plan:
    return plan(folder / "cache", **{"architectures": "9.0", **settings})


# ------------------------------------------------------------------------------------------------------------- the plan


def test_the_versions_are_those_that_the_project_pins():
    with (ROOT / "pyproject.toml").open("rb") as file:
        pinned = tomllib.load(file)["project"]["optional-dependencies"]["cuda"]
    assert {CONV.requirement, MAMBA.requirement} == {line for line in pinned if "==" in line}
    assert (CONV.name, MAMBA.name) == ("causal-conv1d", "mamba-ssm")
    assert not any("torch" in line for line in pinned)


def test_a_plan_says_what_it_will_do(able: Path):
    here = planned(able, jobs=8)
    assert problems(here) == []
    said = "\n".join(here.sentences())
    assert f"compute capability 9.0; Python {sys.version.split()[0]}, torch {torch.__version__}" in said
    assert f"CUDA toolkit 13.0 in {able / 'cuda'}" in said
    for package, jobs in ((CONV, 2), (MAMBA, 6)):
        assert f"{package.requirement}: built from PyPI (source archive) with MAX_JOBS={jobs}" in said
    assert f"kept in {here.folder}" in said
    assert f"torch {torch.__version__} stays" in said
    for part in (PYTHON, f"torch{torch.__version__}", "cuda13.0", "sm9.0"):
        assert part in here.folder.name
    assert not (able / "cache").exists()


@pytest.mark.parametrize(
    ("cores", "memory", "jobs", "shares"),
    [(16, 64, 16, (3, 13)), (64, 8, 4, (1, 3)), (2, 64, 2, (1, 1)), (8, 1, 1, (1, 1))],
)
def test_jobs_fit_cores_and_memory(able: Path, monkeypatch, cores, memory, jobs, shares):
    monkeypatch.setattr(recipe, "available_cores", lambda: cores)
    monkeypatch.setattr(recipe, "free_memory", lambda: memory << 30)
    here = planned(able)
    assert here.jobs == jobs
    assert (here.shares()[CONV], here.shares()[MAMBA]) == shares
    assert planned(able, jobs=5).jobs == 5
    wheel(here.folder, CONV)
    assert planned(able).shares() == {MAMBA: jobs}


def test_the_architectures_are_those_of_the_visible_cards(able: Path, monkeypatch):
    cards = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index])
    assert planned(able, architectures=None).architectures == ("8.0", "9.0")
    assert planned(able, architectures="10.0, 9.0").architectures == ("10.0", "9.0")
    assert planned(able, architectures=None).folder != planned(able).folder


@pytest.mark.parametrize("asked", ["90", "sm_90", "9.0;8.0", "", "9.0,"])
def test_what_is_no_architecture_is_refused(tmp_path: Path, asked: str):
    with pytest.raises(SpecError, match=r"a compute capability reads like 9\.0"):
        planned(tmp_path, architectures=asked)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(SpecError, match=r"--from .*nowhere: no such folder"):
        planned(tmp_path, source=tmp_path / "nowhere")


def test_wheels_come_from_the_cache_first_and_then_from_the_folder(able: Path):
    source = able / "source"
    given = {package: wheel(source, package) for package in (CONV, MAMBA)}
    assert planned(able, source=source).wheels == given
    archive(source, MAMBA)
    given[MAMBA].unlink()
    here = planned(able, source=source)
    assert (here.wheels, here.to_build) == ({CONV: given[CONV]}, (MAMBA,))
    assert here.archives[MAMBA].name == f"mamba_ssm-{MAMBA.version}.tar.gz"
    kept = wheel(here.folder, CONV)
    assert planned(able, source=source).wheels == {CONV: kept}


def test_other_versions_and_other_pythons_are_no_wheels(able: Path):
    source = able / "source"
    wheel(source, CONV, python="cp39")
    wheel(source, MAMBA, version="2.2")
    wheel(source, Package("mamba", MAMBA.version))
    assert planned(able, source=source).wheels == {}
    local = wheel(source, CONV, version=f"{CONV.version}+cu13")
    assert planned(able, source=source).wheels == {CONV: local}


def test_where_nothing_is_to_be_built_no_compiler_is_missed(able: Path, monkeypatch):
    for package in (CONV, MAMBA):
        wheel(planned(able).folder, package)
    shutil.rmtree(able / "cuda")
    monkeypatch.setattr(shutil, "which", lambda *of, **rest: None)
    here = planned(able)
    assert (here.toolkit, here.to_build, problems(here)) == (None, (), [])
    assert f"{MAMBA.requirement}: taken ready from {here.folder}" in "\n".join(here.sentences())


# -------------------------------------------------------------------------------------------------------- the diagnosis


def without(name: str):
    """Without one program."""

    def change(folder: Path, monkeypatch) -> None:
        which = shutil.which
        monkeypatch.setattr(shutil, "which", lambda asked, **rest: None if asked == name else which(asked, **rest))

    return change


def no_nvcc(folder: Path, monkeypatch) -> None:
    shutil.rmtree(folder / "cuda" / "bin")


def no_headers(folder: Path, monkeypatch) -> None:
    (folder / "cuda" / "include" / "cuda_runtime.h").unlink()


def older_nvcc(folder: Path, monkeypatch) -> None:
    toolkit(folder / "cuda", "12.8")


def full_disk(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**8))


def cpu_torch(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)


def no_python_headers(folder: Path, monkeypatch) -> None:
    (folder / "headers" / "Python.h").unlink()


def lacking(module: str):
    def change(folder: Path, monkeypatch) -> None:
        find = recipe.util.find_spec
        monkeypatch.setattr(recipe.util, "find_spec", lambda name: None if name == module else find(name))

    return change


def nothing(folder: Path, monkeypatch) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (no_nvcc, {}, r"CUDA_HOME .*/cuda has no bin/nvcc with its headers: install the CUDA toolkit 13 and set"),
        (no_headers, {}, r"has no bin/nvcc with its headers: install the CUDA toolkit 13"),
        (older_nvcc, {}, r"nvcc is of CUDA 12\.8, torch of CUDA 13\.0: install the CUDA toolkit 13 and set CUDA_HOME"),
        (without("c++"), {}, r"no C\+\+ compiler \('c\+\+'\): install g\+\+, or set CXX"),
        (without("ninja"), {}, r"no ninja, .*: pip install ninja"),
        (full_disk, {}, r"no room: .* has 0\.5 GB free, building needs 2\.1 GB: set LAB_CACHE"),
        (cpu_torch, {}, r"is built without CUDA: install a build of torch for CUDA"),
        (no_python_headers, {}, r"Python's headers are missing: install python3\.\d+-dev"),
        (lacking("pip"), {}, r"has no pip: run python -m ensurepip"),
        (lacking("setuptools"), {}, r"building needs setuptools: pip install setuptools wheel"),
        (nothing, {"architectures": None}, r"no GPU is visible: .* such as --arch 9\.0"),
        (
            nothing,
            {"architectures": "7.0"},
            r"compute capability 7\.0 is not supported, the kernels need 7\.5 or newer",
        ),
        (
            nothing,
            {"architectures": "12.0"},
            r"nvcc 13\.0 does not compile for compute capability 12\.0, only for 7\.5, ",
        ),
    ],
)
def test_what_stands_in_the_way_is_one_line_with_the_remedy(able: Path, monkeypatch, change, settings, said):
    change(able, monkeypatch)
    (problem,) = problems(planned(able, **settings))
    assert re.search(said, problem), problem
    assert "\n" not in problem


def test_a_cache_that_cannot_be_written_is_said(able: Path, monkeypatch):
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **rest: False if mode == os.W_OK else access(path, mode, **rest)
    )
    (problem,) = problems(planned(able))
    assert problem == f"cannot write {able}: set LAB_CACHE to a folder of your own"


def test_a_folder_without_a_package_is_said(able: Path):
    archive(able / "source", CONV)
    (problem,) = problems(planned(able, source=able / "source"))
    assert problem == (
        f"--from {able / 'source'} has neither a source archive nor a wheel for this Python of {MAMBA.requirement}: "
        "put it there, or leave --from out"
    )


def test_nvcc_is_found_where_it_lies(able: Path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    wrapper = able / "elsewhere" / "bin"  # a folder with nvcc but without the headers, such as /usr/bin
    wrapper.mkdir(parents=True)
    (wrapper / "nvcc").symlink_to(able / "cuda" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{wrapper}{os.pathsep}{os.environ['PATH']}")
    found = recipe.find_toolkit()
    assert found is not None
    assert (found.home, found.release) == (able / "cuda", "13.0")
    assert found.architectures == ("7.5", "8.0", "9.0", "10.0")
    monkeypatch.setenv("CUDA_PATH", str(able / "nowhere"))
    assert recipe.find_toolkit() is None


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("fatal error: error writing to /tmp/x.s: No space left on device", "LAB_CACHE"),
        ("#error -- unsupported GNU version! gcc versions later than 15", "CC and CXX"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "--jobs"),
        ("NewConnectionError('Failed to establish a new connection: [Errno 111] Connection refused')", "--from"),
        ("ERROR: Could not find a version that satisfies the requirement einops", "--from"),
        ("ModuleNotFoundError: No module named 'wheel'", "pip install wheel"),
        ("error: no such variable", None),
    ],
)
def test_known_failures_of_a_step(output: str, said: str | None):
    found = diagnosis(f"one line\n{output}\nanother")
    assert found is None if said is None else said in (found or "")


# ------------------------------------------------------------------------------------------------------------ setup.py


@pytest.mark.parametrize("nvcc", ["12.0", "13.0"])
@pytest.mark.parametrize("architectures", [("9.0",), ("10.3", "8.6")])
def test_a_setup_compiles_for_the_asked_architectures_only(monkeypatch, nvcc, architectures):
    given: dict[str, Any] = {}
    stub: Any = ModuleType("setuptools")
    stub.setup, stub.Extension = lambda **settings: given.update(settings), lambda *of: SimpleNamespace()
    command: Any = ModuleType("setuptools.command.build_ext")
    command.build_ext = object
    monkeypatch.setitem(sys.modules, "setuptools", stub)
    monkeypatch.setitem(sys.modules, "setuptools.command", ModuleType("setuptools.command"))
    monkeypatch.setitem(sys.modules, "setuptools.command.build_ext", command)
    monkeypatch.setenv("NVCC", nvcc)
    monkeypatch.setenv("CAUSAL_CONV1D_SKIP_CUDA_BUILD", "FALSE")
    exec(compile(for_architectures(setup_text(CONV), architectures), "setup.py", "exec"), {})
    (extension,) = given["ext_modules"]
    pairs = [part for one in architectures for number in [one.replace(".", "")]
             for part in ("-gencode", f"arch=compute_{number},code=sm_{number}")]  # fmt: skip
    assert extension.extra_compile_args == {"cxx": ["-O3"], "nvcc": ["-O3", "--threads", "4", *pairs]}
    assert (given["name"], given["version"]) == ("causal_conv1d", CONV.version)


@pytest.mark.parametrize(
    "text",
    [
        "print(1)",
        "setup(ext_modules=[])  # -gencode",
        "setup(ext_modules=found)",
        "setup(ext_modules=a)\nsetup()  # -gencode",
    ],
)
def test_a_setup_of_another_kind_is_refused(text: str):
    with pytest.raises(EnvironmentLacksError, match=r"setup\.py that this recipe does not know: build it with pip"):
        for_architectures(text, ["9.0"])


def test_an_archive_that_reaches_outside_is_refused(tmp_path: Path):
    into = tmp_path / "in"
    for name, link in (("../outside/setup.py", ""), ("inside/setup.py", str(tmp_path / "outside"))):
        member = tarfile.TarInfo(name)
        if link:
            member.type, member.linkname = tarfile.SYMTYPE, link
        with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as made:
            made.addfile(member)
        with pytest.raises(EnvironmentLacksError, match="is no usable source archive"):
            unpack(tmp_path / "bad.tar.gz", into)
        assert not (tmp_path / "outside").exists()
    (tmp_path / "torn.tar.gz").write_bytes(archive(tmp_path, CONV).read_bytes()[:40])
    with pytest.raises(EnvironmentLacksError, match="fetch it again"):
        unpack(tmp_path / "torn.tar.gz", tmp_path / "in")


# ------------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture
def pip_here(able: Path, monkeypatch):
    """pip without a network and without its settings, installing into a folder of the test."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_TARGET", str(able / "site"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # refuses connections
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return able


def refuse(*of: Any, **rest: Any) -> Any:
    raise AssertionError("nothing to check without a GPU")


def test_archives_become_wheels_that_are_installed_and_reused(pip_here: Path, monkeypatch):
    monkeypatch.setattr(build, "of_this_gpu", refuse)
    monkeypatch.setenv("MAMBA_SKIP_CUDA_BUILD", "TRUE")  # of an earlier try: it would give wheels without kernels
    source = pip_here / "source"
    for package in (CONV, MAMBA):
        archive(source, package)
    here = planned(pip_here, source=source, jobs=8)
    said: list[str] = []
    assert build.install(here, pip_here / "cache", said.append, refuse) is None
    for package, jobs, switch in ((CONV, "2", "CAUSAL_CONV1D"), (MAMBA, "6", "MAMBA")):
        told = json.loads((pip_here / "site" / f"{package.name.replace('-', '_')}_told.json").read_text())
        assert told["nvcc"] == ["-O3", "--threads", "4", "-gencode", "arch=compute_90,code=sm_90"]
        assert (told["MAX_JOBS"], told[f"{switch}_FORCE_BUILD"]) == (jobs, "TRUE")
        assert told["CUDA_HOME"] == str(pip_here / "cuda")
        assert told["TMPDIR"].startswith(str(here.folder))
        assert (here.folder / f"{package.name}-{package.version}.log").stat().st_size
    assert not [path for path in here.folder.iterdir() if path.name.startswith(".")]
    begun = [line.partition(":")[0] for line in said if " -m pip " in line]
    assert begun == [f"building {CONV.requirement}", f"building {MAMBA.requirement}", "installing the wheels"]
    (installing,) = [line for line in said if " install " in line]
    files = [Path(word).name for word in installing.partition("--force-reinstall ")[2].split()]
    assert [file.partition("-")[0] for file in files] == ["causal_conv1d", "mamba_ssm"]

    again = planned(pip_here)
    assert (again.to_build, set(again.wheels)) == ((), {CONV, MAMBA})
    shutil.rmtree(pip_here / "site")
    said.clear()
    assert build.install(again, pip_here / "cache", said.append, refuse) is None
    assert [line.partition(":")[0] for line in said] == ["installing the wheels", "installing the wheels"]
    assert (pip_here / "site" / "mamba_ssm_told.json").is_file()


@pytest.mark.parametrize("failing", [CONV, MAMBA], ids=["first", "second"])
def test_a_failing_build_shows_what_it_said_and_what_is_finished_is_kept(pip_here: Path, failing: Package):
    """One after the other: where the first fails the second is not begun."""
    source = pip_here / "source"
    for package in (CONV, MAMBA):
        text = setup_text(package)
        if package is failing:
            text = text.replace("told = {", "raise SystemExit('fatal: a bad flag') or {")
        archive(source, package, text)
    here = planned(pip_here, source=source, jobs=1)
    said: list[str] = []
    with pytest.raises(
        LabError, match=rf"building {failing.requirement} failed, its output is in (.*\.log); docs/kern"
    ):
        build.install(here, pip_here / "cache", said.append, refuse)
    assert any("fatal: a bad flag" in line for line in said)
    assert any(MAMBA.requirement in line for line in said) is (failing is MAMBA)
    again = planned(pip_here, source=source, jobs=1)
    assert again.to_build == ((CONV, MAMBA) if failing is CONV else (MAMBA,))
    assert not (pip_here / "site").exists()


def test_without_a_network_the_remedy_is_a_folder(pip_here: Path):
    here = planned(pip_here)
    with pytest.raises(
        EnvironmentLacksError, match=r"fetching the source archives failed: .*repeat with a network, or"
    ):
        build.install(here, pip_here / "cache", lambda line: None, refuse)


def test_after_the_install_the_gpu_checks_the_kernels(pip_here: Path, monkeypatch):
    """With the wheels' install left out, and a GPU made up."""
    for package in (CONV, MAMBA):
        wheel(planned(pip_here).folder, package)
    asked: list[Any] = []

    def of_this_gpu(cache: Path, say: Any, again: bool, on_row: Any) -> dict[str, Any]:
        asked.append((cache, again, on_row))
        return {"rows": []}

    monkeypatch.setattr(build, "run", lambda steps, say: None)
    monkeypatch.setattr(build, "of_this_gpu", of_this_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build.install(planned(pip_here), pip_here / "cache", print, refuse) == {"rows": []}
    assert asked == [(pip_here / "cache", True, refuse)]


def test_a_torch_that_changed_is_an_error(pip_here: Path, monkeypatch):
    for package in (CONV, MAMBA):
        wheel(planned(pip_here).folder, package)
    versions = iter(["2.11.0", "2.12.0", "2.12.0"])
    monkeypatch.setattr(build, "run", lambda steps, say: None)
    monkeypatch.setattr(build.metadata, "version", lambda name: next(versions))
    with pytest.raises(LabError, match=r"torch was 2\.11\.0 and is now 2\.12\.0: install 2\.11\.0 again"):
        build.install(planned(pip_here), pip_here / "cache", print, refuse)


def test_a_step_that_fails_stops_the_others(tmp_path: Path):
    def step(name: str, script: str) -> build.Step:
        return build.Step(name, ("sh", "-c", script), dict(os.environ), tmp_path / f"{name}.log")

    slow = step("slow", f"sh -c 'sleep 60; touch {tmp_path}/late' & wait")
    with pytest.raises(
        EnvironmentLacksError, match=r"^quick failed: memory ran out: repeat with fewer --jobs; its output"
    ):
        build.run([slow, step("quick", "echo 'nvcc error: Killed'; exit 1")], lambda line: None)
    slept = [
        p for p in psutil.process_iter(["cmdline"]) if f"touch {tmp_path}/late" in " ".join(p.info["cmdline"] or [])
    ]
    assert [process for process in slept if process.status() != psutil.STATUS_ZOMBIE] == []
