"""A sparse mixture of SwiGLU experts with a top-k router (arXiv 2101.03961, 2401.04088). Dropless.

D: width   F: hidden width of an expert   X: experts   K: experts per token   M: tokens
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ConfigError
from models.feedforward.base import ExpertChoice, FeedForward, Routing
from models.initialisation import reset_linear, reset_weight
from models.norm import Norm, RMSNorm
from models.ops.experts import load
from models.ops.precision import without_autocast
from models.settings import numbers, positive


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Each token goes to the `top_k` experts that its router likes best, weighted by their softmax among themselves, or
    among all where it goes to one.

    balance: weight of the load-balancing loss, X sum_i load_i probability_i, which is 1 where the load is even.
    """

    kind: Literal["moe"] = "moe"
    experts: int = 8
    top_k: int = 2
    hidden: int
    balance: float = 0.01

    def __post_init__(self) -> None:
        positive(self, "experts", "top_k", "hidden")
        numbers(self, "balance")
        if self.top_k > self.experts:
            raise ConfigError(f"moe.top_k = {self.top_k} is more than moe.experts = {self.experts}")
        if not self.balance >= 0:
            raise ConfigError(f"moe.balance must be 0 or above, got {self.balance!r}")

    def parameters(self, width: int) -> int:
        return self.experts * (width + 3 * width * self.hidden)

    def active_parameters(self, width: int) -> int:
        return self.experts * width + self.top_k * 3 * width * self.hidden

    def touched_parameters(self, width: int, tokens: int) -> float:
        missed = (1 - self.top_k / self.experts) ** tokens  # an expert that no token chose
        return self.experts * width + self.experts * (1 - missed) * 3 * width * self.hidden

    def flops_per_token(self, width: int) -> float:
        return 2 * self.active_parameters(width)


class MoE(FeedForward):
    Config = MoEConfig
    reads_unrounded = True

    def __init__(self, config: MoEConfig, width: int, backend: str, device: torch.device) -> None:
        super().__init__(config, width, backend, device)
        self.router = nn.Linear(width, config.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.hidden, width))
        self.down = nn.Parameter(torch.empty(config.experts, width, config.hidden))

    def reset_parameters(self, generator: torch.Generator) -> None:
        reset_linear(self.router, generator)
        reset_weight(self.gate_up, generator)
        reset_weight(self.down, generator)

    @property
    def output_weight(self) -> Tensor:
        return self.down

    @classmethod
    def needs_host(cls, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type == "cuda" and dtype is torch.bfloat16:
            return None  # models.ops.experts.grouped
        return "outside bfloat16 the number of tokens of each expert is read by the host"

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        X = self.config.experts
        rows = x.reshape(-1, x.shape[-1])
        probability, chosen, weight = self._route(rows)
        y = self.ops.experts(rows, chosen, weight, self.gate_up, self.down)
        share = load(chosen, X) / chosen.numel()
        balance = self.config.balance * X * (share * probability.mean(0)).sum()
        return y.view(x.shape).to(x.dtype), Routing(share, balance)

    def branch_step(self, x: Tensor, norm: Norm) -> Tensor:
        weights = self.router.weight, self.gate_up, self.down
        if not isinstance(norm, RMSNorm) or not self.ops.suits_step(x, norm.weight, *weights):
            return super().branch_step(x, norm)
        return self.ops.experts_branch(x, norm.weight, norm.eps, *weights, self.config.top_k)

    def choice(self, x: Tensor) -> ExpertChoice:
        probability, chosen, weight = self._route(x)
        return ExpertChoice(chosen, weight, probability)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> the probability of each expert (..., X), the chosen ones and their weights (..., K)."""
        K = self.config.top_k
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):  # a rounded score can send a token elsewhere
            scores = F.linear(x.to(wide), self.router.weight.to(wide))
        best, chosen = scores.topk(K, -1)
        probability = scores.softmax(-1)
        # among one alone a softmax is 1 and teaches the router nothing: then its share among all, as in 2101.03961
        return probability, chosen, best.softmax(-1) if K > 1 else probability.gather(-1, chosen)
