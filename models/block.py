"""The one residual block, for every mixer: x + mixer(norm(x)), then x + feedforward(norm(x)) where there is one; or,
with `post_norm`, norm(x + mixer(x)) and norm(x + feedforward(x))."""

import torch
from torch import Tensor, nn

from models.config import BlockConfig, ModelConfig
from models.feedforward import FEEDFORWARDS, ExpertChoice, FeedForward, Routing
from models.mixers import MIXERS, Mixer
from models.mixers.explanation import Explanation
from models.norm import NORMS, Norm, dropout
from models.state import State


class Block(nn.Module):
    """`forward` over (B, T, D), which also returns how experts were used (None without any); `step` over (B, D)."""

    def __init__(self, model: ModelConfig, config: BlockConfig, device: torch.device) -> None:
        super().__init__()
        norm, backend = NORMS[model.norm], config.mixer.backend
        self.post_norm, self.drop = model.post_norm, dropout(model.dropout)
        self.mixer_norm = norm(model.width, model.norm_eps, backend, device)
        self.mixer: Mixer = MIXERS[config.mixer.kind](config.mixer, model.width, device)
        self.feedforward_norm: Norm | None = None
        self.feedforward: FeedForward | None = None
        if config.feedforward is not None:
            self.feedforward_norm = norm(model.width, model.norm_eps, backend, device)
            self.feedforward = FEEDFORWARDS[config.feedforward.kind](config.feedforward, model.width, backend, device)

    def reset_parameters(self, generator: torch.Generator) -> None:
        self.mixer_norm.reset_parameters()
        self.mixer.reset_parameters(generator)
        if self.feedforward is not None and self.feedforward_norm is not None:
            self.feedforward_norm.reset_parameters()
            self.feedforward.reset_parameters(generator)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None, Routing | None]:
        y, state = self.mixer(self._before(x, self.mixer_norm), state)
        x, routing = self._feed_forward(self._after(x, y, self.mixer_norm))
        return x, state, routing

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.post_norm or not isinstance(self.drop, nn.Identity):
            y, state = self.mixer.step(self._before(x, self.mixer_norm), state)
            return self._feed_forward(self._after(x, y, self.mixer_norm))[0], state
        x, state = self.mixer.branch_step(x, self.mixer_norm, state)
        if self.feedforward is not None and self.feedforward_norm is not None:
            x = self.feedforward.branch_step(x, self.feedforward_norm)
        return x, state

    def explain(self, x: Tensor) -> tuple[Explanation | None, ExpertChoice | None]:
        """What the mixer and the feed-forward layer say of x (B, T, D), the input of the block."""
        normed = self._before(x, self.mixer_norm)
        said = self.mixer.explain(normed)
        if self.feedforward is None or self.feedforward_norm is None:
            return said, None
        x = self._after(x, self.mixer(normed)[0], self.mixer_norm)
        return said, self.feedforward.choice(self._before(x, self.feedforward_norm))

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        if self.feedforward is None or self.feedforward_norm is None:
            return x, None
        y, routing = self.feedforward(self._before(x, self.feedforward_norm))
        return self._after(x, y, self.feedforward_norm), routing

    def _before(self, x: Tensor, norm: Norm) -> Tensor:
        return x if self.post_norm else norm(x)

    def _after(self, x: Tensor, branch: Tensor, norm: Norm) -> Tensor:
        x = x + self.drop(branch)
        return norm(x) if self.post_norm else x

    @property
    def last_norm(self) -> Norm:
        return self.feedforward_norm or self.mixer_norm

    def residual_writers(self) -> list[Tensor]:
        """The weights of the projections whose output is added to the residual stream."""
        parts = (self.mixer, self.feedforward)
        return [part.output_weight for part in parts if part is not None]
