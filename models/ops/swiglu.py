"""The gated half of a SwiGLU layer (arXiv 2002.05202): gate and up side by side (..., 2F) -> silu(gate) up (..., F)."""

import torch.nn.functional as F
from torch import Tensor


def reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
