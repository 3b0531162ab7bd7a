"""Mamba-1 (arXiv 2312.00752, section 3.4), parameters and initialisation as `mamba_ssm.Mamba`.

B: batch   T: time   D: width   E: expanded width   N: state size   R: dt rank   W: convolution taps
"""

import math

import torch
from torch import Tensor, nn

from models.config import MambaConfig, ModelConfig
from models.initialisation import reset_linear
from models.ops.causal_conv1d import last_inputs
from models.ops.kernels import load, select
from models.state import MambaState


class Mamba(nn.Module):
    """Projection to (u, z); short convolution of u; dt, B, C from u; selective scan gated by z; projection back."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        assert isinstance(config.mixer, MambaConfig)
        self.config = config.mixer
        D, E, N, R = config.width, self.config.expand * config.width, self.config.state, config.dt_rank
        self.sizes = (R, N, N)
        self.backend = select(self.config.backend, device)
        self.ops = load(self.backend.name)
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(E, self.config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E, bias=False)
        # fp32 in every mode: the decay rates drift in 16 bits
        self.dt_bias = nn.Parameter(torch.empty(E, dtype=_at_least_float32()))
        self.A_log = nn.Parameter(torch.empty(E, N, dtype=_at_least_float32()))
        self.D = nn.Parameter(torch.empty(E, dtype=_at_least_float32()))
        self.out_proj = nn.Linear(E, D, bias=False)

    no_weight_decay = ("A_log", "D", "dt_bias")

    def reset_parameters(self, generator: torch.Generator) -> None:
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            reset_linear(linear, generator)
        bound = 1 / math.sqrt(self.config.conv_width)  # torch's depthwise convolution: fan-in W
        self.conv_weight.uniform_(-bound, bound, generator=generator)
        self.conv_bias.uniform_(-bound, bound, generator=generator)
        bound = self.sizes[0] ** -0.5
        self.dt_proj.weight.uniform_(-bound, bound, generator=generator)
        # softplus(dt_bias) is log-uniform in [dt_min, dt_max]
        low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
        dt = torch.empty_like(self.dt_bias).uniform_(low, high, generator=generator).exp_()
        dt = dt.clamp_min(self.config.dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.copy_(torch.arange(1, self.config.state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    @property
    def A(self) -> Tensor:
        return -torch.exp(self.A_log)

    def forward(self, x: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState | None]:
        u, z = self.in_proj(x).chunk(2, -1)
        before = initial = None
        if state is not None and state.length > 0:
            before, initial = state.conv.to(u.dtype), state.ssm.to(self.A_log.dtype)
        conv = None if state is None else last_inputs(u, self.config.conv_width, before)
        u = self.ops.causal_conv1d(u, self.conv_weight, self.conv_bias, before)
        dt, B, C = self.x_proj(u).split(self.sizes, -1)
        y, h = self.ops.selective_scan(
            u, self.dt_proj(dt), self.A, B, C, self.D, z, self.dt_bias, initial
        )  # fmt: skip
        y = self.out_proj(y)
        if state is None or conv is None:
            return y, None
        state.conv.copy_(conv)
        state.ssm.copy_(h)
        return y, MambaState(state.conv, state.ssm, state.length + x.shape[1])

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        uz = self.in_proj(x)
        after = MambaState(state.conv, state.ssm, state.length + 1)
        # the compiled step is for one type throughout, and not a 16-bit one
        if self.backend.name == "numba" and x.dtype == state.conv.dtype == self.A_log.dtype:
            y = self.ops.mamba_step(
                uz, self.conv_weight, self.conv_bias, self.x_proj.weight, self.dt_proj.weight, self.dt_bias,
                self.A_log, self.D, state.conv, state.ssm,
            )  # fmt: skip
            return self.out_proj(y), after
        u, z = uz.chunk(2, -1)
        u = self.ops.causal_conv1d_step(u, self.conv_weight, self.conv_bias, state.conv)
        dt, B, C = self.x_proj(u).split(self.sizes, -1)
        y = self.ops.selective_scan_step(
            u, self.dt_proj(dt), self.A, B, C, self.D, z, self.dt_bias, state.ssm
        )  # fmt: skip
        return self.out_proj(y), after

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> MambaState:
        """Of the same size for every `max_len`."""
        E, N = self.A_log.shape
        conv = torch.zeros(batch, E, self.config.conv_width, dtype=dtype, device=device)
        return MambaState(conv, torch.zeros(batch, E, N, dtype=dtype, device=device))


def _at_least_float32() -> torch.dtype:
    return torch.promote_types(torch.get_default_dtype(), torch.float32)
