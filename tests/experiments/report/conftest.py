"""Fixtures: synthetic run directories, see synthetic_run.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import VARIANTS, Builder, Options


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Builds `Options(**changes)` into a new folder."""

    def make(**changes: Any) -> Path:
        return Builder(tmp_path / f"run{len(list(tmp_path.iterdir()))}", Options(**changes)).build()

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The variant of that name, built once; tests only read it."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = Builder(tmp_path_factory.mktemp("runs") / name, VARIANTS[name]).build()
        return built[name]

    return get
