"""What surrounds the matrix products of the chunked recurrence (models/ops/ssd.py): masks, decays, scalings. In torch
here; compiled for a CPU, one pass over memory each, in models/ops/kernels/numba_ssd.py, with the same signatures.

B: batch   T: time   H: heads   P: head width   G: groups   R: heads per group   Q: chunk   c: chunks

Layouts: `natural` (B, T, H, P), as x is stored; `by head` (B, c, H, Q, P), as batches of products of single heads want
it; `by group` (B, c, G, Q, R P), where the heads of a group share a product. `steps`: (B, T, H), one number per step
and head; `total`: (B, c, H, Q), log |a| summed up from the start of each chunk; `flips`: (B, c, H, Q), the product of
the signs likewise, None where all are 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def spread(x: Tensor, a: Tensor | None, b: Tensor, Q: int, G: int) -> tuple[Tensor, Tensor]:
    """x natural, times the steps a (None: 1), by head; and x times the steps b, by group."""
    turned = x.unflatten(1, (-1, Q)).transpose(2, 3)
    if a is None:
        heads = turned.contiguous()
    else:
        scale = a.to(x.dtype).unflatten(1, (-1, Q)).transpose(2, 3)[..., None]
        heads = torch.mul(turned, scale, out=x.new_empty(turned.shape))
    scaled = (x * b[..., None].to(x.dtype)).unflatten(1, (-1, Q)).unflatten(3, (G, -1))
    return heads, scaled.flatten(4).transpose(2, 3)


def gather(within: Tensor, across: Tensor, b: Tensor, x: Tensor, D: Tensor) -> Tensor:
    """within by head + b across + D x: across by group, x natural, b and D steps. Natural."""
    Q = within.shape[3]
    across = _natural(across, x)
    parts = (m.unflatten(1, (-1, Q)) for m in (across, b[..., None].to(across.dtype)))
    y = torch.addcmul(within.transpose(2, 3), *parts).flatten(1, 2)
    return y.addcmul_(x, D[..., None].to(x.dtype))


def masked(pairs: Tensor, total: Tensor, flips: Tensor | None) -> Tensor:
    """pairs (B, c, G, Q, Q), times the decay from step s to t, 0 where s > t: (B, c, H, Q, Q), in the type of pairs."""
    R = total.shape[2] // pairs.shape[2]
    return (pairs[:, :, :, None] * _decay(total, flips).unflatten(2, (-1, R))).flatten(2, 3).to(pairs.dtype)


def masked_gradient(d_out: Tensor, pairs: Tensor, total: Tensor, flips: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of `masked`: gradients of pairs, and of log |a|, (B, c, H, Q). The latter at step s is the sum of what all pairs
    r < s <= t weigh: each has a_s as a factor, so nothing cancels."""
    R = total.shape[2] // pairs.shape[2]
    d_masked = d_out * _decay(total, flips)
    weights = (d_masked.unflatten(2, (-1, R)) * pairs[:, :, :, None]).flatten(2, 3).cumsum(-1)
    d_log_a = F.pad(weights.tril_(-1).sum(-2)[..., :-1], (1, 0))
    return d_masked.unflatten(2, (-1, R)).sum(3).to(pairs.dtype), d_log_a


def gather_gradient(
    d_y: Tensor, x: Tensor, carried: Tensor, d_within: Tensor, d_left: Tensor, w: Tensor, to_end: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of x, natural, and four inner products over the width of a head, steps: what is written, of w; of D;
    d_y with carried; d_left with x. d_y and x natural, d_within by head, carried and d_left by group, the rest steps.
    """
    carried, d_left = _natural(carried, x), _natural(d_left, x)
    Q = d_within.shape[3]
    parts = (m.unflatten(1, (-1, Q)) for m in (d_left, to_end[..., None].to(d_left.dtype)))
    d_written = torch.addcmul(d_within.transpose(2, 3), *parts).flatten(1, 2)
    d_w, d_D, given, left = ((m * n).sum(-1, dtype=w.dtype) for m, n in (
        (d_written, x), (d_y, x), (d_y, carried), (d_left, x)))  # fmt: skip
    d_x = (d_written * w[..., None].to(x.dtype)).addcmul_(d_y, D[..., None].to(x.dtype))
    return d_x, d_w, d_D, given, left


def carry(states: Tensor, through: Tensor, initial_state: Tensor) -> Tensor:
    """States at the borders of the chunks, (B, c + 1, H, P, N) in the type of `through`: the initial one (B, H, P, N),
    then each chunk's decay through (B, c, H) times the one before plus what the chunk wrote, states (B, c, H, P, N)."""
    borders = initial_state.new_empty(states.shape[0], states.shape[1] + 1, *states.shape[2:])
    borders[:, 0] = initial_state
    for chunk in range(states.shape[1]):
        now, decay = states[:, chunk].to(borders.dtype), through[:, chunk, :, None, None]
        torch.addcmul(now, decay, borders[:, chunk], out=borders[:, chunk + 1])
    return borders


def carry_gradient(d_entering: Tensor, through: Tensor, d_last: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the borders (B, c + 1, H, P, N), from those of what each chunk reads of its first state, d_entering
    (B, c, H, P, N), and of the last one; and what the decay through each chunk weighs in the loss, (B, c, H)."""
    d_borders = torch.empty_like(borders)
    d_borders[:, -1] = d_last
    for chunk in range(d_entering.shape[1] - 1, -1, -1):
        now, decay = d_entering[:, chunk].to(borders.dtype), through[:, chunk, :, None, None]
        torch.addcmul(now, decay, d_borders[:, chunk + 1], out=d_borders[:, chunk])
    return d_borders, through * (borders[:, :-1] * d_borders[:, 1:]).sum((3, 4))


def decay_product(log_a: Tensor) -> Tensor:
    """exp, from -60 to 0: a decay is at most 1, of e^-60 nothing is left in any sum, and what is smaller still is no
    longer a normal number, with which processors are many times slower."""
    return log_a.clamp(-60, 0).exp_()


def _decay(total: Tensor, flips: Tensor | None) -> Tensor:
    """From step s to step t of a chunk, (B, c, H, Q, Q); 0 where s > t."""
    L = decay_product(total[..., :, None] - total[..., None, :]).tril_()
    if flips is not None:
        L *= flips[..., :, None] * flips[..., None, :]  # a quotient of signs is their product
    return L


def _natural(m: Tensor, x: Tensor) -> Tensor:
    """By group -> natural, the shape of x."""
    return m.transpose(2, 3).reshape(x.shape)
