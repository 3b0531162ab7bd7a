"""What a model remembers while it decodes, as values that count their own bytes.

A state handed to a mixer is consumed: its buffers may be written in place, and only the returned state is valid.
`clone` gives an independent copy.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from models.errors import ConfigError


class State(Protocol):
    """`length`: tokens seen so far. `nbytes`: bytes of its buffers, whether filled or not."""

    @property
    def length(self) -> int: ...
    @property
    def buffers(self) -> dict[str, Tensor]: ...
    @property
    def nbytes(self) -> int: ...
    def clone(self) -> Self: ...


@dataclass(frozen=True)
class Place:
    """Where the next token of a recorded decode step goes: a position `at` (0-dimensional, int64) on the device, which
    the step itself moves on, below `limit`. tables: of rotary positions, by head width and base; they must outlive
    every cache of them, since a recording knows their memory alone."""

    at: Tensor
    limit: int
    tables: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Buffers:
    """A state made of tensors: every field that holds one is a buffer."""

    @property
    def buffers(self) -> dict[str, Tensor]:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers.values())

    def clone(self) -> Self:
        return replace(self, **{name: tensor.clone() for name, tensor in self.buffers.items()})


@dataclass(frozen=True)
class KVCache(Buffers):
    """Keys and values (B, K, S, P), preallocated. Without a window S tokens fit. With one they are a ring: position t
    stands in slot t % S, and what has left the window is overwritten. conv: the last inputs of attention's short
    convolution (B, E, W), where it has one. place: of a recorded step, whose host knows no length."""

    keys: Tensor
    values: Tensor
    length: int = 0
    window: int | None = None
    conv: Tensor | None = None
    place: Place | None = None

    @property
    def filled(self) -> int:
        return min(self.length, self.keys.shape[2])

    @property
    def slot(self) -> int:
        """Where the next token goes."""
        return self.length % self.keys.shape[2] if self.window is not None else self.length

    def grow(self, tokens: int) -> "KVCache":
        """With `tokens` more positions, for the caller to fill. Raises ConfigError when there is no room."""
        end, slots = self.length + tokens, self.keys.shape[2]
        if end > slots and slots != self.window:
            raise ConfigError(f"the cache holds {slots} tokens, {end} were asked for: raise max_len")
        return replace(self, length=end)

    def extend(self, keys: Tensor, values: Tensor) -> tuple["KVCache", Tensor, Tensor]:
        """Write keys and values (B, K, T, P) after what is there. Returns the cache, and all keys and values that
        the T new tokens may see, oldest first, in the type of the new ones. Raises ConfigError when they do not fit.
        """
        after = self.grow(keys.shape[2])
        if self.window is None:
            for buffer, new in ((self.keys, keys), (self.values, values)):
                buffer[:, :, self.length : after.length] = new
            # a cache in another type than the activations (16-bit, say) is read in the activations' type
            k, v = (buffer[:, :, : after.length].to(keys.dtype) for buffer in (self.keys, self.values))
            return after, k, v
        seen: list[Tensor] = []
        slots = self.keys.shape[2]
        kept = min(keys.shape[2], slots)
        target = torch.arange(after.length - kept, after.length, device=keys.device) % slots
        for buffer, new in ((self.keys, keys), (self.values, values)):
            start = self.slot if self.filled == slots else 0
            earlier = buffer[:, :, : self.filled].roll(-start, 2).to(new.dtype)
            seen.append(torch.cat([earlier, new], 2))
            buffer[:, :, target] = new[:, :, -kept:].to(buffer.dtype)
        k, v = seen
        return after, k, v

    def put(self, keys: Tensor, values: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Write keys and values (B, K, 1, P) at `place`. Returns all slots of both, in the type of the cache, and how
        many of them, from the first on, are filled (0-dimensional, int64): all that the token sees. The same operations
        on the same memory at any position."""
        slots = self.keys.shape[2]
        at = place.at if self.window is None else place.at % slots
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.index_copy_(2, at[None], new.to(buffer.dtype))
        filled = place.at + 1
        # a ring that is full holds the window and nothing else
        return self.keys, self.values, filled if self.window is None else filled.clamp_(max=slots)


@dataclass(frozen=True)
class RecurrentState(Buffers):
    """Of Mamba-1 and Mamba-2: the last W inputs of the convolution (B, E, W) and the recurrent state, (B, E, N) in
    Mamba-1, (B, H, P, N) in Mamba-2. constants: of a recorded step, `Mixer.constants`; no buffers, they do not move."""

    conv: Tensor
    ssm: Tensor
    length: int = 0
    constants: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class RotatingState(Buffers):
    """Of Mamba-3: the accumulated angles (B, H, S), the recurrent state (B, H, P, N), and the previous token's rotated
    B (B, R, H, N) and input x (B, H, P)."""

    angle: Tensor
    ssm: Tensor
    previous_B: Tensor
    previous_x: Tensor
    length: int = 0


@dataclass(frozen=True)
class LSTMState(Buffers):
    """Hidden and cell state (B, E)."""

    hidden: Tensor
    cell: Tensor
    length: int = 0


@dataclass(frozen=True)
class ModelState:
    """One state per block, in order. place: of a recorded step."""

    blocks: tuple[State, ...]
    place: Place | None = None

    @property
    def length(self) -> int:
        return self.blocks[0].length

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def clone(self) -> "ModelState":
        return ModelState(tuple(block.clone() for block in self.blocks))
