"""All of Mamba-2 behind its first projection, as one operation: the short convolution, the recurrence, the gated norm,
the last projection (arXiv 2405.21060, section 7). For whole sequences that start from nothing and leave no state.

B: batch   T: time   D: width   E: expanded width   H: heads   P: head width   G: groups   N: state size
W: convolution taps   C: channels of the convolution, E + 2 G N
"""

import torch.nn.functional as F
from torch import Tensor

from models.ops.causal_conv1d import reference as causal_conv1d
from models.ops.rms_norm import gated
from models.ops.ssd import reference as ssd


def reference(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, groups: int, eps: float,
) -> Tensor:  # fmt: skip
    """projected (B, T, E + C + H): z, what is convolved to x, B and C, and dt. conv_weight (C, W), conv_bias (C),
    dt_bias, A, D (H), norm_weight (E), out_weight (D, E). The norm runs over each group by itself. Returns (B, T, D).
    """
    E, H = norm_weight.shape[0], A.shape[0]
    GN = (conv_weight.shape[0] - E) // 2
    z, xBC, dt = projected.split([E, E + 2 * GN, H], -1)
    x, B, C = causal_conv1d(xBC, conv_weight, conv_bias).split([E, GN, GN], -1)
    B, C = (m.unflatten(-1, (groups, -1)) for m in (B, C))
    y, _ = ssd(x.unflatten(-1, (H, -1)), dt, A, B, C, D, dt_bias)
    return F.linear(gated(y.flatten(-2), z, norm_weight, eps, groups).to(out_weight.dtype), out_weight)
