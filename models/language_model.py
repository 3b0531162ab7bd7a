"""LanguageModel: embed -> blocks -> norm -> head. The same class for every architecture.

B: batch   T: time   D: width   V: vocabulary
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Block
from models.config import ModelConfig
from models.initialisation import FINAL_NORM, reset_embedding
from models.norm import RMSNorm
from models.ops.kernels import Selection
from models.state import ModelState


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
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                # from_pretrained: the constructor would draw numbers, which on the meta device imports a compiler
                weight = torch.empty(config.vocabulary, config.width)
                self.embedding = nn.Embedding.from_pretrained(weight, freeze=False)
                self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config, device) for _ in range(config.layers)))
                self.norm = RMSNorm(config, device)
                self.head = nn.Linear(config.width, config.vocabulary, bias=False)
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
        self.norm.reset_parameters(FINAL_NORM)
        writers = []
        for block in self.blocks:
            block.reset_parameters(generator)
            writers += block.residual_writers()
        for linear in writers:
            linear.weight /= len(writers) ** 0.5

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def backend(self) -> Selection:
        """What was selected for the mixers, the same in every block."""
        return self.blocks[0].mixer.backend

    def hidden(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState | None]:
        """tokens (B, T) -> what the head reads (B, T, D), and the state after them where one was given."""
        x = self.embedding(tokens)
        if state is None:
            for block in self.blocks:
                x, _ = block(x)
            return self.norm(x), None
        after = []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x, block_state = block(x, before)
            after.append(block_state)
        return self.norm(x), ModelState(tuple(after))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V)."""
        return self.head(self.hidden(tokens)[0])

    def prefill(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Read a prompt (B, T), continuing `state`: the logits after its last token (B, V), and the state."""
        x, after = self.hidden(tokens, state)
        assert after is not None
        return self.head(x[:, -1]), after

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Read one token (B,), continuing `state`: the logits after it (B, V), and the state."""
        x = F.embedding(token, self.embedding.weight)
        after = []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x, block_state = block.step(x, before)
            after.append(block_state)
        return self.head(self.norm(x)), ModelState(tuple(after))

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
