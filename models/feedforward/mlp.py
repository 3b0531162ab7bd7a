"""The two-layer perceptron of the original transformer: down(f(up(x))), f ReLU or GELU.

D: width   F: hidden width
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.feedforward.base import FeedForward
from models.initialisation import reset_bias, reset_linear
from models.settings import flags, one_of, positive_or_none

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """hidden: None, four times the width."""

    kind: Literal["mlp"] = "mlp"
    hidden: int | None = None
    activation: str = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        positive_or_none(self, "hidden")
        one_of(self, "activation", tuple(ACTIVATIONS))
        flags(self, "bias")

    def size(self, width: int) -> int:
        """F."""
        return self.hidden or 4 * width

    def parameters(self, width: int) -> int:
        hidden = self.size(width)
        return 2 * width * hidden + (hidden + width if self.bias else 0)

    def active_parameters(self, width: int) -> int:
        return self.parameters(width)

    def touched_parameters(self, width: int, tokens: int) -> float:
        return self.parameters(width)

    def flops_per_token(self, width: int) -> float:
        return 2 * 2 * width * self.size(width)


class MLP(FeedForward):
    Config = MLPConfig

    def __init__(self, config: MLPConfig, width: int, backend: str, device: torch.device) -> None:
        super().__init__(config, width, backend, device)
        hidden = config.size(width)
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(width, hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, width, bias=config.bias)

    def reset_parameters(self, generator: torch.Generator) -> None:
        for linear in (self.up_proj, self.down_proj):
            reset_linear(linear, generator)
            reset_bias(linear.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        hidden = self.activation(self.ops.linear_step(x, self.up_proj.weight, self.up_proj.bias))
        return self.ops.linear_step(hidden, self.down_proj.weight, self.down_proj.bias), None
