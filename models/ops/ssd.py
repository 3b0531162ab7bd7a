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

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.precision import without_autocast
from models.ops.selective_scan import decay

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
    sign: Tensor | None = None, D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by matrix products (arXiv 2405.21060, Listing 1), from log_a = log |a| and the sign of a, None for 1;
    with D x added to y, D (H) or (B, T, H), None for 0.

    Within a chunk of Q steps y is a masked attention with scores C_t . B_s and the product of the decays in between;
    across chunks only the states at their borders are carried on. Memory O(T Q H) for the scores. The products are in
    the type of x, the decays and the state in that of log_a. The gradient is written out below.
    """
    rows, T, H, P = x.shape
    D = log_a.new_zeros(H) if D is None else D
    padding = -T % min(CHUNK, T)  # steps that neither decay nor write
    if padding:
        x, log_a, w, B, C = (F.pad(m, (0, 0) * (m.ndim - 2) + (0, padding)) for m in (x, log_a, w, B, C))
        sign = None if sign is None else F.pad(sign, (0, 0, 0, padding), value=1.0)
        D = F.pad(D, (0, 0, 0, padding)) if D.ndim == 3 else D
    if initial_state is None:
        initial_state = log_a.new_zeros(rows, H, P, B.shape[-1])
    B, C = B.to(x.dtype), C.to(x.dtype)
    y, h = _Chunked.apply(x, log_a, w.to(log_a.dtype), B, C, D, initial_state.to(log_a.dtype), sign)
    return y[:, :T], h


class _Chunked(torch.autograd.Function):
    """Layouts: `natural` (B, c, Q, H, P), as x is stored; `by head` (B, c, H, Q, P), as batches of products want it.

    c: chunks   R: heads per group. In the gradient d_m is the gradient of m.
    """

    @staticmethod
    def forward(ctx, x, log_a, w, B, C, D, initial_state, sign):
        ctx.Q = min(CHUNK, x.shape[1])
        with without_autocast(x.device):
            L, from_start, to_end = _decays(log_a, sign, ctx.Q)
            B_, C_ = _groups(B, ctx.Q), _groups(C, ctx.Q)
            within = _scores(B_, C_, L, x.dtype) @ _by_head(x, w, ctx.Q)  # (B, c, H, Q, P)
            written = _flat(_scaled(x, w * to_end), B_)  # (B, c, G, Q, R P)
            states = (written.transpose(3, 4) @ B_).unflatten(3, (-1, x.shape[3])).flatten(2, 3)  # (B, c, H, P, N)
            through = from_start.unflatten(1, (-1, ctx.Q))[:, :, -1, :, None, None]  # (B, c, H, 1, 1)
            borders = initial_state.new_empty(states.shape[0], states.shape[1] + 1, *states.shape[2:])
            borders[:, 0] = initial_state
            for chunk in range(states.shape[1]):
                now = states[:, chunk].to(borders.dtype)
                torch.addcmul(now, through[:, chunk], borders[:, chunk], out=borders[:, chunk + 1])
            entering, h = borders[:, :-1], borders[:, -1].clone()  # (B, c, H, P, N) and (B, H, P, N)
            carried = _natural(C_ @ _state_matrix(entering, B_).transpose(3, 4), x)
            y = _together(within, carried, from_start)
            y.addcmul_(x, D[..., None].to(x.dtype))
        ctx.save_for_backward(x, w, B, C, D, L, from_start, to_end, entering, carried)
        return y, h

    @staticmethod
    def backward(ctx, d_y, d_h):
        x, w, B, C, D, L, from_start, to_end, entering, carried = ctx.saved_tensors
        Q, d_y = ctx.Q, d_y.contiguous()
        B_, C_ = _groups(B, Q), _groups(C, Q)
        R = x.shape[2] // B.shape[2]
        with without_autocast(x.device):
            d_within = _by_head(d_y, None, Q)
            scores = _scores(B_, C_, L, w.dtype)
            d_xw = scores.to(x.dtype).transpose(3, 4) @ d_within  # by head, so far from within the chunk
            d_pairs = d_within @ _by_head(x, w, Q).transpose(3, 4)
            pairs = (d_pairs * scores).cumsum(-1)  # (B, c, H, Q, Q): what all s' <= s give to t weighs in the loss
            d_scores = d_pairs.mul_(L).unflatten(2, (-1, R)).sum(3).to(x.dtype)  # (B, c, G, Q, Q)
            d_carried = _flat(_scaled(d_y, from_start), B_)  # (B, c, G, Q, R P)
            d_entering = (d_carried.transpose(3, 4) @ C_).unflatten(3, (-1, x.shape[3])).flatten(2, 3)
            through = from_start.unflatten(1, (-1, Q))[:, :, -1, :, None, None]
            d_borders = entering.new_empty(entering.shape[0], entering.shape[1] + 1, *entering.shape[2:])
            d_borders[:, -1] = d_h
            for chunk in range(entering.shape[1] - 1, -1, -1):
                now = d_entering[:, chunk].to(d_borders.dtype)
                torch.addcmul(now, through[:, chunk], d_borders[:, chunk + 1], out=d_borders[:, chunk])
            leaving = d_borders[:, 1:]  # gradient of the state at the end of each chunk
            d_states = _state_matrix(leaving, B_)  # (B, c, G, R P, N)
            d_B = d_scores.transpose(3, 4) @ C_ + _flat(_scaled(x, w * to_end), B_) @ d_states
            d_C = d_scores @ B_ + d_carried @ _state_matrix(entering, B_)
            d_left = _natural(B_ @ d_states.transpose(3, 4), x)  # of what the chunk leaves behind
            d_xw = _together(d_xw, d_left, to_end)
            d_w = (d_xw * x).sum(-1, dtype=w.dtype)
            d_D = (d_y * x).sum(-1, dtype=w.dtype)
            # What the decay at s weighs in the loss is the sum of all that it multiplies: of pairs r < s <= t in the
            # chunk; of what the chunk's first state gives to t >= s; of what r < s gives to its last state; and of the
            # first state in the last. Each term has a_s as a factor, so that its rounding stays small beside it, in 16
            # bits too and where a_s is almost 0. (The difference of what y and x weigh is the same, but cancels.)
            d_log_a = F.pad(pairs.tril_(-1).sum(-2)[..., :-1], (1, 0)).transpose(2, 3)  # (B, c, Q, H)
            given = (d_y * carried).sum(-1, dtype=w.dtype) * from_start
            d_log_a = d_log_a + given.unflatten(1, (-1, Q)).flip(2).cumsum(2).flip(2)
            left = (d_left * x).sum(-1, dtype=w.dtype) * w * to_end
            d_log_a = d_log_a + F.pad(left.unflatten(1, (-1, Q)).cumsum(2)[:, :, :-1], (0, 0, 1, 0))
            d_log_a = d_log_a + (through[..., 0, 0] * (entering * leaving).sum((3, 4)))[:, :, None]
            d_log_a = d_log_a.flatten(1, 2)
            d_x = _scaled(d_xw, w).addcmul_(d_y, D[..., None].to(x.dtype))
        d_B, d_C = (m.transpose(2, 3).reshape(B.shape) for m in (d_B, d_C))
        return d_x, d_log_a, d_w, d_B, d_C, d_D.sum_to_size(D.shape).to(D.dtype), d_borders[:, 0], None


def _decays(log_a: Tensor, sign: Tensor | None, Q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Products of the decays, from log_a (B, T, H) by chunks: L (B, c, H, Q, Q) from step s to t, 0 where s > t; from
    the chunk's start to t, and from t to its end, (B, T, H) each."""
    total = log_a.unflatten(1, (-1, Q)).cumsum(2)
    by_head = total.transpose(2, 3).contiguous()  # L takes its layout in memory from this
    L = _product(by_head[..., :, None] - by_head[..., None, :]).tril_()
    from_start, to_end = _product(total), _product(total[:, :, -1:] - total)
    if sign is not None:
        signs = sign.unflatten(1, (-1, Q)).cumprod(2)
        flips = signs.transpose(2, 3).contiguous()
        L *= flips[..., :, None] * flips[..., None, :]  # a quotient of signs is their product
        from_start, to_end = from_start * signs, to_end * (signs[:, :, -1:] * signs)
    return L, from_start.flatten(1, 2), to_end.flatten(1, 2)


