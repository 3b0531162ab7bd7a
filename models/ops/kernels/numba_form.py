"""Form `numba`: the compiled CPU kernels, brought to the signatures of `models.ops`."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.ops.kernels import numba_conv, numba_norm, numba_scan, numba_step
from models.ops.selective_scan import forward_flops

__all__ = [
    "attention_step", "causal_conv1d", "causal_conv1d_step", "rms_norm", "selective_scan", "selective_scan_step",
]  # fmt: skip


def _real(*tensors: Tensor | None) -> list[Any]:
    """The kernels compute in float32 or float64; 16-bit inputs are computed in float32."""
    small = (torch.bfloat16, torch.float16)
    return [t.float() if t is not None and t.dtype in small else t for t in tensors]


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
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = u.dtype
    u, dt, A, B, C, D, z, dt_bias, initial_state = _real(u, dt, A, B, C, D, z, dt_bias, initial_state)
    before = None if initial_state is None else initial_state.transpose(1, 2).contiguous()
    keep = _needs_gradient(u, dt, A, B, C, D, z, dt_bias, initial_state)
    y, state, _ = numba_scan.scan(
        u.contiguous(), dt.contiguous(), A, B.contiguous(), C.contiguous(), D, z, dt_bias, before, keep
    )  # fmt: skip
    return y.to(dtype), state.transpose(1, 2)


def selective_scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    state: Tensor,
) -> Tensor:  # fmt: skip
    _refuse_gradients(u, dt, A, B, C, D, z, dt_bias, state)
    u32, dt, A, B, C, D, z, dt_bias, work = _real(u, dt, A, B, C, D, z, dt_bias, state)
    y = numba_step.scan_step(u32, dt, A, B, C, D, z, dt_bias, work)
    if work is not state:
        state.copy_(work)
    return y.to(u.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    dtype = x.dtype
    x, weight, bias, before = _real(x, weight, bias, before)
    return numba_conv.conv(x, weight, bias, before).to(dtype)


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    _refuse_gradients(x, weight, bias, state)
    x32, weight, bias, work = _real(x, weight, bias, state)
    y = numba_step.conv_step(x32, weight, bias, work)
    if work is not state:
        state.copy_(work)
    return y.to(x.dtype)


def attention_step(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    _refuse_gradients(qkv)
    return numba_step.attention_step(qkv, cos, sin, keys, values, length)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32, weight = _real(x, weight)
    return numba_norm.rms_norm(x32, weight, eps).to(x.dtype)


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
