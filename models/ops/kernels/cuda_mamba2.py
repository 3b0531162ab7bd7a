"""All of Mamba-2 behind its first projection by the kernels of mamba_ssm and causal_conv1d, forward and backward.

`mamba_split_conv1d_scan_combined` calls the same kernels and has the same numbers, to the last bit, but for the
gradient of the norm's weight: here more programs share the rows, so that it is summed in another order. Around them it
rearranges tensors by name, hands the convolution over as an operator of torch's and computes step sizes and decays anew
for the backward pass, all of which its host does, and for its host a training step of a small model waits. Here the
step sizes and decays are kept, 8 bytes for each head and token. What the convolution gave, the states at the ends of
chunks, the scores within them and what the norm gave are computed anew, as there.

B: batch   T: time   D: width   E: expanded width   H: heads   P: head width   G: groups   N: state size
W: convolution taps   C: channels of the convolution, E + 2 G N   Q: chunk   c: chunks

In a backward pass d_m is the gradient of m.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (the libraries are installed on CUDA machines only)

from typing import Any, NamedTuple

import torch
import triton
from causal_conv1d import cpp_functions
from mamba_ssm.ops.triton import (
    layernorm_gated,
    ssd_bmm,
    ssd_chunk_scan,
    ssd_chunk_state,
    ssd_combined,
    ssd_state_passing,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.ops.kernels.triton_decode import processors

NORM_WARPS_PER_PROCESSOR = 16  # of the norm's backward pass, which waits for memory


class Kept(NamedTuple):
    """Of a forward pass for the backward one: the outputs of the recurrence (B, T, H, P), what the norm divided by
    (B T G), step sizes and the sums of log decays from the start of a chunk (B, H, c, Q)."""

    scanned: Tensor
    rstd: Tensor
    delta: Tensor
    decays: Tensor


def forward(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, chunk: int, groups: int, eps: float,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """Shapes as in models.ops.mamba2_inner; dt_bias, A and D in float32, out_weight in the type of projected."""
    E = norm_weight.shape[0]
    z, xBC, dt = _parts(projected, conv_weight, E)
    x, B, C = _heads(_convolved(xBC, conv_weight, conv_bias), D.shape[0], E, groups)
    decays, delta = ssd_chunk_state._chunk_cumsum_fwd(dt, A, chunk, dt_bias=dt_bias, dt_softplus=True)
    entering = _entering(x, B, delta, decays, chunk, C.dtype)
    scores = ssd_bmm._bmm_chunk_fwd(C, B, chunk, output_dtype=torch.float32)
    scanned, _ = ssd_chunk_scan._chunk_scan_fwd(scores, x, delta, decays, C, entering, D=D)
    normed, _, rstd = layernorm_gated._layer_norm_fwd(
        scanned.view(-1, E), norm_weight, None, eps, z=z.reshape(-1, E), group_size=E // groups,
        norm_before_gate=False, is_rms_norm=True,
    )  # fmt: skip
    return F.linear(normed.view(z.shape), out_weight), Kept(scanned, rstd, delta, decays)


def backward(
    d_y: Tensor, kept: Kept, projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, norm_weight: Tensor, out_weight: Tensor, chunk: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the tensors that `forward` is given. Those of z, x, B, C and dt are written side by side, as
    `projected` has them."""
    scanned, rstd, delta, decays = kept
    E, H = norm_weight.shape[0], D.shape[0]
    z, xBC, dt = _parts(projected, conv_weight, E)
    x, B, C = _heads(_convolved(xBC, conv_weight, conv_bias), H, E, groups)
    d_projected = torch.empty_like(projected)
    d_z, d_xBC, d_dt = _parts(d_projected, conv_weight, E)
    d_convolved = xBC.new_empty(xBC.shape)
    d_x, d_B, d_C = _heads(d_convolved, H, E, groups)

    d_y = d_y.reshape(-1, d_y.shape[-1])
    d_scanned, d_norm, normed = _norm_backward(
        d_y @ out_weight, scanned.view(-1, E), z.reshape(-1, E), norm_weight, rstd, d_z.view(-1, E), groups, eps
    )
    d_scanned = d_scanned.view(x.shape)

    scores = ssd_bmm._bmm_chunk_fwd(C, B, chunk, output_dtype=torch.float32)
    entering = _entering(x, B, delta, decays, chunk, torch.float32)
    d_entering = ssd_chunk_scan._chunk_scan_bwd_dstates(C, decays, d_scanned, dtype=torch.float32)
    d_leaving, d_through, _, entering = ssd_state_passing._state_passing_bwd(
        entering.flatten(3), decays[..., -1], d_entering.flatten(3), has_initial_states=False, dstates_dtype=x.dtype,
        states_dtype=x.dtype, chunk_size=chunk,
    )  # fmt: skip
    d_leaving, entering = d_leaving.view(d_entering.shape), entering.view(d_entering.shape)
    _, d_delta, d_D = ssd_combined._chunk_scan_chunk_state_bwd_dx(
        x, delta, decays, B, scores, d_scanned, d_leaving, D=D, dx=d_x
    )
    d_B_left, d_to_end = ssd_chunk_state._chunk_state_bwd_db(x, delta, decays, d_leaving, B=B, ngroups=groups)
    d_C_carried, d_from_start = ssd_chunk_scan._chunk_scan_bwd_dC(entering, decays, d_scanned, C=C, ngroups=groups)
    d_scores = ssd_chunk_scan._chunk_scan_bwd_dcb(x, delta, decays, d_scanned, ngroups=groups)
    ssd_bmm._bmm_chunk_bwd(C, d_scores, residual=d_B_left, out=d_B)
    ssd_bmm._bmm_chunk_bwd(B, d_scores.transpose(-1, -2), residual=d_C_carried, out=d_C)
    d_from_start[..., -1] += d_through
    d_decays = ssd_chunk_scan._chunk_scan_bwd_ddAcs_stable(x, delta, decays, d_scanned, scores)
    d_decays += d_to_end + d_from_start.flip(-1).cumsum(-1).flip(-1)
    _, d_A, d_dt_bias = ssd_chunk_state._chunk_cumsum_bwd(
        d_decays, d_delta, dt, A, dt_bias=dt_bias, dt_softplus=True, ddt=d_dt
    )
    d_conv_weight, d_conv_bias = _convolution_backward(xBC, conv_weight, conv_bias, d_convolved, d_xBC)
    return d_projected, d_conv_weight, d_conv_bias, d_dt_bias, d_A, d_D, d_norm, d_y.t() @ normed


