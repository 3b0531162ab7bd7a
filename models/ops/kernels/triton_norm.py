"""The sum of a residual stream and a branch, and its RMSNorm, on a GPU: one kernel forward and one backward. Sum, norm
and conversion to the type of the product that reads it, each by itself, would move twice as many bytes. A stream that
has no branch yet is its own sum; there the backward kernel adds what reaches the stream beside its norm.

rows: batch x time   D: width
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with torch on CUDA machines only; its kernels take their grid in brackets)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.kernels.triton_decode import processors

PROGRAMS_PER_PROCESSOR = 4  # of the backward pass: each has a sum of its own for the gradient of the weight
ENTRIES_PER_WARP = 256


def of_sum(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, own: bool
) -> tuple[Tensor, Tensor]:
    """x + branch and its norm (models.ops.rms_norm), x and branch (..., D) in types of at most 32 bits: computed in
    float32, the sum in the wider type of both, its norm in `dtype`. A program holds a row in registers. Without a
    branch x itself and its norm.

    What needs no gradient is written over branch and, if x is the caller's own, over x, where the types are right."""
    if torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in (x, branch, weight)):
        return _OfSum.apply(x, branch, weight, eps, dtype)
    total, normed, _ = _made(x, branch, weight, eps, dtype, own, True)
    return (x if branch is None else total), normed


def _made(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, over_x: bool, over_branch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, norm, and what the weight's scale was, (rows)."""
    x, D = x.contiguous(), x.shape[-1]
    if branch is None:
        total, normed = x, torch.empty_like(x, dtype=dtype)
    else:
        branch, total_type = branch.contiguous(), torch.promote_types(x.dtype, branch.dtype)
        total = x if over_x and x.dtype == total_type else torch.empty_like(x, dtype=total_type)
        normed = branch if over_branch and branch.dtype == dtype else torch.empty_like(x, dtype=dtype)
    scale = torch.empty(x.numel() // D, dtype=torch.float32, device=x.device)
    _forward[(len(scale),)](
        x, x if branch is None else branch, weight, total, normed, scale, eps, D=D, summed=branch is not None,
        **_block(D),
    )  # fmt: skip
    return total, normed, scale


class _OfSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, normed, scale = _made(x, branch, weight, eps, dtype, False, False)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, scale)
        ctx.types = x.dtype, None if branch is None else branch.dtype
        return (x if branch is None else total), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, of_branch = ctx.types
        if d_normed is None:  # autograd converts what is not in the type of x or branch
            return d_total, None if of_branch is None else d_total, None, None, None
        total, weight, scale = ctx.saved_tensors
        D, rows = total.shape[-1], scale.shape[0]
        d_x = torch.empty(total.shape, dtype=of_x, device=total.device)
        d_branch = d_x if of_branch in (of_x, None) else torch.empty_like(d_x, dtype=of_branch)
        programs = min(rows, PROGRAMS_PER_PROCESSOR * processors(total.device))
        d_weight = torch.empty(programs, D, dtype=torch.float32, device=total.device)
        d_normed = d_normed.contiguous()
        _backward[(programs,)](
            total, weight, scale, d_normed, d_normed if d_total is None else d_total.contiguous(), d_x, d_branch,
            d_weight, rows, D=D, passed_on=d_total is not None, apart=d_branch is not d_x, **_block(D),
        )  # fmt: skip
        return d_x, None if of_branch is None else d_branch, d_weight.sum(0), None, None


def _block(D: int) -> dict[str, int]:
    width = triton.next_power_of_2(D)
    return {"width": width, "num_warps": min(max(width // ENTRIES_PER_WARP, 1), 16)}


@triton.jit
def _forward(
    x_at, branch_at, weight_at, total_at, normed_at, scale_at, eps,
    D: tl.constexpr, width: tl.constexpr, summed: tl.constexpr,
):  # fmt: skip
    """One row. summed: whether there is a branch."""
    row, columns = tl.program_id(0), tl.arange(0, width)
    inside, at = columns < D, row.to(tl.int64) * D + columns
    total = tl.load(x_at + at, mask=inside, other=0).to(tl.float32)
    if summed:
        total += tl.load(branch_at + at, mask=inside, other=0).to(tl.float32)
        rounded = total.to(total_at.dtype.element_ty)
        tl.store(total_at + at, rounded, mask=inside)
        total = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(total * total) / D + eps)
    tl.store(scale_at + row, scale)
    weight = tl.load(weight_at + columns, mask=inside, other=0).to(tl.float32)
    tl.store(normed_at + at, (total * scale * weight).to(normed_at.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    total_at, weight_at, scale_at, d_normed_at, d_total_at, d_x_at, d_branch_at, d_weight_at, rows,
    D: tl.constexpr, width: tl.constexpr, passed_on: tl.constexpr, apart: tl.constexpr,
):  # fmt: skip
    """Every so many rows. passed_on: whether the sum has a gradient beside its norm's. apart: whether that of the
    branch is in another type than that of x."""
    first, programs, columns = tl.program_id(0), tl.num_programs(0), tl.arange(0, width)
    inside, start = columns < D, first.to(tl.int64) * D
    weight = tl.load(weight_at + columns, mask=inside, other=0).to(tl.float32)
    d_weight = tl.zeros((width,), tl.float32)
    for row in range(first, rows, programs):
        at = start + columns
        scale = tl.load(scale_at + row)
        unit = scale * tl.load(total_at + at, mask=inside, other=0).to(tl.float32)
        d_normed = tl.load(d_normed_at + at, mask=inside, other=0).to(tl.float32)
        d_weight += d_normed * unit
        d_unit = d_normed * weight
        d = scale * (d_unit - unit * (tl.sum(d_unit * unit) / D))
        if passed_on:
            d += tl.load(d_total_at + at, mask=inside, other=0).to(tl.float32)
        tl.store(d_x_at + at, d.to(d_x_at.dtype.element_ty), mask=inside)
        if apart:
            tl.store(d_branch_at + at, d.to(d_branch_at.dtype.element_ty), mask=inside)
        start += programs.to(tl.int64) * D
    tl.store(d_weight_at + first.to(tl.int64) * D + columns, d_weight, mask=inside)
