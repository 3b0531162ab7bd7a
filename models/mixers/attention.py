"""Self-attention with optional rotary positions, grouped queries, sliding window and short convolution.

B: batch   T: time   D: width   H: heads   K: key-value heads   P: head width   W: taps of the convolution
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ConfigError, nearest
from models.initialisation import reset_bias, reset_convolution, reset_linear
from models.mixers.base import Mixer
from models.mixers.explanation import AttentionExplanation
from models.norm import Norm, RMSNorm, then_linear
from models.ops.attention import ATTENTION, of_slots, place_token, rotary_table, weights
from models.ops.causal_conv1d import last_inputs
from models.ops.kernels import Selection, load, select
from models.settings import divides, flags, numbers, positive, positive_or_none
from models.state import KVCache, Place


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Llama's attention by default: causal, rotary positions (arXiv 2104.09864), no biases.

    kv_heads: grouped queries (arXiv 2305.13245); None, as many as heads. head_width: None, width / heads.
    window: sliding-window attention, the tokens that a token sees, itself included; its cache is a ring of as many.
    causal: False for an encoder, in which every token sees every other. It cannot decode.
    conv_width: taps of a short causal convolution with SiLU over queries, keys and values; None, no convolution.
    """

    kind: Literal["attention"] = "attention"
    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    rotary: bool = True
    rotary_base: float = 10000.0
    window: int | None = None
    causal: bool = True
    bias: bool = False
    conv_width: int | None = None
    backend: str = "auto"  # auto, reference, sdpa, numba

    def __post_init__(self) -> None:
        positive(self, "heads")
        positive_or_none(self, "kv_heads", "head_width", "window", "conv_width")
        flags(self, "rotary", "causal", "bias")
        if self.kv_heads is not None:
            divides(self, self.heads, "attention.heads", "kv_heads")
        numbers(self, "rotary_base")
        if not self.rotary_base > 1:
            raise ConfigError(f"attention.rotary_base must be above 1, got {self.rotary_base!r}")
        if not self.causal and (self.window or self.conv_width):
            raise ConfigError("attention.causal = false sees both ways; window and conv_width look back only")

    def check(self, width: int) -> None:
        if self.head_width is None:
            divides(self, width, "model.width", "heads")
        if self.rotary and self.sizes(width)[2] % 2:
            raise ConfigError(f"rotary positions need an even head width, got {self.sizes(width)[2]}")

    def sizes(self, width: int) -> tuple[int, int, int]:
        """H, K, P."""
        return self.heads, self.kv_heads or self.heads, self.head_width or width // self.heads

    def parameters(self, width: int) -> int:
        H, K, P = self.sizes(width)
        channels = (H + 2 * K) * P
        count = width * channels + H * P * width
        if self.bias:
            count += channels + width
        return count + channels * (self.conv_width + 1 if self.conv_width else 0)

    def float32_parameters(self, width: int) -> int:
        return 0

    def flops_per_token(self, width: int, context: int) -> float:
        """A token at position t (from 0) meets min(t + 1, window) keys; all `context` of them where not causal."""
        H, K, P = self.sizes(width)
        W = min(self.window or context, context)
        keys = (W * (W + 1) / 2 + (context - W) * W) / context if self.causal else context
        projections = 2 * width * (H + 2 * K) * P + 2 * H * P * width
        return projections + 2 * (self.conv_width or 0) * (H + 2 * K) * P + 2 * 2 * H * P * keys

    def state_bytes(self, width: int, max_len: int, element_size: int) -> int:
        H, K, P = self.sizes(width)
        slots = min(max_len, self.window or max_len)
        return (2 * K * P * slots + (self.conv_width or 0) * (H + 2 * K) * P) * element_size

    def state_formula(self, width: int) -> str:
        H, K, P = self.sizes(width)
        most = f", at most {self.window} tokens" if self.window else ""
        conv = f" + {self.conv_width} x {(H + 2 * K) * P}" if self.conv_width else ""
        return f"2 x {K * P} elements per token{most}{conv}"


