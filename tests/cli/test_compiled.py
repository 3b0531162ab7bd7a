"""Kernels are compiled before anything is measured: otherwise the first arm would pay for it in memory and time."""

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from numba.core.dispatcher import Dispatcher

from experiments import cells
from experiments.data.dataset import prepare
from experiments.measurement.process import run_fresh
from experiments.spec import Experiment, load

ARMS = ("transformer", "mamba", "mamba2", "mamba3", "moe", "sliding", "lstm")


def _kernels() -> set[tuple[str, str, Any]]:
    """Every kernel of this process with the types that it is compiled for, or loaded."""
    return {
        (module, name, signature)
        for module, content in list(sys.modules.items()) if module.startswith("models.ops.kernels")
        for name, one in vars(content).items() if isinstance(one, Dispatcher)
        for signature in one.signatures
    }  # fmt: skip


def _compiled_too_late(
    send: cells.Send, experiment: Experiment, dataset: Path, folder: Path
) -> Generator[None, None, tuple[int, list[str]]]:
    cells.compile_kernels(send, experiment, dataset)
    before = _kernels()
    for name, arm in experiment.arms.items():
        yield from cells.train_cell(send, experiment, name, arm, 0, dataset, folder / name)
        for phase in ("load", "prefill", "decode"):
            yield from cells.measure_cell(send, experiment, phase, 8, None, dataset, folder / name)
    return len(before), sorted(f"{module}.{name}{types}" for module, name, types in _kernels() - before)


def test_no_cell_compiles_a_kernel(small: list[str], tmp_path: Path) -> None:
    assignments = [word for word in small if "=" in word]
    experiment = load("compare", profile="smoke", assignments=assignments, arms=ARMS)
    dataset = prepare(experiment.data, tmp_path / "cache", lambda message: None)
    count, late = run_fresh(_compiled_too_late, experiment, dataset.folder, tmp_path / "cells")
    assert count > 15
    assert late == []
