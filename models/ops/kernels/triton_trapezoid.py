"""One token of Mamba-3 on a GPU: all that `models.ops.trapezoid.step` does in one kernel, a program for each head.

As torch's operations a token takes some sixty launches of a few thousand numbers each; the work is reading the state.

B: batch   H: heads   P: head width   G: groups of heads   N: state size   S: rotated pairs
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with torch on CUDA machines only; its kernels take their grid in brackets)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.ops.trapezoid import State

TURN = tl.constexpr(2 * math.pi)


def step(
    x: Tensor, dt: Tensor, a: Tensor, trap: Tensor, angle: Tensor, B: Tensor, C: Tensor, z: Tensor | None, D: Tensor,
    dt_bias: Tensor, B_bias: Tensor, C_bias: Tensor, A_floor: float, state: State,
) -> tuple[Tensor, State]:  # fmt: skip
    """`models.ops.trapezoid.step` of rank 1 in types of at most 32 bits: x (B, H, P), dt, a, trap (B, H), angle (B, S),
    B, C (B, 1, G, N), z like x or None. The state is written over; its parts have to be contiguous. Computed in float32
    and rounded once. No gradient."""
    rows, H, P = x.shape
    G, N = B.shape[2:]
    for part in state:
        assert part.is_contiguous()
    tokens = [
        m if m[0].is_contiguous() else m.contiguous() for m in (x, dt, a, trap, angle, B, C, x if z is None else z)
    ]
    weights = [m.contiguous() for m in (D, dt_bias, B_bias, C_bias)]
    y = torch.empty(rows, H, P, dtype=x.dtype, device=x.device)
    _step[rows, H](
        *tokens, *weights, *state, y, A_floor, *(m.stride(0) for m in tokens),
        H=H, P=P, G=G, N=N, S=angle.shape[1], gated=z is not None,
        width=triton.next_power_of_2(P), entries=triton.next_power_of_2(N),
        pairs=triton.next_power_of_2(angle.shape[1]), num_warps=8,
    )  # fmt: skip
    return y, state


@triton.jit
def _step(
    x_at, dt_at, a_at, trap_at, angle_at, B_at, C_at, z_at, D_at, dt_bias_at, B_bias_at, C_bias_at,
    theta_at, h_at, before_B_at, before_x_at, y_at, A_floor,
    x_row, dt_row, a_row, trap_row, angle_row, B_row, C_row, z_row,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, S: tl.constexpr, gated: tl.constexpr,
    width: tl.constexpr, entries: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, group = row * H + head, head // (H // G)
    p, n, s = tl.arange(0, width), tl.arange(0, entries), tl.arange(0, pairs)

    delta = _softplus(tl.load(dt_at + row * dt_row + head).to(tl.float32) + tl.load(dt_bias_at + head).to(tl.float32))
    rate = _softplus(tl.load(a_at + row * a_row + head).to(tl.float32))
    alpha = tl.exp(-delta * tl.maximum(rate, A_floor))
    mix = tl.sigmoid(tl.load(trap_at + row * trap_row + head).to(tl.float32))

    # each pair's angle twice: for what is kept, and for both entries that it turns
    angle_at += row * angle_row
    theta_at += place * S
    theta = _turned_on(theta_at, angle_at, s, s < S, delta)
    of_entry = _turned_on(theta_at, angle_at, n // 2, n < 2 * S, delta)
    cos, sin = tl.cos(of_entry), tl.sin(of_entry)
    B = _of_head(B_at + row * B_row + group * N, B_bias_at + head * N, n, cos, sin, N)
    C = _of_head(C_at + row * C_row + group * N, C_bias_at + head * N, n, cos, sin, N)
    B, C = B.to(B_at.dtype.element_ty), C.to(C_at.dtype.element_ty).to(tl.float32)

    x = tl.load(x_at + row * x_row + head * P + p, mask=p < P, other=0)
    before_x = tl.load(before_x_at + place * P + p, mask=p < P, other=0).to(tl.float32)
    before_B = tl.load(before_B_at + place * N + n, mask=n < N, other=0).to(tl.float32)
    # (P, N)
    here = h_at + place * P * N + p[:, None] * N + n[None, :]
    there = (p[:, None] < P) & (n[None, :] < N)
    h = alpha * tl.load(here, mask=there, other=0).to(tl.float32)
    h += ((1 - mix) * delta * alpha) * before_x[:, None] * before_B[None, :]
    h += (mix * delta) * x.to(tl.float32)[:, None] * B.to(tl.float32)[None, :]
    y = tl.sum(h * C[None, :], 1) + tl.load(D_at + head).to(tl.float32) * x.to(tl.float32)
    if gated:
        z = tl.load(z_at + row * z_row + head * P + p, mask=p < P, other=0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(y_at + place * P + p, y.to(y_at.dtype.element_ty), mask=p < P)

    tl.debug_barrier()  # what is written over now, other threads have read
    tl.store(here, h.to(h_at.dtype.element_ty), mask=there)
    tl.store(theta_at + s, theta.to(theta_at.dtype.element_ty), mask=s < S)
    tl.store(before_B_at + place * N + n, B.to(before_B_at.dtype.element_ty), mask=n < N)
    tl.store(before_x_at + place * P + p, x.to(before_x_at.dtype.element_ty), mask=p < P)


@triton.jit
def _softplus(v):
    """log(1 + e^v), also where e^v is far below 1: log(1 + u) is u log(w) / (w - 1) for the w that 1 + u rounds to."""
    u = tl.exp(-tl.abs(v))
    w = 1 + u
    return tl.maximum(v, 0.0) + tl.where(w == 1, u, u * (tl.log(w) / tl.where(w == 1, 1.0, w - 1)))


@triton.jit
def _turned_on(theta_at, angle_at, pair, there, delta):
    """The angle of a pair after this token, less whole turns."""
    angle = tl.load(angle_at + pair, mask=there, other=0).to(tl.float32)
    theta = tl.load(theta_at + pair, mask=there, other=0).to(tl.float32)
    theta += (2 * tl.sigmoid(2 * angle) - 1) * (0.5 * TURN * delta)
    return theta - tl.floor(theta / TURN) * TURN


@triton.jit
def _of_head(m_at, bias_at, n, cos, sin, N: tl.constexpr):
    """(N) of the group with the head's bias, its pairs turned; where nothing turns, cos is 1 and sin 0."""
    own = tl.load(m_at + n, mask=n < N, other=0).to(tl.float32)
    own += tl.load(bias_at + n, mask=n < N, other=0).to(tl.float32)
    beside = n ^ 1
    other = tl.load(m_at + beside, mask=beside < N, other=0).to(tl.float32)
    other += tl.load(bias_at + beside, mask=beside < N, other=0).to(tl.float32)
    return own * cos + tl.where(n % 2 == 0, -other, other) * sin
