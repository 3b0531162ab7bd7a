"""One decode step of a whole residual branch on a CPU, x + f(norm(x)), in one compiled call, without autograd: of
every mixer, of SwiGLU and of experts. Calling its parts one by one takes a small model as long as their arithmetic.

B: batch   D: width   E: expanded width   N: state size   R: dt rank   W: taps   H: heads   K: key-value heads; experts
of a token   P: head width   F: hidden width   G: groups   S: rotated pairs   X: experts

Every tensor float32, or every one float64, and contiguous; states and caches are advanced in place.
"""

import numpy as np
from torch import Tensor

from models.ops.kernels.numba_linear import linear_step, product, swiglu_row
from models.ops.kernels.numba_norm import norm_row, rms_norm
from models.ops.kernels.numba_runtime import LOG2_E, addresses, at, compiled, exp2
from models.ops.kernels.numba_step import (
    WORK_PER_THREAD,
    angles,
    attention_head,
    attention_step,
    lstm_row,
    mamba2_row,
    mamba3_row,
    mamba_row,
    turned,
)


@compiled
def _swiglu_branch(kind, x_at, norm_at, gate_up_at, down_at, out_at, eps, B, D, F):
    x, norm, out = at(x_at, kind, (B, D)), at(norm_at, kind, (D,)), at(out_at, kind, (B, D))
    gate_up, down = at(gate_up_at, kind, (2 * F, D)), at(down_at, kind, (D, F))
    normed, hidden = np.empty(D, x.dtype), np.empty(2 * F, x.dtype)
    for b in range(B):
        norm_row(x[b], norm, eps, normed)
        swiglu_row(gate_up, down, normed, hidden, out[b])
        for d in range(D):
            out[b, d] += x[b, d]


def swiglu_branch(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor, down: Tensor) -> Tensor:
    """x (B, D), norm (D) with its eps, gate_up (2 F, D), down (D, F) -> (B, D)."""
    (B, D), F = x.shape, down.shape[1]
    out = x.new_empty(B, D)
    _swiglu_branch(*addresses(x, norm, gate_up, down, out), eps, B, D, F)
    return out


@compiled
def likeliest(scores, K, chosen, weight):
    """The K largest of `scores` (X), largest first, in chosen (K), and their softmax in weight (K): among themselves,
    or among all where K is 1 (`models.feedforward.moe`)."""
    log2_e = scores.dtype.type(LOG2_E)
    for k in range(K):
        best = -1
        for x in range(scores.shape[0]):
            taken = False
            for earlier in range(k):
                taken = taken or chosen[earlier] == x
            if not taken and (best < 0 or scores[x] > scores[best]):
                best = x
        chosen[k] = best
        weight[k] = exp2((scores[best] - scores[chosen[0]]) * log2_e)
    total = scores.dtype.type(0)
    if K > 1:
        for k in range(K):
            total += weight[k]
    else:
        for x in range(scores.shape[0]):
            total += exp2((scores[x] - scores[chosen[0]]) * log2_e)
    for k in range(K):
        weight[k] /= total


@compiled
def _experts_branch(kind, x_at, norm_at, router_at, gate_up_at, down_at, out_at, eps, B, D, F, X, K):
    x, norm, out = at(x_at, kind, (B, D)), at(norm_at, kind, (D,)), at(out_at, kind, (B, D))
    router, gate_up, down = (
        at(router_at, kind, (X, D)),
        at(gate_up_at, kind, (X, 2 * F, D)),
        at(down_at, kind, (X, D, F)),
    )
    normed, hidden, y = np.empty(D, x.dtype), np.empty(2 * F, x.dtype), np.empty(D, x.dtype)
    scores, chosen, weight = np.empty(X, x.dtype), np.empty(K, np.int64), np.empty(K, x.dtype)
    for b in range(B):
        norm_row(x[b], norm, eps, normed)
        product(router, normed, scores)
        likeliest(scores, K, chosen, weight)
        for d in range(D):
            out[b, d] = x[b, d]
        for k in range(K):
            swiglu_row(gate_up[chosen[k]], down[chosen[k]], normed, hidden, y)
            for d in range(D):
                out[b, d] += weight[k] * y[d]


def experts_branch(
    x: Tensor, norm: Tensor, eps: float, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int
) -> Tensor:
    """x (B, D), norm (D) with its eps, router (X, D), gate_up (X, 2 F, D), down (X, D, F) -> (B, D). Of experts with
    equal scores the first counts as the better."""
    (B, D), (X, _, F) = x.shape, down.shape
    out = x.new_empty(B, D)
    _experts_branch(*addresses(x, norm, router, gate_up, down, out), eps, B, D, F, X, top_k)
    return out


