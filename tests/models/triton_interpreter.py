"""Triton kernels without a GPU, in Triton's interpreter."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

OURS = "models.ops.kernels.triton_"


def interpreted(name: str, processors: int = 1) -> Iterator[ModuleType]:
    """For a fixture: our module of kernels, interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernel itself is compared: pytest -m cuda")
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch, processors)
        yield importlib.import_module(f"{OURS}{name}")


def interpret(patch: pytest.MonkeyPatch, processors: int = 1) -> None:
    """Every Triton kernel that is imported from here on is interpreted, as on a device of so many multiprocessors."""
    # triton decides when it is imported whether it interprets, and others may have imported it before
    for module in with_kernels():
        patch.delitem(sys.modules, module)
    patch.setenv("TRITON_INTERPRET", "1")
    properties = SimpleNamespace(multi_processor_count=processors)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def with_kernels() -> list[str]:
    """The Python of triton, whose compiled module is loaded once in a process, and of what has kernels in it:
    transformers may have imported some of them."""
    packages = ("triton", "mamba_ssm", "causal_conv1d")
    found = [name for name in sys.modules if name.partition(".")[0] in packages and not name.startswith("triton._C")]
    return found + [name for name in sys.modules if name.startswith(OURS)]
