"""Prefill, then decode token by token through the cache or the recurrent state.

B: batch   T: time   V: vocabulary
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.config import ModelConfig
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.state import ModelState


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from logits. temperature 0 is greedy: always the highest score.

    top_k keeps the k likeliest tokens; top_p the fewest whose probability reaches p (arXiv 1904.09751). Both are
    applied after the temperature, top_k first. Raises ConfigError on values that mean nothing, which at temperature 0
    top_k and top_p do: the highest score stays the highest.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 (greedy) or a finite number above, got {self.temperature!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        for name in ("top_k", "top_p"):
            if self.greedy and getattr(self, name) is not None:
                raise ConfigError(f"{name} changes nothing at temperature 0, which always takes the highest score: "
                                  f"set a temperature above 0, 1 for the model's own probabilities")  # fmt: skip

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B, V), each row summing to 1; one-hot for temperature 0."""
        if self.greedy:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        # float64, and from the highest score down: no temperature above 0 then gives softmax an infinity above, and the
        # lowest ones meet the limit, greedy. A subnormal one is as its neighbour, whose inverse is finite.
        below = logits.double() - logits.amax(1, keepdim=True).double()
        p = (below / max(self.temperature, sys.float_info.min)).softmax(1).float()
        if self.top_k is not None and self.top_k < p.shape[1]:
            kept = p.topk(self.top_k, 1)
            p = torch.zeros_like(p).scatter_(1, kept.indices, kept.values)
            p = p / p.sum(1, keepdim=True)
        if self.top_p is not None:
            ordered, order = p.sort(1, descending=True)
            # a token is kept while those before it have not reached p: the first always is
            ordered[ordered.cumsum(1) - ordered >= self.top_p] = 0
            p = torch.zeros_like(p).scatter_(1, order, ordered)
        return p / p.sum(1, keepdim=True)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, V) -> token ids (B,)."""
        if self.greedy:
            return logits.argmax(1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]


class Step(NamedTuple):
    """A token (B,), the logits (B, V) from which it was chosen, and the state that gave them: everything before the
    token has been read into it. The state is valid until the next step."""

    token: Tensor
    logits: Tensor
    state: ModelState


def check_room(config: ModelConfig, prompt: int, tokens: int) -> None:
    """Raise ConfigError where a prompt of so many tokens, continued by `tokens`, does not fit the learned positions.
    The last token is chosen and not read."""
    if config.positions is not None and prompt + tokens - 1 > config.positions:
        left = config.positions - prompt + 1
        remedy = f"ask for at most {left}" if left > 0 else "use a shorter prompt"
        raise ConfigError(f"the model has {config.positions} learned positions, too few for a prompt of {prompt} "
                          f"tokens and {tokens} more: {remedy}")  # fmt: skip


@torch.inference_mode()
def steps(model: LanguageModel, prompt: Tensor, tokens: int, sampling: Sampling, *, seed: int = 0) -> Iterator[Step]:
    """Continue `prompt` (B, T), T >= 1, by `tokens` tokens; yields each as soon as it is chosen, the first after the
    prefill of the prompt, every other one after one step.

    seed: of this call's own random stream; greedy decoding draws nothing from it. Raises ConfigError.
    """
    if prompt.shape[1] < 1:
        raise ConfigError("the prompt has no tokens; give at least one")
    if tokens < 1:
        return
    check_room(model.config, prompt.shape[1], tokens)
    generator = torch.Generator(model.device).manual_seed(seed)
    state = model.make_state(prompt.shape[0], prompt.shape[1] + tokens)
    logits, state = model.prefill(prompt, state)
    for _ in range(tokens - 1):
        token = sampling.choose(logits, generator)
        yield Step(token, logits, state)
        logits, state = model.step(token, state)
    yield Step(sampling.choose(logits, generator), logits, state)


def generate(
    model: LanguageModel, prompt: Tensor, tokens: int, sampling: Sampling, *, seed: int = 0
) -> Iterator[Tensor]:
    """The tokens alone of `steps`, each (B,)."""
    return (step.token for step in steps(model, prompt, tokens, sampling, seed=seed))


@torch.inference_mode()
def generate_by_forward(
    model: LanguageModel, prompt: Tensor, tokens: int, sampling: Sampling, *, seed: int = 0
) -> Iterator[Tensor]:
    """As `generate`, by a pass over the whole text for every token: for models without a causal mask, whose earlier
    tokens change with each later one, so that no cache can hold them. A causal model writes the same either way."""
    if prompt.shape[1] < 1:
        raise ConfigError("the prompt has no tokens; give at least one")
    generator = torch.Generator(model.device).manual_seed(seed)
    text = prompt
    for _ in range(tokens):
        token = sampling.choose(model(text)[:, -1], generator)
        yield token
        text = torch.cat([text, token[:, None]], 1)
