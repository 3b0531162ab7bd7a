"""The kernels of whole sequences as operators of torch's, for `torch.compile`, which calls an operator as it is,
forward and backward, and keeps its graph whole around it.

torch has to be told what an operator returns, by tensors without data, and what its gradients are, which is an operator
too. Both are the code that runs uncompiled, the libraries' own but for Mamba-2's: the first with no kernel launched,
the second given what the forward pass kept.

An operator returns new memory, and tensors only: an empty one stands for what there is not.

B: batch   T: time   E: channels   N: state size   H: heads   P: head width   G: groups   W: convolution taps
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (the libraries are installed on CUDA machines only)

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from causal_conv1d import cpp_functions
from mamba_ssm.ops import selective_scan_interface
from mamba_ssm.ops.triton import ssd_combined
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import functional as F

from models.ops.kernels import cuda_mamba2
from models.ops.kernels.without_data import kernels_without_data


def operator(compute: Callable[..., Any]) -> CustomOpDef:
    """`lab::` and the function's name. What it is given keeps the order of its strides, and may be padded: to have the
    strides themselves, the compiler would copy the products that it pads."""
    made = torch.library.custom_op(
        f"lab::{compute.__name__}", compute, mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
    )

    @made.register_fake
    @wraps(compute)
    def _(*inputs: Any) -> Any:
        with kernels_without_data():
            return compute(*inputs)

    return made


def differentiate(
    forward: CustomOpDef, backward: CustomOpDef, results: int, kept: tuple[int, ...], numbers: int = 0
) -> None:
    """Let autograd call `backward` with the gradients of the first `results` outputs of `forward`, then with the inputs
    of `forward` and, before the last `numbers` of these, which are no tensors, the outputs that are `kept`. It returns
    a gradient for every tensor."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        count = len(inputs) - numbers
        ctx.save_for_backward(*inputs[:count], *(output[i] for i in kept))
        ctx.numbers, ctx.given = inputs[count:], [x is not None for x in inputs[:count]]

    def gradients(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:
        found = backward(*of_outputs[:results], *ctx.saved_tensors, *ctx.numbers)
        return *(x if is_given else None for x, is_given in zip(found, ctx.given, strict=True)), *[None] * numbers

    forward.register_autograd(gradients, setup_context=keep)


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


# ------------------------------------------------------------------------------------------------ short convolution


def laid_out(x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (B, T, E) as (B, E, T), and of before (B, E, W) the last W - 1 inputs, as the kernel reads them: x from nothing
    before it where it lies, if it can; else copied, with channels next to each other, in multiples of 8."""
    if before is not None:
        before = before[:, :, 1:].transpose(1, 2).contiguous().transpose(1, 2).to(x.dtype)
    if before is not None or not _suits(x):
        # not `contiguous`: a slice of one token counts as that, with the strides and the offset in what it was cut from
        x = x.clone(memory_format=torch.contiguous_format)
    return x.transpose(1, 2), before


def _suits(x: Tensor) -> bool:
    """Time innermost; or channels, which the kernel loads 8 at a time."""
    return x.stride(1) == 1 or (
        x.stride(2) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == x.storage_offset() % 8 == 0
    )  # fmt: skip


@operator
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    """`causal_conv1d_fn` with SiLU. x (B, T, E), weight (E, W), bias (E), before (B, E, W)."""
    inputs, first = laid_out(x, before)
    return cpp_functions.causal_conv1d_fwd_function(inputs, weight, bias, None, first, None, True).transpose(1, 2)


@operator
def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, first = laid_out(x, before)
    dx, dweight, dbias, dfirst = cpp_functions.causal_conv1d_bwd_function(
        inputs, weight, bias, laid_out(dy, None)[0], None, first, None, None, before is not None, True
    )
    dbefore = None if before is None else F.pad(dfirst, (1, 0)).to(before.dtype)
    return dx.transpose(1, 2), dweight, dbias, _or_nothing(dbefore, dy)


differentiate(causal_conv1d, causal_conv1d_backward, results=1, kept=())


# ---------------------------------------------------------------------------------------------------- selective scan


@operator
def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u, delta, z (B, E, T) and B, C (B, N, T) with time innermost; A (E, N), D, delta_bias (E) in float32. Returns the
    outputs, those before the gate where there is one, and a decay and a state at the end of every chunk."""
    y, states, *gated = selective_scan_interface.selective_scan_cuda.fwd(
        u, delta, A, B[:, None], C[:, None], D, z, delta_bias, True
    )
    return (gated[0], y, states) if gated else (y, y.new_empty(0), states)


@operator
def scan_backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
    delta_bias: Tensor, ungated: Tensor, states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Without the gradient of the last state."""
    before_gate = None if z is None else ungated
    du, ddelta, dA, dB, dC, dD, dbias, *dz = selective_scan_interface.selective_scan_cuda.bwd(
        u, delta, A, B[:, None], C[:, None], D, z, delta_bias, _time_innermost(dy), states, before_gate, None, True,
        False,
    )  # fmt: skip
    return du, ddelta, dA, dB[:, 0], dC[:, 0], dD, _or_nothing(dz[0] if dz else None, dy), dbias


differentiate(scan, scan_backward, results=1, kept=(1, 2))


def _time_innermost(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_scan_fn` with the softplus and the last state (B, E, N)."""
    u, delta, B, C = (_time_innermost(x) for x in (u, delta, B, C))
    y, _, states = scan(u, delta, A, B, C, D, None if z is None else _time_innermost(z), delta_bias)
    return y, states[:, :, -1, 1::2]


# ------------------------------------------------------------------------------------------------------- Mamba-2


@operator
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial_state: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mamba_chunk_scan_combined` with the softplus and the last state. x (B, T, H, P), dt (B, T, H), A, D, dt_bias
    (H), B, C (B, T, G, N), initial_state (B, H, P, N)."""
    y, _, _, _, _, final = ssd_combined._mamba_chunk_scan_combined_fwd(
        x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, initial_states=initial_state, dt_softplus=True
    )
    return y, final


@operator
def ssd_backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None, y: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, ddt, dA, dB, dC, dD, _, dbias, dinitial = ssd_combined._mamba_chunk_scan_combined_bwd(
        dy, x, dt, A, B, C, y, chunk, D=D, dt_bias=dt_bias, initial_states=initial_state, dfinal_states=dfinal,
        dt_softplus=True,
    )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dbias, _or_nothing(dinitial, dy)


differentiate(ssd, ssd_backward, results=2, kept=(0,), numbers=1)


@operator
def mamba2(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, chunk: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`cuda_mamba2.forward`: the outputs, and what it keeps."""
    y, kept = cuda_mamba2.forward(
        projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, chunk, groups, eps
    )
    return y, kept.scanned, kept.rstd, kept.delta, kept.decays


@operator
def mamba2_backward(
    dy: Tensor, projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, scanned: Tensor, rstd: Tensor, delta: Tensor, decays: Tensor, chunk: int,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kept = cuda_mamba2.Kept(scanned, rstd, delta, decays)
    return cuda_mamba2.backward(
        dy, kept, projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, chunk, groups, eps
    )


differentiate(mamba2, mamba2_backward, results=1, kept=(1, 2, 3, 4), numbers=3)


def mamba2_inner(*inputs: Any) -> Tensor:
    """`cuda_mamba2.inner`."""
    return mamba2(*inputs)[0]


# ------------------------------------------------------------------------------------------------------- Mamba-3

MAMBA3_DTYPE = torch.bfloat16  # of what the kernels read, whatever they are given
MAMBA3_CHUNK = 64  # their default


class Kept:
    """In place of the context that autograd hands to a `torch.autograd.Function`."""

    def __init__(self, *saved: Tensor | None, **settings: Any) -> None:
        self.saved_tensors = saved
        vars(self).update(settings)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@operator
def trapezoid(
    C: Tensor, B: Tensor, x: Tensor, log_alpha: Tensor, delta: Tensor, trap: Tensor, C_bias: Tensor, B_bias: Tensor,
    angle: Tensor, D: Tensor, z: Tensor | None, theta: Tensor | None, ssm: Tensor | None, previous_B: Tensor | None,
    previous_x: Tensor | None, differentiable: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """`mamba3_siso_combined` with the last states, its inputs in the types that it converts them to. C, B (B, T, G, N),
    x, z (B, T, H, P), log_alpha, delta, trap (B, H, T), angle (B, T, H, S). Returns the outputs, the states theta, ssm,
    B and x, and ten tensors for the backward pass, empty where there is to be none."""
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import _Mamba3Function

    kept = Kept(needs_input_grad=(differentiable,))
    y, *after = _Mamba3Function.forward(
        kept, C, B, x, log_alpha, delta, trap, C_bias, B_bias, angle, D, z, theta, ssm, previous_B, previous_x, None,
        MAMBA3_CHUNK, True,
    )  # fmt: skip
    saved = kept.saved_tensors
    inner = (saved[9], *saved[16:25]) if saved else [None] * 10
    last = [m.clone() for m in after]  # x of the last token is a part of x
    return y, *last, *(_or_nothing(m, y) for m in inner)  # pyright: ignore[reportReturnType]


@operator
def trapezoid_backward(
    dy: Tensor, dtheta: Tensor, dssm: Tensor, dprevious_B: Tensor, dprevious_x: Tensor, C: Tensor, B: Tensor, x: Tensor,
    log_alpha: Tensor, delta: Tensor, trap: Tensor, C_bias: Tensor, B_bias: Tensor, angle: Tensor, D: Tensor,
    z: Tensor | None, theta: Tensor | None, ssm: Tensor | None, previous_B: Tensor | None, previous_x: Tensor | None,
    angles: Tensor, ungated: Tensor, states: Tensor, log_alphas: Tensor, log_alpha_of_chunks: Tensor, C_turned: Tensor,
    B_turned: Tensor, CB: Tensor, scale: Tensor, gamma: Tensor, differentiable: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import _Mamba3Function

    kept = Kept(
        C, B, x, log_alpha, delta, trap, C_bias, B_bias, angle, angles, D, z, ssm, previous_B, previous_x, dy, ungated,
        states, log_alphas, log_alpha_of_chunks, C_turned, B_turned, CB, scale, gamma, None, None,
        chunk_size=MAMBA3_CHUNK, has_D=True, has_Z=z is not None, has_input_state=ssm is not None,
        return_final_states=True, has_varlen=False,
    )  # fmt: skip
    of_inputs = _Mamba3Function.backward(kept, dy, dtheta, dssm, dprevious_B, dprevious_x)
    return tuple(_or_nothing(m, dy) for m in of_inputs[:15])  # pyright: ignore[reportReturnType]


differentiate(trapezoid, trapezoid_backward, results=5, kept=tuple(range(5, 15)), numbers=1)


def mamba3_siso_combined(
    C: Tensor, B: Tensor, x: Tensor, log_alpha: Tensor, delta: Tensor, trap: Tensor, C_bias: Tensor, B_bias: Tensor,
    angle: Tensor, D: Tensor, z: Tensor | None, before: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The official function of that name, with its last states."""
    C, B, x, trap, angle = (m.to(MAMBA3_DTYPE) for m in (C, B, x, trap, angle))
    z = None if z is None else z.to(MAMBA3_DTYPE)
    states = (None,) * 4 if before is None else before
    differentiable = torch.is_grad_enabled()
    return trapezoid(
        C, B, x, log_alpha, delta, trap, C_bias, B_bias, angle, D, z, *states, differentiable
    )[:5]  # fmt: skip
