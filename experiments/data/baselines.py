"""What a model must beat on the same test bytes: token frequencies alone, and a general compressor."""

import lzma

import numpy as np

_CHUNK = 1 << 22  # tokens counted at once: bincount wants them as int64


def unigram_bits_per_byte(train_tokens: np.ndarray, test_tokens: np.ndarray, test_bytes: int, vocabulary: int) -> float:
    """Bits per byte of test text under the train split's token frequencies, add-one smoothed.

    Charged as models are: every test token but the first, end-of-text tokens included, over the text's bytes.
    """
    counts = _counts(train_tokens, vocabulary)
    bits = -np.log2((counts + 1) / (counts.sum() + vocabulary))
    return float(_counts(test_tokens[1:], vocabulary) @ bits / test_bytes)


def lzma_bits_per_byte(test_text: bytes) -> float:
    """Bits per byte of test text after `xz -9e`: it has seen no train text, and pays for its container."""
    return 8 * len(lzma.compress(test_text, preset=9 | lzma.PRESET_EXTREME)) / len(test_text)


def _counts(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """(V,) int64."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        counts += np.bincount(tokens[start : start + _CHUNK], minlength=vocabulary)
    return counts
