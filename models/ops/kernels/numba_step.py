"""One decode step of the convolution, of the scan and of attention on a CPU, without autograd.

A step of a recurrence touches a few kilobytes, so the cost that matters is that of calling: no task splitting, one
call each. Attention splits its heads over threads once the cache is long enough to be worth waking them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import LOG2_E, compiled, exp2, run_tasks, sigmoid, softplus

_ONE_THREAD = 1 << 19  # elements of the cache below which a step stays on the calling thread


@compiled
def _scan_step(u, dt, A, B, C, D, z, dt_bias, gated, state, out):
    rows, E = u.shape
    N = A.shape[1]
    log2_e = u.dtype.type(LOG2_E)
    for b in range(rows):
        for e in range(E):
            delta = softplus(dt[b, e] + dt_bias[e])
            delta_u = delta * u[b, e]
            rate = delta * log2_e
            y = D[e] * u[b, e]
            for n in range(N):
                h = exp2(rate * A[e, n]) * state[b, e, n] + delta_u * B[b, n]
                state[b, e, n] = h
                y += h * C[b, n]
            if gated:
                y *= z[b, e] * sigmoid(z[b, e])
            out[b, e] = y


@compiled
def _conv_step(x, weight, bias, state, out):
    rows, E = x.shape
    W = weight.shape[1]
    for b in range(rows):
        for e in range(E):
            acc = bias[e]
            for w in range(W - 1):
                state[b, e, w] = state[b, e, w + 1]
                acc += state[b, e, w] * weight[e, w]
            state[b, e, W - 1] = x[b, e]
            acc += x[b, e] * weight[e, W - 1]
            out[b, e] = acc * sigmoid(acc)


def scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    state: Tensor,
) -> Tensor:  # fmt: skip
    """As `models.ops.selective_scan.step_reference`; every tensor float32, or every one float64."""
    out = torch.empty_like(u)
    arrays = [t.detach().numpy() for t in (u, dt, A, B, C, D, u if z is None else z, dt_bias)]
    _scan_step(*arrays, z is not None, state.numpy(), out.numpy())
    return out


def conv_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """As `models.ops.causal_conv1d.step_reference`; every tensor float32, or every one float64."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _conv_step(*(t.detach().numpy() for t in (x, weight, bias)), state.numpy(), out.numpy())
    return out


@compiled
def _attention_step(qkv, cos, sin, keys, values, length, out, first, last):
    """Tasks are (batch row, key-value head). cos, sin (P/2): of this position. Softmax without a second pass over
    the keys: the running maximum rescales what was summed before it rose."""
    K, P = keys.shape[1], keys.shape[3]
    H = qkv.shape[1] - 2 * K
    half = P // 2
    scale = qkv.dtype.type(1.0 / math.sqrt(P))
    zero, one = qkv.dtype.type(0), qkv.dtype.type(1)
    log2_e = qkv.dtype.type(LOG2_E)
    q = np.empty(P, qkv.dtype)
    y = np.empty(P, qkv.dtype)
    for task in range(first, last):
        b, kv = task // K, task % K
        for i in range(half):
            x0, x1 = qkv[b, H + kv, i], qkv[b, H + kv, half + i]
            keys[b, kv, length, i] = x0 * cos[i] - x1 * sin[i]
            keys[b, kv, length, half + i] = x1 * cos[i] + x0 * sin[i]
        for p in range(P):
            values[b, kv, length, p] = qkv[b, H + K + kv, p]
        for h in range(kv * (H // K), (kv + 1) * (H // K)):
            for i in range(half):
                x0, x1 = qkv[b, h, i] * scale, qkv[b, h, half + i] * scale
                q[i] = x0 * cos[i] - x1 * sin[i]
                q[half + i] = x1 * cos[i] + x0 * sin[i]
            for p in range(P):
                y[p] = zero
            top, total = zero, zero
            for s in range(length + 1):
                score = zero
                for p in range(P):
                    score += q[p] * keys[b, kv, s, p]
                if s == 0 or score > top:
                    shrink = zero if s == 0 else exp2((top - score) * log2_e)
                    top = score
                    total *= shrink
                    for p in range(P):
                        y[p] *= shrink
                weight = exp2((score - top) * log2_e)
                total += weight
                for p in range(P):
                    y[p] += weight * values[b, kv, s, p]
            for p in range(P):
                out[b, h * P + p] = y[p] * (one / total)


def attention_step(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    """One token of `models.ops.attention`, rotation and cache included.

    qkv (B, H + 2K, P): this token's queries, keys, values, not yet rotated. cos, sin (P/2): the rotation at its
    position. keys, values (B, K, max_len, P): the cache with `length` filled positions; the token's are written after
    them. Returns (B, H P). Every tensor float32, or every one float64.
    """
    rows, K, _, P = keys.shape
    H = qkv.shape[1] - 2 * K
    out = torch.empty(rows, H * P, dtype=qkv.dtype)
    arrays = [t.detach().numpy() for t in (qkv, cos, sin, keys, values)]
    if length * rows * H * P < _ONE_THREAD:
        _attention_step(*arrays, length, out.numpy(), 0, rows * K)
    else:
        run_tasks(_attention_step, rows * K, *arrays, length, out.numpy())
    return out
