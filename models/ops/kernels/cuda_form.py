"""Form `cuda`: the kernels of mamba_ssm and causal_conv1d, brought to the signatures of `models.ops`.

Both libraries keep channels before time, (B, E, T), and B and C as (B, N, T). Which of the two is innermost in memory
is a matter of strides: the scan wants time there (`channel_projections` sees to it), SSD channels, the convolution
takes either. `torch.compile` calls the kernels of whole sequences as operators (`cuda_operators`; the convolution
is one already). Not so in a decode step: one token is so little work that launches are what it costs, and traced, the
definitions are fused with what is beside them. Compiled, the forms of a step are therefore those of `torch`, but for
the convolution's.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (the two libraries are installed on CUDA machines only)

from collections.abc import Callable
from functools import partial, wraps
from typing import TypeVar

import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import linear as linear_step

from models.ops import cross_entropy
from models.ops.attention import rotary_qkv
from models.ops.experts import by_device as experts
from models.ops.kernels import cuda_mamba2, cuda_operators
from models.ops.kernels.triton_cross_entropy import softmax_gradient
from models.ops.kernels.triton_norm import of_sum as norm_of_sum
from models.ops.kernels.triton_trapezoid import step as trapezoid_kernel
from models.ops.kernels.tuning import compile_side_by_side, look_names_up
from models.ops.precision import autocast_type
from models.ops.projections import added_in_place as residual_step
from models.ops.projections import no_branches as suits_step
from models.ops.projections import time_innermost as channel_projections
from models.ops.projections import together as projections
from models.ops.rms_norm import fused as rms_norm
from models.ops.rms_norm import gated_fused
from models.ops.selective_scan import CHUNK
from models.ops.selective_scan import step_reference as scan_step
from models.ops.ssd import step_reference as heads_step
from models.ops.swiglu import reference as swiglu
from models.ops.trapezoid import State, log_alpha_and_delta
from models.ops.trapezoid import step as trapezoid_definition

__all__ = [
    "causal_conv1d", "causal_conv1d_step", "channel_projections", "experts", "gated_rms_norm", "linear_cross_entropy",
    "linear_step", "mamba2_inner", "projections", "residual_step", "rms_norm", "rms_norm_of_sum", "rotary_qkv",
    "selective_scan", "selective_scan_step", "ssd", "ssd_step", "suits_step", "suits_sum", "swiglu", "trapezoid",
    "trapezoid_step",
]  # fmt: skip

compile_side_by_side()
look_names_up()

WIDEST_NORM = 8192  # entries of a row, of which 16 warps have 16 in each thread
SSD_CHUNK = 256  # what `mamba_ssm.Mamba2` uses
Kernel = TypeVar("Kernel", bound=Callable)


def traced_as(other: Callable) -> Callable[[Kernel], Kernel]:
    """A kernel in whose place `torch.compile`, which cannot look into it, traces another form of the same signature."""

    def either(kernel: Kernel) -> Kernel:
        @wraps(kernel)
        def form(*args, **kwargs):
            return (other if torch.compiler.is_compiling() else kernel)(*args, **kwargs)

        return form  # pyright: ignore[reportReturnType]

    return either


linear_cross_entropy = partial(cross_entropy.linear_cross_entropy, softmax_gradient=softmax_gradient)


def suits_sum(x: Tensor, branch: Tensor | None) -> bool:
    """`torch.compile` fuses sum and norm by itself; given a branch or none, it would compile a block twice."""
    wide = x.dtype == torch.float64 or x.shape[-1] > WIDEST_NORM
    wide = wide or (branch is not None and branch.dtype == torch.float64)
    return not wide and not torch.compiler.is_compiling()


def rms_norm_of_sum(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, own: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + branch and its norm, for what `suits_sum`; as in models.norm.RMSNorm."""
    dtype = autocast_type(x.device) or (x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype))
    return norm_of_sum(x, branch, weight, eps, dtype, own)


@traced_as(gated_fused)
def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    return rmsnorm_fn(
        y, weight, None, z=z, eps=eps, group_size=y.shape[-1] // groups, norm_before_gate=False
    )  # fmt: skip


