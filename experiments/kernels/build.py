"""Building and installing the CUDA kernels: what experiments.kernels.recipe says, step by step, each with a log."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments.data.dataset import writing
from experiments.errors import EnvironmentLacksError, LabError
from experiments.kernels.check import of_this_gpu
from experiments.kernels.recipe import Package, Plan, diagnosis, for_architectures, search_path, unpack

Say = Callable[[str], None]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
TAIL = 15  # lines of a failed step's log that are shown
EVERY_S = 60.0  # between two signs of life


@dataclass(frozen=True, eq=False)
class Step:
    """A command whose output goes to `log`. what: as a person would call it."""

    what: str
    command: tuple[str, ...]
    environment: dict[str, str]
    log: Path


def install(plan: Plan, cache: Path, say: Say, on_row: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """Build what has no wheel, install, and check. The check's record, or None where no GPU is visible.

    plan: without `problems`. Wheels that were built stay in its folder, whatever comes later. Raises
    EnvironmentLacksError for a step that fails for a known reason, LabError for one that fails otherwise.
    """
    before = metadata.version("torch")
    with writing(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=plan.folder, ignore_cleanup_errors=True) as scratch:
            wheels = plan.wheels | _build(plan, Path(scratch), say)
            _install(plan, [wheels[package] for package in plan.packages], Path(scratch), say)
    if metadata.version("torch") != before:
        raise LabError(f"torch was {before} and is now {metadata.version('torch')}: install {before} again")
    if not torch.cuda.is_available():
        return None
    return of_this_gpu(cache, say, again=True, on_row=on_row)


def build_environment(plan: Plan, scratch: Path) -> dict[str, str]:
    """For pip and setup.py: build at once, never look for a wheel on the network, everything temporary in `scratch`."""
    forced = {f"{name}_{what}": value for name in ("MAMBA", "CAUSAL_CONV1D")
              for what, value in (("FORCE_BUILD", "TRUE"), ("SKIP_CUDA_BUILD", "FALSE"))}  # fmt: skip
    home = {} if plan.toolkit is None else {"CUDA_HOME": str(plan.toolkit.home)}
    return os.environ | forced | home | {"PATH": search_path(), "TMPDIR": str(scratch)}


def _build(plan: Plan, scratch: Path, say: Say) -> dict[Package, Path]:
    environment = build_environment(plan, scratch)
    archives = dict(plan.archives)
    wanted = [package for package in plan.to_build if package not in archives]
    if wanted:
        archives |= _download(plan, wanted, environment, scratch, say)
    steps = []
    for package, jobs in plan.shares().items():
        folder = unpack(archives[package], scratch / package.name)
        setup = folder / "setup.py"
        setup.write_text(for_architectures(setup.read_text(encoding="utf-8"), plan.architectures), encoding="utf-8")
        command = (*PIP, "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation",
                   "--wheel-dir", str(scratch / "wheels"), str(folder))  # fmt: skip
        log = plan.folder / f"{package.name}-{package.version}.log"
        steps.append(Step(f"building {package.requirement}", command, environment | {"MAX_JOBS": str(jobs)}, log))
    built: dict[Package, Path] = {}
    groups = [[step] for step in steps] if plan.jobs == 1 else [steps] if steps else []
    try:
        for group in groups:
            run(group, say)
    finally:  # what is finished is kept, also where another failed
        for made in sorted((scratch / "wheels").glob("*.whl")):
            for package in filter(lambda one: one.is_wheel(made), plan.to_build):
                built[package] = plan.folder / made.name
                os.replace(made, built[package])
    missing = [package.requirement for package in plan.to_build if package not in built]
    if missing:
        raise LabError(f"building gave no wheel for this Python of {', '.join(missing)}; see {plan.folder}")
    return built


def _download(
    plan: Plan, wanted: Sequence[Package], environment: dict[str, str], scratch: Path, say: Say
) -> dict[Package, Path]:
    """Their source archives. pip runs a setup.py to learn its name: without the part that needs a compiler."""
    skip = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}
    into = scratch / "archives"
    command = (*PIP, "download", "--retries", "2", "--no-binary", ":all:", "--no-deps", "--no-build-isolation",
               "--dest", str(into), *(package.requirement for package in wanted))  # fmt: skip
    run([Step("fetching the source archives", command, environment | skip, plan.folder / "download.log")], say)
    return {package: next(filter(package.is_archive, sorted(into.iterdir()))) for package in wanted}


def _install(plan: Plan, wheels: Sequence[Path], scratch: Path, say: Say) -> None:
    environment = os.environ | {"PATH": search_path(), "TMPDIR": str(scratch)}
    if plan.beside:
        index = ("--retries", "2") if plan.source is None else ("--no-index", "--find-links", str(plan.source))
        command = (*PIP, "install", *index, *plan.beside)
        run([Step(f"installing {', '.join(plan.beside)}", command, environment, plan.folder / "beside.log")], say)
    # reinstalled, because the same version built for another torch counts as there
    command = (*PIP, "install", "--no-deps", "--no-index", "--force-reinstall", *map(str, wheels))
    run([Step("installing the wheels", command, environment, plan.folder / "install.log")], say)


def run(steps: Sequence[Step], say: Say) -> None:
    """The commands side by side until all have ended. Where one fails the others are stopped, the tail of its log is
    shown, and EnvironmentLacksError is raised for a failure that is known, LabError for another."""
    running: dict[Step, subprocess.Popen] = {}
    begun = last = time.monotonic()
    try:
        for step in steps:
            say(f"{step.what}: {shlex.join(step.command)}")
            with step.log.open("w", encoding="utf-8") as log:
                # a session of its own, so that the compilers can be stopped with it
                running[step] = subprocess.Popen(
                    step.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env=step.environment, start_new_session=True,
                )  # fmt: skip
        while running:
            for step in [step for step, process in running.items() if process.poll() is not None]:
                if running[step].returncode:
                    _failed(step, say)
                del running[step]
                say(f"{step.what}: done after {time.monotonic() - begun:.0f} s")
            if running and time.monotonic() - last > EVERY_S:
                last = time.monotonic()
                say(f"{last - begun:.0f} s: still {', '.join(step.what for step in running)}")
            time.sleep(0.1 if running else 0)
    finally:
        for process in running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _failed(step: Step, say: Say) -> None:
    text = step.log.read_text(encoding="utf-8", errors="replace")
    said, _, _ = text.partition("error: subprocess-exited-with-error")  # after it pip repeats itself
    for line in said.rstrip().splitlines()[-TAIL:]:
        say(f"  | {line}")
    known = diagnosis(text)
    if known:
        raise EnvironmentLacksError(f"{step.what} failed: {known}; its output is in {step.log}")
    raise LabError(f"{step.what} failed, its output is in {step.log}; docs/kernels.md lists known failures")
