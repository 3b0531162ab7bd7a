"""Causal self-attention with rotary positions and optional grouped queries; weights as Llama's.

B: batch   T: time   D: width   H: heads   K: key-value heads   P: head width, D / H
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from models.config import AttentionConfig, ModelConfig
from models.errors import ConfigError, nearest
from models.initialisation import reset_linear
from models.ops.attention import ATTENTION
from models.ops.kernels import Selection, load, select
from models.state import KVCache


class Attention(nn.Module):
    """One fused projection to queries, keys and values, attention, one projection back."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        mixer = config.mixer
        assert isinstance(mixer, AttentionConfig)
        self.heads, self.kv_heads = mixer.heads, mixer.kv_heads or mixer.heads
        self.head_width = config.width // mixer.heads
        self.rotary_base = mixer.rotary_base
        self.backend = select_attention(mixer.backend, device)
        self.attend = ATTENTION.get(self.backend.name, ATTENTION["sdpa"])
        self.ops = load("numba" if self.backend.name == "numba" else "torch")
        self.qkv_proj = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        reset_linear(self.qkv_proj, generator)
        reset_linear(self.o_proj, generator)

    def forward(self, x: Tensor, state: KVCache | None = None) -> tuple[Tensor, KVCache | None]:
        B, T, D = x.shape
        H, K = self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(B, T, H + 2 * K, self.head_width)
        start = state.length if state is not None else 0
        qkv = self.ops.rotate(qkv, H + K, start, self.rotary_base)
        q, k, v = qkv.transpose(1, 2).split([H, K, K], 1)
        if state is not None:
            state = state.append(k, v)
            # a cache in another type than the activations (16-bit, say) is read in the activations' type
            k, v = (c[:, :, : state.length].to(q.dtype) for c in (state.keys, state.values))
        y = self.attend(q, k, v).transpose(1, 2).reshape(B, T, D)
        return self.o_proj(y), state

    def step(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        # the compiled step is for one type throughout, and not a 16-bit one
        compiled = self.backend.name == "numba" and state.keys.dtype == x.dtype and x.dtype.itemsize >= 4
        if not compiled:
            y, after = self(x[:, None], state)
            assert after is not None
            return y[:, 0], after
        position = state.length
        after = state.grow(1)
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_width)
        y = self.ops.attention_step(qkv, self.rotary_base, state.keys, state.values, position)
        return self.o_proj(y), after

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        shape = (batch, self.kv_heads, max_len, self.head_width)
        return KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def select_attention(asked: str, device: torch.device) -> Selection:
    """`numba` is torch's kernel over sequences and a compiled step for single tokens; `auto` takes it on a CPU and
    torch's kernel for both on a GPU, which is no fallback there."""
    names = (*ATTENTION, "numba", "auto")
    if asked not in names:
        raise ConfigError(f"unknown backend '{asked}' for attention: {nearest(asked, names)}")
    if asked in ATTENTION or (asked == "auto" and device.type != "cpu"):
        return Selection("sdpa" if asked == "auto" else asked, asked)
    selection = select(asked, device)
    return replace(selection, name="sdpa") if selection.fallback else selection
