"""The gated half of a SwiGLU layer (arXiv 2002.05202): gate and up side by side (..., 2F) -> silu(gate) up (..., F)."""

import torch.nn.functional as F
from torch import Tensor


def reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def step_reference(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The whole layer: x (B, D), gate_up (2 F, D), down (D, F) -> (B, D)."""
    return F.linear(reference(F.linear(x, gate_up)), down)