@compiled
def _attention_branch(
    kind, x_at, norm_at, qkv_at, o_at, keys_at, values_at, out_at, table, cos_at, sin_at, eps, B, D, H, K, P, slots,
    position, slot, filled,
):  # fmt: skip
    x, norm, out = at(x_at, kind, (B, D)), at(norm_at, kind, (D,)), at(out_at, kind, (B, D))
    qkv_weight, o_weight = at(qkv_at, kind, ((H + 2 * K) * P, D)), at(o_at, kind, (D, H * P))
    keys, values = at(keys_at, kind, (B, K, slots, P)), at(values_at, kind, (B, K, slots, P))
    cos, sin = angles(kind, table, cos_at, sin_at, position, P)
    normed, qkv = np.empty(D, x.dtype), np.empty((H + 2 * K) * P, x.dtype)
    q, y = np.empty(P, x.dtype), np.empty(H * P, x.dtype)
    for b in range(B):
        norm_row(x[b], norm, eps, normed)
        product(qkv_weight, normed, qkv)
        for kv in range(K):
            attention_head(
                qkv.reshape(H + 2 * K, P), kv, keys[b, kv], values[b, kv], cos, sin, slot, filled, q, y.reshape(H, P)
            )  # fmt: skip
        product(o_weight, y, out[b])
        for d in range(D):
            out[b, d] += x[b, d]


