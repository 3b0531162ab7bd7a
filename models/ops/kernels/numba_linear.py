"""Products of one or a few rows with a matrix on a CPU, as a decode step makes them, compiled by numba.

Such a product reads each weight once and is done in microseconds: what costs is calling it, and waking threads for it.
One thread was faster than torch's two for a whole feed-forward layer of 37,000 to 8,500,000 weights: 1.2 to 5 times
with one row of x on 2 cores of an AMD EPYC, and level with four rows at 2,000,000 weights. A whole text goes to torch.

B: rows of x   D: width in   O: width out   F: hidden width
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.kernels.numba_runtime import addresses, at, compiled, sigmoid

FEW_ROWS, FEW_WEIGHTS = 4, 1 << 21  # so many rows at most; with more than one, so many weights at most


@compiled
def product(weight, x, out):
    """out (O) = weight (O, D) x (D), four rows of the weight at a time, which share each load of x."""
    zero = x.dtype.type(0)
    whole = weight.shape[0] // 4 * 4
    for o in range(0, whole, 4):
        a, b, c, d = zero, zero, zero, zero
        for i in range(x.shape[0]):
            a += weight[o, i] * x[i]
            b += weight[o + 1, i] * x[i]
            c += weight[o + 2, i] * x[i]
            d += weight[o + 3, i] * x[i]
        out[o], out[o + 1], out[o + 2], out[o + 3] = a, b, c, d
    for o in range(whole, weight.shape[0]):
        a = zero
        for i in range(x.shape[0]):
            a += weight[o, i] * x[i]
        out[o] = a


@compiled
def swiglu_row(gate_up, down, x, hidden, out):
    """x, out (D); hidden (2 F) is room to work in"""
    F = down.shape[1]
    product(gate_up, x, hidden)
    for f in range(F):
        hidden[f] *= sigmoid(hidden[f]) * hidden[F + f]
    product(down, hidden[:F], out)


@compiled
def _linear(kind, x_at, weight_at, out_at, B, D, O):
    x, weight, out = at(x_at, kind, (B, D)), at(weight_at, kind, (O, D)), at(out_at, kind, (B, O))
    for row in range(B):
        product(weight, x[row], out[row])


def suits(x: Tensor, *weights: Tensor) -> bool:
    """Whether these are for the kernels: a few rows, no gradient, one type throughout and not a 16-bit one."""
    if x.ndim != 2:
        return False
    rows, size = x.shape[0], sum(weight.numel() for weight in weights)
    return (
        not torch.is_grad_enabled() and type(x) is Tensor and x.dtype.itemsize >= 4 and x.is_contiguous()
        and (rows == 1 or (rows <= FEW_ROWS and size <= FEW_WEIGHTS))
        and all(weight.dtype is x.dtype and weight.is_contiguous() for weight in weights)
    )  # fmt: skip


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, D), weight (O, D), bias (O) or None -> (B, O), as `torch.nn.functional.linear`; x (..., D) goes there."""
    if not suits(x, weight):
        return F.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    _linear(*addresses(x, weight, out), x.shape[0], x.shape[1], weight.shape[0])
    return out if bias is None else out.add_(bias)
