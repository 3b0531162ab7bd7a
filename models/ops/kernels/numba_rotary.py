"""Rotary positions on a CPU in one pass, compiled by numba. A rotation's gradient is the rotation back.

B: batch   T: time   J: heads of queries, keys and values   P: head width. A task is `ROWS` of the B T rows.
"""

import torch
from torch import Tensor

from models.ops.attention import rotary_table
from models.ops.kernels.numba_runtime import addresses, at, compiled, run_tasks

ROWS = 32


@compiled
def _rotate_rows(kind, x_at, out_at, table, cos_at, sin_at, direction, M, T, J, P, rotated, start, first, last):
    """cos, sin (positions, P/2): positions start..start+T-1 for a sequence's rows. direction: 1, or -1 for back."""
    half = P // 2
    x, out = at(x_at, kind, (M, J, 2, half)), at(out_at, kind, (M, J, 2, half))
    cos, sin = at(cos_at, table, (start + T, half)), at(sin_at, table, (start + T, half))
    for row in range(first * ROWS, min(last * ROWS, M)):
        t = start + row % T
        for j in range(rotated):
            for i in range(half):
                a, b = x[row, j, 0, i], x[row, j, 1, i]
                c, s = x.dtype.type(cos[t, i]), x.dtype.type(sin[t, i]) * direction
                out[row, j, 0, i] = a * c - b * s
                out[row, j, 1, i] = b * c + a * s
        for j in range(rotated, J):
            for i in range(half):
                out[row, j, 0, i] = x[row, j, 0, i]
                out[row, j, 1, i] = x[row, j, 1, i]


def _apply(x: Tensor, cos: Tensor, sin: Tensor, rotated: int, start: int, back: bool) -> Tensor:
    B, T, J, P = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    arrays = addresses(x, out)
    direction = type(arrays[0])(-1 if back else 1)
    sizes = (B * T, T, J, P, rotated, start)
    run_tasks(_rotate_rows, -(-B * T // ROWS), *arrays, *addresses(cos, sin), direction, *sizes, work=x.numel())
    return out


_rotated = torch.library.custom_op("lab::rotate_cpu", _apply, mutates_args=(), device_types="cpu")


@_rotated.register_fake
def _(x, cos, sin, rotated, start, back):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    _, *ctx.tables, ctx.rotated, ctx.start, ctx.back = inputs


def _differentiate(ctx, d_out):
    return _rotated(d_out, *ctx.tables, ctx.rotated, ctx.start, not ctx.back), None, None, None, None, None


_rotated.register_autograd(_differentiate, setup_context=_save)


def rotate(x: Tensor, rotated: int, start: int, base: float) -> Tensor:
    """As `models.ops.attention.rotate`, in float32 or float64."""
    cos, sin = rotary_table(start + x.shape[1], x.shape[3], base, x.device)
    if not torch.is_grad_enabled() and x.is_cpu:
        return _apply(x, cos, sin, rotated, start, False)
    return _rotated(x, cos, sin, rotated, start, False)
