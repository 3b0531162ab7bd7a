"""One decode step of Mamba, Mamba-2, Mamba-3, LSTM and attention on a CPU, between their projections in and out,
without autograd.

A step touches a few kilobytes, so the cost that matters is that of calling: one compiled call each, on addresses.
Attention splits its heads over threads once the cache is long enough to be worth waking them.

B: batch   E: expanded width   N: state size   R: dt rank   W: taps   H: heads   K: key-value heads   P: head width
G: groups   S: rotated pairs   channels: those of Mamba-2's convolution, x, B and C, E + 2 G N
"""

import math

import numpy as np
import torch
from torch import Tensor

from models.ops.attention import rotary_table
from models.ops.kernels.numba_norm import norm_row
from models.ops.kernels.numba_runtime import LOG2_E, addresses, at, compiled, exp2, run_tasks, sigmoid, softplus

# By then the other thread has gone to sleep since the layer before. With one sequence and 4 heads of 32, two threads
# were slower than one at 512 tokens (880 against 1,790 tokens/s) and still at 8192, which is 2^21 numbers.
WORK_PER_THREAD = 1 << 21


@compiled
def mamba_row(
    uz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, conv, state, negative, u, delta, projected, out
):  # fmt: skip
    """One sequence: uz (2, E); u, delta (E) and projected (R + 2 N), of dt, B and C, are room to work in; out (E)."""
    (E, N), R, W = A_log.shape, dt_proj.shape[1], conv_weight.shape[1]
    zero = uz.dtype.type(0)
    log2_e = uz.dtype.type(LOG2_E)
    shift = uz.dtype.type(1 if negative else 0)
    scale = uz.dtype.type(1) + shift
    for e in range(E):
        acc = conv_bias[e]
        for w in range(W - 1):
            conv[e, w] = conv[e, w + 1]
            acc += conv[e, w] * conv_weight[e, w]
        conv[e, W - 1] = uz[0, e]
        u[e] = acc + uz[0, e] * conv_weight[e, W - 1]
    for e in range(E):
        u[e] *= sigmoid(u[e])
    for j in range(R + 2 * N):
        acc = zero
        for e in range(E):
            acc += x_proj[j, e] * u[e]
        projected[j] = acc
    # loops of their own over the channels, so that each becomes vector instructions
    for e in range(E):
        acc = dt_bias[e]
        for r in range(R):
            acc += dt_proj[e, r] * projected[r]
        delta[e] = acc
    for e in range(E):
        delta[e] = softplus(delta[e])
    for e in range(E):
        rate = -delta[e] * log2_e
        delta_u = delta[e] * u[e]
        acc = D[e] * u[e]
        for n in range(N):
            # A = -exp(A_log)
            decay = scale * exp2(rate * exp2(A_log[e, n] * log2_e)) - shift
            h = decay * state[e, n] + delta_u * projected[R + n]
            state[e, n] = h
            acc += h * projected[R + N + n]
        out[e] = acc
    for e in range(E):
        z = uz[1, e]
        out[e] *= z * sigmoid(z)


@compiled
def _mamba_step(
    kind, uz_at, conv_weight_at, conv_bias_at, x_proj_at, dt_proj_at, dt_bias_at, A_log_at, D_at, conv_at, state_at,
    out_at, negative, rows, E, N, R, W,
):  # fmt: skip
    uz, out = at(uz_at, kind, (rows, 2, E)), at(out_at, kind, (rows, E))
    conv_weight, conv_bias = at(conv_weight_at, kind, (E, W)), at(conv_bias_at, kind, (E,))
    x_proj, dt_proj = at(x_proj_at, kind, (R + 2 * N, E)), at(dt_proj_at, kind, (E, R))
    dt_bias, A_log, D = at(dt_bias_at, kind, (E,)), at(A_log_at, kind, (E, N)), at(D_at, kind, (E,))
    conv, state = at(conv_at, kind, (rows, E, W)), at(state_at, kind, (rows, E, N))
    u, delta, projected = np.empty(E, uz.dtype), np.empty(E, uz.dtype), np.empty(R + 2 * N, uz.dtype)
    for b in range(rows):
        mamba_row(
            uz[b], conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, conv[b], state[b], negative,
            u, delta, projected, out[b],
        )  # fmt: skip


