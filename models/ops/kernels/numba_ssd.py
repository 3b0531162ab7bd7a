"""What surrounds the products of the chunked recurrence, on a CPU: `models.ops.ssd_passes`, one pass over memory each,
compiled by numba. Layouts and signatures are there.

A task is one chunk of one sequence, n = B c of them. Nothing (Q, Q) is kept between the passes but what they return: a
decay is computed where it is used, from its logarithm.
"""

import numpy as np
import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import LOG2_E, addresses, at, compiled, exp2, run_tasks


@compiled
def _spread(kind, x_at, a_at, b_at, heads_at, scaled_at, stride, scales, n, Q, H, P, G, first, last):
    R = H // G
    a, b = at(a_at, kind, (n, Q, H)), at(b_at, kind, (n, Q, H))
    heads, scaled = at(heads_at, kind, (n, H, Q, P)), at(scaled_at, kind, (n, G, Q, R, P))
    for task in range(first, last):
        for t in range(Q):
            x = at(x_at + (task * Q + t) * stride, kind, (H, P))
            for h in range(H):
                g, r = h // R, h % R
                one = a[task, t, h] if scales else kind + x.dtype.type(1)
                other = b[task, t, h]
                for p in range(P):
                    heads[task, h, t, p] = x[h, p] * one
                    scaled[task, g, t, r, p] = x[h, p] * other


@compiled
def _gather(kind, within_at, across_at, b_at, x_at, D_at, y_at, stride, n, Q, H, P, G, first, last):
    R = H // G
    within, across = at(within_at, kind, (n, H, Q, P)), at(across_at, kind, (n, G, Q, R, P))
    b, D, y = at(b_at, kind, (n, Q, H)), at(D_at, kind, (n, Q, H)), at(y_at, kind, (n, Q, H, P))
    for task in range(first, last):
        for t in range(Q):
            x = at(x_at + (task * Q + t) * stride, kind, (H, P))
            for h in range(H):
                g, r = h // R, h % R
                scale, skip = b[task, t, h], D[task, t, h]
                for p in range(P):
                    y[task, t, h, p] = within[task, h, t, p] + across[task, g, t, r, p] * scale + x[h, p] * skip


@compiled
def _decay_row(total, flips, flipped, t, out):
    """The decays from s = 0 .. t to t, (Q) each, clamped as `decay_product`."""
    kind = total.dtype.type
    for s in range(t + 1):
        d = total[t] - total[s]
        d = kind(-60) if d < kind(-60) else d
        d = kind(0) if d > kind(0) else d
        out[s] = exp2(d * kind(LOG2_E))
    if flipped:
        for s in range(t + 1):
            out[s] *= flips[t] * flips[s]


