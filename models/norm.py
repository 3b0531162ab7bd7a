"""Normalisation as a module, in the form that the device has."""

from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ops.kernels import load_beside
from models.ops.rms_norm import before_linear, one_compiled_row


class RMSNorm(nn.Module):
    """Over the last axis, with a learned weight; models.ops.rms_norm."""

    has_bias = False

    def __init__(self, width: int, eps: float, backend: str, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.ops = load_beside(backend, device)
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self, value: float = 1.0) -> None:
        nn.init.constant_(self.weight, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, branch: Tensor | None, own: bool) -> tuple[Tensor, Tensor]:
        """x + branch and its norm, x and branch (..., D), in one kernel, for what `suits_sum`; x itself where branch is
        None. Under autocast the norm is in the type of the product that reads it. Without gradients it may be written
        over the branch and, where x is the caller's own, the sum over x."""
        return self.ops.rms_norm_of_sum(x, branch, self.weight, self.eps, own)


class LayerNorm(nn.Module):
    """Over the last axis, with a learned weight and bias (arXiv 1607.06450)."""

    has_bias = True

    def __init__(self, width: int, eps: float, backend: str, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def reset_parameters(self, value: float = 1.0) -> None:
        nn.init.constant_(self.weight, value)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm
NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def suits_sum(norm: Norm, x: Tensor, branch: Tensor | None) -> TypeGuard[RMSNorm]:
    """Whether one kernel makes x + branch, or x where branch is None, and its norm here."""
    return isinstance(norm, RMSNorm) and norm.ops.suits_sum(x, branch)


def normed_sum(norm: Norm, x: Tensor, branch: Tensor | None) -> Tensor:
    """norm(x + branch), or norm(x) where branch is None, for products to read. Where there is a branch, both may be
    written over."""
    if suits_sum(norm, x, branch):
        return norm.of_sum(x, branch, branch is not None)[1]
    return norm(x if branch is None else x + branch)


def then_linear(
    norm: Norm, x: Tensor, linear: Callable[..., Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """linear(norm(x), weight, bias) of one token, x (B, D). Compiled for one row, an RMSNorm is part of the product;
    elsewhere, and where more than one product or none reads it (experts, LSTM), it stays an operation of its own."""
    if isinstance(norm, RMSNorm) and one_compiled_row(x):
        return before_linear(x, norm.weight, norm.eps, weight, bias)
    return linear(norm(x), weight, bias)


def dropout(share: float) -> nn.Module:
    """Of a share of the entries in training; nothing at all, not even a call, where the share is 0."""
    return nn.Dropout(share) if share else nn.Identity()
