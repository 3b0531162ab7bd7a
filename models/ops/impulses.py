"""The matrix of a map over time that is linear in its input: a scan read as attention.

B: batch   T: outputs   S: inputs, as many   U: units, channels or heads
"""

from collections.abc import Callable

import torch
from torch import Tensor


def response(scan: Callable[[Tensor], Tensor], rows: int, steps: int, units: int, like: Tensor) -> Tensor:
    """M (B, T, S, U) with y_t = sum_s M[t, s] u_s in each unit by itself, B = `rows`, T = S = `steps`, in the type and
    on the device of `like`: what `scan` answers to a unit impulse at each s.

    scan: (B S, T, U) -> (B S, T, U), S copies of each row of the batch in turn. It must be linear in its input and keep
    units apart, as a selective scan is and does once its step sizes, B and C are given.
    """
    impulses = torch.eye(steps, dtype=like.dtype, device=like.device)[:, :, None].expand(rows, -1, -1, units)
    return scan(impulses.flatten(0, 1)).unflatten(0, (rows, steps)).transpose(1, 2)
