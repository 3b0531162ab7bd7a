"""Where each parameter of ours is found among theirs. One table per architecture serves both directions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One parameter of ours. theirs: what it is made of, joined along the first axis; rows: of each, where there are
    several. depthwise: theirs are the weights of a convolution (E, 1, W), ours (E, W)."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    depthwise: bool = False

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Copies only where there are several."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return tensor[:, 0] if self.depthwise else tensor

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `join`; views."""
        tensor = tensor[:, None] if self.depthwise else tensor
        return tensor.split(self.rows) if self.rows else (tensor,)

    def shapes(self, ours: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of theirs."""
        first, *rest = ours
        rest = [1, *rest] if self.depthwise else rest
        return {name: (rows, *rest) for name, rows in zip(self.theirs, self.rows or (first,), strict=True)}


def entries(prefix: str, theirs: str, names: Mapping[str, str]) -> list[Entry]:
    """Those of one layer that only differ in name, ours to theirs; a `conv_weight` of ours is depthwise there."""
    return [
        Entry(f"{prefix}.{mine}", (f"{theirs}.{name}",), depthwise=mine.endswith("conv_weight"))
        for mine, name in names.items()
    ]


def to_ours(theirs: Mapping[str, Tensor], layout: Iterable[Entry]) -> dict[str, Tensor]:
    return {entry.ours: entry.join([theirs[name] for name in entry.theirs]) for entry in layout}


def to_theirs(ours: Mapping[str, Tensor], layout: Iterable[Entry]) -> dict[str, Tensor]:
    return {
        name: part for entry in layout for name, part in zip(entry.theirs, entry.split(ours[entry.ours]), strict=True)
    }
