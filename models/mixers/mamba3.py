"""Mamba-3 (arXiv 2603.15569), parameters, order and initialisation as `mamba_ssm.Mamba3`.

B: batch   T: time   D: width   E: expanded width   H: heads   P: head width   G: groups   N: state size
R: rank (1: the SISO form)   S: rotated pairs
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import BackendUnavailableError, ConfigError
from models.initialisation import reset_linear, reset_step_sizes
from models.mixers.base import Mixer, at_least_float32, written
from models.mixers.explanation import MemoryExplanation, half_lives, remaining
from models.norm import Norm, RMSNorm, then_linear
from models.ops.impulses import response
from models.ops.kernels import Selection
from models.ops.trapezoid import State, forward_flops, log_alpha_and_delta
from models.ops.trapezoid import reference as trapezoid
from models.settings import divides, numbers, one_of, positive, step_sizes
from models.state import RotatingState


@dataclass(frozen=True, kw_only=True)
class Mamba3Config:
    """Shapes and initialisation as `mamba_ssm.Mamba3`; no short convolution.

    rotated_fraction: of the state, 0.5 or 1. A_floor: the decay rate is at least this. rank: above 1, the MIMO form
    with as many copies of B and C, which only the reference form has.
    """

    kind: Literal["mamba3"] = "mamba3"
    expand: int = 2
    state: int = 128
    head_width: int = 64
    groups: int = 1
    rank: int = 1
    rotated_fraction: float = 0.5
    A_floor: float = 1e-4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    norm_eps: float = 1e-5
    backend: str = "auto"  # auto, reference, torch, numba, cuda

    causal = True

    def __post_init__(self) -> None:
        positive(self, "expand", "state", "head_width", "groups", "rank")
        step_sizes(self)
        numbers(self, "A_floor", "norm_eps")
        one_of(self, "rotated_fraction", (0.5, 1.0))
        if not self.A_floor > 0 or not self.norm_eps > 0:
            raise ConfigError(f"mamba3 needs A_floor and norm_eps above 0, got {self.A_floor!r}, {self.norm_eps!r}")
        if self.pairs < 1:
            raise ConfigError(
                f"mamba3.state = {self.state} leaves no pair to rotate; at least {2 / self.rotated_fraction:g}"
            )

    @property
    def pairs(self) -> int:
        """S."""
        return int(self.state * self.rotated_fraction) // 2

    def check(self, width: int) -> None:
        divides(self, self.expand * width, "the expanded width", "head_width")
        divides(self, self.expand * width // self.head_width, "the number of heads", "groups")

    def cuda_limit(self, width: int) -> str | None:
        odd = [size for size in (self.state, self.head_width) if size & (size - 1)]
        if odd:
            return f"Mamba-3's CUDA kernels have states and heads of a power of two, not {odd[0]}"
        return "Mamba-3's CUDA kernels rotate an even number of pairs" if self.pairs % 2 else None

    def sizes(self, width: int) -> tuple[int, int, int]:
        """E, H, and the entries of B or of C in the projection."""
        E = self.expand * width
        return E, E // self.head_width, self.rank * self.groups * self.state

    def _projections(self, width: int) -> int:
        E, H, RGN = self.sizes(width)
        return width * (2 * E + 2 * RGN + 3 * H + self.pairs) + E * width

    def parameters(self, width: int) -> int:
        E = self.sizes(width)[0]
        maps = 3 * self.rank * E if self.rank > 1 else 0
        return self._projections(width) + 2 * self.state + maps + self.float32_parameters(width)

    def float32_parameters(self, width: int) -> int:
        """dt_bias, D, and the biases of B and C."""
        H = self.sizes(width)[1]
        return 2 * H + 2 * H * self.rank * self.state

    def flops_per_token(self, width: int, context: int) -> float:
        H, P, R = self.sizes(width)[1], self.head_width, self.rank
        rotation = 2 * 6 * R * H * self.pairs
        return 2 * self._projections(width) + rotation + forward_flops(H, P, self.state, R, context)

    def state_bytes(self, width: int, max_len: int, element_size: int) -> int:
        """Angles and the recurrent state in float32 at least, the previous B and x in the model's type."""
        E, H, _ = self.sizes(width)
        wide = H * self.pairs + E * self.state
        return wide * max(4, element_size) + self.rank * (H * self.state + E) * element_size

    def state_formula(self, width: int) -> str:
        E, H, _ = self.sizes(width)
        previous = f"{self.rank * H} x {self.state} + {self.rank * E}"
        return f"{E} x {self.state} + {H} x {self.pairs} elements in float32, {previous}, whatever the length"