def mamba_step(
    uz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor,
    A_log: Tensor, D: Tensor, conv: Tensor, state: Tensor, negative: bool,
) -> Tensor:  # fmt: skip
    """One token of `models.mixers.mamba`, what lies between its projections in and out.

    uz (B, 2E): the input and the gate. conv_weight (E, W), conv_bias (E), x_proj (R + 2N, E), dt_proj (E, R),
    dt_bias, D (E), A_log (E, N): its parameters. conv (B, E, W), state (B, E, N): advanced in place. Returns (B, E).
    Every tensor float32, or every one float64, and contiguous.
    """
    (E, N), R, W = A_log.shape, dt_proj.shape[1], conv_weight.shape[1]
    rows = uz.shape[0]
    out = uz.new_empty(rows, E)
    arrays = addresses(uz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, conv, state, out)
    _mamba_step(*arrays, negative, rows, E, N, R, W)
    return out


@compiled
def mamba2_row(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv, state, negative, eps, G, norm_groups, u,
    out,
):  # fmt: skip
    """One sequence: projected (E + channels + H); u (channels) is room to work in; out (E)."""
    H, P, N = state.shape
    channels, W = conv_weight.shape
    E, GN = H * P, G * N
    zero = projected.dtype.type(0)
    log2_e = projected.dtype.type(LOG2_E)
    shift = projected.dtype.type(1 if negative else 0)
    scale = projected.dtype.type(1) + shift
    for e in range(channels):
        now = projected[E + e]
        acc = conv_bias[e]
        for w in range(W - 1):
            conv[e, w] = conv[e, w + 1]
            acc += conv[e, w] * conv_weight[e, w]
        conv[e, W - 1] = now
        u[e] = acc + now * conv_weight[e, W - 1]
    for e in range(channels):
        u[e] *= sigmoid(u[e])
    for h in range(H):
        delta = softplus(projected[E + channels + h] + dt_bias[h])
        # A = -exp(A_log)
        decay = scale * exp2(-delta * log2_e * exp2(A_log[h] * log2_e)) - shift
        g = h // (H // G)
        B, C = u[E + g * N : E + (g + 1) * N], u[E + GN + g * N : E + GN + (g + 1) * N]
        for p in range(P):
            x, of_head = u[h * P + p], state[h, p]
            written, acc = delta * x, zero
            for n in range(N):
                of_head[n] = decay * of_head[n] + written * B[n]
                acc += of_head[n] * C[n]
            out[h * P + p] = acc + D[h] * x
    for e in range(E):
        z = projected[e]
        out[e] *= z * sigmoid(z)
    width = E // norm_groups
    for g in range(norm_groups):
        total = zero
        for e in range(g * width, (g + 1) * width):
            total += out[e] * out[e]
        along = projected.dtype.type(1.0 / math.sqrt(total / width + eps))
        for e in range(g * width, (g + 1) * width):
            out[e] *= along * norm_weight[e]


@compiled
def _mamba2_step(
    kind, projected_at, conv_weight_at, conv_bias_at, dt_bias_at, A_log_at, D_at, norm_weight_at, conv_at, state_at,
    out_at, negative, eps, rows, H, P, G, N, W, norm_groups,
):  # fmt: skip
    E, channels = H * P, H * P + 2 * G * N
    projected, out = at(projected_at, kind, (rows, E + channels + H)), at(out_at, kind, (rows, E))
    conv_weight, conv_bias = at(conv_weight_at, kind, (channels, W)), at(conv_bias_at, kind, (channels,))
    dt_bias, A_log, D = at(dt_bias_at, kind, (H,)), at(A_log_at, kind, (H,)), at(D_at, kind, (H,))
    norm_weight = at(norm_weight_at, kind, (E,))
    conv, state = at(conv_at, kind, (rows, channels, W)), at(state_at, kind, (rows, H, P, N))
    u = np.empty(channels, projected.dtype)
    for b in range(rows):
        mamba2_row(
            projected[b], conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv[b], state[b], negative, eps, G,
            norm_groups, u, out[b],
        )  # fmt: skip


