"""The short causal convolution with SiLU on a CPU, forward and hand-written backward, compiled by numba.

B batch, T time, E channels, W taps. A task is (batch row, `STEPS` neighbouring steps); every inner loop runs over all
channels of a step, which lie next to each other, and touches few arrays, so that it compiles to vector
instructions. torch's depthwise convolution wants channels before time, which would cost two transposes each way; this
one reads (B, T, E) as the projections write it.

Each task keeps its own sums of d_weight and d_bias, which are added in a fixed order: the result depends neither on
the number of threads nor on timing.
"""

import numpy as np
import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import compiled, row, run_tasks, sigmoid, with_rows

STEPS = 64


@compiled
def _input(x, before, b, s, W):
    """x_s, where s may lie up to W steps before x; `before` (B, W, E) holds those, oldest first."""
    return row(x, b, s) if s >= 0 else row(before, b, W + s)


@compiled
def _sum_of_taps(x, weight, bias, before, b, t, acc):
    """acc (E) = bias + sum_w weight[w] x_(t-W+1+w), two taps at a time: each pass over acc costs as much as a tap."""
    W, E = weight.shape[0], acc.shape[0]
    first = t - W + 1
    odd = W % 2
    if odd:
        tap, source = weight[0], _input(x, before, b, first, W)
        for e in range(E):
            acc[e] = bias[e] + tap[e] * source[e]
    else:
        for e in range(E):
            acc[e] = bias[e]
    for w in range(odd, W, 2):
        tap, source = weight[w], _input(x, before, b, first + w, W)
        tap1, source1 = weight[w + 1], _input(x, before, b, first + w + 1, W)
        for e in range(E):
            acc[e] += tap[e] * source[e] + tap1[e] * source1[e]


@compiled
def _forward(x, weight, bias, before, out, first, last):
    T, E = x.shape[1], x.shape[2]
    blocks = (T + STEPS - 1) // STEPS
    acc = np.empty(E, x.dtype)
    for task in range(first, last):
        b, t0 = task // blocks, (task % blocks) * STEPS
        for t in range(t0, min(t0 + STEPS, T)):
            _sum_of_taps(x, weight, bias, before, b, t, acc)
            y = row(out, b, t)
            for e in range(E):
                y[e] = acc[e] * sigmoid(acc[e])


@compiled
def _backward(x, weight, bias, before, d_out, d_x, d_weight, d_bias, d_before, first, last):
    """d_weight (tasks, W, E) and d_bias (tasks, E) are partial sums."""
    T, E = x.shape[1], x.shape[2]
    W = weight.shape[0]
    blocks = (T + STEPS - 1) // STEPS
    zero, one = x.dtype.type(0), x.dtype.type(1)
    g = np.empty((W, E), x.dtype)  # g[t % W]: gradient of the sum at step t, 0 beyond the end
    acc = np.empty(E, x.dtype)
    for task in range(first, last):
        b, t0 = task // blocks, (task % blocks) * STEPS
        t1 = min(t0 + STEPS, T)
        sum_bias = d_bias[task]
        for e in range(E):
            sum_bias[e] = zero
        for w in range(W):
            sums = d_weight[task, w]
            for e in range(E):
                sums[e] = zero
        # an input is whole once the W - 1 steps after it are known: the first ones of the next task are done again
        for t in range(t0, t1 + W - 1):
            now = g[t % W]
            if t < T:
                _sum_of_taps(x, weight, bias, before, b, t, acc)
                d_y = row(d_out, b, t)
                for e in range(E):
                    sig = sigmoid(acc[e])
                    now[e] = d_y[e] * sig * (one + acc[e] * (one - sig))
            else:
                for e in range(E):
                    now[e] = zero
            if t < t1:
                for e in range(E):
                    sum_bias[e] += now[e]
                for w in range(W):
                    source = _input(x, before, b, t - W + 1 + w, W)
                    sums = d_weight[task, w]
                    for e in range(E):
                        sums[e] += now[e] * source[e]
            s = t - W + 1
            if t0 <= s or (t0 == 0 and s < 0):
                d_s = row(d_x, b, s) if s >= 0 else row(d_before, b, W + s)
                start = max(s, 0)
                odd = (t + 1 - start) % 2
                if odd:
                    tap, at = weight[s - start + W - 1], g[start % W]
                    for e in range(E):
                        d_s[e] = tap[e] * at[e]
                else:
                    for e in range(E):
                        d_s[e] = zero
                for later in range(start + odd, t + 1, 2):
                    tap, at = weight[s - later + W - 1], g[later % W]
                    tap1, at1 = weight[s - later + W - 2], g[(later + 1) % W]
                    for e in range(E):
                        d_s[e] += tap[e] * at[e] + tap1[e] * at1[e]
        if t0 == 0:  # the state holds one input more than the sum needs
            oldest = row(d_before, b, 0)
            for e in range(E):
                oldest[e] = zero


def _arrays(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None) -> list[np.ndarray]:
    rows, _, E = x.shape
    W = weight.shape[1]
    before = x.new_zeros(rows, W, E) if before is None else before.transpose(1, 2).contiguous()
    return [with_rows(y) for y in (x, weight.t().contiguous(), bias, before)]


@torch.library.custom_op("lab::causal_conv1d_cpu", mutates_args=(), device_types="cpu")
def conv(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None) -> Tensor:
    """Shapes as `models.ops.causal_conv1d.causal_conv1d`; returns y (B, T, E)."""
    out = x.new_empty(x.shape)
    tasks = x.shape[0] * ((x.shape[1] + STEPS - 1) // STEPS)
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
    rows, T, E = x.shape
    W = weight.shape[1]
    tasks = rows * ((T + STEPS - 1) // STEPS)
    d_x, d_before = x.new_empty(x.shape), x.new_empty(rows, W, E)
    d_weight, d_bias = x.new_empty(tasks, W, E), x.new_empty(tasks, E)
    results = [y.numpy() for y in (d_x, d_weight, d_bias, d_before)]
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
