"""Form `cuda`: the kernels of mamba_ssm and causal_conv1d, brought to the signatures of `models.ops`.

Both libraries keep channels before time, (B, E, T), and B and C as (B, N, T).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (the two libraries are installed on CUDA machines only)

import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from torch import Tensor
from torch.nn import functional as F

from models.ops.attention import rotate
from models.ops.rms_norm import fused as rms_norm
from models.ops.selective_scan import CHUNK
from models.ops.swiglu import reference as swiglu

__all__ = [
    "causal_conv1d", "causal_conv1d_step", "rms_norm", "rotate", "selective_scan", "selective_scan_step", "swiglu",
]  # fmt: skip


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel starts from a zero state; what a given initial state adds is linear in it and added in torch."""
    gate = z if initial_state is None else None
    y, state = selective_scan_fn(
        u.transpose(1, 2), dt.transpose(1, 2), A.float(), B.transpose(1, 2).contiguous(),
        C.transpose(1, 2).contiguous(), D.float(), None if gate is None else gate.transpose(1, 2),
        dt_bias.float(), delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    y = y.transpose(1, 2)
    if initial_state is None:
        return y, state
    carried, final = _carried(dt, A, C, dt_bias, initial_state)
    y = y + carried.to(y.dtype)
    return (y if z is None else y * F.silu(z)), state + final


def _carried(dt: Tensor, A: Tensor, C: Tensor, dt_bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What the initial state contributes to every output (B, T, E), and what is left of it (B, E, N)."""
    delta = F.softplus(dt.float() + dt_bias.float())
    ys, h = [], state.float()
    for start in range(0, dt.shape[1], CHUNK):
        now = slice(start, start + CHUNK)
        decay = torch.exp(delta[:, now].cumsum(1)[..., None] * A.float())  # (B, Q, E, N)
        hs = decay * h[:, None]
        ys.append(torch.einsum("bqen,bqn->bqe", hs, C[:, now].float()))
        h = hs[:, -1]
    return torch.cat(ys, 1), h


def selective_scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    state: Tensor,
) -> Tensor:  # fmt: skip
    return selective_state_update(state, u, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=True)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    """The kernel takes W - 1 earlier inputs, and wants them with channels next to each other."""
    if before is not None:
        before = before[:, :, 1:].transpose(1, 2).contiguous().transpose(1, 2).to(x.dtype)
    # channels-last strides are what the kernel needs for initial states
    y = causal_conv1d_fn(x.contiguous().transpose(1, 2), weight.to(x.dtype), bias.to(x.dtype),
                         initial_states=before, activation="silu")  # fmt: skip
    return y.transpose(1, 2)


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    return causal_conv1d_update(x, state, weight.to(x.dtype), bias.to(x.dtype), activation="silu")