def mamba2_step(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, conv: Tensor, state: Tensor, negative: bool, eps: float, norm_groups: int,
) -> Tensor:  # fmt: skip
    """One token of `models.mixers.mamba2`, what lies between its projections in and out.

    projected (B, E + channels + H): the gate; x, B and C; dt. conv_weight (channels, W), conv_bias (channels), dt_bias,
    A_log, D (H), norm_weight (E): its parameters. conv (B, channels, W), state (B, H, P, N): advanced in place.
    eps, norm_groups: of the gated norm. Returns (B, E). Every tensor float32, or every one float64, and contiguous.
    """
    rows, H, P, N = state.shape
    channels, W = conv_weight.shape
    if projected.shape != (rows, H * P + channels + H) or conv.shape[0] != rows:
        raise ValueError(f"the state is of {rows} sequences, the token is {tuple(projected.shape)}")
    out = projected.new_empty(rows, H * P)
    arrays = addresses(
        projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv, state, out
    )  # fmt: skip
    G = (channels - H * P) // (2 * N)
    _mamba2_step(*arrays, negative, eps, rows, H, P, G, N, W, norm_groups)
    return out


@compiled
def mamba3_row(
    projected, B_norm, C_norm, B_bias, C_bias, dt_bias, D, theta, state, before_B, before_x, eps, floor, B, C, rates,
    b, c, out,
):  # fmt: skip
    """One sequence: projected (2 E + 2 G N + 3 H + S): z, x, B, C, dt, a, trap, angle. B, C (G, N), rates (S) and b, c
    (N), of one head, are room to work in; out (E)."""
    (H, P, N), S, G = state.shape, theta.shape[1], B.shape[0]
    E, GN = H * P, G * N
    zero, one = projected.dtype.type(0), projected.dtype.type(1)
    log2_e, turn = projected.dtype.type(LOG2_E), projected.dtype.type(2 * math.pi)
    slowest = projected.dtype.type(-floor)
    for g in range(G):
        norm_row(projected[2 * E + g * N : 2 * E + (g + 1) * N], B_norm, eps, B[g])
        norm_row(projected[2 * E + GN + g * N : 2 * E + GN + (g + 1) * N], C_norm, eps, C[g])
    of_head_each = 2 * (E + GN)  # where dt, a and trap begin, H of each
    for i in range(S):
        rates[i] = turn / 2 * math.tanh(projected[of_head_each + 3 * H + i])
    for h in range(H):
        delta = softplus(projected[of_head_each + h] + dt_bias[h])
        A = -softplus(projected[of_head_each + H + h])
        if slowest < A:
            A = slowest
        alpha = exp2(delta * A * log2_e)
        mix = sigmoid(projected[of_head_each + 2 * H + h])
        g = h // (H // G)
        for n in range(N):
            b[n] = B[g, n] + B_bias[h, n]
            c[n] = C[g, n] + C_bias[h, n]
        for i in range(S):
            angle = theta[h, i] + delta * rates[i]
            angle -= turn * np.floor(angle / turn)
            theta[h, i] = angle
            cos, sin = math.cos(angle), math.sin(angle)
            b0, b1, c0, c1 = b[2 * i], b[2 * i + 1], c[2 * i], c[2 * i + 1]
            b[2 * i], b[2 * i + 1] = b0 * cos - b1 * sin, b0 * sin + b1 * cos
            c[2 * i], c[2 * i + 1] = c0 * cos - c1 * sin, c0 * sin + c1 * cos
        old, now = (one - mix) * delta * alpha, mix * delta
        for p in range(P):
            x, of_head = projected[E + h * P + p], state[h, p]
            before, written, acc = old * before_x[h, p], now * x, zero
            for n in range(N):
                of_head[n] = alpha * of_head[n] + before * before_B[h, n] + written * b[n]
                acc += of_head[n] * c[n]
            out[h * P + p] = acc + D[h] * x
            before_x[h, p] = x
        for n in range(N):
            before_B[h, n] = b[n]
    for e in range(E):
        z = projected[e]
        out[e] *= z * sigmoid(z)


