"""Batches that begin at the same places of a text, whatever tokens it was cut into.

Legend: B batch, T context in tokens, V vocabulary.
"""

import hashlib

import numpy as np
from tokenizers import Tokenizer

from experiments.data.batches import Batch, Batches, shifted, words
from experiments.data.tokenizer import END_OF_TEXT_ID
from experiments.errors import CorpusError


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: how many bytes of text each token of a tokenizer of ours stands for; end of text for none."""
    # a byte-level BPE spells every byte as one character
    spelled = [tokenizer.id_to_token(at) for at in range(tokenizer.get_vocab_size())]
    sizes = np.array([len(token or "") for token in spelled], dtype=np.int64)
    sizes[END_OF_TEXT_ID] = 0
    return sizes


class PlacedBatches(Batches):
    """Windows of T tokens that begin with the first token at or after a place of the text. The places depend on (seed,
    step), on the length of the text and on `window_bytes`, the text that a window has room for on average: not on the
    tokenizer. Windows beyond the end begin earlier, so that they fit.

    sizes: (V,), see `token_bytes`. Raises CorpusError where the text is shorter than one window.
    """

    def __init__(
        self, tokens: np.ndarray, sizes: np.ndarray, *, context: int, batch: int, seed: int, window_bytes: int
    ) -> None:
        super().__init__(tokens, context=context, batch=batch, seed=seed)
        ends = np.cumsum(sizes[tokens])
        self.sizes, self.begins, self.text_bytes = sizes, ends - sizes[tokens], int(ends[-1])
        self.room = self.text_bytes - window_bytes
        if self.room < 1:
            raise CorpusError(
                f"the text has {self.text_bytes} bytes, a window of {window_bytes} needs more; use more text"
            )

    def places(self, step: int) -> np.ndarray:
        """(B,) int64: bytes into the text."""
        return (words(self.seed, step, self.batch) % np.uint64(self.room)).astype(np.int64)

    def at(self, step: int) -> Batch:
        """(inputs, targets) of step `step` >= 0: int64 (B, T) each."""
        starts = np.searchsorted(self.begins, self.places(step))
        starts = np.minimum(starts, len(self.tokens) - self.context - 1)
        return shifted(self.tokens[starts[:, None] + np.arange(self.context + 1)])

    def seen(self, steps: int) -> tuple[int, str]:
        """Bytes of text that the first `steps` batches ask for, and the SHA-256 of the places that they begin at."""
        total, digest = 0, hashlib.sha256()
        for step in range(steps):
            total += int(self.sizes[self.at(step)[1].numpy()].sum())
            digest.update(self.places(step).astype("<i8").tobytes())
        return total, digest.hexdigest()
