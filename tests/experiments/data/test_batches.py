"""Batches depend on (seed, step) alone; evaluation windows predict every token exactly once."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.batches import Batches, StreamHash, require_length, windows
from experiments.errors import CorpusError

TOKENS = np.arange(1000, dtype=np.uint16)


def test_a_batch_is_windows_of_the_stream_with_targets_one_token_on():
    inputs, targets = Batches(TOKENS, context=16, batch=5, seed=3).at(7)
    assert inputs.shape == targets.shape == (5, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # the stream counts up
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


def test_known_batch_never_changes():
    inputs, _ = Batches(TOKENS, context=4, batch=6, seed=1).at(2)
    assert inputs[:, 0].tolist() == [709, 634, 891, 182, 559, 688]


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.integers(0, 10_000), min_size=1, max_size=8), seed=st.integers(0, 2**63))
def test_the_order_of_calls_and_global_random_states_change_nothing(steps: list[int], seed: int):
    expected = {step: Batches(TOKENS, context=8, batch=3, seed=seed).at(step)[0] for step in steps}
    batches = Batches(TOKENS, context=8, batch=3, seed=seed)
    for step in reversed(steps):
        torch.manual_seed(step)
        np.random.seed(step)  # noqa: NPY002
        random.seed(step)
        assert torch.equal(batches.at(step)[0], expected[step])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batches.at(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_steps_are_different_streams():
    firsts = {
        tuple(Batches(TOKENS, context=8, batch=4, seed=seed).at(step)[0][:, 0].tolist())
        for seed in range(20)
        for step in range(20)
    }
    assert len(firsts) == 400


def test_every_place_is_drawn_and_none_beyond_the_end():
    tokens = TOKENS[:12]
    batches = Batches(tokens, context=8, batch=64, seed=0)
    inputs = torch.cat([batches.at(step)[0] for step in range(20)])
    targets = torch.cat([batches.at(step)[1] for step in range(20)])
    counts = torch.bincount(inputs[:, 0])
    assert counts.shape == (4,)  # starts 0..3: a window of 8 and its target fit four ways into 12 tokens
    assert counts.min() > 0.8 * counts.max()
    assert targets.max() == 11


def test_the_width_of_the_file_changes_nothing(tmp_path: Path):
    hashes = set()
    for kind in ("<u2", "<u4"):
        TOKENS.astype(kind).tofile(tmp_path / kind)
        tokens = np.memmap(tmp_path / kind, dtype=kind, mode="r")
        stream = StreamHash()
        stream.update(*Batches(tokens, context=8, batch=3, seed=1).at(0))
        for batch in windows(tokens, context=300, batch=2):
            stream.update(*batch)
        hashes.add(stream.hexdigest())
    assert len(hashes) == 1


def test_the_stream_hash_tells_streams_apart_and_ignores_representation():
    def digest(*updates: tuple[torch.Tensor, torch.Tensor]) -> str:
        stream = StreamHash()
        for inputs, targets in updates:
            stream.update(inputs, targets)
        return stream.hexdigest()

    a, b = torch.arange(6).view(2, 3), torch.arange(1, 7).view(2, 3)
    same = digest((a, b), (b, a))
    assert same == digest((a.int(), b.short()), (b, a))
    assert same == digest((a.T.contiguous().T, b), (b, a))
    others = [
        digest((a, b)),
        digest((b, a), (a, b)),
        digest((a.view(3, 2), b.view(3, 2)), (b, a)),
        digest((a, b), (b, a + (a == 5))),
        digest(),
    ]
    assert len({same, *others}) == 6


@settings(max_examples=200, deadline=None)
@given(length=st.integers(2, 200), context=st.integers(1, 60), batch=st.integers(1, 7))
def test_windows_predict_every_token_after_the_first_exactly_once(length: int, context: int, batch: int):
    tokens = np.random.default_rng(length).integers(0, 1 << 16, length).astype(np.uint16)
    if length <= context:
        with pytest.raises(CorpusError):
            windows(tokens, context=context, batch=batch)
        return
    found = list(windows(tokens, context=context, batch=batch))
    assert np.array_equal(torch.cat([targets.flatten() for _, targets in found]).numpy(), tokens[1:])
    assert np.array_equal(torch.cat([inputs.flatten() for inputs, _ in found]).numpy(), tokens[:-1])
    for inputs, targets in found:
        assert inputs.dtype == targets.dtype == torch.int64
        assert len(inputs) <= batch
    full = [inputs for inputs, _ in found if inputs.shape[1] == context]
    assert all(len(inputs) == batch for inputs in full[:-1])
    assert sum(map(len, full)) == (length - 1) // context
    assert len(found) - len(full) == ((length - 1) % context > 0)


def test_a_short_stream_is_named_with_what_it_has_and_what_is_needed():
    require_length("validation split", TOKENS[:9], 8)
    with pytest.raises(CorpusError, match="the validation split has 8 tokens, context = 8 needs 9"):
        require_length("validation split", TOKENS[:8], 8)
    with pytest.raises(CorpusError, match="has 8 tokens, context = 8 needs 9"):
        Batches(TOKENS[:8], context=8, batch=1, seed=0)
    with pytest.raises(CorpusError, match="has 8 tokens, context = 8 needs 9"):
        windows(TOKENS[:8], context=8, batch=1)
    assert Batches(TOKENS[:9], context=8, batch=2, seed=0).at(0)[1].max() == 8