@compiled
def _mamba3_step(
    kind, projected_at, B_norm_at, C_norm_at, B_bias_at, C_bias_at, dt_bias_at, D_at, theta_at, state_at, before_B_at,
    before_x_at, out_at, eps, floor, rows, H, P, G, N, S,
):  # fmt: skip
    projected, out = at(projected_at, kind, (rows, 2 * (H * P + G * N) + 3 * H + S)), at(out_at, kind, (rows, H * P))
    B_norm, C_norm = at(B_norm_at, kind, (N,)), at(C_norm_at, kind, (N,))
    B_bias, C_bias = at(B_bias_at, kind, (H, N)), at(C_bias_at, kind, (H, N))
    dt_bias, D = at(dt_bias_at, kind, (H,)), at(D_at, kind, (H,))
    theta, state = at(theta_at, kind, (rows, H, S)), at(state_at, kind, (rows, H, P, N))
    before_B, before_x = at(before_B_at, kind, (rows, H, N)), at(before_x_at, kind, (rows, H, P))
    B, C, rates = np.empty((G, N), out.dtype), np.empty((G, N), out.dtype), np.empty(S, out.dtype)
    b, c = np.empty(N, out.dtype), np.empty(N, out.dtype)
    for r in range(rows):
        mamba3_row(
            projected[r], B_norm, C_norm, B_bias, C_bias, dt_bias, D, theta[r], state[r], before_B[r], before_x[r],
            eps, floor, B, C, rates, b, c, out[r],
        )  # fmt: skip