class Attention(Mixer):
    """One fused projection to queries, keys and values, attention, one projection back."""

    Config = AttentionConfig

    def __init__(self, config: AttentionConfig, width: int, device: torch.device) -> None:
        nn.Module.__init__(self)
        config.check(width)
        self.config = config
        self.backend = self.select(config, width, device)
        self.attend = ATTENTION.get(self.backend.name, ATTENTION["sdpa"])
        self.ops = load("numba" if self.backend.name == "numba" else "torch")
        self.heads, self.kv_heads, self.head_width = H, K, P = config.sizes(width)
        self.qkv_proj = nn.Linear(width, (H + 2 * K) * P, bias=config.bias)
        self.o_proj = nn.Linear(H * P, width, bias=config.bias)
        self.conv_weight = self.conv_bias = None
        if config.conv_width is not None:
            self.conv_weight = nn.Parameter(torch.empty((H + 2 * K) * P, config.conv_width))
            self.conv_bias = nn.Parameter(torch.empty((H + 2 * K) * P))

    @classmethod
    def select(cls, config: AttentionConfig, width: int, device: torch.device) -> Selection:
        """`numba` is torch's kernel over sequences and a compiled step for single tokens; `auto` takes it on a CPU
        and torch's kernel for both on a GPU, which is no fallback there."""
        asked, names = config.backend, (*ATTENTION, "numba", "auto")
        if asked not in names:
            raise ConfigError(f"unknown backend '{asked}' for attention: {nearest(asked, names)}")
        if asked in ATTENTION or (asked == "auto" and device.type != "cpu"):
            return Selection("sdpa" if asked == "auto" else asked, asked)
        selection = select(asked, device, ("reference", "torch", "numba"))
        return replace(selection, name="sdpa") if selection.name == "torch" else selection

    def reset_parameters(self, generator: torch.Generator) -> None:
        for linear in (self.qkv_proj, self.o_proj):
            reset_linear(linear, generator)
            reset_bias(linear.bias)
        if self.conv_weight is not None and self.conv_bias is not None:
            reset_convolution(self.conv_weight, self.conv_bias, generator)

    @property
    def output_weight(self) -> Tensor:
        return self.o_proj.weight

    def forward(self, x: Tensor, state: KVCache | None = None) -> tuple[Tensor, KVCache | None]:
        B, T, _ = x.shape
        start = state.length if state is not None else 0
        if state is not None and not self.config.causal:
            raise ConfigError("attention without a mask (causal = false) reads a whole text at once; it cannot decode")
        qkv = self.qkv_proj(x)
        if self.conv_weight is not None:
            before = state.conv if state is not None and start > 0 else None
            before = before.to(qkv.dtype) if before is not None else None
            projected = qkv
            qkv = self.ops.causal_conv1d(projected, self.conv_weight, self.conv_bias, before)
            if state is not None and state.conv is not None:
                state.conv.copy_(last_inputs(projected, self.conv_weight.shape[1], before))
        q, k, v = self._heads(qkv, start)
        if state is not None:
            state, k, v = state.extend(k, v)
        y = self.attend(q, k, v, causal=self.config.causal, window=self.config.window)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), state

    def _heads(self, qkv: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, channels), the first at position `start` -> q (B, H, T, P), k and v (B, K, T, P)."""
        H, K = self.heads, self.kv_heads
        qkv = qkv.view(*qkv.shape[:2], H + 2 * K, self.head_width)
        if self.config.rotary:
            return self.ops.rotary_qkv(qkv, K, start, self.config.rotary_base)
        q, k, v = qkv.transpose(1, 2).split([H, K, K], 1)
        return q, k, v

    def rotary_tables(self, positions: int) -> dict[tuple[int, float], tuple[Tensor, Tensor]]:
        P, base = self.head_width, self.config.rotary_base
        return {(P, base): rotary_table(positions, P, base, self.o_proj.weight.device)} if self.config.rotary else {}

    def explain(self, x: Tensor) -> AttentionExplanation:
        qkv = self.qkv_proj(x)
        if self.conv_weight is not None:
            qkv = self.ops.causal_conv1d(qkv, self.conv_weight, self.conv_bias, None)
        q, k, v = self._heads(qkv, 0)
        scores, weight = weights(q, k, causal=self.config.causal, window=self.config.window)
        mixed = (weight @ v.repeat_interleave(self.heads // self.kv_heads, 1)).transpose(1, 2)
        return AttentionExplanation(scores, weight, mixed, self.o_proj(mixed.flatten(2)))

    def step(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        if state.place is not None:
            return self.o_proj(self._recorded_step(self.qkv_proj(x), state, state.place)), state
        # the compiled step is for one type throughout, and not a 16-bit one
        compiled = self.backend.name == "numba" and state.keys.dtype == x.dtype and x.dtype.itemsize >= 4
        if not compiled or self.conv_weight is not None:
            y, after = self(x[:, None], state)
            assert after is not None
            return y[:, 0], after
        after = state.grow(1)
        qkv = self.ops.linear_step(x, self.qkv_proj.weight, self.qkv_proj.bias).view(x.shape[0], -1, self.head_width)
        places = (state.length, state.slot, after.filled)
        y = self.ops.attention_step(qkv, self._base, state.keys, state.values, *places)
        return self.ops.linear_step(y, self.o_proj.weight, self.o_proj.bias), after

    def _recorded_step(self, qkv: Tensor, state: KVCache, place: Place) -> Tensor:
        """`step` with its position on the device, between its projections: qkv (B, channels) -> (B, H P)."""
        if state.conv is not None:
            qkv = self.ops.causal_conv1d_step(qkv, self.conv_weight, self.conv_bias, state.conv)
        y = of_slots(*place_token(qkv.unflatten(1, (-1, self.head_width)), self._base, state, place))
        return y.flatten(1)

    def branch_step(self, x: Tensor, norm: Norm, state: KVCache) -> tuple[Tensor, KVCache]:
        if state.place is not None:
            qkv = then_linear(norm, x, F.linear, self.qkv_proj.weight, self.qkv_proj.bias)
            y = self._recorded_step(qkv, state, state.place)
            return self.ops.residual_step(x, y, self.o_proj.weight, self.o_proj.bias), state
        weights = self.qkv_proj.weight, self.o_proj.weight
        plain = isinstance(norm, RMSNorm) and not self.config.bias and self.conv_weight is None
        plain = plain and self.backend.name == "numba" and state.keys.dtype == x.dtype
        if not plain or not self.ops.suits_step(x, norm.weight, *weights):
            return super().branch_step(x, norm, state)
        after = state.grow(1)
        places = (state.length, state.slot, after.filled)
        cache = self._base, state.keys, state.values, *places
        return self.ops.attention_branch(x, norm.weight, norm.eps, *weights, *cache), after

    @property
    def _base(self) -> float | None:
        return self.config.rotary_base if self.config.rotary else None

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        if not self.config.causal:
            raise ConfigError("attention without a mask (causal = false) reads a whole text at once; it cannot decode")
        window = self.config.window
        shape = (batch, self.kv_heads, min(max_len, window or max_len), self.head_width)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.rotary_tables(max_len)  # made and kept now, for no step to make
        conv = None
        if self.conv_weight is not None:
            conv = torch.zeros(batch, *self.conv_weight.shape, dtype=dtype, device=device)
        return KVCache(keys, values, window=window, conv=conv)
