"""The selective scan on a CPU: forward and hand-written backward, compiled by numba.

Legend (as `models.ops.selective_scan`): B batch, T time, E expanded width, N state size, Q chunk, L lanes.

    a_t = exp(dt_t A)        h_t = a_t h_(t-1) + dt_t B_t u_t        y_t = (C_t . h_t + D u_t) silu(z_t)

With `negative`, a_t = 2 exp(dt_t A) - 1, written `scale exp(dt_t A) - shift` for both (1 and 0, or 2 and 1).

Layout. A task is one (batch row, L neighbouring channels). Its state `h[n, e]` lives in the first-level cache for
the whole sequence, and every inner loop runs over the channels e, which lie next to each other in memory, so it
compiles to vector instructions. Kernels take A transposed and scaled, `A2[n, e] = A[e, n] log2(e)`, so that the
discretisation is one multiplication and one `exp2`, and never exists as a tensor.

Memory. The forward keeps the state before every Q-th step: (B, T/Q, N, E), as much as one (B, T, E) tensor when
Q = N. The backward walks the chunks from the last to the first, recomputes the Q states of a chunk from its kept
one into scratch of fixed size, and sweeps the chunk in reverse.

Determinism. Tasks write to private places (partial sums of dB and dC per channel group; of dA, dD and d(dt_bias)
per batch row) that are added in a fixed order, so the result depends neither on the number of threads nor on
timing.
"""

import numpy as np
import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import LN_2, LOG2_E, compiled, exp2, row, run_tasks, sigmoid, softplus, with_rows

L = 256  # channels per task: 16 states x 256 channels x 4 bytes = 16 KiB of state
Q = 16  # steps between kept states


