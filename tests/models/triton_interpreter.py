"""Triton kernels without a GPU, in Triton's interpreter."""

import sys
from types import SimpleNamespace

import pytest
import torch

OURS = "models.ops.kernels.triton_"


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
