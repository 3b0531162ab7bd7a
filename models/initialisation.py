"""One initialisation for every trunk, so that none is a hidden advantage.

Every linear layer is uniform in +-1/sqrt(fan-in), which is torch's default and what `mamba_ssm` leaves in place, and
biases are zero; the layers that write to the residual stream are divided by sqrt(number of residual branches), as
`mamba_ssm` and GPT-2 do; the embedding (and an untied head) is normal with standard deviation 1/sqrt(width), and the
last norm's weight is 1/4, so that the first logits have standard deviation 1/4 at every width and the first loss lies
within 1% of ln(vocabulary). Mixers add what is their own (Mamba's dt and A).

The logits could be made small by a small embedding instead, and usually are. But then what the first branches write
drowns the token itself in the residual stream, which narrow models pay for: docs/method.md has the figures.
"""

import math

import torch
from torch import Tensor, nn

FINAL_NORM = 0.25  # weight of the last norm before the head


def reset_embedding(weight: Tensor, generator: torch.Generator) -> None:
    """weight (V, D)."""
    weight.normal_(0, 1 / math.sqrt(weight.shape[1]), generator=generator)


def reset_weight(weight: Tensor, generator: torch.Generator) -> None:
    """weight (..., out, in)."""
    bound = 1 / math.sqrt(weight.shape[-1])
    weight.uniform_(-bound, bound, generator=generator)


def reset_linear(linear: nn.Linear, generator: torch.Generator) -> None:
    reset_weight(linear.weight, generator)


def reset_bias(bias: Tensor | None) -> None:
    if bias is not None:
        bias.zero_()


def reset_convolution(weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
    """weight (E, W), bias (E) of a depthwise convolution: torch's default, its fan-in being W."""
    reset_weight(weight, generator)
    bound = 1 / math.sqrt(weight.shape[1])
    bias.uniform_(-bound, bound, generator=generator)


def reset_step_sizes(dt_bias: Tensor, low: float, high: float, floor: float, generator: torch.Generator) -> None:
    """So that softplus(dt_bias) is log-uniform in [low, high], and not below `floor`, as `mamba_ssm` has it."""
    dt = torch.empty_like(dt_bias).uniform_(math.log(low), math.log(high), generator=generator).exp_().clamp_min(floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
