"""The gated norm of Mamba-2, norm(y silu(z)) weight, on a CPU: one pass forward and one backward, compiled by numba.

M: rows   E: width   G: groups, each normalised by itself. A task is `ROWS` rows; each writes its own partial sum of the
weight's gradient.
"""

import math

import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import addresses, at, compiled, run_tasks, sigmoid

ROWS = 32


@compiled
def _forward(kind, y_at, z_at, weight_at, out_at, eps, M, G, E, first, last):
    y, z, out = at(y_at, kind, (M, G, E)), at(z_at, kind, (M, G, E)), at(out_at, kind, (M, G, E))
    weight = at(weight_at, kind, (G, E))
    for row in range(first * ROWS, min(last * ROWS, M)):
        for g in range(G):
            for e in range(E):
                out[row, g, e] = y[row, g, e] * z[row, g, e] * sigmoid(z[row, g, e])
            total = kind
            for e in range(E):
                total += out[row, g, e] * out[row, g, e]
            scale = y.dtype.type(1.0 / math.sqrt(total / E + eps))
            for e in range(E):
                out[row, g, e] *= scale * weight[g, e]


@compiled
def _backward(
    kind, y_at, z_at, weight_at, d_out_at, scratch_at, d_y_at, d_z_at, d_weight_at, eps, M, G, E, first, last
):
    """d_weight (tasks, G, E): partial sums. scratch (tasks, 2, E): y silu(z) and sigmoid(z) of a row's group."""
    y, z, d_out = at(y_at, kind, (M, G, E)), at(z_at, kind, (M, G, E)), at(d_out_at, kind, (M, G, E))
    d_y, d_z = at(d_y_at, kind, (M, G, E)), at(d_z_at, kind, (M, G, E))
    weight, d_weight = at(weight_at, kind, (G, E)), at(d_weight_at, kind, (last, G, E))
    scratch = at(scratch_at, kind, (last, 2, E))
    one = y.dtype.type(1)
    for task in range(first, last):
        u, s = scratch[task, 0], scratch[task, 1]
        for g in range(G):
            for e in range(E):
                d_weight[task, g, e] = kind
        for row in range(task * ROWS, min((task + 1) * ROWS, M)):
            for g in range(G):
                for e in range(E):
                    s[e] = sigmoid(z[row, g, e])
                for e in range(E):
                    u[e] = y[row, g, e] * z[row, g, e] * s[e]
                total, inner = kind, kind
                for e in range(E):
                    total += u[e] * u[e]
                    inner += d_out[row, g, e] * weight[g, e] * u[e]
                scale = y.dtype.type(1.0 / math.sqrt(total / E + eps))
                along = inner * scale * scale * scale / y.dtype.type(E)
                for e in range(E):
                    d_weight[task, g, e] += d_out[row, g, e] * u[e] * scale
                for e in range(E):
                    u[e] = d_out[row, g, e] * weight[g, e] * scale - u[e] * along
                for e in range(E):
                    d_y[row, g, e] = u[e] * z[row, g, e] * s[e]
                for e in range(E):
                    # silu' = s (1 + z (1 - s))
                    d_z[row, g, e] = u[e] * y[row, g, e] * s[e] * (one + z[row, g, e] * (one - s[e]))


def _sizes(y: Tensor, groups: int) -> tuple[int, int, int, int]:
    """M, G, E and the number of tasks."""
    M = y.numel() // y.shape[-1]
    return M, groups, y.shape[-1] // groups, -(-M // ROWS)


def _normalise(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    M, G, E, tasks = _sizes(y, groups)
    y, z = y.contiguous(), z.contiguous()
    out = torch.empty_like(y)
    run_tasks(_forward, tasks, *addresses(y, z, weight, out), eps, M, G, E, work=4 * y.numel())
    return out


_norm = torch.library.custom_op("lab::gated_rms_norm_cpu", _normalise, mutates_args=(), device_types="cpu")


@_norm.register_fake
def _(y, z, weight, eps, groups):
    return y.new_empty(y.shape)


@torch.library.custom_op("lab::gated_rms_norm_cpu_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    M, G, E, tasks = _sizes(y, groups)
    y, z, d_out = y.contiguous(), z.contiguous(), d_out.contiguous()
    d_y, d_z = torch.empty_like(y), torch.empty_like(z)
    d_weight, scratch = y.new_empty(tasks, G, E), y.new_empty(tasks, 2, E)
    arrays = addresses(y, z, weight, d_out, scratch, d_y, d_z, d_weight)
    run_tasks(_backward, tasks, *arrays, eps, M, G, E, work=8 * y.numel())
    return d_y, d_z, d_weight.sum(0).flatten()


@_norm_backward.register_fake
def _(y, z, weight, eps, groups, d_out):
    return y.new_empty(y.shape), z.new_empty(z.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    y, z, weight, ctx.eps, ctx.groups = inputs
    ctx.save_for_backward(y, z, weight)


def _differentiate(ctx, d_out):
    return *_norm_backward(*ctx.saved_tensors, ctx.eps, ctx.groups, d_out), None, None


_norm.register_autograd(_differentiate, setup_context=_save)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """As `models.ops.rms_norm.gated`, in float32 or float64."""
    if not torch.is_grad_enabled() and y.is_cpu:
        return _normalise(
            y, z, weight, eps, groups
        )  # as for the plain norm: a decode step's work is less than dispatch
    return _norm(y, z, weight, eps, groups)
