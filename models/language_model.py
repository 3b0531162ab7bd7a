"""LanguageModel: embed -> blocks -> norm -> head. The same class for every architecture.

B: batch   T: time   D: width   V: vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Block
from models.config import ModelConfig
from models.errors import ConfigError
from models.feedforward import Routing
from models.initialisation import FINAL_NORM, reset_bias, reset_embedding
from models.norm import NORMS, Norm, dropout, normed_sum, then_linear
from models.ops.kernels import Selection, load_beside
from models.state import ModelState, Place


class Hidden(NamedTuple):
    """x (B, T, D); the state after it, or None; one Routing for each layer of experts."""

    x: Tensor
    state: ModelState | None
    routing: tuple[Routing, ...]


class LanguageModel(nn.Module):
    """A causal language model; `forward` always returns logits.

    device: where it runs; backends are selected for it, once, here.
    seed: initialises the parameters from a random stream of their own; None leaves them unset and on the meta
        device, for a checkpoint to fill.
    dtype: of the parameters, except those that a mixer keeps in float32.
    Raises ConfigError and BackendUnavailableError.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.ops = load_beside(config.blocks[-1].mixer.backend, device)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                self.embedding = _embedding(config.vocabulary, config.width, config.padding_index)
                self.positions = None if config.positions is None else _embedding(config.positions, config.width)
                self.drop = dropout(config.dropout)
                blocks = nn.ModuleList(Block(config, block, device) for block in config.blocks)
                self.blocks = cast(Sequence[Block], blocks)
                self.norm: Norm | None = None
                if not config.post_norm:  # otherwise the last block's norm is the last norm
                    backend = config.blocks[-1].mixer.backend
                    self.norm = NORMS[config.norm](config.width, config.norm_eps, backend, device)
                self.head = nn.Linear(config.width, config.vocabulary, bias=config.head_bias)
        finally:
            torch.set_default_dtype(default)
        if seed is not None:
            self.to_empty(device=device)
        self.tie()
        if seed is not None:
            self.reset_parameters(seed)

    def tie(self) -> None:
        """Make the head share the embedding's weight, where the configuration says so. Moving a module between
        devices with `to_empty`, or assigning a checkpoint, gives each its own."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """The initialisation of models/initialisation.py; the same numbers for a seed whatever else was drawn."""
        generator = torch.Generator(self.embedding.weight.device).manual_seed(seed)
        reset_embedding(self.embedding.weight, generator)
        if not self.config.tie_embeddings:
            reset_embedding(self.head.weight, generator)
            reset_bias(self.head.bias)
        if self.positions is not None:
            reset_embedding(self.positions.weight, generator)
        if self.config.padding_index is not None:
            self.embedding.weight[self.config.padding_index] = 0
        writers = []
        for block in self.blocks:
            block.reset_parameters(generator)
            writers += block.residual_writers()
        for weight in writers:
            weight /= len(writers) ** 0.5
        (self.norm or self.blocks[-1].last_norm).reset_parameters(FINAL_NORM)

    def cast(self, dtype: torch.dtype) -> "LanguageModel":
        """The same model with its parameters in `dtype`, except those that a mixer keeps in float32, which `to` would
        round as well. What has its type already is shared."""
        made = LanguageModel(self.config, seed=None, device=self.device, dtype=dtype)
        held = self.state_dict()
        made.load_state_dict(
            {name: held[name].to(place.dtype) for name, place in made.state_dict().items()}, assign=True
        )
        made.tie()
        return made.train(self.training)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def backend(self) -> Selection:
        """What was selected for the mixers; where several kinds differ, all of it, joined by '+'."""
        chosen = list(dict.fromkeys(block.mixer.backend for block in self.blocks))
        name, asked = ("+".join(dict.fromkeys(getattr(one, field) for one in chosen)) for field in ("name", "asked"))
        return Selection(name, asked, "; ".join(one.fallback for one in chosen if one.fallback) or None)

    def hidden(self, tokens: Tensor, state: ModelState | None = None) -> Hidden:
        """tokens (B, T) -> what the head reads (B, T, D), the state after them where one was given, and how each
        layer of experts was used."""
        x, branch = self.embed(tokens, 0 if state is None else state.length), None
        before = (None,) * len(self.blocks) if state is None else state.blocks
        after, routing = [], []
        for block, block_state in zip(self.blocks, before, strict=True):
            x, branch, block_state, used = block(x, branch, block_state)
            after.append(block_state)
            if used is not None:
                routing.append(used)
        if self.norm is not None:
            x = normed_sum(self.norm, x, branch)
        return Hidden(x, None if state is None else ModelState(tuple(after)), tuple(routing))

    def embed(self, tokens: Tensor, start: int | Place = 0) -> Tensor:
        """tokens (B, T), or (B,) of one step, the first at position `start` -> (B, T, D) or (B, D). Raises ConfigError
        beyond the last learned position; of a Place, if that is beyond its limit."""
        x = F.embedding(tokens, self.embedding.weight, self.config.padding_index)
        if self.positions is not None:
            recorded = isinstance(start, Place)
            end = start.limit if recorded else start + (tokens.shape[1] if tokens.ndim > 1 else 1)
            known = self.positions.weight.shape[0]
            if end > known:
                raise ConfigError(f"the model has {known} learned positions, {end} tokens were given: use fewer")
            weight = self.positions.weight
            x = x + (weight.index_select(0, start.at[None]) if recorded else weight[start:end])
        return self.drop(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V)."""
        return self.head(self.hidden(tokens).x)

    def prefill(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Read a prompt (B, T), continuing `state`: the logits after its last token (B, V), and the state."""
        x, after, _ = self.hidden(tokens, state)
        assert after is not None
        return self.head(x[:, -1]), after

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Read one token (B,), continuing `state`: the logits after it (B, V), and the state."""
        x = self.embed(token, state.length if state.place is None else state.place)
        after = []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x, block_state = block.step(x, before)
            after.append(block_state)
        return self.step_logits(x), ModelState(tuple(after))

    def step_logits(self, x: Tensor) -> Tensor:
        """What the last block gives for one token (B, D) -> logits (B, V)."""
        head = self.head.weight, self.head.bias
        if self.norm is None:
            return self.ops.linear_step(x, *head)
        return then_linear(self.norm, x, self.ops.linear_step, *head)

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype | None = None) -> ModelState:
        """An empty state for sequences of up to `max_len` tokens; dtype defaults to the parameters'."""
        dtype = dtype or self.dtype
        return ModelState(tuple(b.mixer.make_state(batch, max_len, dtype, self.device) for b in self.blocks))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """For an optimizer: decay on matrices, none on vectors and on what a mixer exempts (A_log, D, dt_bias)."""
        decay, rest = [], []
        for name, parameter in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            exempt = name.rpartition(".")[2] in getattr(owner, "no_weight_decay", ())
            (rest if exempt or parameter.ndim < 2 else decay).append(parameter)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _embedding(entries: int, width: int, padding_index: int | None = None) -> nn.Embedding:
    # from_pretrained: the constructor would draw numbers, which on the meta device imports a compiler
    return nn.Embedding.from_pretrained(torch.empty(entries, width), freeze=False, padding_idx=padding_index)
