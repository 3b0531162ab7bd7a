"""Scaled dot-product attention, softmax(Q K^T / sqrt(P)) V, in forms that agree; rotary positions.

B: batch   T: queries   S: keys   H: heads   K: key-value heads   P: head width   W: window

Signature of every form:

    q (B, H, T, P)   k, v (B, K, S, P), S >= T   causal   window or None   ->  (B, H, T, P)

Query t stands at position S - T + t. It sees the keys up to there (`causal`), of those the last `window` (itself
among them), or, where not `causal`, every key. With K < H each key-value head serves H / K neighbouring query heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.kernels import attention_of_splits, has_triton
from models.ops.kernels import place_token as place_by_kernel
from models.state import KVCache, Place


def reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None) -> Tensor:
    """The definition, with the (T, S) matrix of scores in memory."""
    _, weight = weights(q, k, causal=causal, window=window)
    return weight @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def weights(q: Tensor, k: Tensor, *, causal: bool = True, window: int | None = None) -> tuple[Tensor, Tensor]:
    """The scores Q K^T / sqrt(P), -inf where a query does not see a key, and their softmax, each (B, H, T, S)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    if causal:
        scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], window, q.device), float("-inf"))
    return scores, scores.softmax(-1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None) -> Tensor:
    """torch's fused kernel (flash attention where the device has it). A window much shorter than the sequence is
    walked in blocks, so that what cannot be seen is not computed either."""
    T = q.shape[2]
    if window is not None and causal and 2 * window < T:
        return _banded(q, k, v, window)
    if window is not None and causal and T == 1:  # needs no mask, which flash attention does not take
        k, v = k[:, :, -window:], v[:, :, -window:]
    S = k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    windowed = window is not None and window < S
    mask = visible(T, S, window, q.device) if causal and (windowed or 1 < T < S) else None
    whole = causal and mask is None and T > 1
    with _without_cudnn() if T == 1 and q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=grouped)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """torch prefers cuDNN's attention on some GPUs, which makes a plan for every number of keys, in milliseconds: in
    decode that number is new at every token."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def by_triton(x: Tensor) -> bool:
    """Whether one token's attention over a cache runs in the kernels of a GPU; there, float64 excepted."""
    return x.is_cuda and x.dtype is not torch.float64 and has_triton()


def place_token(qkv: Tensor, base: float | None, cache: KVCache, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token's queries, keys and values (B, H + 2 K, P), rotated to its place, where `base` asks for it, and put
    into the cache: what `of_slots` reads, q (B, H, 1, P), both buffers of the cache, and how many slots are filled."""
    kv_heads, P = cache.keys.shape[1], cache.keys.shape[3]
    if by_triton(qkv):
        cos, sin = place.tables[P, base] if base is not None else (None, None)
        q, filled = place_by_kernel(qkv, cos, sin, place.at, cache.keys, cache.values)
        return q, cache.keys, cache.values, filled
    if base is not None:
        q, k, v = rotary_qkv(qkv[:, None], kv_heads, place, base)
    else:
        heads = [qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
        q, k, v = qkv[:, :, None].split(heads, 1)
    return q, *cache.put(k, v, place)


def of_slots(q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
    """One query, T = 1, that sees the first `filled` (0-dimensional, int64, at least 1) of the S keys, which may have
    another type. In Triton by a kernel that splits the keys; else every slot is read."""
    if by_triton(q):
        return attention_of_splits(q, k, v, filled)
    grouped = q.shape[1] != k.shape[1]
    seen = (torch.arange(k.shape[2], device=q.device) < filled).expand(1, -1)
    k, v = k.to(q.dtype), v.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Blocks of W queries; each block sees its own W keys and the W before them: O(T W) scores instead of O(T S)."""
    B, H, T, P = q.shape
    W, S = window, k.shape[2]
    blocks = -(-T // W)
    behind = min(W, S - T)  # keys before the first query, as far as it can see
    k, v = (x[:, :, S - T - behind :].repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    k, v = (F.pad(x, (0, 0, W - behind, blocks * W - T)) for x in (k, v))  # (B, H, (blocks + 1) W, P)
    # overlapping views of 2 W keys, one for each block
    k, v = (x.reshape(B * H, -1, P).unfold(1, 2 * W, W).transpose(2, 3) for x in (k, v))  # (B H, blocks, 2 W, P)
    q = F.pad(q, (0, 0, 0, blocks * W - T)).reshape(B * H, blocks, W, P)
    there = torch.arange((blocks + 1) * W, device=q.device).unfold(0, 2 * W, W) >= W - behind
    mask = visible(W, 2 * W, W, q.device) & there[:, None, :]  # (blocks, W, 2 W)
    mask = mask if mask.device.type == "cpu" else mask[None]  # cuDNN takes three axes for those without the heads'
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.reshape(B, H, blocks * W, P)[:, :, :T]


ATTENTION = {"reference": reference, "sdpa": sdpa}


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S): which keys a causal query sees."""
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return seen if window is None else seen.triu(S - T - window + 1)


_tables: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}


def rotary_table(positions: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (at least `positions`, P/2) of the rotation angles t base^(-2i/P), float32 (angles in float64). One
    table is kept for all layers and calls, in place of a shorter one."""
    key = width, base, device
    kept = _tables.get(key)
    if kept is None or len(kept[0]) < positions:
        _tables.pop(key, None)
        kept = _tables[key] = _rotary_table(positions, width, base, device)
    return kept


# a kept table outlives the call: built outside inference mode, so that training may use what decoding made
@torch.inference_mode(False)
def _rotary_table(positions: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def kept_tables() -> tuple[Tensor, ...]:
    return tuple(table for pair in _tables.values() for table in pair)


def forget_tables() -> None:
    _tables.clear()


def rotate(x: Tensor, rotated: int, start: int | Place, base: float) -> Tensor:
    """Rotary positions start..start+T-1 on the first `rotated` heads of x (B, T, heads, P); the others pass through.
    Entry i is paired with i + P/2, as Llama does. A Place is of one token, T = 1."""
    T, P = x.shape[1], x.shape[3]
    if isinstance(start, Place):
        tables = (table.index_select(0, start.at[None])[:, None] for table in start.tables[P, base])
    else:
        tables = (table[start : start + T, None] for table in rotary_table(start + T, P, base, x.device))
    cos, sin = tables if x.dtype is torch.float64 else (table.to(x.dtype) for table in tables)
    a, b = x[:, :, :rotated].chunk(2, -1)
    return torch.cat([torch.cat([a * cos - b * sin, b * cos + a * sin], -1), x[:, :, rotated:]], 2)


def rotary_qkv(qkv: Tensor, kv_heads: int, start: int | Place, base: float) -> tuple[Tensor, Tensor, Tensor]:
    """One projection's heads (B, T, H + 2 K, P) as q (B, H, T, P), k and v (B, K, T, P), with rotary positions
    start..start+T-1 on q and k."""
    rotated = rotate(qkv, qkv.shape[2] - kv_heads, start, base).transpose(1, 2)
    q, k, v = rotated.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 1)
    return q, k, v
