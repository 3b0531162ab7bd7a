"""The short causal convolution with SiLU on a CPU, forward and hand-written backward, compiled by numba.

B batch, T time, E channels, W taps, L lanes. As in `numba_scan`, a task is one (batch row, L neighbouring
channels) and the inner loops run over channels. torch's depthwise convolution wants channels before time, which
would cost two transposes each way; this one reads (B, T, E) as the projections write it.
"""

import numpy as np
import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import compiled, row, run_tasks, sigmoid, with_rows

L = 64


@compiled
def _forward(x, weight, bias, before, out, first, last):
    """weight (W, E); before (B, W, E): the W inputs that precede x, oldest first."""
    T, E = x.shape[1], x.shape[2]
    W = weight.shape[0]
    groups = (E + L - 1) // L
    taps = np.empty((W, L), x.dtype)  # taps[w]: the weights of this task's channels
    window = np.empty((W, L), x.dtype)  # window[s % W]: input s, for the last W inputs
    acc = np.empty(L, x.dtype)
    for task in range(first, last):
        b, e0 = task // groups, (task % groups) * L
        lanes = min(L, E - e0)
        for w in range(W):
            for e in range(lanes):
                taps[w, e] = weight[w, e0 + e]
                window[w, e] = before[b, w, e0 + e]
        for t in range(T):
            x_t = row(x, b, t)
            for e in range(lanes):
                window[t % W, e] = x_t[e0 + e]
                acc[e] = bias[e0 + e]
            for w in range(W):
                slot = (t + 1 + w) % W
                for e in range(lanes):
                    acc[e] += taps[w, e] * window[slot, e]
            for e in range(lanes):
                out[b, t, e0 + e] = acc[e] * sigmoid(acc[e])


@compiled
def _backward(x, weight, bias, before, d_out, d_x, d_weight, d_bias, d_before, first, last):
    """d_weight (B, W, E) and d_bias (B, E) are partial sums."""
    T, E = x.shape[1], x.shape[2]
    W = weight.shape[0]
    groups = (E + L - 1) // L
    zero, one = x.dtype.type(0), x.dtype.type(1)
    taps = np.empty((W, L), x.dtype)
    window = np.empty((W, L), x.dtype)
    d_taps = np.empty((W, L), x.dtype)
    d_window = np.empty((W, L), x.dtype)  # d_window[s % W]: gradient of input s so far
    sum_bias = np.empty(L, x.dtype)
    g = np.empty(L, x.dtype)
    for task in range(first, last):
        b, e0 = task // groups, (task % groups) * L
        lanes = min(L, E - e0)
        for e in range(lanes):
            sum_bias[e] = zero
        for w in range(W):
            for e in range(lanes):
                taps[w, e] = weight[w, e0 + e]
                window[w, e] = before[b, w, e0 + e]
                d_taps[w, e] = zero
                d_window[w, e] = zero
        for t in range(T + W):
            # slot t % W held input t - W, whose gradient is now whole; it becomes input t
            slot = t % W
            for e in range(lanes):
                if t >= W:
                    d_x[b, t - W, e0 + e] = d_window[slot, e]
                else:
                    d_before[b, t, e0 + e] = d_window[slot, e]
                d_window[slot, e] = zero
            if t >= T:
                continue
            x_t = row(x, b, t)
            for e in range(lanes):
                window[slot, e] = x_t[e0 + e]
                g[e] = bias[e0 + e]
            for w in range(W):
                slot = (t + 1 + w) % W
                for e in range(lanes):
                    g[e] += taps[w, e] * window[slot, e]
            for e in range(lanes):
                sig = sigmoid(g[e])
                g[e] = d_out[b, t, e0 + e] * sig * (one + g[e] * (one - sig))
                sum_bias[e] += g[e]
            for w in range(W):
                slot = (t + 1 + w) % W
                for e in range(lanes):
                    d_taps[w, e] += g[e] * window[slot, e]
                    d_window[slot, e] += g[e] * taps[w, e]
        for e in range(lanes):
            d_bias[b, e0 + e] = sum_bias[e]
        for w in range(W):
            for e in range(lanes):
                d_weight[b, w, e0 + e] = d_taps[w, e]


def _arrays(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None) -> list[np.ndarray]:
    rows, _, E = x.shape
    W = weight.shape[1]
    before = x.new_zeros(rows, W, E) if before is None else before.transpose(1, 2).contiguous()
    return [with_rows(y) for y in (x, weight.t().contiguous(), bias, before)]


@torch.library.custom_op("lab::causal_conv1d_cpu", mutates_args=(), device_types="cpu")
def conv(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None) -> Tensor:
    """Shapes as `models.ops.causal_conv1d.causal_conv1d`; returns y (B, T, E)."""
    out = x.new_empty(x.shape)
    tasks = x.shape[0] * ((x.shape[2] + L - 1) // L)
    run_tasks(_forward, tasks, *_arrays(x, weight, bias, before), out.numpy())
    return out


@conv.register_fake
def _(x, weight, bias, before):
    return x.new_empty(x.shape)


@torch.library.custom_op("lab::causal_conv1d_cpu_backward", mutates_args=(), device_types="cpu")
def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the W inputs before x, (B, E, W)."""
    rows, _, E = x.shape
    W = weight.shape[1]
    d_x, d_before = x.new_empty(x.shape), x.new_empty(rows, W, E)
    d_weight, d_bias = x.new_empty(rows, W, E), x.new_empty(rows, E)
    results = [y.numpy() for y in (d_x, d_weight, d_bias, d_before)]
    tasks = rows * ((E + L - 1) // L)
    run_tasks(_backward, tasks, *_arrays(x, weight, bias, before), d_out.contiguous().numpy(), *results)
    return d_x, d_weight.sum(0).t(), d_bias.sum(0), d_before.transpose(1, 2)


@conv_backward.register_fake
def _(x, weight, bias, before, d_out):
    rows, _, E = x.shape
    W = weight.shape[1]
    d_before = x.new_empty(rows, W, E).transpose(1, 2)
    return x.new_empty(x.shape), x.new_empty(W, E).t(), torch.empty_like(bias), d_before


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_out):
    x, weight, bias, before = ctx.saved_tensors
    *gradients, d_before = conv_backward(x, weight, bias, before, d_out)
    return *gradients, d_before if before is not None else None


conv.register_autograd(_differentiate, setup_context=_save)
