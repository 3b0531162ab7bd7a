"""Rotary positions on a CPU, compiled by numba: one pass from the projection to queries, keys and values, each in
memory of its own, and one back, in which a rotation's gradient is the rotation back.

B: batch   T: time   H: heads of queries   K: of keys, and of values   P: head width   M: B T rows

A task is `ROWS` rows.
"""

import torch
from torch import Tensor

from models.ops.attention import rotary_table
from models.ops.kernels.numba_runtime import addresses, at, compiled, run_tasks

ROWS = 32


@compiled
def _rotate_head(x, out, cos, sin, direction):
    """x, out (2, P/2); cos, sin (P/2). direction: 1, or -1 for back."""
    kind = x.dtype.type
    for i in range(len(cos)):
        a, b = x[0, i], x[1, i]
        c, s = kind(cos[i]), kind(sin[i]) * direction
        out[0, i] = a * c - b * s
        out[1, i] = b * c + a * s


@compiled
def _copy_head(x, out):
    for i in range(x.shape[1]):
        out[0, i] = x[0, i]
        out[1, i] = x[1, i]


@compiled
def _split(kind, qkv_at, q_at, k_at, v_at, table, cos_at, sin_at, M, T, H, K, P, start, first, last):
    """cos, sin (start + T, P/2): positions start..start+T-1 for a sequence's rows."""
    half = P // 2
    qkv, q = at(qkv_at, kind, (M, H + 2 * K, 2, half)), at(q_at, kind, (M, H, 2, half))
    k, v = at(k_at, kind, (M, K, 2, half)), at(v_at, kind, (M, K, 2, half))
    cos, sin = at(cos_at, table, (start + T, half)), at(sin_at, table, (start + T, half))
    forward = qkv.dtype.type(1)
    for row in range(first * ROWS, min(last * ROWS, M)):
        t = start + row % T
        for j in range(H):
            _rotate_head(qkv[row, j], q[row, j], cos[t], sin[t], forward)
        for j in range(K):
            _rotate_head(qkv[row, H + j], k[row, j], cos[t], sin[t], forward)
            _copy_head(qkv[row, H + K + j], v[row, j])


@compiled
def _join(kind, d_q_at, d_k_at, d_v_at, d_qkv_at, table, cos_at, sin_at, M, T, H, K, P, start, first, last):
    half = P // 2
    d_qkv, d_q = at(d_qkv_at, kind, (M, H + 2 * K, 2, half)), at(d_q_at, kind, (M, H, 2, half))
    d_k, d_v = at(d_k_at, kind, (M, K, 2, half)), at(d_v_at, kind, (M, K, 2, half))
    cos, sin = at(cos_at, table, (start + T, half)), at(sin_at, table, (start + T, half))
    back = d_qkv.dtype.type(-1)
    for row in range(first * ROWS, min(last * ROWS, M)):
        t = start + row % T
        for j in range(H):
            _rotate_head(d_q[row, j], d_qkv[row, j], cos[t], sin[t], back)
        for j in range(K):
            _rotate_head(d_k[row, j], d_qkv[row, H + j], cos[t], sin[t], back)
            _copy_head(d_v[row, j], d_qkv[row, H + K + j])


def _split_heads(qkv: Tensor, cos: Tensor, sin: Tensor, K: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, T, H + 2 K, P) -> q (B, T, H, P), k, v (B, T, K, P)."""
    B, T, J, P = qkv.shape
    qkv, (q, k, v) = qkv.contiguous(), (qkv.new_empty(B, T, n, P) for n in (J - 2 * K, K, K))
    sizes = (B * T, T, J - 2 * K, K, P, start)
    run_tasks(
        _split, -(-B * T // ROWS), *addresses(qkv, q, k, v), *addresses(cos, sin), *sizes, work=qkv.numel()
    )  # fmt: skip
    return q, k, v


_splits = torch.library.custom_op("lab::rotary_qkv_cpu", _split_heads, mutates_args=(), device_types="cpu")


@_splits.register_fake
def _(qkv, cos, sin, K, start):
    B, T, J, P = qkv.shape
    q, k, v = (qkv.new_empty(B, T, n, P) for n in (J - 2 * K, K, K))
    return q, k, v


@torch.library.custom_op("lab::rotary_qkv_cpu_backward", mutates_args=(), device_types="cpu")
def _join_heads(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
    (B, T, H, P), K = d_q.shape, d_k.shape[2]
    held, d_qkv = [d.contiguous() for d in (d_q, d_k, d_v)], d_q.new_empty(B, T, H + 2 * K, P)
    sizes = (B * T, T, H, K, P, start)
    run_tasks(
        _join, -(-B * T // ROWS), *addresses(*held, d_qkv), *addresses(cos, sin), *sizes, work=d_qkv.numel()
    )  # fmt: skip
    return d_qkv


@_join_heads.register_fake
def _(d_q, d_k, d_v, cos, sin, start):
    B, T, H, P = d_q.shape
    return d_q.new_empty(B, T, H + 2 * d_k.shape[2], P)


def _save(ctx, inputs, output):
    _, *ctx.tables, _, ctx.start = inputs


def _differentiate(ctx, *gradients):
    return _join_heads(*gradients, *ctx.tables, ctx.start), None, None, None, None


_splits.register_autograd(_differentiate, setup_context=_save)


def rotary_qkv(qkv: Tensor, kv_heads: int, start: int, base: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `models.ops.attention.rotary_qkv`, in float32 or float64."""
    cos, sin = rotary_table(start + qkv.shape[1], qkv.shape[3], base, qkv.device)
    # without autograd the operator's dispatch would cost more than a short prompt's rotation
    split = _split_heads if not torch.is_grad_enabled() and qkv.is_cpu else _splits
    q, k, v = split(qkv, cos, sin, kv_heads, start)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