@compiled
def _forward(u, dt, A2, B, C, D, z, dt_bias, gated, negative, keep, state, kept, out, first, last):
    """state (B, N, E): the initial state in, the last one out. kept (B, T/Q, N, E), written if `keep`."""
    T, E = u.shape[1], u.shape[2]
    N = A2.shape[0]
    groups = (E + L - 1) // L
    shift = u.dtype.type(1 if negative else 0)
    scale = u.dtype.type(1) + shift
    h = np.empty((N, L), u.dtype)
    A = np.empty((N, L), u.dtype)
    delta = np.empty(L, u.dtype)
    delta_u = np.empty(L, u.dtype)
    y = np.empty(L, u.dtype)
    for task in range(first, last):
        b, e0 = task // groups, (task % groups) * L
        lanes = min(L, E - e0)
        for n in range(N):
            for e in range(lanes):
                h[n, e] = state[b, n, e0 + e]
                A[n, e] = A2[n, e0 + e]
        for t in range(T):
            if keep and t % Q == 0:
                for n in range(N):
                    for e in range(lanes):
                        kept[b, t // Q, n, e0 + e] = h[n, e]
            u_t, dt_t, z_t = row(u, b, t), row(dt, b, t), row(z, b, t)
            for e in range(lanes):
                d = softplus(dt_t[e0 + e] + dt_bias[e0 + e])
                x = u_t[e0 + e]
                delta[e] = d
                delta_u[e] = d * x
                y[e] = D[e0 + e] * x
            for n in range(N):
                Bn, Cn = B[b, t, n], C[b, t, n]
                for e in range(lanes):
                    hn = (scale * exp2(delta[e] * A[n, e]) - shift) * h[n, e] + delta_u[e] * Bn
                    h[n, e] = hn
                    y[e] += hn * Cn
            if gated:
                for e in range(lanes):
                    out[b, t, e0 + e] = y[e] * z_t[e0 + e] * sigmoid(z_t[e0 + e])
            else:
                for e in range(lanes):
                    out[b, t, e0 + e] = y[e]
        for n in range(N):
            for e in range(lanes):
                state[b, n, e0 + e] = h[n, e]


@compiled
def _backward(
    u, dt, A2, B, C, D, z, dt_bias, gated, negative, kept, d_out, d_state,
    d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_dt_bias, first, last,
):  # fmt: skip
    """d_state (B, N, E): gradient of the last state in, of the initial state out.

    Partial sums: d_A (B, N, E), d_B and d_C (groups, B, T, N), d_D and d_dt_bias (B, E).
    """
    T, E = u.shape[1], u.shape[2]
    N = A2.shape[0]
    groups = (E + L - 1) // L
    one = u.dtype.type(1)
    zero = u.dtype.type(0)
    shift = one if negative else zero
    scale = one + shift
    ln_2 = u.dtype.type(LN_2)
    A = np.empty((N, L), u.dtype)
    g = np.empty((N, L), u.dtype)  # gradient of h_t
    sum_dA = np.empty((N, L), u.dtype)
    h = np.empty((Q + 1, N, L), u.dtype)  # h[s] is the state before step s of the chunk
    a = np.empty((Q, N, L), u.dtype)
    delta = np.empty((Q, L), u.dtype)
    slope = np.empty((Q, L), u.dtype)  # d softplus
    y = np.empty(L, u.dtype)
    dy = np.empty(L, u.dtype)
    delta_u = np.empty(L, u.dtype)
    g_B = np.empty(L, u.dtype)  # sum over n of g B
    g_A = np.empty(L, u.dtype)  # sum over n of g a h A, in units of ln 2
    sum_dD = np.empty(L, u.dtype)
    sum_bias = np.empty(L, u.dtype)
    for task in range(first, last):
        b, group = task // groups, task % groups
        e0 = group * L
        lanes = min(L, E - e0)
        for n in range(N):
            for e in range(lanes):
                A[n, e] = A2[n, e0 + e]
                g[n, e] = d_state[b, n, e0 + e]
                sum_dA[n, e] = zero
        for e in range(lanes):
            sum_dD[e] = zero
            sum_bias[e] = zero
        for chunk in range((T + Q - 1) // Q - 1, -1, -1):
            t0 = chunk * Q
            steps = min(Q, T - t0)
            for n in range(N):
                for e in range(lanes):
                    h[0, n, e] = kept[b, chunk, n, e0 + e]
            for s in range(steps):
                u_t, dt_t = row(u, b, t0 + s), row(dt, b, t0 + s)
                for e in range(lanes):
                    raw = dt_t[e0 + e] + dt_bias[e0 + e]
                    delta[s, e] = softplus(raw)
                    slope[s, e] = sigmoid(raw)
                    delta_u[e] = delta[s, e] * u_t[e0 + e]
                for n in range(N):
                    Bn = B[b, t0 + s, n]
                    for e in range(lanes):
                        an = scale * exp2(delta[s, e] * A[n, e]) - shift
                        a[s, n, e] = an
                        h[s + 1, n, e] = an * h[s, n, e] + delta_u[e] * Bn
            for s in range(steps - 1, -1, -1):
                t = t0 + s
                u_t, z_t = row(u, b, t), row(z, b, t)
                for e in range(lanes):
                    dy[e] = d_out[b, t, e0 + e]
                    if gated:
                        dy[e] *= z_t[e0 + e] * sigmoid(z_t[e0 + e])
                    x = u_t[e0 + e]
                    y[e] = D[e0 + e] * x
                    delta_u[e] = delta[s, e] * x
                    g_B[e] = zero
                    g_A[e] = zero
                    sum_dD[e] += dy[e] * x
                for n in range(N):
                    Bn, Cn = B[b, t, n], C[b, t, n]
                    dB, dC = zero, zero
                    for e in range(lanes):
                        hn = h[s + 1, n, e]
                        y[e] += hn * Cn
                        dC += dy[e] * hn
                        gn = g[n, e] + dy[e] * Cn
                        dB += gn * delta_u[e]
                        g_B[e] += gn * Bn
                        an = a[s, n, e]
                        g[n, e] = gn * an
                        gah = gn * (an + shift) * h[s, n, e]  # a + shift: the derivative of a
                        sum_dA[n, e] += gah * delta[s, e]
                        g_A[e] += gah * A[n, e]
                    d_B[group, b, t, n] = dB
                    d_C[group, b, t, n] = dC
                for e in range(lanes):
                    x = u_t[e0 + e]
                    d_u[b, t, e0 + e] = dy[e] * D[e0 + e] + delta[s, e] * g_B[e]
                    d_raw = (x * g_B[e] + ln_2 * g_A[e]) * slope[s, e]
                    d_dt[b, t, e0 + e] = d_raw
                    sum_bias[e] += d_raw
                if gated:
                    for e in range(lanes):
                        sig = sigmoid(z_t[e0 + e])
                        d_z[b, t, e0 + e] = d_out[b, t, e0 + e] * y[e] * sig * (one + z_t[e0 + e] * (one - sig))
        for n in range(N):
            for e in range(lanes):
                d_state[b, n, e0 + e] = g[n, e]
                d_A[b, n, e0 + e] = sum_dA[n, e]
        for e in range(lanes):
            d_D[b, e0 + e] = sum_dD[e]
            d_dt_bias[b, e0 + e] = sum_bias[e]


def _scaled_transpose(A: Tensor) -> Tensor:
    return (A.t() * LOG2_E).contiguous()


@torch.library.custom_op("lab::selective_scan_cpu", mutates_args=(), device_types="cpu")
def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    initial_state: Tensor | None, negative: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y (B, T, E), the last state (B, N, E) and the kept states ((B, T/Q, N, E), empty unless `keep`).

    Shapes as `models.ops.selective_scan.selective_scan`, the initial state as (B, N, E).
    """
    rows, T, E = u.shape
    N = A.shape[1]
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    state = u.new_zeros(rows, N, E) if initial_state is None else initial_state.clone()
    kept = u.new_empty((rows, (T + Q - 1) // Q if keep else 0, N, E))
    gate = u if z is None else z
    arrays = [with_rows(x) for x in (u, dt, _scaled_transpose(A), B, C, D, gate, dt_bias)]
    tasks = rows * ((E + L - 1) // L)
    run_tasks(_forward, tasks, *arrays, z is not None, negative, keep, state.numpy(), kept.numpy(), out.numpy())
    return out, state, kept


@scan.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, negative, keep):
    rows, T, E = u.shape
    N = A.shape[1]
    chunks = (T + Q - 1) // Q if keep else 0
    return torch.empty_like(u), u.new_empty(rows, N, E), u.new_empty(rows, chunks, N, E)


@torch.library.custom_op("lab::selective_scan_cpu_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    negative: bool, kept: Tensor, d_out: Tensor, d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, dt, A, B, C, D, z (empty without a gate), dt_bias and the initial state (B, N, E)."""
    rows, T, E = u.shape
    N = A.shape[1]
    groups = (E + L - 1) // L
    d_u, d_dt = u.new_empty(u.shape), u.new_empty(u.shape)
    d_z = u.new_empty(u.shape if z is not None else (0, 0, 0))
    d_A, d_state = u.new_empty(rows, N, E), u.new_zeros(rows, N, E)
    if d_last is not None:
        d_state.copy_(d_last)
    d_B, d_C = u.new_empty(groups, rows, T, N), u.new_empty(groups, rows, T, N)
    d_D, d_dt_bias = u.new_empty(rows, E), u.new_empty(rows, E)
    gate = u if z is None else z
    arrays = [with_rows(x) for x in (u, dt, _scaled_transpose(A), B, C, D, gate, dt_bias)]
    results = [x.numpy() for x in (d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_dt_bias)]
    run_tasks(
        _backward, rows * groups, *arrays, z is not None, negative, kept.numpy(), d_out.contiguous().numpy(),
        d_state.numpy(), *results,
    )  # fmt: skip
    return d_u, d_dt, d_A.sum(0).t(), d_B.sum(0), d_C.sum(0), d_D.sum(0), d_z, d_dt_bias.sum(0), d_state


@scan_backward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, negative, kept, d_out, d_last):
    rows, _, E = u.shape
    N = A.shape[1]
    gate = torch.empty_like(u) if z is not None else u.new_empty(0, 0, 0)
    return (
        torch.empty_like(u), torch.empty_like(u), A.new_empty(N, E).t(), B.new_empty(B.shape),
        C.new_empty(C.shape), torch.empty_like(D), gate, torch.empty_like(dt_bias), u.new_empty(rows, N, E),
    )  # fmt: skip


def _save(ctx, inputs, output):
    *tensors, initial_state, ctx.negative, _keep = inputs
    ctx.has_state = initial_state is not None
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, d_out, d_last, _d_kept):
    *tensors, kept = ctx.saved_tensors
    *gradients, d_z, d_dt_bias, d_state = scan_backward(*tensors, ctx.negative, kept, d_out, d_last)
    gate = d_z if tensors[6] is not None else None
    return *gradients, gate, d_dt_bias, d_state if ctx.has_state else None, None, None


scan.register_autograd(_differentiate, setup_context=_save)
