"""Root mean square normalisation (arXiv 1910.07467), y = x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D)."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's own, in the type of x: one kernel on a GPU, several on a CPU. It has none for two types, which are
    brought to the wider one."""
    if x.dtype == weight.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def no_sums(x: Tensor, branch: Tensor | None) -> bool:
    """Whether the sum of these has its norm from one kernel: of a form that has none."""
    return False


def one_compiled_row(x: Tensor) -> bool:
    """Whether x (B, D) is of a step that `torch.compile` traces for one sequence, whose products it writes as sums."""
    return torch.compiler.is_compiling() and len(x) == 1


def before_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(norm(x)) of one row x (1, D), weight (out, D), for a compiler: one kernel instead of two.

    The root mean square scales the product. Written as a sum for each row of the weight it is one more sum over what
    the product reads; apart, it would be a kernel of one program, which everything waits for."""
    rows = weight.shape[0]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt((wide * wide).expand(rows, -1).mean(-1) + eps)
    y = (F.linear(x * norm_weight, weight) * scale).to(x.dtype)
    return y if bias is None else y + bias


def gated(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm: Callable[..., Tensor] = reference
) -> Tensor:
    """norm(y silu(z)) over each of `groups` equal parts of the last axis: Mamba-2's, gate first. y, z (..., E)."""
    y = y * F.silu(z)
    if groups == 1:
        return norm(y, weight, eps)
    y = y.unflatten(-1, (groups, -1))
    return norm(y, torch.ones_like(weight[: y.shape[-1]]), eps).flatten(-2) * weight


def gated_fused(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """`gated` on torch's norm."""
    return gated(y, z, weight, eps, groups, fused)
