"""What every mixer is.

    Mixer(config, width, device)          parameters allocated, not yet initialised
    forward(x, state=None) -> (y, state)  x, y (B, T, D); a state continues a sequence; None wants none back
    step(x, state) -> (y, state)          one token, x, y (B, D); this y and that of forward may be written over, and
                                          are memory of their own
    branch_step(x, norm, state)           x + step(norm(x)), which may be written over x, and the state
    make_state(batch, max_len, dtype, device) -> state
    reset_parameters(generator)           its own initialisation
    output_weight                         of the projection that writes to the residual stream
    rotary_tables(positions)              by head width and base; what a recorded step reads (models/recorded.py)
    constants()                           what else it reads, made of parameters once for all steps
    explain(x) -> Explanation or None     what is behind forward(x), for models/trace.py; None: it says nothing
    Config                                its settings, a frozen dataclass that also says what it costs

and of every `Config`, D being the model's width:

    kind, backend                         the name in the registry; the form asked for
    check(D)                              raises ConfigError where it does not fit the width
    parameters(D), float32_parameters(D)  exact; those kept in float32 whatever the model's type
    flops_per_token(D, context)           forward, the mean over a sequence of `context` tokens
    state_bytes(D, max_len, element_size) of `make_state` for one sequence, exact
    state_formula(D)                      that in words
    cuda_limit(D)                         of a mixer with the form cuda: why its kernels do not take this shape, or None
    causal                                False where a token sees what comes after it
"""

from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from models.errors import BackendUnavailableError
from models.mixers.explanation import Explanation
from models.norm import Norm
from models.ops.kernels import Selection, load, select


class MixerConfig(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def causal(self) -> bool: ...
    def check(self, width: int) -> None: ...
    def parameters(self, width: int) -> int: ...
    def float32_parameters(self, width: int) -> int: ...
    def flops_per_token(self, width: int, context: int) -> float: ...
    def state_bytes(self, width: int, max_len: int, element_size: int) -> int: ...
    def state_formula(self, width: int) -> str: ...


class Mixer(nn.Module):
    """Chooses its form when it is built; `ops` holds that form's operations."""

    Config: ClassVar[Any]
    forms: ClassVar[tuple[str, ...]] = ("reference", "torch")
    operation: ClassVar[str] = "selective_scan"  # what a form has to be able to run, for the probe of CUDA kernels
    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, width: int, device: torch.device) -> None:
        super().__init__()
        config.check(width)
        self.config = config
        self.backend = self.select(config, width, device)
        self.ops = load(self.backend.name)

    @classmethod
    def select(cls, config: Any, width: int, device: torch.device) -> Selection:
        """Where the CUDA kernels do not take a shape, `auto` falls back to torch. Raises ConfigError (no such form),
        BackendUnavailableError (not on this machine, or not in this shape)."""
        selection = select(config.backend, device, cls.forms, cls.operation)
        problem = config.cuda_limit(width) if selection.name == "cuda" else None
        if problem is None:
            return selection
        if selection.asked == "cuda":
            raise BackendUnavailableError(f"backend 'cuda' cannot run this {config.kind}: {problem}; choose 'torch'")
        return Selection("torch", selection.asked, fallback=problem)

    def reset_parameters(self, generator: torch.Generator) -> None:
        raise NotImplementedError

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def branch_step(self, x: Tensor, norm: Norm, state: Any) -> tuple[Tensor, Any]:
        y, state = self.step(norm(x), state)
        return x + y, state

    def make_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> Any:
        raise NotImplementedError

    def rotary_tables(self, positions: int) -> dict[tuple[int, float], tuple[Tensor, Tensor]]:
        return {}

    def constants(self) -> tuple[Tensor, ...]:
        return ()

    def explain(self, x: Tensor) -> Explanation | None:
        """x (B, T, D), what forward reads."""
        return None

    @property
    def output_weight(self) -> Tensor:
        return self.get_parameter("out_proj.weight")


def at_least_float32() -> torch.dtype:
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def written(ops: ModuleType, y: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """The last projection of a step, y (B, E), weight (D, E); added to `onto` (B, D), which may be written over."""
    return ops.linear_step(y, weight) if onto is None else ops.residual_step(onto, y, weight)