def attention_branch(
    x: Tensor, norm: Tensor, eps: float, qkv_weight: Tensor, o_weight: Tensor, base: float | None, keys: Tensor,
    values: Tensor, position: int, slot: int, filled: int,
) -> Tensor:  # fmt: skip
    """x (B, D), norm (D) with its eps, qkv_weight ((H + 2 K) P, D), o_weight (D, H P) -> (B, D). The rest as for
    `numba_step.attention_step`."""
    (B, D), (_, K, slots, P) = x.shape, keys.shape
    if 2 * B * K * filled * P >= 2 * WORK_PER_THREAD:  # long enough for several threads
        qkv = linear_step(rms_norm(x, norm, eps), qkv_weight).view(B, -1, P)
        y = attention_step(qkv, base, keys, values, position, slot, filled)
        return x + linear_step(y, o_weight)
    out = x.new_empty(B, D)
    cos, sin, row = turned(position, P, base, x.device)
    arrays = (*addresses(x, norm, qkv_weight, o_weight, keys, values, out), *addresses(cos, sin))
    _attention_branch(*arrays, eps, B, D, o_weight.shape[1] // P, K, P, slots, row, slot, filled)
    return out


@compiled
def _mamba_branch(
    kind, x_at, norm_at, in_at, out_proj_at, conv_weight_at, conv_bias_at, x_proj_at, dt_proj_at, dt_bias_at, A_log_at,
    D_at, conv_at, state_at, out_at, eps, negative, B, width, E, N, R, W,
):  # fmt: skip
    x, norm, out = at(x_at, kind, (B, width)), at(norm_at, kind, (width,)), at(out_at, kind, (B, width))
    in_proj, out_proj = at(in_at, kind, (2 * E, width)), at(out_proj_at, kind, (width, E))
    conv_weight, conv_bias = at(conv_weight_at, kind, (E, W)), at(conv_bias_at, kind, (E,))
    x_proj, dt_proj = at(x_proj_at, kind, (R + 2 * N, E)), at(dt_proj_at, kind, (E, R))
    dt_bias, A_log, D = at(dt_bias_at, kind, (E,)), at(A_log_at, kind, (E, N)), at(D_at, kind, (E,))
    conv, state = at(conv_at, kind, (B, E, W)), at(state_at, kind, (B, E, N))
    normed, uz, y = np.empty(width, x.dtype), np.empty(2 * E, x.dtype), np.empty(E, x.dtype)
    u, delta, projected = np.empty(E, x.dtype), np.empty(E, x.dtype), np.empty(R + 2 * N, x.dtype)
    for b in range(B):
        norm_row(x[b], norm, eps, normed)
        product(in_proj, normed, uz)
        mamba_row(
            uz.reshape(2, E), conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, conv[b], state[b], negative,
            u, delta, projected, y,
        )  # fmt: skip
        product(out_proj, y, out[b])
        for d in range(width):
            out[b, d] += x[b, d]


def mamba_branch(
    x: Tensor, norm: Tensor, eps: float, in_proj: Tensor, out_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, conv: Tensor, state: Tensor,
    negative: bool,
) -> Tensor:  # fmt: skip
    """x (B, D), norm (D) with its eps, in_proj (2 E, D), out_proj (D, E) -> (B, D). The rest as for
    `numba_step.mamba_step`."""
    (B, width), (E, N), R, W = x.shape, A_log.shape, dt_proj.shape[1], conv_weight.shape[1]
    out = x.new_empty(B, width)
    arrays = addresses(
        x, norm, in_proj, out_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, conv, state, out
    )  # fmt: skip
    _mamba_branch(*arrays, eps, negative, B, width, E, N, R, W)
    return out


@compiled
def _mamba2_branch(
    kind, x_at, norm_at, in_at, out_proj_at, conv_weight_at, conv_bias_at, dt_bias_at, A_log_at, D_at, norm_weight_at,
    conv_at, state_at, out_at, eps, negative, gated_eps, B, width, H, P, G, N, W, norm_groups,
):  # fmt: skip
    E, channels = H * P, H * P + 2 * G * N
    x, norm, out = at(x_at, kind, (B, width)), at(norm_at, kind, (width,)), at(out_at, kind, (B, width))
    in_proj, out_proj = at(in_at, kind, (E + channels + H, width)), at(out_proj_at, kind, (width, E))
    conv_weight, conv_bias = at(conv_weight_at, kind, (channels, W)), at(conv_bias_at, kind, (channels,))
    dt_bias, A_log, D = at(dt_bias_at, kind, (H,)), at(A_log_at, kind, (H,)), at(D_at, kind, (H,))
    norm_weight = at(norm_weight_at, kind, (E,))
    conv, state = at(conv_at, kind, (B, channels, W)), at(state_at, kind, (B, H, P, N))
    normed, projected = np.empty(width, x.dtype), np.empty(E + channels + H, x.dtype)
    u, y = np.empty(channels, x.dtype), np.empty(E, x.dtype)
    for b in range(B):
        norm_row(x[b], norm, eps, normed)
        product(in_proj, normed, projected)
        mamba2_row(
            projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv[b], state[b], negative, gated_eps,
            G, norm_groups, u, y,
        )  # fmt: skip
        product(out_proj, y, out[b])
        for d in range(width):
            out[b, d] += x[b, d]


def mamba2_branch(
    x: Tensor, norm: Tensor, eps: float, in_proj: Tensor, out_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_weight: Tensor, conv: Tensor, state: Tensor, negative: bool,
    gated_eps: float, norm_groups: int,
) -> Tensor:  # fmt: skip
    """x (B, D), norm (D) with its eps, in_proj (E + channels + H, D), out_proj (D, E) -> (B, D). The rest as for
    `numba_step.mamba2_step`. Raises ValueError where the state is of another number of sequences."""
    (B, width), (rows, H, P, N), (channels, W) = x.shape, state.shape, conv_weight.shape
    if rows != B or conv.shape[0] != B:
        raise ValueError(f"the state is of {rows} sequences, the token is {tuple(x.shape)}")
    out = x.new_empty(B, width)
    arrays = addresses(
        x, norm, in_proj, out_proj, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv, state, out
    )  # fmt: skip
    G = (channels - H * P) // (2 * N)
    _mamba2_branch(*arrays, eps, negative, gated_eps, B, width, H, P, G, N, W, norm_groups)
    return out


@compiled
def _mamba3_branch(
    kind, x_at, norm_at, in_at, out_proj_at, B_norm_at, C_norm_at, B_bias_at, C_bias_at, dt_bias_at, D_at, theta_at,
    state_at, before_B_at, before_x_at, out_at, eps, inner_eps, floor, B, width, H, P, G, N, S,
):  # fmt: skip
    E, inputs = H * P, 2 * (H * P + G * N) + 3 * H + S
    x, norm, out = at(x_at, kind, (B, width)), at(norm_at, kind, (width,)), at(out_at, kind, (B, width))
    in_proj, out_proj = at(in_at, kind, (inputs, width)), at(out_proj_at, kind, (width, E))
    B_norm, C_norm = at(B_norm_at, kind, (N,)), at(C_norm_at, kind, (N,))
    B_bias, C_bias = at(B_bias_at, kind, (H, N)), at(C_bias_at, kind, (H, N))
    dt_bias, D = at(dt_bias_at, kind, (H,)), at(D_at, kind, (H,))
    theta, state = at(theta_at, kind, (B, H, S)), at(state_at, kind, (B, H, P, N))
    before_B, before_x = at(before_B_at, kind, (B, H, N)), at(before_x_at, kind, (B, H, P))
    normed, projected, y = np.empty(width, x.dtype), np.empty(inputs, x.dtype), np.empty(E, x.dtype)
    B_groups, C_groups, rates = np.empty((G, N), x.dtype), np.empty((G, N), x.dtype), np.empty(S, x.dtype)
    b, c = np.empty(N, x.dtype), np.empty(N, x.dtype)
    for r in range(B):
        norm_row(x[r], norm, eps, normed)
        product(in_proj, normed, projected)
        mamba3_row(
            projected, B_norm, C_norm, B_bias, C_bias, dt_bias, D, theta[r], state[r], before_B[r], before_x[r],
            inner_eps, floor, B_groups, C_groups, rates, b, c, y,
        )  # fmt: skip
        product(out_proj, y, out[r])
        for d in range(width):
            out[r, d] += x[r, d]


def mamba3_branch(
    x: Tensor, norm: Tensor, eps: float, in_proj: Tensor, out_proj: Tensor, B_norm: Tensor, C_norm: Tensor,
    B_bias: Tensor, C_bias: Tensor, dt_bias: Tensor, D: Tensor, theta: Tensor, state: Tensor, before_B: Tensor,
    before_x: Tensor, inner_eps: float, floor: float,
) -> Tensor:  # fmt: skip
    """x (B, D), norm (D) with its eps, in_proj (2 E + 2 G N + 3 H + S, D), out_proj (D, E) -> (B, D). The rest as for
    `numba_step.mamba3_step`. Raises ValueError where the state is of another number of sequences."""
    (B, width), (rows, H, P, N), S = x.shape, state.shape, theta.shape[2]
    if rows != B:
        raise ValueError(f"the state is of {rows} sequences, the token is {tuple(x.shape)}")
    out = x.new_empty(B, width)
    arrays = addresses(
        x, norm, in_proj, out_proj, B_norm, C_norm, B_bias, C_bias, dt_bias, D, theta, state, before_B, before_x, out
    )  # fmt: skip
    G = (len(in_proj) - 2 * H * P - 3 * H - S) // (2 * N)
    _mamba3_branch(*arrays, eps, inner_eps, floor, B, width, H, P, G, N, S)
    return out


@compiled
def _lstm_branch(kind, x_at, norm_at, W_at, U_at, bias_at, out_proj_at, hidden_at, cell_at, out_at, eps, B, D, E):
    x, norm, out = at(x_at, kind, (B, D)), at(norm_at, kind, (D,)), at(out_at, kind, (B, D))
    W, U, bias = at(W_at, kind, (4 * E, D)), at(U_at, kind, (4 * E, E)), at(bias_at, kind, (4 * E,))
    out_proj, hidden, cell = at(out_proj_at, kind, (D, E)), at(hidden_at, kind, (B, E)), at(cell_at, kind, (B, E))
    normed, gates, carried = np.empty(D, x.dtype), np.empty(4 * E, x.dtype), np.empty(4 * E, x.dtype)
    for b in range(B):
        norm_row(x[b], norm, eps, normed)
        product(W, normed, gates)
        product(U, hidden[b], carried)
        for e in range(4 * E):
            gates[e] += carried[e] + bias[e]
        lstm_row(gates, hidden[b], cell[b])
        product(out_proj, hidden[b], out[b])
        for d in range(D):
            out[b, d] += x[b, d]


def lstm_branch(
    x: Tensor, norm: Tensor, eps: float, W: Tensor, U: Tensor, bias: Tensor, out_proj: Tensor, hidden: Tensor,
    cell: Tensor,
) -> Tensor:  # fmt: skip
    """x (B, D), norm (D) with its eps, W (4 E, D), U (4 E, E), bias (4 E), out_proj (D, E), hidden, cell (B, E) ->
    (B, D). Raises ValueError where the state is of another number of sequences."""
    (B, D), (rows, E) = x.shape, cell.shape
    if rows != B:
        raise ValueError(f"the state is of {rows} sequences, the token is {tuple(x.shape)}")
    out = x.new_empty(B, D)
    _lstm_branch(*addresses(x, norm, W, U, bias, out_proj, hidden, cell, out), eps, B, D, E)
    return out
