"""A safetensors file: what its header says, and its tensors, mapped into memory or read into a place that waits.

A mapped tensor is made of the file's own pages, and a page that was touched stays resident as long as any tensor of the
file lives. What is to be joined or converted is therefore read: a copy of mapped pages would be in memory beside them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from mmap import mmap
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.errors import ConfigError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 1 << 18  # elements: large enough for the system's calls, small enough for a processor's cache


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. kind: its type in the format's words. begin: its first byte in the file."""

    kind: str
    shape: tuple[int, ...]
    begin: int


class TensorFile:
    """tensors: what the file holds, by name.

    Raises FileNotFoundError, and ConfigError for what is no such file or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._mapped = safe_open(path, "pt")  # it also checks the header against the file
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes))
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"damaged weights: {path.name}: {error}") from None
        self.tensors: dict[str, Stored] = {
            name: Stored(one["dtype"], tuple(one["shape"]), 8 + header_bytes + one["data_offsets"][0])
            for name, one in header.items()
            if name != "__metadata__"
        }

    def dtype(self, name: str) -> torch.dtype:
        """Raises ConfigError where it is not floating point."""
        kind = self.tensors[name].kind
        if kind not in DTYPES:
            raise ConfigError(f"{name!r} has type {kind}: weights must be floating point, one of {', '.join(DTYPES)}")
        return DTYPES[kind]

    def mapped(self, name: str) -> Tensor:
        """Made of the file's pages; what is written to it does not reach the file."""
        return self._mapped.get_tensor(name)

    def read_into(self, name: str, place: Tensor) -> None:
        """Fill `place`, contiguous and of as many elements, with the tensor's, in the type and on the device of
        `place`. Nothing of the file stays in memory. Raises ConfigError."""
        flat = place.view(-1)
        if flat.dtype == self.dtype(name) and flat.device.type == "cpu":
            self._fill(flat, name, 0)
            return
        for begin, piece in zip(range(0, len(flat), PIECE), self.pieces(name), strict=True):
            flat[begin : begin + PIECE] = piece

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor's elements in their order, at most PIECE at a time, on the CPU; each piece lies where the one
        before it lay. Raises ConfigError."""
        elements, dtype = prod(self.tensors[name].shape), self.dtype(name)
        # pages of its own: between parameters, the allocator would keep what is freed as a hole
        buffer = torch.frombuffer(mmap(-1, PIECE * dtype.itemsize), dtype=dtype)
        for begin in range(0, elements, PIECE):
            piece = buffer[: elements - begin]
            self._fill(piece, name, begin)
            yield piece

    def _fill(self, flat: Tensor, name: str, begin: int) -> None:
        """With as many elements as it has, from `begin` on, byte for byte."""
        with self.path.open("rb") as file:
            file.seek(self.tensors[name].begin + begin * flat.itemsize)
            if file.readinto(flat.view(torch.uint8).numpy().data) != flat.nbytes:
                raise ConfigError(f"damaged weights: {self.path.name} ends within {name!r}")
