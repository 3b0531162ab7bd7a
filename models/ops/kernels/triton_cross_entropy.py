"""What lies between the products of a cross-entropy's head, on a GPU: one pass over a row for its normaliser, one for
its gradient, which takes the logits' place.

m: rows   V: vocabulary
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (triton comes with torch for CUDA)

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # entries of a row at a time


def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`models.ops.cross_entropy.softmax_gradient` for logits (m, V), each row in one piece: computed in float32, the
    gradient in their type, in their memory."""
    rows, V = logits.shape
    assert logits.stride(1) == 1
    losses = logits.new_empty(rows, dtype=torch.float32)
    _softmax_gradient[(rows,)](logits, targets, losses, logits.stride(0), V, BLOCK, num_warps=8)
    return losses.sum(), logits


@triton.jit
def _softmax_gradient(logits, targets, losses, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    of_target = tl.load(logits + target).to(tl.float32)  # before it is overwritten
    columns = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):  # each lane by itself
        x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        # a lane that has seen nothing yet stays at 0
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(highest - higher) + tl.exp(x - higher))
        highest = higher
    top = tl.max(highest)
    whole = tl.sum(total * tl.exp(highest - top))
    tl.store(losses + row, tl.log(whole) - (of_target - top))
    for start in range(0, V, BLOCK):
        at = start + columns
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - top) / whole
        tl.store(logits + at, tl.where(at == target, p - 1, p).to(logits.dtype.element_ty), mask=at < V)