def _product(log_a: Tensor) -> Tensor:
    """exp, from -60 to 0: a decay is at most 1, of e^-60 nothing is left in any sum, and what is smaller still is no
    longer a normal number, with which processors are many times slower."""
    return log_a.clamp(-60, 0).exp_()


def _groups(m: Tensor, Q: int) -> Tensor:
    """B or C (B, T, G, N) -> (B, c, G, Q, N)."""
    return m.unflatten(1, (-1, Q)).transpose(2, 3)


def _scores(B_: Tensor, C_: Tensor, L: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, c, H, Q, Q)"""
    R = L.shape[2] // B_.shape[2]
    scores = (C_ @ B_.transpose(3, 4))[:, :, :, None]
    return (scores * L.unflatten(2, (-1, R))).flatten(2, 3).to(dtype)


def _by_head(x: Tensor, scale: Tensor | None, Q: int) -> Tensor:
    """(B, T, H, P), times scale (B, T, H), -> (B, c, H, Q, P), in memory in that order."""
    turned = x.unflatten(1, (-1, Q)).transpose(2, 3)
    if scale is None:
        return turned.contiguous()
    scale = scale.to(x.dtype).unflatten(1, (-1, Q)).transpose(2, 3)[..., None]
    return torch.mul(turned, scale, out=x.new_empty(turned.shape))


def _together(within: Tensor, across: Tensor, scale: Tensor) -> Tensor:
    """within (B, c, H, Q, P) + across (B, T, H, P) scale (B, T, H) -> (B, T, H, P), in one pass."""
    Q = within.shape[3]
    out = torch.empty_like(across)
    parts = (m.unflatten(1, (-1, Q)) for m in (across, scale[..., None].to(across.dtype)))
    torch.addcmul(within.transpose(2, 3), *parts, out=out.unflatten(1, (-1, Q)))
    return out


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale[..., None].to(x.dtype)


def _flat(x: Tensor, B_: Tensor) -> Tensor:
    """(B, T, H, P) -> (B, c, G, Q, R P)."""
    G, Q = B_.shape[2:4]
    return x.unflatten(1, (-1, Q)).unflatten(3, (G, -1)).flatten(4).transpose(2, 3)


def _natural(m: Tensor, x: Tensor) -> Tensor:
    """(B, c, G, Q, R P) -> (B, T, H, P), the shape of x."""
    return m.transpose(2, 3).reshape(x.shape)


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
    initial_state: Tensor | None = None, negative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2 by `chunked_recurrence`."""
    delta = F.softplus(dt + dt_bias)
    log_a, sign = log_decay(delta, A, negative)
    y, h = chunked_recurrence(x, log_a, delta, B, C, initial_state, sign, D)
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
