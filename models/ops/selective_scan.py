"""The selective scan of Mamba-1 (arXiv 2312.00752, Alg. 2), in forms that agree.

B: batch   T: time   E: expanded width (channels)   N: state size   Q: chunk

    delta_t = softplus(dt_t + dt_bias)
    h_t     = exp(delta_t A) h_(t-1) + delta_t B_t u_t            h: (B, E, N)
    y_t     = (C_t . h_t + D u_t) silu(z_t)

With `negative`, the decay exp(delta A) in (0, 1) becomes 2 exp(delta A) - 1 in (-1, 1) (arXiv 2411.12537): a state that
can change its sign can count modulo two.

Deviation from the paper, as in the official kernels: B is discretised by Euler's rule (delta B), not by zero-order
hold; A is exact.

Every form has one signature:

    u (B, T, E)   dt (B, T, E)   A (E, N)   B (B, T, N)   C (B, T, N)   D (E)   z (B, T, E) or None
    dt_bias (E)   initial_state (B, E, N) or None (zeros)   negative
    -> y (B, T, E), last_state (B, E, N)

It agrees with `mamba_ssm.ops.selective_scan_interface.selective_scan_fn(..., delta_softplus=True)` up to layout
(there channels come before time).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32


def forward_flops(E: int, N: int) -> int:
    """Operations per token of the recurrence itself, the convention of this repository: an addition, a
    multiplication and an exponential each count one. Per (channel, state): delta A, exp, a h, delta u B, the sum,
    h C, its sum: 7. Per channel: bias and softplus 2, delta u 1, D u and its sum 2, the gate 2."""
    return 7 * E * N + 7 * E


def decay(exponent: Tensor, negative: bool) -> Tensor:
    """What a state is multiplied with: exp(exponent), or, with `negative`, 2 exp(exponent) - 1."""
    a = torch.exp(exponent)
    return 2 * a - 1 if negative else a


def decay_rate(exponent: Tensor, negative: bool) -> Tensor:
    """-log |a| of a = decay(exponent, negative), at least 0: what is forgotten per step."""
    return -decay(exponent, True).abs().log() if negative else -exponent


def reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    initial_state: Tensor | None = None, negative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step at a time, differentiable, in the precision of its inputs."""
    rows, T, E = u.shape
    delta = F.softplus(dt + dt_bias)
    h = A.new_zeros(rows, E, A.shape[1]) if initial_state is None else initial_state
    ys = []
    for t in range(T):
        a = decay(delta[:, t, :, None] * A, negative)  # (B, E, N)
        h = a * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, 1) + D * u
    return (y if z is None else y * F.silu(z)).to(u.dtype), h


def chunked(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    initial_state: Tensor | None = None, negative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain torch for any device: a parallel prefix scan within chunks of `CHUNK` steps, a loop over chunks.

    Memory O(B Q E N) per chunk beside what autograd keeps. Within a chunk the pairs (a, b) of h -> a h + b are
    combined in log2(Q) doubling steps; only products of the decays occur, never quotients, so it is as stable as
    the loop.
    """
    rows, T, E = u.shape
    delta = F.softplus(dt + dt_bias)
    h = A.new_zeros(rows, E, A.shape[1]) if initial_state is None else initial_state
    ys = []
    for start in range(0, T, CHUNK):
        now = slice(start, min(start + CHUNK, T))
        a = decay(delta[:, now, :, None] * A, negative)  # (B, Q, E, N)
        b = (delta[:, now] * u[:, now])[..., None] * B[:, now, None, :]
        distance = 1
        while distance < a.shape[1]:
            # step t absorbs the `distance` steps before it: h -> a_t (a_s h + b_s) + b_t
            b = torch.cat([b[:, :distance], b[:, distance:] + a[:, distance:] * b[:, :-distance]], 1)
            a = torch.cat([a[:, :distance], a[:, distance:] * a[:, :-distance]], 1)
            distance *= 2
        hs = a * h[:, None] + b
        ys.append(torch.einsum("bqen,bqn->bqe", hs, C[:, now].to(hs.dtype)))
        h = hs[:, -1]
    y = torch.cat(ys, 1) + D * u
    return (y if z is None else y * F.silu(z)).to(u.dtype), h


def step_reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
    state: Tensor, negative: bool = False,
) -> Tensor:  # fmt: skip
    """One token: u, dt, z (B, E), B, C (B, N); `state` (B, E, N) is advanced in place. Returns y (B, E)."""
    delta = F.softplus(dt + dt_bias)
    h = decay(delta[..., None] * A, negative) * state.to(A.dtype) + (delta * u)[..., None] * B[:, None, :]
    state.copy_(h)  # a 16-bit state rounds here, not in the arithmetic
    y = torch.einsum("ben,bn->be", h, C.to(h.dtype)) + D * u
    return (y if z is None else y * F.silu(z)).to(u.dtype)
