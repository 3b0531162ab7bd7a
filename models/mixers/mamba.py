"""Mamba-1 (arXiv 2312.00752, section 3.4), parameters and initialisation as `mamba_ssm.Mamba`.

B: batch   T: time   D: width   E: expanded width   N: state size   R: dt rank   W: convolution taps
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialisation import reset_convolution, reset_linear, reset_step_sizes
from models.mixers.base import Mixer, at_least_float32, written
from models.mixers.explanation import MemoryExplanation, half_lives, remaining
from models.norm import Norm, RMSNorm, then_linear
from models.ops.causal_conv1d import last_inputs
from models.ops.impulses import response
from models.ops.projections import columns, kept
from models.ops.selective_scan import decay_rate, forward_flops
from models.ops.selective_scan import reference as selective_scan
from models.settings import flags, positive, positive_or_none, step_sizes
from models.state import RecurrentState


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba-1, shapes and initialisation as `mamba_ssm.Mamba`.

    dt_rank: None, width / 16 rounded up. negative_eigenvalues: state transitions in (-1, 1) instead of (0, 1)
    (arXiv 2411.12537), which the cuda form does not have.
    """

    kind: Literal["mamba"] = "mamba"
    expand: int = 2
    state: int = 16
    conv_width: int = 4
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    negative_eigenvalues: bool = False
    backend: str = "auto"  # auto, reference, torch, numba, cuda

    causal = True

    def __post_init__(self) -> None:
        positive(self, "expand", "state", "conv_width")
        positive_or_none(self, "dt_rank")
        step_sizes(self)
        flags(self, "negative_eigenvalues")

    def check(self, width: int) -> None:
        """Fits every width."""

    def cuda_limit(self, width: int) -> str | None:
        if self.negative_eigenvalues:
            return "the CUDA kernels have no negative_eigenvalues"
        if not 2 <= self.conv_width <= 4:
            return f"the CUDA convolution has 2 to 4 taps, not conv_width = {self.conv_width}"
        if (E := self.expand * width) % 8:
            return f"the CUDA convolution has multiples of 8 channels, not {E}"
        return f"the CUDA scan has states up to 256, not {self.state}" if self.state > 256 else None

    def sizes(self, width: int) -> tuple[int, int, int]:
        """E, N, R."""
        return self.expand * width, self.state, self.dt_rank or -(-width // 16)

    def _projections(self, width: int) -> int:
        E, N, R = self.sizes(width)
        return 2 * width * E + E * (R + 2 * N) + R * E + E * width

    def parameters(self, width: int) -> int:
        return self._projections(width) + self.sizes(width)[0] * (self.conv_width + 1) + self.float32_parameters(width)

    def float32_parameters(self, width: int) -> int:
        """A_log, D, dt_bias."""
        E, N, _ = self.sizes(width)
        return E * (N + 2)

    def flops_per_token(self, width: int, context: int) -> float:
        E, N, _ = self.sizes(width)
        return 2 * self._projections(width) + 2 * E * self.conv_width + forward_flops(E, N)

    def state_bytes(self, width: int, max_len: int, element_size: int) -> int:
        E, N, _ = self.sizes(width)
        return E * (N + self.conv_width) * element_size

    def state_formula(self, width: int) -> str:
        E, N, _ = self.sizes(width)
        return f"{E} x ({N} + {self.conv_width}) elements, whatever the length"


class Mamba(Mixer):
    """Projection to (u, z); short convolution of u; dt, B, C from u; selective scan gated by z; projection back."""

    Config = MambaConfig
    forms = ("reference", "torch", "numba", "cuda")
    no_weight_decay = ("A_log", "D", "dt_bias")

    def __init__(self, config: MambaConfig, width: int, device: torch.device) -> None:
        super().__init__(config, width, device)
        D, (E, N, R) = width, config.sizes(width)
        self.gate_sizes, self.split_sizes = (E, E), (R, N, N)
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(E, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E, bias=False)
        # fp32 in every mode: the decay rates drift in 16 bits
        self.dt_bias = nn.Parameter(torch.empty(E, dtype=at_least_float32()))
        self.A_log = nn.Parameter(torch.empty(E, N, dtype=at_least_float32()))
        self.D = nn.Parameter(torch.empty(E, dtype=at_least_float32()))
        self.out_proj = nn.Linear(E, D, bias=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            reset_linear(linear, generator)
        reset_convolution(self.conv_weight, self.conv_bias, generator)
        bound = self.split_sizes[0] ** -0.5
        self.dt_proj.weight.uniform_(-bound, bound, generator=generator)
        reset_step_sizes(self.dt_bias, self.config.dt_min, self.config.dt_max, self.config.dt_floor, generator)
        self.A_log.copy_(torch.arange(1, self.config.state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    @property
    def A(self) -> Tensor:
        return -torch.exp(self.A_log)

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState | None]:
        u, z = self.ops.channel_projections(x, self.in_proj.weight, self.gate_sizes)
        before = initial = None
        if state is not None and state.length > 0:
            before, initial = state.conv.to(u.dtype), state.ssm.to(self.A_log.dtype)
        conv = None if state is None else last_inputs(u, self.config.conv_width, before)
        u = self.ops.causal_conv1d(u, self.conv_weight, self.conv_bias, before)
        dt, B, C = self.x_proj(u).split(self.split_sizes, -1)
        (dt,) = self.ops.channel_projections(dt, self.dt_proj.weight, self.gate_sizes[:1])
        y, h = self.ops.selective_scan(
            u, dt, self.A, B, C, self.D, z, self.dt_bias, initial, self.config.negative_eigenvalues
        )  # fmt: skip
        y = self.out_proj(y)
        if state is None or conv is None:
            return y, None
        state.conv.copy_(conv)
        state.ssm.copy_(h)
        return y, replace(state, length=state.length + x.shape[1])

    def explain(self, x: Tensor) -> MemoryExplanation:
        u, z = self.ops.channel_projections(x, self.in_proj.weight, self.gate_sizes)
        u = self.ops.causal_conv1d(u, self.conv_weight, self.conv_bias, None)
        dt, B, C = self.x_proj(u).split(self.split_sizes, -1)
        dt, negative = self.dt_proj(dt), self.config.negative_eigenvalues
        rows, T, E = u.shape

        def scan(inputs: Tensor, D: Tensor) -> Tensor:
            step_size, B_, C_ = (m.repeat_interleave(len(inputs) // rows, 0) for m in (dt, B, C))
            return selective_scan(inputs, step_size, self.A, B_, C_, D, None, self.dt_bias, None, negative)[0]

        matrix = response(lambda impulses: scan(impulses, torch.zeros_like(self.D)), rows, T, E, self.A)
        y = scan(u, self.D)
        delta = F.softplus(dt + self.dt_bias)
        rate = decay_rate(delta[..., None] * self.A, negative)  # (B, T, E, N)
        write = (delta * u)[..., None] * B[:, :, None]
        return MemoryExplanation(
            unit="channel", half_life=half_lives(rate), written=write.norm(dim=-1),
            left=(write * remaining(rate)).norm(dim=-1), output=self.out_proj((y * F.silu(z)).to(u.dtype)),
            inputs=u[..., None], matrix=matrix, skip=self.D, scanned=y[..., None],
        )  # fmt: skip

    def constants(self) -> tuple[Tensor]:
        return (self.A,)

    def step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        return self._projected_step(self.ops.linear_step(x, self.in_proj.weight), state)

    def _projected_step(
        self, uz: Tensor, state: RecurrentState, onto: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """`step` after its first projection; plus `onto`, which may be written over."""
        after = replace(state, length=state.length + 1)
        # the compiled step is for one type throughout, and not a 16-bit one
        if self.backend.name == "numba" and uz.dtype == state.conv.dtype == self.A_log.dtype:
            y = self.ops.mamba_step(
                uz, self.conv_weight, self.conv_bias, self.x_proj.weight, self.dt_proj.weight, self.dt_bias,
                self.A_log, self.D, state.conv, state.ssm, self.config.negative_eigenvalues,
            )  # fmt: skip
            return written(self.ops, y, self.out_proj.weight, onto), after
        u, z = columns(uz, self.gate_sizes)
        u = self.ops.causal_conv1d_step(u, self.conv_weight, self.conv_bias, state.conv)
        dt, B, C = self.x_proj(u).split(self.split_sizes, -1)
        (A,) = state.constants or self.constants()
        y = self.ops.selective_scan_step(
            u, self.dt_proj(dt), A, B, C, self.D, z, self.dt_bias, state.ssm, self.config.negative_eigenvalues
        )  # fmt: skip
        return written(self.ops, kept(y), self.out_proj.weight, onto), after

    def branch_step(self, x: Tensor, norm: Norm, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        parameters = (
            self.in_proj.weight, self.out_proj.weight, self.conv_weight, self.conv_bias, self.x_proj.weight,
            self.dt_proj.weight, self.dt_bias, self.A_log, self.D,
        )  # fmt: skip
        buffers = state.conv, state.ssm
        if not isinstance(norm, RMSNorm) or not self.ops.suits_step(x, norm.weight, *parameters, *buffers):
            projected = then_linear(norm, x, self.ops.linear_step, self.in_proj.weight)
            return self._projected_step(projected, state, onto=x)
        negative = self.config.negative_eigenvalues
        x = self.ops.mamba_branch(x, norm.weight, norm.eps, *parameters, *buffers, negative)
        return x, replace(state, length=state.length + 1)

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        """Of the same size for every `max_len`."""
        E, N = self.A_log.shape
        conv = torch.zeros(batch, E, self.config.conv_width, dtype=dtype, device=device)
        return RecurrentState(conv, torch.zeros(batch, E, N, dtype=dtype, device=device))
