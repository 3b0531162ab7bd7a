"""Scaled dot-product attention, softmax(Q K^T / sqrt(P)) V, in forms that agree; rotary positions.

B: batch   T: queries   S: keys   H: heads   K: key-value heads   P: head width

Signature of every form: q (B, H, T, P), k and v (B, K, S, P), S >= T; query t stands at position S - T + t and sees
the keys up to there. Returns (B, H, T, P). With K < H each key-value head serves H / K neighbouring query heads.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, with the (T, S) matrix of scores in memory."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    T, S = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    scores = scores.masked_fill(~_visible(T, S, q.device), float("-inf"))
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused kernel (flash attention where the device has it)."""
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    mask = _visible(T, S, q.device) if 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S > 1, enable_gqa=grouped)


ATTENTION = {"reference": reference, "sdpa": sdpa}


def _visible(T: int, S: int, device: torch.device) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def rotary_table(positions: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (at least `positions`, P/2) of the rotation angles t base^(-2i/P), float32 (angles in float64)."""
    return _rotary_table(1 << (positions - 1).bit_length(), width, base, device)  # powers of two: few tables


# cached tables outlive the call: built outside inference mode, so that training may use what decoding made
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _rotary_table(positions: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rotated: int, start: int, base: float) -> Tensor:
    """Rotary positions start..start+T-1 on the first `rotated` heads of x (B, T, heads, P); the others pass through.
    Entry i is paired with i + P/2, as Llama does."""
    T, P = x.shape[1], x.shape[3]
    tables = (table[start : start + T, None] for table in rotary_table(start + T, P, base, x.device))
    cos, sin = tables if x.dtype is torch.float64 else (table.to(x.dtype) for table in tables)
    a, b = x[:, :, :rotated].chunk(2, -1)
    return torch.cat([torch.cat([a * cos - b * sin, b * cos + a * sin], -1), x[:, :, rotated:]], 2)
