"""The LSTM as a mixer: the recurrent baseline that attention replaced.

B: batch   T: time   D: width   E: hidden width
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialisation import reset_linear, reset_weight
from models.mixers.base import Mixer
from models.mixers.explanation import MemoryExplanation, half_lives, remaining
from models.norm import Norm, RMSNorm
from models.ops.lstm import reference as lstm
from models.settings import positive_or_none
from models.state import LSTMState


@dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """hidden: None, the width of the model."""

    kind: Literal["lstm"] = "lstm"
    hidden: int | None = None
    backend: str = "auto"  # auto, reference, torch, numba

    causal = True

    def __post_init__(self) -> None:
        positive_or_none(self, "hidden")

    def check(self, width: int) -> None:
        """Fits every width."""

    def parameters(self, width: int) -> int:
        E = self.hidden or width
        return 4 * E * (width + E + 1) + E * width

    def float32_parameters(self, width: int) -> int:
        return 0

    def flops_per_token(self, width: int, context: int) -> float:
        E = self.hidden or width
        return 2 * (4 * E * (width + E) + E * width) + 13 * E  # 13: five non-linearities, bias 4, cell 3, hidden 1

    def state_bytes(self, width: int, max_len: int, element_size: int) -> int:
        return 2 * (self.hidden or width) * element_size

    def state_formula(self, width: int) -> str:
        return f"2 x {self.hidden or width} elements, whatever the length"


class LSTM(Mixer):
    """The recurrence over time, then a projection back."""

    Config = LSTMConfig
    forms = ("reference", "torch", "numba")

    def __init__(self, config: LSTMConfig, width: int, device: torch.device) -> None:
        super().__init__(config, width, device)
        if device.type == "cuda":  # float32 is float32 here as elsewhere: by itself cuDNN rounds it to tf32
            torch.backends.cudnn.allow_tf32 = False
        E = config.hidden or width
        self.input_weight = nn.Parameter(torch.empty(4 * E, width))
        self.hidden_weight = nn.Parameter(torch.empty(4 * E, E))
        self.bias = nn.Parameter(torch.empty(4 * E))
        self.out_proj = nn.Linear(E, width, bias=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        for weight in (self.input_weight, self.hidden_weight):
            reset_weight(weight, generator)
        # a forget gate that starts open (Jozefowicz et al. 2015): gradients survive many steps
        E = self.hidden_weight.shape[1]
        self.bias.zero_()
        self.bias[E : 2 * E] = 1.0
        reset_linear(self.out_proj, generator)

    def forward(self, x: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState | None]:
        if state is None:
            hidden = cell = x.new_zeros(x.shape[0], self.hidden_weight.shape[1])
        else:
            hidden, cell = state.hidden.to(x.dtype), state.cell.to(x.dtype)
        h, hidden, cell = self.ops.lstm(x, self.input_weight, self.hidden_weight, self.bias, hidden, cell)
        y = self.out_proj(h)
        if state is None:
            return y, None
        state.hidden.copy_(hidden)
        state.cell.copy_(cell)
        return y, LSTMState(state.hidden, state.cell, state.length + x.shape[1])

    def explain(self, x: Tensor) -> MemoryExplanation:
        """The cells; no matrix, because the gates read what the cells gave before."""
        nothing = x.new_zeros(x.shape[0], self.hidden_weight.shape[1])
        h, _, _ = lstm(x, self.input_weight, self.hidden_weight, self.bias, nothing, nothing)
        before = torch.cat([nothing[:, None], h[:, :-1]], 1)
        gates = x @ self.input_weight.t() + before @ self.hidden_weight.t() + self.bias
        i, f, g, _ = gates.chunk(4, -1)
        rate, written = F.softplus(-f), (i.sigmoid() * g.tanh()).abs()  # softplus(-f) = -log sigmoid(f)
        left, output = written * remaining(rate), self.out_proj(h)
        return MemoryExplanation("channel", half_lives(rate)[..., None], written, left, output)

    def step(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        y, after = self(x[:, None], state)
        assert after is not None
        return y[:, 0], after

    def branch_step(self, x: Tensor, norm: Norm, state: LSTMState) -> tuple[Tensor, LSTMState]:
        weights = self.input_weight, self.hidden_weight, self.bias, self.out_proj.weight
        buffers = state.hidden, state.cell
        if not isinstance(norm, RMSNorm) or not self.ops.suits_step(x, norm.weight, *weights, *buffers):
            return super().branch_step(x, norm, state)
        x = self.ops.lstm_branch(x, norm.weight, norm.eps, *weights, *buffers)
        return x, LSTMState(*buffers, state.length + 1)

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> LSTMState:
        """Of the same size for every `max_len`."""
        E = self.hidden_weight.shape[1]
        hidden, cell = (torch.zeros(batch, E, dtype=dtype, device=device) for _ in range(2))
        return LSTMState(hidden, cell)
