"""One token's attention over a long cache on a GPU: the keys are split among the multiprocessors.

With one query, a program for each head leaves most of a GPU idle, and it is reading the cache that takes the time. Here
each split of the keys has a program of its own, which walks its keys in blocks under an online softmax (arXiv
2205.14135, Alg. 1) for all queries that share them, so that a key is read once; a second kernel joins the splits
("flash decoding"). What depends on the number of tokens is read on the device, so that a CUDA graph can repeat it.

B: batch   S: slots   H: heads   K: key-value heads   G: queries of one key-value head, H / K   P: head width
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with torch on CUDA machines only; its kernels take their grid in brackets)

import torch
import triton
import triton.language as tl
from torch import Tensor

# what a program reads at once, and the products with its queries, both in registers
BLOCK_ELEMENTS = 4096
BLOCK_PRODUCTS = 8192
PROGRAMS_PER_PROCESSOR = 4  # some read while others compute
MOST_SPLITS = 128  # what one program can join
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; the difference of two infinities is no number


def place_token(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, at: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """`models.ops.attention.place_token`, in one kernel."""
    B, K, S, P = keys.shape
    H = qkv.shape[1] - 2 * K
    assert qkv.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    q, filled = qkv.new_empty(B, H, 1, P), torch.empty_like(at)
    _place[B, H + 2 * K](
        qkv, qkv if cos is None else cos, qkv if sin is None else sin, at, keys, values, q, filled, S,
        H=H, K=K, P=P, width=triton.next_power_of_2(P), rotary=cos is not None,
    )  # fmt: skip
    return q, filled


@triton.jit
def _place(
    qkv_at, cos_at, sin_at, at_at, k_at, v_at, q_at, filled_at, S,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, width: tl.constexpr, rotary: tl.constexpr,
):  # fmt: skip
    """One head of queries, keys or values."""
    row, head = tl.program_id(0), tl.program_id(1)
    p = tl.arange(0, width)
    at = tl.load(at_at)
    here = qkv_at + (row.to(tl.int64) * (H + 2 * K) + head) * P
    x = tl.load(here + p, mask=p < P)
    if rotary and head < H + K:
        half = P // 2
        # entry i turns with i + P/2, by the table in the type of x
        other = tl.load(here + (p + half) % P, mask=p < P).to(tl.float32)
        cos = tl.load(cos_at + at * half + p % half).to(x.dtype).to(tl.float32)
        sin = tl.load(sin_at + at * half + p % half).to(x.dtype).to(tl.float32)
        x = (x.to(tl.float32) * cos + tl.where(p < half, -other, other) * sin).to(x.dtype)
    if head < H:
        tl.store(q_at + (row.to(tl.int64) * H + head) * P + p, x, mask=p < P)
    else:
        slot = ((row.to(tl.int64) * K + (head - H) % K) * S + at % S) * P + p
        if head < H + K:
            tl.store(k_at + slot, x.to(k_at.dtype.element_ty), mask=p < P)
        else:
            tl.store(v_at + slot, x.to(v_at.dtype.element_ty), mask=p < P)
    if row + head == 0:
        tl.store(filled_at, tl.minimum(at + 1, S))


def attend(q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
    """`models.ops.attention.of_slots`: q (B, H, 1, P), k and v (B, K, S, P), contiguous, in any types of at most 32
    bits, and their number of filled slots, at least 1 (0-dimensional, int64) -> (B, H, 1, P) in q's type. Sums in
    float32. No gradient."""
    B, H, _, P = q.shape
    K, S = k.shape[1:3]
    assert k.is_contiguous()
    assert v.is_contiguous()
    assert q.stride(3) == 1
    group, width = triton.next_power_of_2(H // K), triton.next_power_of_2(P)
    block = max(1, min(BLOCK_ELEMENTS, BLOCK_PRODUCTS // group) // width)
    splits = split_count(B * K, triton.cdiv(S, block), processors(q.device))
    part = torch.empty(B * H, splits, P, dtype=torch.float32, device=q.device)
    weight = torch.empty(B * H, splits, dtype=torch.float32, device=q.device)
    y = torch.empty(B, H, 1, P, dtype=q.dtype, device=q.device)
    scale = P**-0.5 * 1.4426950408889634  # log2(e): the softmax to base 2
    _attend_split[B * K, splits](
        q, k, v, filled, part, weight, q.stride(0), q.stride(1), S, scale,
        K=K, G=H // K, P=P, group=group, width=width, block=block,
    )  # fmt: skip
    _join[(B * H,)](part, weight, y, splits, P=P, width=width, most=triton.next_power_of_2(splits))
    return y


def split_count(rows: int, blocks: int, processors: int) -> int:
    """Splits of each of `rows` (B K) caches of so many blocks: programs enough for every multiprocessor, and a block
    for every program."""
    return min(triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, rows), blocks, MOST_SPLITS)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _attend_split(
    q_at, k_at, v_at, filled_at, part_at, weight_at, q_row, q_head, S, scale,
    K: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    group: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One split of one key-value head: its average of the values, and the logarithm to base 2 of what it weighs."""
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    # (G, block, P), the widths padded to powers of two
    g = tl.arange(0, group)[:, None, None]
    s = tl.arange(0, block)[None, :, None]
    p = tl.arange(0, width)[None, None, :]
    b, h = row // K, row % K * G + g
    q = tl.load(q_at + b.to(tl.int64) * q_row + h * q_head + p, mask=(g < G) & (p < P), other=0).to(tl.float32) * scale
    k_at += row.to(tl.int64) * S * P
    v_at += row.to(tl.int64) * S * P

    filled = tl.load(filled_at).to(tl.int32)
    blocks = tl.cdiv(filled, block)
    each = tl.cdiv(blocks, splits)
    # each of the block's places has a softmax of its own, so that nothing is joined within the loop
    top = tl.full([group, block], LOWEST, tl.float32)
    total = tl.zeros([group, block], tl.float32)
    y = tl.zeros([group, block, width], tl.float32)
    for start in range(split * each * block, tl.minimum((split + 1) * each, blocks) * block, block):
        there = start + s < filled
        at = (start + s) * P + p
        k = tl.load(k_at + at, mask=there & (p < P), other=0).to(tl.float32)
        v = tl.load(v_at + at, mask=there & (p < P), other=0).to(tl.float32)
        scores = tl.where(tl.reshape(there, [1, block]), tl.sum(q * k, 2), float("-inf"))
        before, top = top, tl.maximum(top, scores)
        faded = tl.exp2(before - top)
        weights = tl.exp2(scores - top)
        total = total * faded + weights
        y = y * faded[:, :, None] + weights[:, :, None] * v
    highest = tl.max(top, 1)
    faded = tl.exp2(top - highest[:, None])
    total = tl.sum(total * faded, 1)
    y = tl.sum(y * faded[:, :, None], 1)

    # a split without keys weighs nothing
    g = tl.arange(0, group)
    p = tl.arange(0, width)
    out = (b * K * G + row % K * G + g) * splits + split
    tl.store(weight_at + out, highest + tl.log2(total), mask=g < G)
    y = y / tl.where(total > 0, total, 1)[:, None]
    tl.store(part_at + out[:, None] * P + p[None, :], y, mask=(g < G)[:, None] & (p < P)[None, :])


@triton.jit
def _join(part_at, weight_at, y_at, splits, P: tl.constexpr, width: tl.constexpr, most: tl.constexpr):
    """One head: the average of its splits."""
    row = tl.program_id(0)
    s = tl.arange(0, most)
    p = tl.arange(0, width)
    weight = tl.load(weight_at + row * splits + s, mask=s < splits, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))
    part = tl.load(
        part_at + (row * splits + s)[:, None] * P + p[None, :],
        mask=(s < splits)[:, None] & (p < P)[None, :], other=0,
    )  # fmt: skip
    y = tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0)
    tl.store(y_at + row * P + p, y.to(y_at.dtype.element_ty), mask=p < P)
