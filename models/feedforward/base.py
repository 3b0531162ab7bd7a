"""What every feed-forward layer is, and what a mixture of experts says of its routing.

FeedForward(config, width, backend, device)
forward(x) -> (y, Routing | None)     x, y (..., D), each position by itself; y may be written over, as a mixer's
branch_step(x, norm)                  x + forward(norm(x)), x (B, D), which may be written over x
needs_host(dtype, device)             why its step cannot be recorded for a GPU to repeat; None if it can
reset_parameters(generator), output_weight     as of a mixer
reads_unrounded                       what it reads is not to be rounded to autocast's type: it chooses by it
choice(x) -> ExpertChoice | None      where each token goes; None where there are no experts
Config                                its settings, with
  parameters(D), active_parameters(D) exact; active: those that one token meets
  touched_parameters(D, tokens)       that so many tokens at once meet, the mean where they choose experts evenly
  flops_per_token(D)                  forward
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from models.norm import Norm
from models.ops.kernels import load_beside


class FeedForwardConfig(Protocol):
    @property
    def kind(self) -> str: ...
    def parameters(self, width: int) -> int: ...
    def active_parameters(self, width: int) -> int: ...
    def touched_parameters(self, width: int, tokens: int) -> float: ...
    def flops_per_token(self, width: int) -> float: ...


@dataclass(frozen=True)
class Routing:
    """load (X): the share of assignments that went to each expert, summing to 1. balance: what the training loss is to
    add, with its gradient."""

    load: Tensor
    balance: Tensor


@dataclass(frozen=True)
class ExpertChoice:
    """chosen (..., K): expert numbers, the one with the largest weight first. weight (..., K): of their outputs.
    probability (..., X): of each expert, before the choice."""

    chosen: Tensor
    weight: Tensor
    probability: Tensor


class FeedForward(nn.Module):
    """backend: of the mixer beside it; a model of references is one throughout."""

    Config: ClassVar[Any]
    reads_unrounded: ClassVar[bool] = False

    def __init__(self, config: Any, width: int, backend: str, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.ops = load_beside(backend, device)

    def reset_parameters(self, generator: torch.Generator) -> None:
        raise NotImplementedError

    def branch_step(self, x: Tensor, norm: Norm) -> Tensor:
        return x + self(norm(x))[0]

    @classmethod
    def needs_host(cls, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why a step of this layer, in this type, has to ask the host for a number; None: it does not."""
        return None

    def choice(self, x: Tensor) -> ExpertChoice | None:
        """x (..., D), what forward reads."""
        return None

    @property
    def output_weight(self) -> Tensor:
        return self.get_parameter("down_proj.weight")