@compiled
def _masked(kind, pairs_at, total_at, flips_at, out_at, flipped, n, Q, H, G, first, last):
    R = H // G
    pairs, out = at(pairs_at, kind, (n, G, Q, Q)), at(out_at, kind, (n, H, Q, Q))
    total, flips = at(total_at, kind, (n, H, Q)), at(flips_at, kind, (n, H, Q))
    for task in range(first, last):
        for h in range(H):
            for t in range(Q):
                row, scores = out[task, h, t], pairs[task, h // R, t]
                _decay_row(total[task, h], flips[task, h], flipped, t, row)
                for s in range(t + 1):
                    row[s] *= scores[s]
                for s in range(t + 1, Q):
                    row[s] = kind


@compiled
def _masked_gradient(
    kind, d_out_at, pairs_at, total_at, flips_at, d_pairs_at, d_log_a_at, flipped, n, Q, H, G, first, last
):
    R = H // G
    d_out, pairs = at(d_out_at, kind, (n, H, Q, Q)), at(pairs_at, kind, (n, G, Q, Q))
    total, flips = at(total_at, kind, (n, H, Q)), at(flips_at, kind, (n, H, Q))
    d_pairs, d_log_a = at(d_pairs_at, kind, (n, G, Q, Q)), at(d_log_a_at, kind, (n, H, Q))
    weight = np.empty(Q, total.dtype)
    for task in range(first, last):
        for g in range(G):
            for t in range(Q):
                for s in range(Q):
                    d_pairs[task, g, t, s] = kind
        for h in range(H):
            for t in range(Q):
                d_log_a[task, h, t] = kind
            for t in range(Q):
                d_row, scores, sums = d_out[task, h, t], pairs[task, h // R, t], d_pairs[task, h // R, t]
                _decay_row(total[task, h], flips[task, h], flipped, t, weight)
                for s in range(t + 1):
                    weight[s] *= d_row[s]
                    sums[s] += weight[s]
                    weight[s] *= scores[s]
                before = kind
                for s in range(1, t + 1):
                    before += weight[s - 1]
                    d_log_a[task, h, s] += before


@compiled
def _gather_gradient(
    kind, d_y_at, x_at, carried_at, d_within_at, d_left_at, w_at, to_end_at, D_at, d_x_at, d_w_at, d_D_at, given_at,
    left_at, stride, n, Q, H, P, G, first, last,
):  # fmt: skip
    R = H // G
    d_y, d_x = at(d_y_at, kind, (n, Q, H, P)), at(d_x_at, kind, (n, Q, H, P))
    carried, d_left = at(carried_at, kind, (n, G, Q, R, P)), at(d_left_at, kind, (n, G, Q, R, P))
    d_within = at(d_within_at, kind, (n, H, Q, P))
    w, to_end, D = at(w_at, kind, (n, Q, H)), at(to_end_at, kind, (n, Q, H)), at(D_at, kind, (n, Q, H))
    d_w, d_D = at(d_w_at, kind, (n, Q, H)), at(d_D_at, kind, (n, Q, H))
    given, left = at(given_at, kind, (n, Q, H)), at(left_at, kind, (n, Q, H))
    for task in range(first, last):
        for t in range(Q):
            x = at(x_at + (task * Q + t) * stride, kind, (H, P))
            for h in range(H):
                g, r = h // R, h % R
                written, end, skip = w[task, t, h], to_end[task, t, h], D[task, t, h]
                of_w, of_D, of_carried, of_left = kind, kind, kind, kind
                for p in range(P):
                    gradient, behind = d_y[task, t, h, p], d_left[task, g, t, r, p]
                    d_written = d_within[task, h, t, p] + behind * end
                    of_w += d_written * x[h, p]
                    of_D += gradient * x[h, p]
                    of_carried += gradient * carried[task, g, t, r, p]
                    of_left += behind * x[h, p]
                    d_x[task, t, h, p] = d_written * written + gradient * skip
                d_w[task, t, h], d_D[task, t, h] = of_w, of_D
                given[task, t, h], left[task, t, h] = of_carried, of_left


@compiled
def _carry(kind, states_at, through_at, borders_at, n, c, H, PN, first, last):
    """A task is one head of one sequence; borders[:, 0] is given."""
    states, through = at(states_at, kind, (n, c, H, PN)), at(through_at, kind, (n, c, H))
    borders = at(borders_at, kind, (n, c + 1, H, PN))
    for task in range(first, last):
        b, h = task // H, task % H
        for chunk in range(c):
            now, before, after, decay = (
                states[b, chunk, h],
                borders[b, chunk, h],
                borders[b, chunk + 1, h],
                through[b, chunk, h],
            )
            for i in range(PN):
                after[i] = now[i] + decay * before[i]


@compiled
def _carry_gradient(kind, d_entering_at, through_at, borders_at, d_borders_at, d_through_at, n, c, H, PN, first, last):
    """d_borders[:, c] is given."""
    d_entering, through = at(d_entering_at, kind, (n, c, H, PN)), at(through_at, kind, (n, c, H))
    borders, d_borders = at(borders_at, kind, (n, c + 1, H, PN)), at(d_borders_at, kind, (n, c + 1, H, PN))
    d_through = at(d_through_at, kind, (n, c, H))
    for task in range(first, last):
        b, h = task // H, task % H
        for chunk in range(c - 1, -1, -1):
            now, decay, state = d_entering[b, chunk, h], through[b, chunk, h], borders[b, chunk, h]
            before, after = d_borders[b, chunk, h], d_borders[b, chunk + 1, h]
            total = kind
            for i in range(PN):
                before[i] = now[i] + decay * after[i]
                total += state[i] * after[i]
            d_through[b, chunk, h] = decay * total


def _in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x (B, T, H, P) as rows (H, P), and how many bytes lie from one to the next: a view where x is that already."""
    rows, T, _, P = x.shape
    if x.stride(3) != 1 or x.stride(2) != P or (rows > 1 and x.stride(0) != T * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1) * x.element_size()


def _checked(x: Tensor, *others: Tensor) -> tuple:
    """As `addresses`, of x, whose rows may lie apart, and of the others, which are made contiguous."""
    held = [other.contiguous() for other in others]
    found = addresses(*held)
    if x.dtype is not held[0].dtype:
        raise ValueError("a compiled kernel takes tensors of one type")
    return found[0], x.data_ptr(), found[1:], held


def _op(name: str):
    return torch.library.custom_op(f"lab::ssd_{name}_cpu", mutates_args=(), device_types="cpu")


@_op("spread")
def spread(x: Tensor, a: Tensor | None, b: Tensor, Q: int, G: int) -> tuple[Tensor, Tensor]:
    rows, T, H, P = x.shape
    (x, stride), n = _in_rows(x), rows * T // Q
    heads, scaled = x.new_empty(rows, T // Q, H, Q, P), x.new_empty(rows, T // Q, G, Q, H // G * P)
    kind, x_at, rest, _held = _checked(x, b if a is None else a, b, heads, scaled)
    run_tasks(_spread, n, kind, x_at, *rest, stride, a is not None, n, Q, H, P, G, work=2 * x.numel())
    return heads, scaled


@spread.register_fake
def _(x, a, b, Q, G):
    rows, T, H, P = x.shape
    return x.new_empty(rows, T // Q, H, Q, P), x.new_empty(rows, T // Q, G, Q, H // G * P)


@_op("gather")
def gather(within: Tensor, across: Tensor, b: Tensor, x: Tensor, D: Tensor) -> Tensor:
    (x, stride), (rows, T, H, P) = _in_rows(x), x.shape
    Q, G = within.shape[3], across.shape[2]
    n, y = rows * T // Q, x.new_empty(x.shape)
    kind, x_at, (within_at, across_at, b_at, D_at, y_at), _held = _checked(x, within, across, b, D, y)
    run_tasks(_gather, n, kind, within_at, across_at, b_at, x_at, D_at, y_at, stride, n, Q, H, P, G, work=2 * x.numel())
    return y


@gather.register_fake
def _(within, across, b, x, D):
    return x.new_empty(x.shape)


@_op("masked")
def masked(pairs: Tensor, total: Tensor, flips: Tensor | None) -> Tensor:
    rows, chunks, H, Q = total.shape
    n, G, out = rows * chunks, pairs.shape[2], pairs.new_empty(rows, chunks, H, Q, Q)
    held = [m.contiguous() for m in (pairs, total, total if flips is None else flips)]
    run_tasks(_masked, n, *addresses(*held, out), flips is not None, n, Q, H, G, work=2 * out.numel())
    return out


@masked.register_fake
def _(pairs, total, flips):
    return pairs.new_empty(*total.shape, total.shape[3])


@_op("masked_gradient")
def masked_gradient(d_out: Tensor, pairs: Tensor, total: Tensor, flips: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, chunks, H, Q = total.shape
    n, G, d_pairs, d_log_a = rows * chunks, pairs.shape[2], pairs.new_empty(pairs.shape), total.new_empty(total.shape)
    held = [m.contiguous() for m in (d_out, pairs, total, total if flips is None else flips)]
    arrays = addresses(*held, d_pairs, d_log_a)
    run_tasks(_masked_gradient, n, *arrays, flips is not None, n, Q, H, G, work=4 * d_out.numel())
    return d_pairs, d_log_a


@masked_gradient.register_fake
def _(d_out, pairs, total, flips):
    return pairs.new_empty(pairs.shape), total.new_empty(total.shape)


@_op("gather_gradient")
def gather_gradient(
    d_y: Tensor, x: Tensor, carried: Tensor, d_within: Tensor, d_left: Tensor, w: Tensor, to_end: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (x, stride), (rows, T, H, P) = _in_rows(x), x.shape
    Q, G = d_within.shape[3], carried.shape[2]
    n, d_x = rows * T // Q, x.new_empty(x.shape)
    d_w, d_D, given, left = (w.new_empty(w.shape) for _ in range(4))
    arrays = (d_y, carried, d_within, d_left, w, to_end, D, d_x, d_w, d_D, given, left)
    kind, x_at, (d_y_at, *rest), _held = _checked(x, *arrays)
    run_tasks(_gather_gradient, n, kind, d_y_at, x_at, *rest, stride, n, Q, H, P, G, work=4 * x.numel())
    return d_x, d_w, d_D, given, left


@gather_gradient.register_fake
def _(d_y, x, carried, d_within, d_left, w, to_end, D):
    d_w, d_D, given, left = (w.new_empty(w.shape) for _ in range(4))
    return x.new_empty(x.shape), d_w, d_D, given, left


@_op("carry")
def carry(states: Tensor, through: Tensor, initial_state: Tensor) -> Tensor:
    rows, chunks, H, P, N = states.shape
    borders = initial_state.new_empty(rows, chunks + 1, H, P, N)
    borders[:, 0] = initial_state
    held = [m.contiguous() for m in (states, through)]
    run_tasks(_carry, rows * H, *addresses(*held, borders), rows, chunks, H, P * N, work=2 * states.numel())
    return borders


@carry.register_fake
def _(states, through, initial_state):
    rows, chunks, H, P, N = states.shape
    return initial_state.new_empty(rows, chunks + 1, H, P, N)


@_op("carry_gradient")
def carry_gradient(d_entering: Tensor, through: Tensor, d_last: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    rows, chunks, H, P, N = d_entering.shape
    d_borders, d_through = torch.empty_like(borders), through.new_empty(through.shape)
    d_borders[:, -1] = d_last
    held = [m.contiguous() for m in (d_entering, through, borders)]
    arrays = addresses(*held, d_borders, d_through)
    run_tasks(_carry_gradient, rows * H, *arrays, rows, chunks, H, P * N, work=3 * borders.numel())
    return d_borders, d_through


@carry_gradient.register_fake
def _(d_entering, through, d_last, borders):
    return torch.empty_like(borders), through.new_empty(through.shape)
