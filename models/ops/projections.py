"""Several linear maps of one input, whose weights are rows of one matrix, in forms that agree.

x (..., D)   weight (sum of sizes, D)   sizes   ->  one (..., size) for each of them
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


def together(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """One product, taken apart: one launch on a GPU, and parts that are columns of one matrix."""
    return linear(x, weight).split(tuple(sizes), -1)


def apart(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """A product for each part, so that each is a matrix of its own: its gradient need not be copied into one matrix
    with the others' before the products of the backward pass."""
    return tuple(linear(x, part) for part in weight.split(tuple(sizes)))


def time_innermost(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """As `apart`, x (B, T, D), but laid out with time innermost, (size, B, T) in memory: what the CUDA kernels of the
    convolution and the scan read without a copy, and lay their results and gradients out like. Only strides tell."""
    B, T, D = x.shape
    columns = x.reshape(B * T, D).t()
    return tuple((part @ columns).view(-1, B, T).permute(1, 2, 0) for part in weight.split(tuple(sizes)))


def columns(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """y (B, sum of sizes), a product that has its memory to itself, as its parts, each (B, size).

    As `y.split(sizes, 1)`; but `torch.compile` takes a split into whatever reads a part, and leaves y in the type of
    the sum, for another kernel to convert. A view by strides needs y itself."""
    at = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(y.as_strided((len(y), size), (y.shape[1], 1), start) for size, start in zip(sizes, at, strict=True))


def kept(y: Tensor) -> Tensor:
    """y itself. `torch.compile` then computes it once, where its last sum is made, and not anew in every row of the
    product that reads it: a view by strides needs it in memory."""
    return y.as_strided(y.shape, y.stride())


def added(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + linear(y, weight, bias): a residual branch's last projection. x (B, D), y (B, E), weight (D, E)."""
    return x + linear(y, weight, bias)


def added_in_place(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`added`, written over x: the product is added as it is made, which costs no launch and rounds once.

    Not over x where that may be needed again, for a gradient, nor where `torch.compile` puts the two together."""
    own = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if own or bias is not None or not x.dtype == y.dtype == weight.dtype:
        return added(x, y, weight, bias)
    return x.addmm_(y, weight.t())


def no_branches(x: Tensor, *others: Tensor) -> bool:
    """Whether these are for the form's residual branches in one call: a form that has none."""
    return False
