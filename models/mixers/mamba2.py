"""Mamba-2 (arXiv 2405.21060, section 7), parameters and initialisation as `mamba_ssm.Mamba2`.

B: batch   T: time   D: width   E: expanded width   H: heads   P: head width   G: groups   N: state size
W: convolution taps
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ConfigError
from models.initialisation import reset_convolution, reset_linear, reset_step_sizes
from models.mixers.base import Mixer, at_least_float32, written
from models.mixers.explanation import MemoryExplanation, half_lives, remaining
from models.norm import Norm, RMSNorm, then_linear
from models.ops.causal_conv1d import last_inputs
from models.ops.impulses import response
from models.ops.projections import columns, kept
from models.ops.rms_norm import before_linear, one_compiled_row
from models.ops.selective_scan import decay_rate
from models.ops.ssd import for_heads, forward_flops
from models.ops.ssd import reference as ssd
from models.settings import divides, flags, numbers, positive, step_sizes
from models.state import RecurrentState


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Shapes and initialisation as `mamba_ssm.Mamba2`.

    grouped_norm: the gated norm before the output runs over each group by itself, as `mamba_ssm` has it; False, over
    all channels (the same where groups = 1). negative_eigenvalues: as in MambaConfig.
    """

    kind: Literal["mamba2"] = "mamba2"
    expand: int = 2
    state: int = 128
    head_width: int = 64
    groups: int = 1
    conv_width: int = 4
    A_min: float = 1.0
    A_max: float = 16.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    norm_eps: float = 1e-5
    grouped_norm: bool = True
    negative_eigenvalues: bool = False
    backend: str = "auto"  # auto, reference, torch, numba, cuda

    causal = True

    def __post_init__(self) -> None:
        positive(self, "expand", "state", "head_width", "groups", "conv_width")
        step_sizes(self)
        numbers(self, "A_min", "A_max", "norm_eps")
        if not 0 < self.A_min <= self.A_max:
            raise ConfigError(f"mamba2 needs 0 < A_min <= A_max, got {self.A_min!r}, {self.A_max!r}")
        if not self.norm_eps > 0:
            raise ConfigError(f"mamba2.norm_eps must be above 0, got {self.norm_eps!r}")
        flags(self, "grouped_norm", "negative_eigenvalues")

    def check(self, width: int) -> None:
        divides(self, self.expand * width, "the expanded width", "head_width")
        divides(self, self.expand * width // self.head_width, "the number of heads", "groups")

    def cuda_limit(self, width: int) -> str | None:
        if self.negative_eigenvalues:
            return "the CUDA kernels have no negative_eigenvalues"
        if not 2 <= self.conv_width <= 4:
            return f"the CUDA convolution has 2 to 4 taps, not conv_width = {self.conv_width}"
        _, _, channels = self.sizes(width)
        return f"the CUDA convolution has multiples of 8 channels, not {channels}" if channels % 8 else None

    def sizes(self, width: int) -> tuple[int, int, int]:
        """E, H, and the channels of the convolution: x, B and C."""
        E = self.expand * width
        return E, E // self.head_width, E + 2 * self.groups * self.state

    def _projections(self, width: int) -> int:
        E, H, channels = self.sizes(width)
        return width * (E + channels + H) + E * width

    def parameters(self, width: int) -> int:
        E, _, channels = self.sizes(width)
        return self._projections(width) + channels * (self.conv_width + 1) + E + self.float32_parameters(width)

    def float32_parameters(self, width: int) -> int:
        """A_log, D, dt_bias."""
        return 3 * self.sizes(width)[1]

    def flops_per_token(self, width: int, context: int) -> float:
        _, H, channels = self.sizes(width)
        scan = forward_flops(H, self.head_width, self.groups, self.state, context)
        return 2 * self._projections(width) + 2 * channels * self.conv_width + scan

    def state_bytes(self, width: int, max_len: int, element_size: int) -> int:
        E, _, channels = self.sizes(width)
        return (E * self.state + channels * self.conv_width) * element_size

    def state_formula(self, width: int) -> str:
        E, _, channels = self.sizes(width)
        return f"{E} x {self.state} + {channels} x {self.conv_width} elements, whatever the length"


class Mamba2(Mixer):
    """One projection to z, x, B, C, dt; short convolution of x, B, C; the recurrence; gated norm; projection back."""

    Config = Mamba2Config
    forms = ("reference", "torch", "numba", "cuda")
    operation = "ssd"
    no_weight_decay = ("A_log", "D", "dt_bias")

    def __init__(self, config: Mamba2Config, width: int, device: torch.device) -> None:
        super().__init__(config, width, device)
        E, H, channels = config.sizes(width)
        GN = config.groups * config.state
        self.split_sizes, self.conv_sizes = (E, channels, H), (E, GN, GN)
        self.norm_groups = config.groups if config.grouped_norm else 1
        self.in_proj = nn.Linear(width, E + channels + H, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        # fp32 in every mode: the decay rates drift in 16 bits
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(H, dtype=at_least_float32())) for _ in range(3))
        self.norm_weight = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, width, bias=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        config = self.config
        for linear in (self.in_proj, self.out_proj):
            reset_linear(linear, generator)
        reset_convolution(self.conv_weight, self.conv_bias, generator)
        reset_step_sizes(self.dt_bias, config.dt_min, config.dt_max, config.dt_floor, generator)
        self.A_log.uniform_(config.A_min, config.A_max, generator=generator).log_()
        self.D.fill_(1.0)
        self.norm_weight.fill_(1.0)

    @property
    def is_one_operation(self) -> bool:
        """Whether a kernel does all behind the first projection, of a sequence that leaves no state: its norm runs over
        the groups of B and C, and its convolution reads channels 8 at a time where the projection has written them."""
        fits = self.norm_groups == self.config.groups and all(size % 8 == 0 for size in self.split_sizes)
        return fits and self.backend.name == "cuda"

    @property
    def A(self) -> Tensor:
        return -torch.exp(self.A_log)

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState | None]:
        if state is None and self.is_one_operation:
            weights = self.conv_weight, self.conv_bias, self.dt_bias, self.A, self.D, self.norm_weight
            rest = self.out_proj.weight, self.config.groups, self.config.norm_eps
            return self.ops.mamba2_inner(self.in_proj(x), *weights, *rest), None
        z, xBC, dt = self.ops.projections(x, self.in_proj.weight, self.split_sizes)
        before = initial = None
        if state is not None and state.length > 0:
            before, initial = state.conv.to(xBC.dtype), state.ssm.to(self.A_log.dtype)
        conv = None if state is None else last_inputs(xBC, self.config.conv_width, before)
        u, B, C = self._heads(self.ops.causal_conv1d(xBC, self.conv_weight, self.conv_bias, before))
        y, h = self.ops.ssd(
            u, dt, self.A, B, C, self.D, self.dt_bias, initial, self.config.negative_eigenvalues
        )  # fmt: skip
        y = self.out_proj(self._normed(y.flatten(-2), z))
        if state is None or conv is None:
            return y, None
        state.conv.copy_(conv)
        state.ssm.copy_(h)
        return y, replace(state, length=state.length + x.shape[1])

    def explain(self, x: Tensor) -> MemoryExplanation:
        z, xBC, dt = self.ops.projections(x, self.in_proj.weight, self.split_sizes)
        u, B, C = self._heads(self.ops.causal_conv1d(xBC, self.conv_weight, self.conv_bias, None))
        negative = self.config.negative_eigenvalues
        rows, T, H, _ = u.shape

        def scan(inputs: Tensor, D: Tensor) -> Tensor:
            step_size, B_, C_ = (m.repeat_interleave(len(inputs) // rows, 0) for m in (dt, B, C))
            return ssd(inputs, step_size, self.A, B_, C_, D, self.dt_bias, None, negative)[0]

        # one channel stands for all of its head
        alone = response(lambda one: scan(one[..., None], torch.zeros_like(self.D))[..., 0], rows, T, H, self.A)
        y = scan(u, self.D)
        delta = F.softplus(dt + self.dt_bias)
        rate = decay_rate(delta * self.A, negative)  # (B, T, H)
        written = delta * u.norm(dim=-1) * for_heads(B, H).norm(dim=-1)
        return MemoryExplanation(
            unit="head", half_life=half_lives(rate)[..., None], written=written, left=written * remaining(rate),
            output=self.out_proj(self._normed(y.flatten(-2), z)), inputs=u, matrix=alone, skip=self.D, scanned=y,
        )  # fmt: skip

    def constants(self) -> tuple[Tensor]:
        return (self.A,)

    def step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        return self._projected_step(self.ops.linear_step(x, self.in_proj.weight), state)

    def _projected_step(
        self, projected: Tensor, state: RecurrentState, onto: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """`step` after its first projection; plus `onto`, which may be written over."""
        after = replace(state, length=state.length + 1)
        # the compiled step is for one type throughout, and not a 16-bit one
        if self.backend.name == "numba" and projected.dtype == state.conv.dtype == self.A_log.dtype:
            y = self.ops.mamba2_step(
                projected, self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D, self.norm_weight,
                state.conv, state.ssm, self.config.negative_eigenvalues, self.config.norm_eps, self.norm_groups,
            )  # fmt: skip
            return written(self.ops, y, self.out_proj.weight, onto), after
        z, xBC, dt = columns(projected, self.split_sizes)
        u, B, C = self._heads(self.ops.causal_conv1d_step(xBC, self.conv_weight, self.conv_bias, state.conv))
        (A,) = state.constants or self.constants()
        y = self.ops.ssd_step(
            u, dt, A, B, C, self.D, self.dt_bias, state.ssm, self.config.negative_eigenvalues
        )  # fmt: skip
        y = y.flatten(-2)
        if one_compiled_row(y) and self.norm_groups == 1:
            y = before_linear(kept(y * F.silu(z)), self.norm_weight, self.config.norm_eps, self.out_proj.weight)
            return (y if onto is None else onto + y), after
        return written(self.ops, self._normed(y, z), self.out_proj.weight, onto), after

    def branch_step(self, x: Tensor, norm: Norm, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        parameters = (
            self.in_proj.weight, self.out_proj.weight, self.conv_weight, self.conv_bias, self.dt_bias, self.A_log,
            self.D, self.norm_weight,
        )  # fmt: skip
        buffers = state.conv, state.ssm
        if not isinstance(norm, RMSNorm) or not self.ops.suits_step(x, norm.weight, *parameters, *buffers):
            projected = then_linear(norm, x, self.ops.linear_step, self.in_proj.weight)
            return self._projected_step(projected, state, onto=x)
        rest = self.config.negative_eigenvalues, self.config.norm_eps, self.norm_groups
        x = self.ops.mamba2_branch(x, norm.weight, norm.eps, *parameters, *buffers, *rest)
        return x, replace(state, length=state.length + 1)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., channels) -> x (..., H, P), B and C (..., G, N)."""
        u, B, C = xBC.split(self.conv_sizes, -1)
        u = u.unflatten(-1, (-1, self.config.head_width))
        B, C = (m.unflatten(-1, (self.config.groups, self.config.state)) for m in (B, C))
        return u, B, C

    def _normed(self, y: Tensor, z: Tensor) -> Tensor:
        return self.ops.gated_rms_norm(y, z, self.norm_weight, self.config.norm_eps, self.norm_groups)

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        """Of the same size for every `max_len`."""
        H, N = self.D.shape[0], self.config.state
        conv = torch.zeros(batch, *self.conv_weight.shape, dtype=dtype, device=device)
        return RecurrentState(conv, torch.zeros(batch, H, self.config.head_width, N, dtype=dtype, device=device))