_selective_scan = traced_as(cuda_operators.selective_scan)(
    partial(selective_scan_fn, delta_softplus=True, return_last_state=True)
)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    initial_state: Tensor | None = None, negative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel starts from a zero state; what a given initial state adds is linear in it and added in torch. Its
    backward leaves out the gradient of the last state."""
    assert not negative  # models.mixers.base.without_cuda_kernels
    gate = z if initial_state is None else None
    y, state = _selective_scan(
        u.transpose(1, 2), dt.transpose(1, 2), A.float(), B.transpose(1, 2).contiguous(),
        C.transpose(1, 2).contiguous(), D.float(), None if gate is None else gate.transpose(1, 2), dt_bias.float(),
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


@traced_as(scan_step)
def selective_scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    state: Tensor, negative: bool = False,
) -> Tensor:  # fmt: skip
    assert not negative
    return selective_state_update(state, u, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=True)


@traced_as(cuda_operators.causal_conv1d)
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    """2 to 4 taps."""
    x, before = cuda_operators.laid_out(x, before)
    return causal_conv1d_fn(x, weight, bias, initial_states=before, activation="silu").transpose(1, 2)


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """The kernel wants the state in the type of its input; another one, 16 bits say, is converted on the way."""
    same = state.to(x.dtype)
    y = causal_conv1d_update(x, same, weight, bias, activation="silu")
    if same is not state:
        state.copy_(same)
    return y


@traced_as(cuda_operators.ssd)
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial_state: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, initial_states=initial_state, dt_softplus=True,
        return_final_states=True,
    )  # fmt: skip


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None, negative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert not negative  # models.mixers.base.without_cuda_kernels
    return _ssd(x, dt, A.float(), B, C, D.float(), dt_bias.float(), initial_state, SSD_CHUNK)


_mamba2_inner = traced_as(cuda_operators.mamba2_inner)(cuda_mamba2.inner)


def mamba2_inner(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, groups: int, eps: float,
) -> Tensor:  # fmt: skip
    """One node of autograd: gradients of z, x, B, C and dt are written side by side as the first projection has them,
    and what the convolution gave is computed again for them, not kept."""
    return _mamba2_inner(
        projected, conv_weight, conv_bias, dt_bias.float(), A.float(), D.float(), norm_weight,
        out_weight.to(projected.dtype), SSD_CHUNK, groups, eps,
    )  # fmt: skip


@traced_as(heads_step)
def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    negative: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel is Mamba-1's, with strides of 0 where a head has one value for all of its channels."""
    assert not negative
    rows, H, P = x.shape
    N = state.shape[-1]
    return selective_state_update(
        state, x, dt[..., None].expand(rows, H, P), A.float()[:, None, None].expand(H, P, N), B, C,
        D[:, None].expand(H, P), dt_bias=dt_bias[:, None].expand(H, P), dt_softplus=True,
    )  # fmt: skip


@traced_as(cuda_operators.mamba3_siso_combined)
def _trapezoid(
    C: Tensor, B: Tensor, x: Tensor, log_alpha: Tensor, delta: Tensor, trap: Tensor, C_bias: Tensor, B_bias: Tensor,
    angle: Tensor, D: Tensor, z: Tensor | None, before: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    # imported here: a machine whose triton cannot run Mamba-3's kernels still has Mamba-1's and Mamba-2's
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    return mamba3_siso_combined(
        C, B, x, log_alpha, delta, trap, C_bias, B_bias, angle, D=D, Z=z, Input_States=before, return_final_states=True
    )


def trapezoid(
    x: Tensor, dt: Tensor, a: Tensor, trap: Tensor, angle: Tensor, B: Tensor, C: Tensor, z: Tensor | None, D: Tensor,
    dt_bias: Tensor, B_bias: Tensor, C_bias: Tensor, A_floor: float, initial: State | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """The kernels compute in bfloat16 whatever they are given, and round the angles to it too. N and P have to be
    powers of two, and S even."""
    H = x.shape[2]
    if not torch.is_grad_enabled():  # else a parameter, and a view of one, says that it is to have a gradient, and the
        D, B_bias, C_bias = D.detach(), B_bias.detach(), C_bias.detach()  # states for a backward pass are written
    log_alpha, delta = (m.transpose(1, 2) for m in log_alpha_and_delta(dt, a, dt_bias, A_floor))
    before = None if initial is None else (initial.angle, initial.ssm, initial.previous_B[:, 0], initial.previous_x)
    y, theta, ssm, previous_B, previous_x = _trapezoid(
        C[:, :, 0], B[:, :, 0], x, log_alpha, delta, trap.transpose(1, 2), C_bias[0].float(), B_bias[0].float(),
        angle[:, :, None].expand(-1, -1, H, -1).float(), D, z, before,
    )  # fmt: skip
    return y.to(x.dtype), State(theta, ssm, previous_B[:, None], previous_x)


trapezoid_step = traced_as(trapezoid_definition)(trapezoid_kernel)
