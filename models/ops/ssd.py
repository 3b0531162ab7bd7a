"""State-space duality: the recurrence with one decay per head of Mamba-2 (arXiv 2405.21060), in forms that agree.

B: batch   T: time   H: heads   P: head width   G: groups   N: state size   Q: chunk

    h_t = a_t h_(t-1) + w_t x_t B_t^T        y_t = h_t C_t        h: (B, H, P, N)

Each of the G groups of B and C serves H / G neighbouring heads. In Mamba-2, delta_t = softplus(dt_t + dt_bias),
a_t = exp(delta_t A), w_t = delta_t, and D x_t is added to y_t; with `negative`, a_t = 2 exp(delta_t A) - 1, in (-1, 1)
(arXiv 2411.12537). Mamba-3 (models/ops/trapezoid.py) brings its own a_t and w_t.

Mamba-2 in every form has one signature:

    x (B, T, H, P)   dt (B, T, H)   A (H)   B (B, T, G, N)   C (B, T, G, N)   D (H)   dt_bias (H)
    initial_state (B, H, P, N) or None (zeros)   negative   ->  y (B, T, H, P), last_state (B, H, P, N)

It agrees with `mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined(..., dt_softplus=True)`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops import ssd_passes
from models.ops.precision import without_autocast
from models.ops.selective_scan import decay
from models.ops.ssd_passes import decay_product

CHUNK = 64


def recurrence(
    x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it reads, differentiable, in the precision of its inputs.

    x (B, T, H, P)   a, w (B, T, H)   B, C (B, T, G, N)   initial_state (B, H, P, N) or None
    """
    rows, T, H, P = x.shape
    B, C = (for_heads(m, H) for m in (B, C))
    h = a.new_zeros(rows, H, P, B.shape[-1]) if initial_state is None else initial_state
    ys = []
    for t in range(T):
        h = a[:, t, :, None, None] * h + (w[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t].to(h.dtype)))
    return torch.stack(ys, 1), h


