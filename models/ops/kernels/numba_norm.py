"""Root mean square normalisation on a CPU, one pass forward and one backward, compiled by numba.

M: rows   D: width. A task is `ROWS` rows; each writes its own partial sum of the weight's gradient.
"""

import math

import numpy as np
import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import compiled, run_tasks

ROWS = 32


@compiled
def _forward(x, weight, eps, out, first, last):
    M, D = x.shape
    zero = x.dtype.type(0)
    for row in range(first * ROWS, min(last * ROWS, M)):
        total = zero
        for d in range(D):
            total += x[row, d] * x[row, d]
        scale = x.dtype.type(1.0 / math.sqrt(total / D + eps))
        for d in range(D):
            out[row, d] = x[row, d] * scale * weight[d]


@compiled
def _backward(x, weight, eps, d_out, d_x, d_weight, first, last):
    """d_weight (tasks, D): partial sums."""
    M, D = x.shape
    zero = x.dtype.type(0)
    for task in range(first, last):
        for d in range(D):
            d_weight[task, d] = zero
        for row in range(task * ROWS, min((task + 1) * ROWS, M)):
            total, inner = zero, zero
            for d in range(D):
                total += x[row, d] * x[row, d]
                inner += d_out[row, d] * weight[d] * x[row, d]
            scale = x.dtype.type(1.0 / math.sqrt(total / D + eps))
            along = inner * scale * scale * scale / x.dtype.type(D)
            for d in range(D):
                d_x[row, d] = d_out[row, d] * weight[d] * scale - x[row, d] * along
                d_weight[task, d] += d_out[row, d] * x[row, d] * scale


def _rows(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(-1, x.shape[-1]).numpy()


def _tasks(x: Tensor) -> int:
    return (x.numel() // x.shape[-1] + ROWS - 1) // ROWS


@torch.library.custom_op("lab::rms_norm_cpu", mutates_args=(), device_types="cpu")
def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    run_tasks(_forward, _tasks(x), _rows(x), weight.detach().numpy(), eps, _rows(out))
    return out


@_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("lab::rms_norm_cpu_backward", mutates_args=(), device_types="cpu")
def _norm_backward(x: Tensor, weight: Tensor, eps: float, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_x = torch.empty(x.shape, dtype=x.dtype)
    d_weight = torch.empty(_tasks(x), x.shape[-1], dtype=x.dtype)
    arrays = (_rows(x), weight.detach().numpy(), eps, _rows(d_out), _rows(d_x), d_weight.numpy())
    run_tasks(_backward, _tasks(x), *arrays)
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
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        # without autograd the operator's dispatch would cost more than a decode step's norm
        out = torch.empty(x.shape, dtype=x.dtype)
        run_tasks(_forward, _tasks(x), _rows(x), weight.detach().numpy(), eps, _rows(out))
        return out
    return _norm(x, weight, eps)