def _norm_backward(
    d_y: Tensor, x: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, d_z: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gated norm, x (rows, E): writes d_z, and returns the gradients of x and weight, and its outputs. As
    `layernorm_gated._layer_norm_bwd`; that has one program for a multiprocessor where a row is long, which then waits
    for one row at a time."""
    rows, E = x.shape
    size = E // groups
    width = triton.next_power_of_2(size)
    warps = min(max(width // 256, 1), 8)
    programs = min(rows, triton.cdiv(processors(x.device) * NORM_WARPS_PER_PROCESSOR // warps, groups))
    d_x, y = torch.empty_like(x), torch.empty_like(x)
    d_weight = torch.empty(programs, E, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device.index):
        layernorm_gated._layer_norm_bwd_kernel[programs, groups](
            x, weight, None, z, y, d_y, d_x, d_weight, None, d_z, None, rstd, x.stride(0), z.stride(0), y.stride(0),
            d_y.stride(0), d_x.stride(0), d_z.stride(0), d_weight.stride(0), 0, rows, size, eps,
            triton.cdiv(rows, programs), BLOCK_N=width, NORM_BEFORE_GATE=False, IS_RMS_NORM=True, num_warps=warps,
        )  # fmt: skip
    return d_x, d_weight.sum(0).to(weight.dtype), y


def _parts(projected: Tensor, conv_weight: Tensor, E: int) -> tuple[Tensor, ...]:
    """z (B, T, E), what is convolved (B, T, C) and dt (B, T, H), views."""
    channels = conv_weight.shape[0]
    return projected.split([E, channels, projected.shape[-1] - E - channels], -1)


def _heads(convolved: Tensor, H: int, E: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, H, P), B and C (B, T, G, N), views of (B, T, C)."""
    rows, T, channels = convolved.shape
    GN = (channels - E) // 2
    x, B, C = convolved.split([E, GN, GN], -1)
    of_groups = rows, T, groups, GN // groups
    return x.view(rows, T, H, E // H), B.view(of_groups), C.view(of_groups)


def _entering(x: Tensor, B: Tensor, delta: Tensor, decays: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """The state that each chunk begins with, (B, c, H, P, N)."""
    written = ssd_chunk_state._chunk_state_fwd(B, x, delta, decays, states_in_fp32=True)
    states, _ = ssd_state_passing._state_passing_fwd(
        written.flatten(3), decays[..., -1], chunk_size=chunk, out_dtype=dtype
    )
    return states.view(written.shape)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, T, C), whose rows begin at multiples of 8 numbers, as the kernel loads them."""
    y = x.new_empty(x.shape)
    cpp_functions.causal_conv1d_cuda.causal_conv1d_fwd(
        x.transpose(1, 2), weight, bias, None, None, y.transpose(1, 2), None, True
    )
    return y


def _convolution_backward(x: Tensor, weight: Tensor, bias: Tensor, d_y: Tensor, d_x: Tensor) -> tuple[Tensor, Tensor]:
    """Writes d_x, and returns the gradients of weight and bias."""
    d_weight, d_bias = (torch.zeros_like(m, dtype=torch.float32) for m in (weight, bias))
    cpp_functions.causal_conv1d_cuda.causal_conv1d_bwd(
        x.transpose(1, 2), weight, bias, d_y.transpose(1, 2), None, None, None, d_x.transpose(1, 2), d_weight, d_bias,
        None, True,
    )  # fmt: skip
    return d_weight.to(weight.dtype), d_bias.to(bias.dtype)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, kept = forward(*inputs)
        ctx.save_for_backward(*inputs[:8], *kept)
        ctx.settings = inputs[8:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return *backward(d_y, Kept(*saved[8:]), *saved[:8], *ctx.settings), None, None, None


def inner(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, chunk: int, groups: int, eps: float,
) -> Tensor:  # fmt: skip
    """The outputs of `forward`, which `backward` differentiates."""
    return _Inner.apply(
        projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, chunk, groups, eps
    )  # fmt: skip