def chunked_recurrence(
    x: Tensor, log_a: Tensor, w: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    sign: Tensor | None = None, D: Tensor | None = None, passes: Any = ssd_passes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by matrix products (arXiv 2405.21060, Listing 1), from log_a = log |a| and the sign of a, None for 1;
    with D x added to y, D (H) or (B, T, H), None for 0.

    Within a chunk of Q steps y is a masked attention with scores C_t . B_s and the product of the decays in between;
    across chunks only the states at their borders are carried on. Memory O(T Q H) for the scores. The products are in
    the type of x, the decays and the state in that of log_a. The gradient is written out below. passes: who does what
    surrounds the products, a module with the functions of `models.ops.ssd_passes`.
    """
    rows, T, H, P = x.shape
    D = (log_a.new_zeros(H) if D is None else D).to(log_a.dtype).expand(rows, T, H)
    padding = -T % min(CHUNK, T)  # steps that neither decay nor write
    if padding:
        x, log_a, w, B, C, D = (F.pad(m, (0, 0) * (m.ndim - 2) + (0, padding)) for m in (x, log_a, w, B, C, D))
        sign = None if sign is None else F.pad(sign, (0, 0, 0, padding), value=1.0)
    if initial_state is None:
        initial_state = log_a.new_zeros(rows, H, P, B.shape[-1])
    B, C = B.to(x.dtype), C.to(x.dtype)
    y, h = _Chunked.apply(x, log_a, w.to(log_a.dtype), B, C, D, initial_state.to(log_a.dtype), sign, passes)
    return y[:, :T], h


class _Chunked(torch.autograd.Function):
    """Layouts are those of `models.ops.ssd_passes`. c: chunks. In the gradient d_m is the gradient of m."""

    @staticmethod
    def forward(ctx, x, log_a, w, B, C, D, initial_state, sign, passes):
        ctx.Q, ctx.passes = min(CHUNK, x.shape[1]), passes
        with without_autocast(x.device):
            total, flips, from_start, to_end = _decays(log_a, sign, ctx.Q)
            B_, C_ = _groups(B, ctx.Q), _groups(C, ctx.Q)
            xw, written = passes.spread(x, w, w * to_end, ctx.Q, B.shape[2])
            scores = passes.masked(C_ @ B_.transpose(3, 4), total, flips)  # (B, c, H, Q, Q)
            within = scores @ xw
            states = (written.transpose(3, 4) @ B_).unflatten(3, (-1, x.shape[3])).flatten(2, 3)  # (B, c, H, P, N)
            through = from_start.unflatten(1, (-1, ctx.Q))[:, :, -1]  # (B, c, H)
            borders = passes.carry(states, through, initial_state)  # (B, c + 1, H, P, N)
            entering, h = borders[:, :-1], borders[:, -1].clone()
            carried = C_ @ _state_matrix(entering, B_).transpose(3, 4)  # by group
            y = passes.gather(within, carried, from_start, x, D)
        ctx.save_for_backward(x, w, B, C, D, scores, total, flips, from_start, to_end, borders, carried)
        return y, h

    @staticmethod
    def backward(ctx, d_y, d_h):
        x, w, B, C, D, scores, total, flips, from_start, to_end, borders, carried = ctx.saved_tensors
        Q, G, passes = ctx.Q, B.shape[2], ctx.passes
        B_, C_ = _groups(B, Q), _groups(C, Q)
        with without_autocast(x.device):
            d_out, d_carried = passes.spread(d_y, None, from_start, Q, G)
            xw, written = passes.spread(x, w, w * to_end, Q, G)
            d_within = scores.transpose(3, 4) @ d_out  # of x w, by head, within the chunk
            d_pairs, within_pairs = passes.masked_gradient(
                d_out @ xw.transpose(3, 4), C_ @ B_.transpose(3, 4), total, flips
            )
            d_entering = (d_carried.transpose(3, 4) @ C_).unflatten(3, (-1, x.shape[3])).flatten(2, 3)
            through = from_start.unflatten(1, (-1, Q))[:, :, -1]
            d_borders, whole = passes.carry_gradient(d_entering, through, d_h, borders)
            entering, leaving = borders[:, :-1], d_borders[:, 1:]  # of each chunk: its first state, its last's gradient
            d_states = _state_matrix(leaving, B_)  # (B, c, G, R P, N)
            d_B = d_pairs.transpose(3, 4) @ C_ + written @ d_states
            d_C = d_pairs @ B_ + d_carried @ _state_matrix(entering, B_)
            d_left = B_ @ d_states.transpose(3, 4)  # by group, of what the chunk leaves behind
            d_x, d_w, d_D, given, left = passes.gather_gradient(d_y, x, carried, d_within, d_left, w, to_end, D)
            # What the decay at s weighs in the loss is the sum of all that it multiplies: of pairs r < s <= t in the
            # chunk; of what the chunk's first state gives to t >= s; of what r < s gives to its last state; and of the
            # first state in the last. Each term has a_s as a factor, so that its rounding stays small beside it, in 16
            # bits too and where a_s is almost 0. (The difference of what y and x weigh is the same, but cancels.)
            given = (given * from_start).unflatten(1, (-1, Q)).flip(2).cumsum(2).flip(2)  # (B, c, Q, H)
            left = F.pad((left * w * to_end).unflatten(1, (-1, Q)).cumsum(2)[:, :, :-1], (0, 0, 1, 0))
            d_log_a = (within_pairs.transpose(2, 3) + given + left + whole[:, :, None]).flatten(1, 2)
        d_B, d_C = (m.transpose(2, 3).reshape(B.shape) for m in (d_B, d_C))
        return d_x, d_log_a, d_w, d_B, d_C, d_D, d_borders[:, 0], None, None


def _decays(log_a: Tensor, sign: Tensor | None, Q: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """log |a| summed up within each chunk, and the product of the signs, (B, c, H, Q); the decay from the chunk's start
    to t, and from t to its end, (B, T, H)."""
    total = log_a.unflatten(1, (-1, Q)).cumsum(2)
    from_start, to_end = decay_product(total), decay_product(total[:, :, -1:] - total)
    flips = None
    if sign is not None:
        signs = sign.unflatten(1, (-1, Q)).cumprod(2)
        from_start, to_end = from_start * signs, to_end * (signs[:, :, -1:] * signs)
        flips = signs.transpose(2, 3).contiguous()
    return total.transpose(2, 3).contiguous(), flips, from_start.flatten(1, 2), to_end.flatten(1, 2)


def _groups(m: Tensor, Q: int) -> Tensor:
    """B or C (B, T, G, N) -> (B, c, G, Q, N)."""
    return m.unflatten(1, (-1, Q)).transpose(2, 3)


def _state_matrix(h: Tensor, B_: Tensor) -> Tensor:
    """(B, c, H, P, N) -> (B, c, G, R P, N), in the type of the products."""
    return h.to(B_.dtype).unflatten(2, (B_.shape[2], -1)).flatten(3, 4)


def for_heads(m: Tensor, H: int) -> Tensor:
    """(..., G, N) -> (..., H, N)."""
    return m.repeat_interleave(H // m.shape[-2], -2)


def log_decay(delta: Tensor, A: Tensor, negative: bool) -> tuple[Tensor, Tensor | None]:
    """log |a| and the sign of a (None where it is always 1), for a step of size delta (..., H)."""
    if not negative:
        return delta * A, None
    a = decay(delta * A, negative)
    # 1e-6: beside it nothing is left of a state anyway, and the logarithm stays finite
    return a.abs().clamp_min(1e-6).log(), torch.where(a.detach() < 0, -1.0, 1.0).to(a.dtype)


def reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None, negative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2, one step at a time."""
    delta = F.softplus(dt + dt_bias)
    y, h = recurrence(x, decay(delta * A, negative), delta, B, C, initial_state)
    return (y + D[:, None] * x).to(x.dtype), h


def chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None, negative: bool = False, passes: Any = ssd_passes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2 by `chunked_recurrence`."""
    delta = F.softplus(dt + dt_bias)
    log_a, sign = log_decay(delta, A, negative)
    y, h = chunked_recurrence(x, log_a, delta, B, C, initial_state, sign, D, passes)
    return y.to(x.dtype), h


def step_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    negative: bool = False,
) -> Tensor:  # fmt: skip
    """One token: x (B, H, P), dt (B, H), B, C (B, G, N); `state` (B, H, P, N) is advanced in place. Gives (B, H, P)."""
    H = x.shape[1]
    delta = F.softplus(dt + dt_bias)
    B, C = (for_heads(m, H) for m in (B, C))
    a = decay(delta * A, negative)
    h = a[..., None, None] * state.to(a.dtype) + (delta[..., None] * x)[..., None] * B[:, :, None, :]
    state.copy_(h)  # a 16-bit state rounds here, not in the arithmetic
    y = torch.einsum("bhpn,bhn->bhp", h, C.to(h.dtype)) + D[:, None] * x
    return y.to(x.dtype)


def forward_flops(H: int, P: int, G: int, N: int, T: int) -> float:
    """Per token over a sequence of T, by chunks: scores, their product with x, the states and their reading. A
    multiply-add is two; within a chunk the upper triangle, which is masked, is not counted."""
    Q = min(CHUNK, T)
    within = (G * N + H * P) * 2 * (Q + 1) / 2
    return within + 2 * 2 * H * P * N
