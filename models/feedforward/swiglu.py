"""SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), gate and up in one projection.

D: width   F: hidden width
"""

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.initialisation import reset_linear
from models.ops.kernels import load_beside


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        hidden = config.feedforward_hidden
        assert hidden is not None
        self.ops = load_beside(config.mixer.backend, device)
        self.gate_up_proj = nn.Linear(config.width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, config.width, bias=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        reset_linear(self.gate_up_proj, generator)
        reset_linear(self.down_proj, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.swiglu(self.gate_up_proj(x)))
