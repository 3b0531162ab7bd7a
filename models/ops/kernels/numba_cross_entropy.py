"""Loss and gradient of a chunk of logits on a CPU, in place, one row at a time while it is in the cache, compiled by
numba.

M: rows   V: vocabulary. A task is one row.
"""

import math

import numpy as np
import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import LOG2_E, addresses, at, compiled, exp2, run_tasks

_INDEX = np.int64(0)


@compiled
def _largest(row, scratch):
    """By halves, each a vector operation, which a running maximum would not be. scratch: as many numbers as half the
    row."""
    half = (len(row) + 1) // 2
    for v in range(half):
        scratch[v] = row[v]
    for v in range(len(row) - half):
        scratch[v] = row[half + v] if row[half + v] > scratch[v] else scratch[v]
    while half > 1:
        width, half = half, (half + 1) // 2
        for v in range(width - half):
            scratch[v] = scratch[half + v] if scratch[half + v] > scratch[v] else scratch[v]
    return scratch[0]


@compiled
def _softmax_gradient(kind, logits_at, losses_at, targets_at, M, V, first, last):
    logits, losses, targets = at(logits_at, kind, (M, V)), at(losses_at, kind, (M,)), at(targets_at, _INDEX, (M,))
    scratch = np.empty((V + 1) // 2, logits.dtype)
    to_bits = logits.dtype.type(LOG2_E)
    for m in range(first, last):
        row, target = logits[m], targets[m]
        top = _largest(row, scratch)
        above = row[target] - top
        total = kind
        for v in range(V):
            row[v] = exp2((row[v] - top) * to_bits)
            total += row[v]
        losses[m] = math.log(total) - above
        share = logits.dtype.type(1) / total
        for v in range(V):
            row[v] *= share
        row[target] -= logits.dtype.type(1)


@torch.library.custom_op("lab::softmax_gradient_cpu", mutates_args=("logits",), device_types="cpu")
def _in_place(logits: Tensor, targets: Tensor) -> Tensor:
    M, V = logits.shape
    if targets.dtype is not torch.int64 or targets.shape != (M,) or targets.min() < 0 or targets.max() >= V:
        raise IndexError(f"targets must be {M} whole numbers from 0 to {V - 1}")
    losses, targets = logits.new_empty(M), targets.contiguous()
    run_tasks(_softmax_gradient, M, *addresses(logits, losses), targets.data_ptr(), M, V, work=4 * M * V)
    return losses


@_in_place.register_fake
def _(logits, targets):
    return logits.new_empty(logits.shape[0])


def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `models.ops.cross_entropy.softmax_gradient`, in float32 or float64; the gradient takes the logits' place."""
    return _in_place(logits, targets).sum(), logits
