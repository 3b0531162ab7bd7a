"""Root mean square normalisation on a CPU, one pass forward and one backward, compiled by numba.

M: rows   D: width. A task is `ROWS` rows; each writes its own partial sum of the weight's gradient.
"""

import math

import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import addresses, at, compiled, run_tasks

ROWS = 32


@compiled
def norm_row(x, weight, eps, out):
    """x, weight, out (D)"""
    total = x.dtype.type(0)
    for d in range(x.shape[0]):
        total += x[d] * x[d]
    scale = x.dtype.type(1.0 / math.sqrt(total / x.shape[0] + eps))
    for d in range(x.shape[0]):
        out[d] = x[d] * scale * weight[d]


@compiled
def _forward(kind, x_at, weight_at, out_at, eps, M, D, first, last):
    x, weight, out = at(x_at, kind, (M, D)), at(weight_at, kind, (D,)), at(out_at, kind, (M, D))
    for row in range(first * ROWS, min(last * ROWS, M)):
        norm_row(x[row], weight, eps, out[row])


@compiled
def _backward(kind, x_at, weight_at, d_out_at, d_x_at, d_weight_at, eps, M, D, first, last):
    """d_weight (tasks, D): partial sums."""
    x, weight, d_out = at(x_at, kind, (M, D)), at(weight_at, kind, (D,)), at(d_out_at, kind, (M, D))
    d_x, d_weight = at(d_x_at, kind, (M, D)), at(d_weight_at, kind, (last, D))
    for task in range(first, last):
        for d in range(D):
            d_weight[task, d] = kind
        for row in range(task * ROWS, min((task + 1) * ROWS, M)):
            total, inner = kind, kind
            for d in range(D):
                total += x[row, d] * x[row, d]
                inner += d_out[row, d] * weight[d] * x[row, d]
            scale = x.dtype.type(1.0 / math.sqrt(total / D + eps))
            along = inner * scale * scale * scale / x.dtype.type(D)
            for d in range(D):
                d_x[row, d] = d_out[row, d] * weight[d] * scale - x[row, d] * along
                d_weight[task, d] += d_out[row, d] * x[row, d] * scale


def _shape(x: Tensor) -> tuple[int, int, int]:
    """M, D and the number of tasks."""
    D = x.shape[-1]
    M = x.numel() // D
    return M, D, -(-M // ROWS)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    M, D, tasks = _shape(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    run_tasks(_forward, tasks, *addresses(x, weight, out), eps, M, D, work=M * D)
    return out


_norm = torch.library.custom_op("lab::rms_norm_cpu", _normalise, mutates_args=(), device_types="cpu")


@_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("lab::rms_norm_cpu_backward", mutates_args=(), device_types="cpu")
def _norm_backward(x: Tensor, weight: Tensor, eps: float, d_out: Tensor) -> tuple[Tensor, Tensor]:
    M, D, tasks = _shape(x)
    x, d_out = x.contiguous(), d_out.contiguous()
    d_x = torch.empty_like(x)
    d_weight = torch.empty(tasks, D, dtype=x.dtype)
    run_tasks(_backward, tasks, *addresses(x, weight, d_out, d_x, d_weight), eps, M, D, work=M * D)
    return d_x, d_weight.sum(0)


@_norm_backward.register_fake
def _(x, weight, eps, d_out):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, d_out):
    d_x, d_weight = _norm_backward(*ctx.saved_tensors, ctx.eps, d_out)
    return d_x, d_weight, None


_norm.register_autograd(_differentiate, setup_context=_save)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `models.ops.rms_norm.reference`, in float32 or float64."""
    if not torch.is_grad_enabled() and x.is_cpu:
        # without autograd the operator's dispatch would cost more than a decode step's norm
        return _normalise(x, weight, eps)
    return _norm(x, weight, eps)
