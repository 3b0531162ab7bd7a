"""One decode step of the convolution and of the scan on a CPU, without autograd.

A step touches a few kilobytes, so the cost that matters is that of calling: no task splitting, one call each.
"""

import math

import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import compiled, exp2, sigmoid, softplus

LOG2_E = math.log2(math.e)


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
