"""RMSNorm as a module, in the form that the device has."""

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.ops.kernels import load_beside


class RMSNorm(nn.Module):
    """Over the last axis, with a learned weight; models.ops.rms_norm."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.ops = load_beside(config.mixer.backend, device)
        self.weight = nn.Parameter(torch.empty(config.width))

    def reset_parameters(self, value: float = 1.0) -> None:
        nn.init.constant_(self.weight, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)
