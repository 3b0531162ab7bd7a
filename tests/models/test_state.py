"""The cache as a value: what it keeps, what it lets be seen, what it counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from models.state import KVCache, LSTMState, ModelState, RecurrentState, RotatingState


def cache(slots: int, window: int | None = None, dtype=torch.float32) -> KVCache:
    keys, values = (torch.zeros(2, 1, slots, 1, dtype=dtype) for _ in range(2))
    return KVCache(keys, values, window=window)


def numbered(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32).view(1, 1, count, 1).expand(2, -1, -1, -1)


@given(window=st.none() | st.integers(1, 9), pieces=st.lists(st.integers(1, 12), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_what_is_seen_is_the_past_in_its_order(window, pieces):
    """Against a list. With a window: at least what its first new token may see, nothing that was never written."""
    now, length = cache(window or sum(pieces), window), 0
    nbytes = now.nbytes
    for piece in pieces:
        now, keys, values = now.extend(numbered(length, piece), -numbered(length, piece))
        length += piece
        assert torch.equal(values, -keys)
        seen = keys[0, 0, :, 0].tolist()
        assert seen == [float(t) for t in range(length - len(seen), length)]
        assert len(seen) == (length if window is None else min(length - piece, window) + piece)
        assert now.length == length
        assert now.filled == min(length, window or length)
        assert now.nbytes == nbytes
        if window is not None:
            assert now.slot == length % window
            held = now.keys[0, 0, :, 0].tolist()
            for t in range(max(0, length - window), length):
                assert held[t % window] == t


@pytest.mark.parametrize("window", [None, 9])
def test_no_room_is_a_user_error(window):
    """A window longer than the longest text is no ring."""
    now, _, _ = cache(4, window).extend(numbered(0, 3), numbered(0, 3))
    with pytest.raises(ConfigError, match=r"the cache holds 4 tokens, 5 were asked for: raise max_len"):
        now.extend(numbered(3, 2), numbered(3, 2))
    assert now.grow(1).length == 4
    with pytest.raises(ConfigError, match=r"holds 4 tokens, 5 were asked for"):
        now.grow(2)


def test_a_16_bit_cache_is_read_in_the_type_of_what_is_new():
    for window in (None, 3):
        now, _, _ = cache(8 if window is None else 3, window, torch.bfloat16).extend(numbered(0, 2), numbered(0, 2))
        assert now.keys.dtype == torch.bfloat16
        _, keys, values = now.extend(numbered(2, 2), numbered(2, 2))
        assert keys.dtype == values.dtype == torch.float32
        assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3]


STATES = {
    "cache": cache(5, 5),
    "cache-with-convolution": KVCache(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), conv=torch.zeros(1, 7, 2)),
    "recurrent": RecurrentState(torch.zeros(1, 3, 4), torch.zeros(1, 3, 5), 2),
    "rotating": RotatingState(
        torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, 3)
    ),
    "lstm": LSTMState(torch.zeros(1, 6), torch.zeros(1, 6).double()),
}


@pytest.mark.parametrize("name", STATES)
def test_a_clone_shares_nothing_and_every_buffer_is_counted(name):
    state = STATES[name]
    tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    assert state.nbytes == sum(tensor.nbytes for tensor in tensors)
    clone = state.clone()
    assert type(clone) is type(state)
    assert clone.length == state.length
    for field, tensor in state.buffers.items():
        other = clone.buffers[field]
        assert torch.equal(other, tensor)
        other += 1
        assert not torch.equal(other, tensor)
    assert len(state.buffers) == len(tensors)
    both = ModelState((state, clone))
    assert both.nbytes == 2 * state.nbytes
    assert both.length == state.length
    assert both.clone().blocks[1].nbytes == clone.nbytes
