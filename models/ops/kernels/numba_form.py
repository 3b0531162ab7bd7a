"""Form `numba`: the compiled CPU kernels, brought to the signatures of `models.ops`."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.ops import cross_entropy, ssd_passes
from models.ops.causal_conv1d import step_reference as causal_conv1d_step
from models.ops.experts import by_device as experts
from models.ops.kernels import (
    numba_branch,
    numba_conv,
    numba_cross_entropy,
    numba_gated_norm,
    numba_linear,
    numba_norm,
    numba_rotary,
    numba_scan,
    numba_ssd,
    numba_step,
    numba_swiglu,
)
from models.ops.lstm import fused as lstm
from models.ops.projections import apart as channel_projections
from models.ops.projections import apart as projections
from models.ops.rms_norm import no_sums as suits_sum
from models.ops.selective_scan import forward_flops
from models.ops.selective_scan import step_reference as selective_scan_step
from models.ops.ssd import chunked as chunked_ssd
from models.ops.ssd import step_reference as ssd_step
from models.ops.trapezoid import State as TrapezoidState
from models.ops.trapezoid import chunked as chunked_trapezoid
from models.ops.trapezoid import step as trapezoid_step

__all__ = [
    "attention_branch", "attention_step", "causal_conv1d", "causal_conv1d_step", "channel_projections", "experts",
    "experts_branch", "gated_rms_norm", "linear_cross_entropy", "linear_step", "lstm", "lstm_branch", "mamba2_branch",
    "mamba2_step", "mamba3_branch", "mamba3_step", "mamba_branch", "mamba_step", "projections", "residual_step",
    "rms_norm", "rotary_qkv", "selective_scan", "selective_scan_step", "ssd", "ssd_step", "suits_step", "suits_sum",
    "swiglu", "swiglu_branch", "trapezoid", "trapezoid_step",
]  # fmt: skip


_SMALL = (torch.bfloat16, torch.float16)


def _real(*tensors: Tensor | None) -> list[Any]:
    """The kernels compute in float32 or float64; 16-bit inputs are computed in float32."""
    return [t.float() if t is not None and t.dtype in _SMALL else t for t in tensors]


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse_gradients(*tensors: Tensor | None) -> None:
    """The compiled steps write the state in place, outside autograd: a gradient would silently be zero."""
    if _needs_gradient(*tensors):
        raise RuntimeError(
            "the compiled decode step has no gradient: call it under torch.no_grad(), or choose backend 'reference'"
        )


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    initial_state: Tensor | None = None, negative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = u.dtype
    u, dt, A, B, C, D, z, dt_bias, initial_state = _real(u, dt, A, B, C, D, z, dt_bias, initial_state)
    before = None if initial_state is None else initial_state.transpose(1, 2).contiguous()
    keep = _needs_gradient(u, dt, A, B, C, D, z, dt_bias, initial_state)
    y, state, _ = numba_scan.scan(
        u.contiguous(), dt.contiguous(), A, B.contiguous(), C.contiguous(), D, z, dt_bias, before, negative, keep
    )  # fmt: skip
    return y.to(dtype), state.transpose(1, 2)


def _passes(x: Tensor, dt: Tensor) -> Any:
    """ssd and trapezoid are matrix products, which torch does best. What surrounds them numba does in the type of the
    products; 16-bit products, whose decays are float32, have torch's passes."""
    return numba_ssd if x.dtype == dt.dtype and x.dtype not in _SMALL else ssd_passes


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None, negative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return chunked_ssd(x, dt, A, B, C, D, dt_bias, initial_state, negative, _passes(x, dt))


def trapezoid(
    x: Tensor, dt: Tensor, a: Tensor, trap: Tensor, angle: Tensor, B: Tensor, C: Tensor, z: Tensor | None, D: Tensor,
    dt_bias: Tensor, B_bias: Tensor, C_bias: Tensor, A_floor: float, initial: TrapezoidState | None = None,
) -> tuple[Tensor, TrapezoidState]:  # fmt: skip
    return chunked_trapezoid(
        x, dt, a, trap, angle, B, C, z, D, dt_bias, B_bias, C_bias, A_floor, initial, _passes(x, dt)
    )  # fmt: skip


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    dtype = x.dtype
    x, weight, bias, before = _real(x, weight, bias, before)
    return numba_conv.conv(x, weight, bias, before).to(dtype)


