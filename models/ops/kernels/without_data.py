"""The kernels of a GPU on tensors that have no data (torch's fake ones): what they return is made, in its shape and
type, and nothing is computed. For counting what a computation allocates (models.replay).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (the libraries are installed on CUDA machines only)

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from models.ops.kernels import has_convolution, has_scan, has_triton
from models.ops.kernels.tuning import untimed

_ONE_THREAD = RLock()
SCAN_CHUNK = 2048  # tokens between two states that mamba_ssm's scan keeps for its backward pass


@contextmanager
def kernels_without_data() -> Iterator[None]:
    """Triton's kernels and the convolution's write into tensors that their callers have made. That leaves the selective
    scan, which makes its own. What is replaced is replaced for all threads."""
    with ExitStack() as replaced:
        replaced.enter_context(_ONE_THREAD)  # or one would put back what another had put there
        if has_triton():
            from triton.runtime.jit import JITFunction

            replaced.enter_context(untimed("cuda"))
            replaced.enter_context(_in_place_of(JITFunction, "run", _launch_nothing))
        if has_scan():
            from mamba_ssm.ops import selective_scan_interface

            shapes = SimpleNamespace(fwd=scan, bwd=scan_backward)
            replaced.enter_context(_in_place_of(selective_scan_interface, "selective_scan_cuda", shapes))
        if has_convolution():
            from causal_conv1d import cpp_functions

            nothing = SimpleNamespace(causal_conv1d_fwd=_launch_nothing, causal_conv1d_bwd=_launch_nothing)
            replaced.enter_context(_in_place_of(cpp_functions, "causal_conv1d_cuda", nothing))
        yield


def _launch_nothing(*inputs: Any, **settings: Any) -> None:
    """In place of a kernel."""


@contextmanager
def _in_place_of(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, own)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, softplus: bool,
) -> list[Tensor]:  # fmt: skip
    """u, delta, z (B, E, T), A (E, N): the outputs before the gate, a decay and a state at the end of every chunk, and
    the outputs behind the gate, if there is one."""
    rows, E, T = u.shape
    states = u.new_empty((rows, E, -(-T // SCAN_CHUNK), 2 * A.shape[1]), dtype=torch.float32)
    return [torch.empty_like(delta), states, *([] if z is None else [torch.empty_like(z)])]


def scan_backward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, *rest: Any,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of all that `scan` is given. Those of B and C are summed in float32."""
    summed = [torch.zeros_like(x, dtype=torch.float32) for x in (B, C)]
    return [
        torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A),
        *(total.to(x.dtype) for total, x in zip(summed, (B, C), strict=True)),
        *(None if x is None else torch.zeros_like(x) for x in (D, delta_bias)),
        *([] if z is None else [torch.empty_like(z)]),
    ]  # fmt: skip
