"""The one residual block, for every mixer: x + mixer(norm(x)), then x + feedforward(norm(x)) where there is one."""

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.feedforward import FEEDFORWARDS
from models.mixers import MIXERS, Mixer
from models.norm import RMSNorm
from models.state import State


class Block(nn.Module):
    """Pre-norm. `forward` over (B, T, D), `step` over (B, D)."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config, device)
        self.mixer: Mixer = MIXERS[config.mixer.kind](config, device)
        self.feedforward_norm = self.feedforward = None
        if config.feedforward is not None:
            self.feedforward_norm = RMSNorm(config, device)
            self.feedforward = FEEDFORWARDS[config.feedforward.kind](config, device)

    def reset_parameters(self, generator: torch.Generator) -> None:
        self.mixer_norm.reset_parameters()
        self.mixer.reset_parameters(generator)
        if self.feedforward is not None and self.feedforward_norm is not None:
            self.feedforward_norm.reset_parameters()
            self.feedforward.reset_parameters(generator)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        y, state = self.mixer(self.mixer_norm(x), state)
        return self._feed_forward(x + y), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.mixer.step(self.mixer_norm(x), state)
        return self._feed_forward(x + y), state

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.feedforward is None or self.feedforward_norm is None:
            return x
        return x + self.feedforward(self.feedforward_norm(x))

    def residual_writers(self) -> list[nn.Linear]:
        """The projections whose output is added to the residual stream."""
        linears = dict(self.named_modules())
        names = ("mixer.o_proj", "mixer.out_proj", "feedforward.down_proj")
        return [linears[name] for name in names if name in linears]  # type: ignore[misc]