def mamba_step(uz: Tensor, *parameters_and_state: Any) -> Tensor:
    _refuse_gradients(uz, *parameters_and_state[:-1])
    return numba_step.mamba_step(uz, *parameters_and_state)


def mamba2_step(projected: Tensor, *parameters_and_state: Any) -> Tensor:
    _refuse_gradients(projected, *parameters_and_state[:-3])
    return numba_step.mamba2_step(projected, *parameters_and_state)


def mamba3_step(projected: Tensor, *parameters_and_state: Any) -> Tensor:
    _refuse_gradients(projected, *parameters_and_state[:-2])
    return numba_step.mamba3_step(projected, *parameters_and_state)


def attention_step(qkv: Tensor, base: float | None, keys: Tensor, values: Tensor, *places: int) -> Tensor:
    _refuse_gradients(qkv)
    return numba_step.attention_step(qkv, base, keys, values, *places)


attention_branch, lstm_branch = numba_branch.attention_branch, numba_branch.lstm_branch
mamba_branch, mamba2_branch = numba_branch.mamba_branch, numba_branch.mamba2_branch
mamba3_branch = numba_branch.mamba3_branch
experts_branch, swiglu_branch = numba_branch.experts_branch, numba_branch.swiglu_branch
suits_step = numba_linear.suits


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return numba_linear.linear_step(x, weight, bias)


def residual_step(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x + linear_step(y, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype in _SMALL:
        return numba_norm.rms_norm(x.float(), weight.float(), eps).to(x.dtype)
    return numba_norm.rms_norm(x, weight, eps)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    if y.dtype in _SMALL:
        y32, z32, weight32 = _real(y, z, weight)
        return numba_gated_norm.gated_rms_norm(y32, z32, weight32, eps, groups).to(y.dtype)
    return numba_gated_norm.gated_rms_norm(y, z, weight, eps, groups)


def swiglu(gate_up: Tensor) -> Tensor:
    if gate_up.dtype in _SMALL:
        return numba_swiglu.swiglu(gate_up.float()).to(gate_up.dtype)
    return numba_swiglu.swiglu(gate_up)


def rotary_qkv(qkv: Tensor, kv_heads: int, start: int, base: float) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.dtype in _SMALL:
        q, k, v = (x.to(qkv.dtype) for x in numba_rotary.rotary_qkv(qkv.float(), kv_heads, start, base))
        return q, k, v
    return numba_rotary.rotary_qkv(qkv, kv_heads, start, base)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """What lies between the products is compiled, except for logits of 16 bits."""
    small = hidden.dtype in _SMALL or torch.is_autocast_enabled("cpu")
    if small:
        return cross_entropy.linear_cross_entropy(hidden, weight, targets, bias)
    return cross_entropy.linear_cross_entropy(hidden, weight, targets, bias, numba_cross_entropy.softmax_gradient)


@register_flop_formula(torch.ops.lab.selective_scan_cpu)
def _(u_shape, dt_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    rows, T, E = u_shape
    return rows * T * forward_flops(E, A_shape[1])


@register_flop_formula(torch.ops.lab.selective_scan_cpu_backward)
def _(u_shape, dt_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    rows, T, E = u_shape
    return rows * T * 2 * forward_flops(E, A_shape[1])


@register_flop_formula(torch.ops.lab.causal_conv1d_cpu)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    rows, T, E = x_shape
    return rows * T * 2 * E * weight_shape[1]


@register_flop_formula(torch.ops.lab.causal_conv1d_cpu_backward)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    rows, T, E = x_shape
    return rows * T * 4 * E * weight_shape[1]
