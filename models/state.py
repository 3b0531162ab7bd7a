"""What a model remembers while it decodes, as values that count their own bytes.

A state handed to a mixer is consumed: its buffers may be written in place, and only the returned state is valid.
`clone` gives an independent copy.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

from torch import Tensor

from models.errors import ConfigError


class State(Protocol):
    """`length`: tokens seen so far. `nbytes`: bytes of its buffers, whether filled or not."""

    @property
    def length(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def clone(self) -> Self: ...


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class KVCache:
    """Keys and values (B, H_kv, max_len, P), preallocated; the first `length` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @property
    def nbytes(self) -> int:
        return _nbytes(self.keys, self.values)

    def append(self, keys: Tensor, values: Tensor) -> "KVCache":
        """Write (B, H_kv, T, P) after what is there. Raises ConfigError when it does not fit."""
        grown = self.grow(keys.shape[2])
        self.keys[:, :, self.length : grown.length] = keys
        self.values[:, :, self.length : grown.length] = values
        return grown

    def grow(self, tokens: int) -> "KVCache":
        """With `tokens` more positions, for the caller to fill. Raises ConfigError when there is no room."""
        end = self.length + tokens
        if end > self.keys.shape[2]:
            raise ConfigError(f"the cache holds {self.keys.shape[2]} tokens, {end} were asked for: raise max_len")
        return KVCache(self.keys, self.values, end)

    def clone(self) -> "KVCache":
        return replace(self, keys=self.keys.clone(), values=self.values.clone())


@dataclass(frozen=True)
class MambaState:
    """The last W inputs of the convolution (B, E, W) and the recurrent state (B, E, N)."""

    conv: Tensor
    ssm: Tensor
    length: int = 0

    @property
    def nbytes(self) -> int:
        return _nbytes(self.conv, self.ssm)

    def clone(self) -> "MambaState":
        return replace(self, conv=self.conv.clone(), ssm=self.ssm.clone())


@dataclass(frozen=True)
class ModelState:
    """One state per block, in order."""

    blocks: tuple[State, ...]

    @property
    def length(self) -> int:
        return self.blocks[0].length

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def clone(self) -> "ModelState":
        return ModelState(tuple(block.clone() for block in self.blocks))