class Mamba3(Mixer):
    """One projection to z, x, B, C, dt, A, trap, angles; norm and bias of B and C; the recurrence; gate; projection."""

    Config = Mamba3Config
    forms = ("reference", "torch", "numba", "cuda")
    operation = "trapezoid"
    no_weight_decay = ("dt_bias", "D", "B_bias", "C_bias")

    def __init__(self, config: Mamba3Config, width: int, device: torch.device) -> None:
        super().__init__(config, width, device)
        E, H, RGN = config.sizes(width)
        self.split_sizes = (E, E, RGN, RGN, H, H, H, config.pairs)
        self.heads = H
        self.in_proj = nn.Linear(width, sum(self.split_sizes), bias=False)
        wide = at_least_float32()
        self.dt_bias, self.D = (nn.Parameter(torch.empty(H, dtype=wide)) for _ in range(2))
        shape = (H, config.rank, config.state)
        self.B_bias, self.C_bias = (nn.Parameter(torch.empty(shape, dtype=wide)) for _ in range(2))
        self.B_norm_weight, self.C_norm_weight = (nn.Parameter(torch.empty(config.state)) for _ in range(2))
        self.map_x = self.map_z = self.map_y = None
        if config.rank > 1:
            shape = (H, config.rank, config.head_width)
            self.map_x, self.map_z, self.map_y = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.out_proj = nn.Linear(E, width, bias=False)

    @classmethod
    def select(cls, config: Mamba3Config, width: int, device: torch.device) -> Selection:
        if config.rank == 1:
            return super().select(config, width, device)
        if config.backend not in ("auto", "reference"):
            problem = "the MIMO form (rank above 1) has only 'reference'"
            raise BackendUnavailableError(f"backend '{config.backend}' cannot run this mamba3: {problem}")
        fallback = "the MIMO form has only the reference" if config.backend == "auto" else None
        return Selection("reference", config.backend, fallback)

    def reset_parameters(self, generator: torch.Generator) -> None:
        for linear in (self.in_proj, self.out_proj):
            reset_linear(linear, generator)
        reset_step_sizes(self.dt_bias, self.config.dt_min, self.config.dt_max, self.config.dt_floor, generator)
        for ones in (self.D, self.B_bias, self.C_bias, self.B_norm_weight, self.C_norm_weight):
            ones.fill_(1.0)
        if self.map_x is not None and self.map_z is not None and self.map_y is not None:
            self.map_x.fill_(1 / self.config.rank)
            self.map_z.fill_(1.0)
            self.map_y.fill_(1 / self.config.rank)

    def forward(self, x: Tensor, state: RotatingState | None = None) -> tuple[Tensor, RotatingState | None]:
        inputs = self._inputs(x)
        initial = None
        if state is not None and state.length > 0:
            initial = self._read(state, inputs[0].dtype)
        y, after = self.ops.trapezoid(*inputs, *self._constants(), initial)
        y = self._out(self._joined(y))
        return y, None if state is None else self._write(state, after, x.shape[1])

    def step(self, x: Tensor, state: RotatingState) -> tuple[Tensor, RotatingState]:
        return self._projected_step(self.ops.linear_step(x, self.in_proj.weight), state)

    def branch_step(self, x: Tensor, norm: Norm, state: RotatingState) -> tuple[Tensor, RotatingState]:
        weights = self.in_proj.weight, self.out_proj.weight, *self._step_parameters()
        buffers = tuple(state.buffers.values())
        if not isinstance(norm, RMSNorm) or not self.ops.suits_step(x, norm.weight, *weights, *buffers):
            projected = then_linear(norm, x, self.ops.linear_step, self.in_proj.weight)
            return self._projected_step(projected, state, onto=x)
        constants = self.config.norm_eps, self.config.A_floor
        x = self.ops.mamba3_branch(x, norm.weight, norm.eps, *weights, *buffers, *constants)
        return x, replace(state, length=state.length + 1)

    def _projected_step(
        self, projected: Tensor, state: RotatingState, onto: Tensor | None = None
    ) -> tuple[Tensor, RotatingState]:
        """`step` after its first projection; plus `onto`, which may be written over."""
        # the compiled step is for one type throughout, and not a 16-bit one
        if self.backend.name == "numba" and projected.dtype == state.previous_B.dtype == self.D.dtype:
            constants = self.config.norm_eps, self.config.A_floor
            y = self.ops.mamba3_step(projected, *self._step_parameters(), *state.buffers.values(), *constants)
            return self._out(y, onto), replace(state, length=state.length + 1)
        inputs = self._taken_apart(projected)
        before = self._read(state, inputs[0].dtype)
        y, after = self.ops.trapezoid_step(*inputs, *self._constants(), before)
        return self._out(self._joined(y), onto), self._write(state, after, 1)

    def explain(self, x: Tensor) -> MemoryExplanation | None:
        """None for the MIMO form, whose ranks mix channels of a head before and after the recurrence."""
        if self.config.rank > 1:
            return None
        u, *given, z = self._inputs(x)
        dt, a, trap, _, B, _ = given
        rows, T, H, _ = u.shape
        _, dt_bias, B_bias, C_bias, A_floor = self._constants()

        def scan(inputs: Tensor, D: Tensor) -> Tensor:
            dt_, a_, trap_, angle_, B_, C_ = (m.repeat_interleave(len(inputs) // rows, 0) for m in given)
            return trapezoid(inputs, dt_, a_, trap_, angle_, B_, C_, None, D, dt_bias, B_bias, C_bias, A_floor)[0]

        # one channel stands for all of its head
        alone = response(lambda one: scan(one[..., None], torch.zeros_like(self.D))[..., 0], rows, T, H, self.D)
        y = scan(u, self.D)
        log_alpha, delta = log_alpha_and_delta(dt, a, self.dt_bias, A_floor)
        own = trap.to(delta.dtype).sigmoid() * delta
        # the next step writes the rest of a token, and decays it at once: as if it had stood there a step earlier
        weight = own + F.pad((delta - own)[:, 1:], (0, 0, 0, 1))
        heads = B[:, :, 0].repeat_interleave(H // self.config.groups, 2) + self.B_bias[:, 0]
        written = weight * u.norm(dim=-1) * heads.norm(dim=-1)
        return MemoryExplanation(
            unit="head", half_life=half_lives(-log_alpha)[..., None], written=written,
            left=written * remaining(-log_alpha), output=self._out(self._joined(y * F.silu(z))),
            inputs=u, matrix=alone, skip=self.D, scanned=y,
        )  # fmt: skip

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """x (..., D) -> what the recurrence takes of each token: x (..., [R,] H, P); dt, a, trap (..., H); angle
        (..., S); B, C (..., R, G, N); z like x."""
        return self._taken_apart(self.ops.linear_step(x, self.in_proj.weight))

    def _taken_apart(self, projected: Tensor) -> list[Tensor]:
        """That, from what the first projection gives."""
        config = self.config
        z, u, B, C, dt, a, trap, angle = projected.split(self.split_sizes, -1)
        z, u = (m.unflatten(-1, (self.heads, config.head_width)) for m in (z, u))
        if self.map_x is not None and self.map_z is not None:
            z, u = (m[..., None, :, :] * w.transpose(0, 1) for m, w in ((z, self.map_z), (u, self.map_x)))
        B, C = (
            self.ops.rms_norm(m.unflatten(-1, (config.rank, config.groups, config.state)), weight, config.norm_eps)
            for m, weight in ((B, self.B_norm_weight), (C, self.C_norm_weight))
        )
        return [u, dt, a, trap, angle, B.to(projected.dtype), C.to(projected.dtype), z]

    def _step_parameters(self) -> tuple[Tensor, ...]:
        """In the order of the compiled step."""
        return self.B_norm_weight, self.C_norm_weight, self.B_bias, self.C_bias, self.dt_bias, self.D

    def _constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """What it takes beside: D, dt_bias (H); the biases of B and C (R, H, N); the floor of A."""
        B_bias, C_bias = (bias.transpose(0, 1) for bias in (self.B_bias, self.C_bias))
        return self.D, self.dt_bias, B_bias, C_bias, self.config.A_floor

    def _joined(self, y: Tensor) -> Tensor:
        """(..., [R,] H, P) -> (..., E)."""
        if self.map_y is not None:
            y = (y * self.map_y.transpose(0, 1)).sum(-3)
        return y.flatten(-2)

    def _out(self, y: Tensor, onto: Tensor | None = None) -> Tensor:
        return written(self.ops, y, self.out_proj.weight, onto)

    def _read(self, state: RotatingState, dtype: torch.dtype) -> State:
        wide = self.D.dtype
        return State(state.angle.to(wide), state.ssm.to(wide), state.previous_B.to(dtype), state.previous_x.to(dtype))

    def _write(self, state: RotatingState, after: State, tokens: int) -> RotatingState:
        for buffer, new in zip(state.buffers.values(), after, strict=True):
            buffer.copy_(new)
        return RotatingState(**state.buffers, length=state.length + tokens)

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> RotatingState:
        """Of the same size for every `max_len`."""
        H, P, N, R = self.heads, self.config.head_width, self.config.state, self.config.rank
        wide = torch.promote_types(dtype, torch.float32)
        ranks = (R,) if R > 1 else ()
        return RotatingState(
            torch.zeros(batch, H, self.config.pairs, dtype=wide, device=device),
            torch.zeros(batch, H, P, N, dtype=wide, device=device),
            torch.zeros(batch, R, H, N, dtype=dtype, device=device),
            torch.zeros(batch, *ranks, H, P, dtype=dtype, device=device),
        )
