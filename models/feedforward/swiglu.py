"""SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), gate and up in one projection.

D: width   F: hidden width
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.feedforward.base import FeedForward
from models.initialisation import reset_linear
from models.norm import Norm, RMSNorm, then_linear
from models.ops.projections import kept
from models.ops.rms_norm import one_compiled_row
from models.settings import positive_or_none


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig:
    """hidden: None, 8/3 of the width, rounded to a multiple of 64."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: int | None = None

    def __post_init__(self) -> None:
        positive_or_none(self, "hidden")

    def size(self, width: int) -> int:
        """F."""
        return self.hidden or max(64, round(8 * width / 3 / 64) * 64)

    def parameters(self, width: int) -> int:
        return 3 * width * self.size(width)

    def active_parameters(self, width: int) -> int:
        return self.parameters(width)

    def touched_parameters(self, width: int, tokens: int) -> float:
        return self.parameters(width)

    def flops_per_token(self, width: int) -> float:
        return 2 * self.parameters(width)


class SwiGLU(FeedForward):
    Config = SwiGLUConfig

    def __init__(self, config: SwiGLUConfig, width: int, backend: str, device: torch.device) -> None:
        super().__init__(config, width, backend, device)
        hidden = config.size(width)
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        reset_linear(self.gate_up_proj, generator)
        reset_linear(self.down_proj, generator)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down_proj(self.ops.swiglu(self.gate_up_proj(x))), None

    def branch_step(self, x: Tensor, norm: Norm) -> Tensor:
        gate_up, down = self.gate_up_proj.weight, self.down_proj.weight
        if isinstance(norm, RMSNorm) and self.ops.suits_step(x, norm.weight, gate_up, down):
            return self.ops.swiglu_branch(x, norm.weight, norm.eps, gate_up, down)
        if one_compiled_row(x):
            # apart, both are sums of the same size: one kernel makes them and what comes of them
            gate, up = (then_linear(norm, x, self.ops.linear_step, part) for part in gate_up.chunk(2))
            hidden = kept(F.silu(gate) * up)
        else:
            hidden = self.ops.swiglu(self.ops.linear_step(norm(x), gate_up))
        return self.ops.residual_step(x, hidden, down)
