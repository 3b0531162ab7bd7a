"""One decode step of Mamba, Mamba-2 and attention on a CPU, between their projections in and out, without autograd.

A step touches a few kilobytes, so the cost that matters is that of calling: one compiled call each, on addresses.
Attention splits its heads over threads once the cache is long enough to be worth waking them.

B: batch   E: expanded width   N: state size   R: dt rank   W: taps   H: heads   K: key-value heads   P: head width
G: groups   channels: those of Mamba-2's convolution, x, B and C, E + 2 G N
"""

import math

import numpy as np
from torch import Tensor

from models.ops.attention import rotary_table
from models.ops.kernels.numba_runtime import LOG2_E, addresses, at, compiled, exp2, run_tasks, sigmoid, softplus

# By then the other thread has gone to sleep since the layer before. With one sequence and 4 heads of 32, two threads
# were slower than one at 512 tokens (880 against 1,790 tokens/s) and still at 8192, which is 2^21 numbers.
WORK_PER_THREAD = 1 << 21


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
    log2_e = uz.dtype.type(LOG2_E)
    shift = uz.dtype.type(1 if negative else 0)
    scale = uz.dtype.type(1) + shift
    u = np.empty(E, uz.dtype)
    delta = np.empty(E, uz.dtype)
    y = np.empty(E, uz.dtype)
    projected = np.empty(R + 2 * N, uz.dtype)  # dt, B, C
    for b in range(rows):
        for e in range(E):
            acc = conv_bias[e]
            for w in range(W - 1):
                conv[b, e, w] = conv[b, e, w + 1]
                acc += conv[b, e, w] * conv_weight[e, w]
            conv[b, e, W - 1] = uz[b, 0, e]
            u[e] = acc + uz[b, 0, e] * conv_weight[e, W - 1]
        for e in range(E):
            u[e] *= sigmoid(u[e])
        for j in range(R + 2 * N):
            acc = kind
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
                h = decay * state[b, e, n] + delta_u * projected[R + n]
                state[b, e, n] = h
                acc += h * projected[R + N + n]
            y[e] = acc
        for e in range(E):
            z = uz[b, 1, e]
            out[b, e] = y[e] * z * sigmoid(z)


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
def _mamba2_step(
    kind, projected_at, conv_weight_at, conv_bias_at, dt_bias_at, A_log_at, D_at, norm_weight_at, conv_at, state_at,
    out_at, negative, eps, rows, H, P, G, N, W, norm_groups,
):  # fmt: skip
    E, GN = H * P, G * N
    channels = E + 2 * GN
    projected, out = at(projected_at, kind, (rows, E + channels + H)), at(out_at, kind, (rows, E))
    conv_weight, conv_bias = at(conv_weight_at, kind, (channels, W)), at(conv_bias_at, kind, (channels,))
    dt_bias, A_log, D = at(dt_bias_at, kind, (H,)), at(A_log_at, kind, (H,)), at(D_at, kind, (H,))
    norm_weight = at(norm_weight_at, kind, (E,))
    conv, state = at(conv_at, kind, (rows, channels, W)), at(state_at, kind, (rows, H, P, N))
    log2_e = projected.dtype.type(LOG2_E)
    shift = projected.dtype.type(1 if negative else 0)
    scale = projected.dtype.type(1) + shift
    u = np.empty(channels, projected.dtype)
    for b in range(rows):
        for e in range(channels):
            now = projected[b, E + e]
            acc = conv_bias[e]
            for w in range(W - 1):
                conv[b, e, w] = conv[b, e, w + 1]
                acc += conv[b, e, w] * conv_weight[e, w]
            conv[b, e, W - 1] = now
            u[e] = acc + now * conv_weight[e, W - 1]
        for e in range(channels):
            u[e] *= sigmoid(u[e])
        for h in range(H):
            delta = softplus(projected[b, E + channels + h] + dt_bias[h])
            # A = -exp(A_log)
            decay = scale * exp2(-delta * log2_e * exp2(A_log[h] * log2_e)) - shift
            g = h // (H // G)
            B, C = u[E + g * N : E + (g + 1) * N], u[E + GN + g * N : E + GN + (g + 1) * N]
            for p in range(P):
                x, of_head = u[h * P + p], state[b, h, p]
                written, acc = delta * x, kind
                for n in range(N):
                    of_head[n] = decay * of_head[n] + written * B[n]
                    acc += of_head[n] * C[n]
                out[b, h * P + p] = acc + D[h] * x
        for e in range(E):
            z = projected[b, e]
            out[b, e] *= z * sigmoid(z)
        width = E // norm_groups
        for g in range(norm_groups):
            total = kind
            for e in range(g * width, (g + 1) * width):
                total += out[b, e] * out[b, e]
            along = projected.dtype.type(1.0 / math.sqrt(total / width + eps))
            for e in range(g * width, (g + 1) * width):
                out[b, e] *= along * norm_weight[e]


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
def _attention_step(
    kind, qkv_at, keys_at, values_at, out_at, table, cos_at, sin_at, rows, H, K, P, slots, position, slot, filled,
    first, last,
):  # fmt: skip
    """Tasks are (batch row, key-value head). Softmax without a second pass over the keys: the running maximum rescales
    what was summed before it rose."""
    half = P // 2
    qkv, out = at(qkv_at, kind, (rows, H + 2 * K, P)), at(out_at, kind, (rows, H, P))
    keys, values = at(keys_at, kind, (rows, K, slots, P)), at(values_at, kind, (rows, K, slots, P))
    cos_table, sin_table = at(cos_at, table, (position + 1, half)), at(sin_at, table, (position + 1, half))
    scale = qkv.dtype.type(1.0 / math.sqrt(P))
    one = qkv.dtype.type(1)
    log2_e = qkv.dtype.type(LOG2_E)
    q, y = np.empty(P, qkv.dtype), np.empty(P, qkv.dtype)
    cos, sin = np.empty(half, qkv.dtype), np.empty(half, qkv.dtype)
    for i in range(half):
        cos[i], sin[i] = cos_table[position, i], sin_table[position, i]
    for task in range(first, last):
        b, kv = task // K, task % K
        for i in range(half):
            x0, x1 = qkv[b, H + kv, i], qkv[b, H + kv, half + i]
            keys[b, kv, slot, i] = x0 * cos[i] - x1 * sin[i]
            keys[b, kv, slot, half + i] = x1 * cos[i] + x0 * sin[i]
        for p in range(P):
            values[b, kv, slot, p] = qkv[b, H + K + kv, p]
        for h in range(kv * (H // K), (kv + 1) * (H // K)):
            for i in range(half):
                x0, x1 = qkv[b, h, i] * scale, qkv[b, h, half + i] * scale
                q[i] = x0 * cos[i] - x1 * sin[i]
                q[half + i] = x1 * cos[i] + x0 * sin[i]
            for p in range(P):
                y[p] = kind
            top, total = kind, kind
            for s in range(filled):
                score = kind
                for p in range(P):
                    score += q[p] * keys[b, kv, s, p]
                if s == 0 or score > top:
                    shrink = kind if s == 0 else exp2((top - score) * log2_e)
                    top = score
                    total *= shrink
                    for p in range(P):
                        y[p] *= shrink
                weight = exp2((score - top) * log2_e)
                total += weight
                for p in range(P):
                    y[p] += weight * values[b, kv, s, p]
            for p in range(P):
                out[b, h, p] = y[p] * (one / total)


def attention_step(
    qkv: Tensor, base: float, keys: Tensor, values: Tensor, position: int, slot: int, filled: int
) -> Tensor:
    """One token of `models.ops.attention`, rotation and cache included.

    qkv (B, H + 2K, P): this token's queries, keys, values, not yet rotated. base: of the rotary frequencies.
    keys, values (B, K, S, P): the cache; the token, at `position` in its sequence, is written to `slot`, after which
    the first `filled` slots are what it sees (in any order: a softmax does not mind). Returns (B, H P).
    Every tensor float32, or every one float64, and contiguous.
    """
    rows, K, slots, P = keys.shape
    H = qkv.shape[1] - 2 * K
    out = qkv.new_empty(rows, H * P)
    cos, sin = rotary_table(position + 1, P, base, qkv.device)
    sizes = (rows, H, K, P, slots, position, slot, filled)
    arguments = (*addresses(qkv, keys, values, out), *addresses(cos, sin), *sizes)
    run_tasks(_attention_step, rows * K, *arguments, work=2 * filled * rows * K * P, per_thread=WORK_PER_THREAD)
    return out
