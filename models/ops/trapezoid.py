"""The recurrence of Mamba-3 (arXiv 2603.15569): exponential-trapezoidal steps, data-dependent rotation.

B: batch   T: time   H: heads   P: head width   G: groups of heads   N: state size   S: rotated pairs
R: rank (1 in the SISO form)

    delta_t = softplus(dt_t + dt_bias)       A_t = -softplus(a_t), at most -A_floor       alpha_t = exp(delta_t A_t)
    theta_t = theta_(t-1) + pi delta_t tanh(angle_t)      lambda_t = sigmoid(trap_t)
    B'_t, C'_t: of each head, B_t + B_bias, C_t + C_bias, their first S neighbouring pairs rotated by theta_t
    h_t = alpha_t h_(t-1) + (1 - lambda_t) delta_t alpha_t x_(t-1) B'_(t-1)^T + lambda_t delta_t x_t B'_t^T
    y_t = (h_t C'_t + D x_t) silu(z_t)

Every form has one signature (R only in the reference; x and z then differ by rank, (B, T, R, H, P), and so does y):

    x (B, T, H, P)   dt, a, trap (B, T, H)   angle (B, T, S)   B, C (B, T, R, G, N), normalised   z like x, or None
    D, dt_bias (H)   B_bias, C_bias (R, H, N)   A_floor   initial: State or None   ->  y (B, T, H, P), State

The rotation is theirs (`mamba_ssm`): neighbouring entries form a pair, and what lies beyond 2 S is left alone.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops import ssd, ssd_passes


class State(NamedTuple):
    """theta (B, H, S), h (B, H, P, N), the previous token's B' (B, R, H, N) and x ((B, R, H, P) or (B, H, P))."""

    angle: Tensor
    ssm: Tensor
    previous_B: Tensor
    previous_x: Tensor


def rotated(m: Tensor, theta: Tensor) -> Tensor:
    """m (B, ..., H, N) with its pairs turned by theta (B, ..., H, S), which has an axis fewer: none for the rank R."""
    S = theta.shape[-1]
    theta = theta.unsqueeze(-3)
    cos, sin = theta.cos().to(m.dtype), theta.sin().to(m.dtype)
    a, b = m[..., : 2 * S].unflatten(-1, (S, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([turned, m[..., 2 * S :]], -1)


def log_alpha_and_delta(dt: Tensor, a: Tensor, dt_bias: Tensor, A_floor: float) -> tuple[Tensor, Tensor]:
    """Each (B, T, H), at least float32."""
    wide = torch.promote_types(dt.dtype, torch.float32)
    delta = F.softplus(dt.to(wide) + dt_bias)
    return delta * (-F.softplus(a.to(wide))).clamp_max(-A_floor), delta


def _of_heads(m: Tensor, bias: Tensor, theta: Tensor) -> Tensor:
    """m (B, T, R, G, N) of the groups -> (B, T, R, H, N) of their heads, with the bias (R, H, N) and rotated, in the
    type of m, to which it is rounded once."""
    groups = m.shape[3]
    biased = (m[..., None, :] + bias.unflatten(1, (groups, -1))).flatten(3, 4)
    return rotated(biased, theta).to(m.dtype)


def _angles(angle: Tensor, delta: Tensor, initial: Tensor | None) -> Tensor:
    """theta (B, T, H, S), modulo 2 pi: float32 keeps its absolute precision over any length."""
    turns = torch.tanh(angle.to(delta.dtype))[:, :, None] * (math.pi * delta[..., None])
    theta = turns.cumsum(1)
    theta = theta if initial is None else theta + initial[:, None]
    return theta.remainder(2 * math.pi)


def reference(
    x: Tensor, dt: Tensor, a: Tensor, trap: Tensor, angle: Tensor, B: Tensor, C: Tensor, z: Tensor | None, D: Tensor,
    dt_bias: Tensor, B_bias: Tensor, C_bias: Tensor, A_floor: float, initial: State | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """One step at a time, in the precision of its inputs; with ranks, x (B, T, R, H, P)."""
    siso = x.ndim == 4
    x = x[:, :, None] if siso else x
    rows, T, _, H, P = x.shape
    log_alpha, delta = log_alpha_and_delta(dt, a, dt_bias, A_floor)
    mix = trap.to(delta.dtype).sigmoid()
    theta = _angles(angle, delta, None if initial is None else initial.angle)
    B, C = _of_heads(B, B_bias, theta), _of_heads(C, C_bias, theta)
    if initial is None:
        h, before_B, before_x = delta.new_zeros(rows, H, P, B.shape[-1]), torch.zeros_like(B[:, 0]), x[:, 0] * 0
    else:
        h, before_B, before_x = initial.ssm, initial.previous_B, initial.previous_x
        before_x = before_x[:, None] if siso else before_x
    ys = []
    for t in range(T):
        alpha = log_alpha[:, t].exp()
        before = torch.einsum("brhp,brhn->bhpn", before_x, before_B.to(x.dtype))
        now = torch.einsum("brhp,brhn->bhpn", x[:, t], B[:, t])
        old = ((1 - mix[:, t]) * delta[:, t] * alpha)[..., None, None] * before
        h = alpha[..., None, None] * h + old + (mix[:, t] * delta[:, t])[..., None, None] * now
        ys.append(torch.einsum("bhpn,brhn->brhp", h, C[:, t].to(h.dtype)) + D[:, None] * x[:, t])
        before_B, before_x = B[:, t], x[:, t]
    y = torch.stack(ys, 1).to(x.dtype)
    if siso:
        y, before_x = y[:, :, 0], before_x[:, 0]
    return _gated(y, z), State(theta[:, -1], h, before_B, before_x)


def _gated(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else y * F.silu(z)


def chunked(
    x: Tensor, dt: Tensor, a: Tensor, trap: Tensor, angle: Tensor, B: Tensor, C: Tensor, z: Tensor | None, D: Tensor,
    dt_bias: Tensor, B_bias: Tensor, C_bias: Tensor, A_floor: float, initial: State | None = None,
    passes: Any = ssd_passes,
) -> tuple[Tensor, State]:  # fmt: skip
    """By the chunked recurrence of Mamba-2, for g_t = h_t - lambda_t delta_t x_t B'_t^T, what earlier tokens left:

        g_t = alpha_t g_(t-1) + alpha_t (lambda_(t-1) delta_(t-1) + (1 - lambda_t) delta_t) x_(t-1) B'_(t-1)^T

    A token's own part is added to its output. (To write each token with its whole weight at once, and take what only
    the next step adds off its own output, is the same sum, but its rounding tells the present of the future.)"""
    assert B.shape[2] == 1, "the chunked form is SISO"
    log_alpha, delta = log_alpha_and_delta(dt, a, dt_bias, A_floor)
    mix = trap.to(delta.dtype).sigmoid()
    theta = _angles(angle, delta, None if initial is None else initial.angle)
    B, C = (_of_heads(m, bias, theta)[:, :, 0] for m, bias in ((B, B_bias), (C, C_bias)))  # (B, T, H, N)
    own = mix * delta
    earlier = log_alpha.exp() * (F.pad(own[:, :-1], (0, 0, 1, 0)) + (1 - mix) * delta)
    if initial is None:
        h, before_x, before_B = None, torch.zeros_like(x[:, :1]), torch.zeros_like(B[:, :1])
    else:
        h, before_x, before_B = (
            initial.ssm,
            initial.previous_x[:, None].to(x.dtype),
            initial.previous_B[:, 0, None].to(B.dtype),
        )
    before_x, before_B = torch.cat([before_x, x[:, :-1]], 1), torch.cat([before_B, B[:, :-1]], 1)
    y, g = ssd.chunked_recurrence(before_x, log_alpha, earlier, before_B, C, h, passes=passes)
    y = torch.addcmul(y, (D + own * (C * B).sum(-1))[..., None].to(x.dtype), x)
    h = g + (own[:, -1, :, None] * x[:, -1])[..., None] * B[:, -1, :, None, :]
    return _gated(y.to(x.dtype), z), State(theta[:, -1], h, B[:, -1:], x[:, -1])


def step(
    x: Tensor, dt: Tensor, a: Tensor, trap: Tensor, angle: Tensor, B: Tensor, C: Tensor, z: Tensor | None, D: Tensor,
    dt_bias: Tensor, B_bias: Tensor, C_bias: Tensor, A_floor: float, state: State,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token, without the axis T: the reference over a sequence of one."""
    x, dt, a, trap, angle, B, C = (m[:, None] for m in (x, dt, a, trap, angle, B, C))
    z = None if z is None else z[:, None]
    y, after = reference(x, dt, a, trap, angle, B, C, z, D, dt_bias, B_bias, C_bias, A_floor, state)
    return y[:, 0], after


def forward_flops(H: int, P: int, N: int, R: int, T: int) -> float:
    """Per token over a sequence of T: with rank 1 by chunks, B and C being every head's own; with more, by steps."""
    return ssd.forward_flops(H, P, H, N, T) if R == 1 else 2 * 3 * R * H * P * N
