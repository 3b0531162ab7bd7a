"""The short causal depthwise convolution with SiLU that precedes the scan, in forms that agree.

B: batch   T: time   E: channels   W: taps

    y_t = silu(bias + sum_w weight[:, w] x_(t-W+1+w))

Every form has one signature:

    x (B, T, E)   weight (E, W)   bias (E)   before (B, E, W) or None: the W inputs before x, oldest first
    (zeros for None)  ->  y (B, T, E)

The state holds W inputs, one more than the sum needs, as the official decode kernel does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    """The sum, tap by tap; differentiable, any device, in the precision of its inputs."""
    rows, T, E = x.shape
    W = weight.shape[1]
    before = x.new_zeros(rows, E, W) if before is None else before
    padded = torch.cat([before[:, :, 1:].transpose(1, 2), x], 1)  # (B, W - 1 + T, E)
    y = bias + sum(weight[:, w] * padded[:, w : w + T] for w in range(W))
    return F.silu(y)


def last_inputs(x: Tensor, width: int, before: Tensor | None = None) -> Tensor:
    """The state after x: its last `width` inputs (B, E, W), reaching back into `before` where x is shorter."""
    rows, _, E = x.shape
    before = x.new_zeros(rows, E, width) if before is None else before
    tail = x[:, -width:].transpose(1, 2)
    return torch.cat([before[:, :, tail.shape[2] :], tail], 2)


def step_reference(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """One token: x (B, E); `state` (B, E, W) is shifted and filled in place. Returns y (B, E)."""
    state.copy_(state.roll(-1, 2))
    state[:, :, -1] = x
    return F.silu((state.to(x.dtype) * weight).sum(-1) + bias)
