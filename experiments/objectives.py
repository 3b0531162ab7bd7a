"""What a model is asked to predict: the next token, or the tokens that were hidden from it.

`unmasked` is the fault that a causal mask prevents, on purpose: the next token, which the model already sees.

B: batch   T: time
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Name = Literal["causal", "masked", "unmasked"]
IGNORED = -100  # a target that counts nothing
SELECTED, MASKED, REPLACED = 0.15, 0.8, 0.1  # BERT's (arXiv 1810.04805): of all tokens; of those, 80/10/10


@dataclass(frozen=True)
class Objective:
    """name: causal, masked or unmasked. vocabulary: of the tokenizer; a masked model has one entry more, for [MASK], at
    its end.

    The corruption of a batch is a function of (seed, step) alone, from a random stream of its own, so that it depends
    neither on the model nor on what else was drawn.
    """

    name: Name
    vocabulary: int
    seed: int = 0

    @property
    def model_vocabulary(self) -> int:
        return self.vocabulary + (self.name == "masked")

    def batch(self, inputs: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the model reads and what it is to predict at each place, (B, T) each; IGNORED where nothing."""
        return self._corrupted(inputs, step) if self.name == "masked" else (inputs, targets)

    def hidden(self, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The same of a masked model that is evaluated: every token that it is to predict is replaced by [MASK], since
        what it could copy would count as guessed."""
        selected, _, _ = self._drawn(tokens, step)
        return torch.where(selected, self.vocabulary, tokens), torch.where(selected, tokens, IGNORED)

    def _corrupted(self, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """15% of the tokens are to be predicted; of those 80% are replaced by [MASK], 10% by any token, 10% stay."""
        selected, fate, anything = self._drawn(tokens, step)
        corrupted = torch.where(fate < MASKED, self.vocabulary, tokens)
        corrupted = torch.where((fate >= MASKED) & (fate < MASKED + REPLACED), anything, corrupted)
        return torch.where(selected, corrupted, tokens), torch.where(selected, tokens, IGNORED)

    def _drawn(self, tokens: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) each: which tokens are to be predicted, at least one; a number from 0 to 1; any token."""
        words = np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64), counter=[0, 0, 0, 1])
        raw = words.random_raw(3 * tokens.numel()).reshape(3, *tokens.shape)
        uniform = torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) / 2.0**53)
        selected, fate = uniform[0] < SELECTED, uniform[1]
        if not selected.any():
            # a batch that asks for nothing has no loss
            selected[0, int(raw[2].flat[0] % np.uint64(tokens.shape[1]))] = True
        return selected, fate, torch.from_numpy((raw[2] % np.uint64(self.vocabulary)).astype(np.int64))
