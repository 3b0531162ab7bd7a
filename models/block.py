"""The one residual block, for every mixer: x + mixer(norm(x)), then x + feedforward(norm(x)) where there is one; or,
with `post_norm`, norm(x + mixer(x)) and norm(x + feedforward(x)).

Where one kernel makes a sum and its norm (on a GPU), a block leaves its last sum to the next block's norm."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.config import BlockConfig, ModelConfig
from models.feedforward import FEEDFORWARDS, ExpertChoice, FeedForward, Routing
from models.mixers import MIXERS, Mixer
from models.mixers.explanation import Explanation
from models.norm import NORMS, Norm, dropout, suits_sum
from models.state import State


class Passed(NamedTuple):
    """x + branch is the residual stream behind a block, x and branch (B, T, D), or x alone where branch is None; the
    state after it, or None; how experts were used, or None."""

    x: Tensor
    branch: Tensor | None
    state: State | None
    routing: Routing | None

    @property
    def stream(self) -> Tensor:
        return self.x if self.branch is None else self.x + self.branch


class Block(nn.Module):
    """`forward` over (B, T, D); `step` over (B, D)."""

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

    def forward(self, x: Tensor, branch: Tensor | None = None, state: State | None = None) -> Passed:
        """Of the residual stream x + branch. Where there is a branch, both may be written over."""
        own = branch is not None
        x, y = self._before(x, branch, self.mixer_norm, own)
        y, state = self.mixer(y, state)
        x, branch, routing = self._feed_forward(*self._after(x, y, self.mixer_norm), own)
        if branch is not None and not suits_sum(self.mixer_norm, x, branch):
            x, branch = x + branch, None
        return Passed(x, branch, state, routing)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.post_norm or not isinstance(self.drop, nn.Identity):
            x, y = self._before(x, None, self.mixer_norm)
            y, state = self.mixer.step(y, state)
            x, branch, _ = self._feed_forward(*self._after(x, y, self.mixer_norm))
            return x if branch is None else x + branch, state
        x, state = self.mixer.branch_step(x, self.mixer_norm, state)
        if self.feedforward is not None and self.feedforward_norm is not None:
            x = self.feedforward.branch_step(x, self.feedforward_norm)
        return x, state

    def explain(self, x: Tensor) -> tuple[Explanation | None, ExpertChoice | None]:
        """What the mixer and the feed-forward layer say of x (B, T, D), the input of the block."""
        x, y = self._before(x, None, self.mixer_norm)
        said = self.mixer.explain(y)
        if self.feedforward is None or self.feedforward_norm is None:
            return said, None
        x, branch = self._after(x, self.mixer(y)[0], self.mixer_norm)
        _, y = self._before(x, branch, self.feedforward_norm, unrounded=self.feedforward.reads_unrounded)
        return said, self.feedforward.choice(y)

    def _feed_forward(
        self, x: Tensor, branch: Tensor | None, own: bool = False
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        if self.feedforward is None or self.feedforward_norm is None:
            return x, branch, None
        x, y = self._before(x, branch, self.feedforward_norm, own, self.feedforward.reads_unrounded)
        y, routing = self.feedforward(y)
        return *self._after(x, y, self.feedforward_norm), routing

    def _before(
        self, x: Tensor, branch: Tensor | None, norm: Norm, own: bool = False, unrounded: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x + branch, and what a mixer or a feed-forward layer reads of it. own: whether x may be written over."""
        if not self.post_norm and not unrounded and suits_sum(norm, x, branch):
            return norm.of_sum(x, branch, own)
        x = x if branch is None else summed(x, branch, own)
        return x, x if self.post_norm else norm(x)

    def _after(self, x: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor | None]:
        """The residual stream as x and branch, after y was written to it."""
        y = self.drop(y)
        return (norm(x + y), None) if self.post_norm else (x, y)

    @property
    def last_norm(self) -> Norm:
        return self.feedforward_norm or self.mixer_norm

    def residual_writers(self) -> list[Tensor]:
        """The weights of the projections whose output is added to the residual stream."""
        parts = (self.mixer, self.feedforward)
        return [part.output_weight for part in parts if part is not None]


def summed(x: Tensor, branch: Tensor, own: bool) -> Tensor:
    """x + branch, over x where that is the caller's own and no gradient needs it."""
    kept = torch.is_grad_enabled() and (x.requires_grad or branch.requires_grad)
    fits = torch.promote_types(x.dtype, branch.dtype) == x.dtype
    return x.add_(branch) if own and fits and not kept else x + branch