def mamba3_step(
    projected: Tensor, B_norm: Tensor, C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, dt_bias: Tensor, D: Tensor,
    theta: Tensor, state: Tensor, before_B: Tensor, before_x: Tensor, eps: float, floor: float,
) -> Tensor:  # fmt: skip
    """One token of `models.mixers.mamba3` of rank 1, what lies between its projections in and out.

    projected (B, 2 E + 2 G N + 3 H + S): z, x, B, C, dt, a, trap, angle. B_norm, C_norm (N), B_bias, C_bias (H, 1, N),
    dt_bias, D (H): its parameters. theta (B, H, S), state (B, H, P, N), before_B (B, 1, H, N), before_x (B, H, P):
    advanced in place. eps: of the norms of B and C; floor: of -A. Returns (B, E). Every tensor float32, or every one
    float64, and contiguous. Raises ValueError where the state is of another number of sequences.
    """
    (rows, H, P, N), S = state.shape, theta.shape[2]
    groups = projected.shape[1] - 2 * H * P - 3 * H - S
    if len(projected) != rows or groups % (2 * N):
        raise ValueError(f"the state is of {rows} sequences, the token is {tuple(projected.shape)}")
    out = projected.new_empty(rows, H * P)
    arrays = addresses(
        projected, B_norm, C_norm, B_bias, C_bias, dt_bias, D, theta, state, before_B, before_x, out
    )  # fmt: skip
    _mamba3_step(*arrays, eps, floor, rows, H, P, groups // (2 * N), N, S)
    return out


@compiled
def lstm_row(gates, hidden, cell):
    """One sequence: gates (4 E): input, forget, candidate and output, before their nonlinearities; hidden, cell (E)."""
    E = cell.shape[0]
    for e in range(E):
        cell[e] = sigmoid(gates[E + e]) * cell[e] + sigmoid(gates[e]) * math.tanh(gates[2 * E + e])
    for e in range(E):
        hidden[e] = sigmoid(gates[3 * E + e]) * math.tanh(cell[e])


@compiled
def angles(kind, table, cos_at, sin_at, position, P):
    """cos and sin (P/2) of one position, from tables in the type of `table`, in the type of `kind`."""
    half = P // 2
    cos_table, sin_table = at(cos_at, table, (position + 1, half)), at(sin_at, table, (position + 1, half))
    cos, sin = np.full(half, kind), np.full(half, kind)
    for i in range(half):
        cos[i], sin[i] = cos_table[position, i], sin_table[position, i]
    return cos, sin


@compiled
def attention_head(qkv, kv, keys, values, cos, sin, slot, filled, q, out):
    """One key-value head of one sequence, with the query heads that it serves. Softmax without a second pass over the
    keys: the running maximum rescales what was summed before it rose.

    qkv (H + 2 K, P); keys, values (S, P), of this head; cos, sin (P // 2), of this position; q (P) is room to work in;
    out (H, P).
    """
    (H, P), half = out.shape, cos.shape[0]
    K = (qkv.shape[0] - H) // 2
    zero, one = qkv.dtype.type(0), qkv.dtype.type(1)
    scale = qkv.dtype.type(1.0 / math.sqrt(P))
    log2_e = qkv.dtype.type(LOG2_E)
    for i in range(half):
        x0, x1 = qkv[H + kv, i], qkv[H + kv, half + i]
        keys[slot, i] = x0 * cos[i] - x1 * sin[i]
        keys[slot, half + i] = x1 * cos[i] + x0 * sin[i]
    for p in range(2 * half, P):  # an odd width, which is never rotated
        keys[slot, p] = qkv[H + kv, p]
    for p in range(P):
        values[slot, p] = qkv[H + K + kv, p]
    for h in range(kv * (H // K), (kv + 1) * (H // K)):
        y = out[h]
        for i in range(half):
            x0, x1 = qkv[h, i] * scale, qkv[h, half + i] * scale
            q[i] = x0 * cos[i] - x1 * sin[i]
            q[half + i] = x1 * cos[i] + x0 * sin[i]
        for p in range(2 * half, P):
            q[p] = qkv[h, p] * scale
        for p in range(P):
            y[p] = zero
        top, total = zero, zero
        for s in range(filled):
            score = zero
            for p in range(P):
                score += q[p] * keys[s, p]
            if s == 0 or score > top:
                shrink = zero if s == 0 else exp2((top - score) * log2_e)
                top = score
                total *= shrink
                for p in range(P):
                    y[p] *= shrink
            weight = exp2((score - top) * log2_e)
            total += weight
            for p in range(P):
                y[p] += weight * values[s, p]
        for p in range(P):
            y[p] *= one / total


@compiled
def _attention_step(
    kind, qkv_at, keys_at, values_at, out_at, table, cos_at, sin_at, rows, H, K, P, slots, position, slot, filled,
    first, last,
):  # fmt: skip
    """Tasks are (batch row, key-value head)."""
    qkv, out = at(qkv_at, kind, (rows, H + 2 * K, P)), at(out_at, kind, (rows, H, P))
    keys, values = at(keys_at, kind, (rows, K, slots, P)), at(values_at, kind, (rows, K, slots, P))
    cos, sin = angles(kind, table, cos_at, sin_at, position, P)
    q = np.empty(P, qkv.dtype)
    for task in range(first, last):
        b, kv = task // K, task % K
        attention_head(qkv[b], kv, keys[b, kv], values[b, kv], cos, sin, slot, filled, q, out[b])


def turned(position: int, P: int, base: float | None, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Tables of cos and sin (.., P/2), and the row of them that belongs to a position; without a base, no rotation."""
    if base is not None:
        return *rotary_table(position + 1, P, base, device), position
    return torch.ones(1, P // 2), torch.zeros(1, P // 2), 0


def attention_step(
    qkv: Tensor, base: float | None, keys: Tensor, values: Tensor, position: int, slot: int, filled: int
) -> Tensor:
    """One token of `models.ops.attention`, rotation and cache included.

    qkv (B, H + 2K, P): this token's queries, keys, values, not yet rotated. base: of the rotary frequencies; None: no
    rotation.
    keys, values (B, K, S, P): the cache; the token, at `position` in its sequence, is written to `slot`, after which
    the first `filled` slots are what it sees (in any order: a softmax does not mind). Returns (B, H P).
    Every tensor float32, or every one float64, and contiguous.
    """
    rows, K, slots, P = keys.shape
    H = qkv.shape[1] - 2 * K
    out = qkv.new_empty(rows, H * P)
    cos, sin, row = turned(position, P, base, qkv.device)
    sizes = (rows, H, K, P, slots, row, slot, filled)
    arguments = (*addresses(qkv, keys, values, out), *addresses(cos, sin), *sizes)
    run_tasks(_attention_step, rows * K, *arguments, work=2 * filled * rows * K * P, per_thread=WORK_PER_THREAD)
    return out
