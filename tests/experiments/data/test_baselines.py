"""The baselines against hand-made figures."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import baselines
from experiments.data.baselines import lzma_bits_per_byte, unigram_bits_per_byte


def test_unigram_by_hand():
    train = np.array([0, 1, 1, 2], dtype=np.uint16)
    test = np.array([0, 1, 3, 0], dtype=np.uint16)  # the first token is nobody's prediction
    # smoothed over V = 4: p(0) = 2/8, p(1) = 3/8, p(3) = 1/8
    expected = -(math.log2(3 / 8) + math.log2(1 / 8) + math.log2(2 / 8)) / 5
    assert unigram_bits_per_byte(train, test, 5, 4) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    train=st.lists(st.integers(0, 9), min_size=1, max_size=50),
    test=st.lists(st.integers(0, 9), min_size=2, max_size=50),
    chunk=st.integers(1, 60),
)
def test_unigram_is_the_mean_surprise_however_it_is_chunked(train: list[int], test: list[int], chunk: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "_CHUNK", chunk)
        got = unigram_bits_per_byte(np.array(train, np.uint16), np.array(test, np.uint16), 7, 10)
    bits = sum(-math.log2((train.count(token) + 1) / (len(train) + 10)) for token in test[1:])
    assert got == pytest.approx(bits / 7, rel=1e-12)


def test_a_uniform_unigram_costs_the_logarithm_of_the_vocabulary():
    tokens = np.tile(np.arange(256, dtype=np.uint16), 100)
    assert unigram_bits_per_byte(tokens, tokens, len(tokens) - 1, 256) == pytest.approx(8, rel=1e-6)


def test_lzma_charges_noise_in_full_and_repetition_next_to_nothing():
    noise = np.random.default_rng(0).bytes(100_000)
    assert 8 < lzma_bits_per_byte(noise) < 8.02
    assert lzma_bits_per_byte(b"again " * 20_000) < 0.02
