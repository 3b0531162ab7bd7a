"""What a computation allocates, from shapes alone: it is run on tensors without data, and every storage that it makes
is counted while it lives. The forms are those that would run on the CPU, kernels included, so this is what those forms
need, and not a formula beside them. What a kernel takes for itself while it runs is not seen.

B: batch   T: tokens of context
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.config import ModelConfig
from models.language_model import LanguageModel
from models.ops.attention import forget_tables


class Allocations(TorchDispatchMode):
    """Context manager: bytes of the storages made inside, `live` now and at their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        for tensor in tree_leaves((arguments, keywords)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage()._cdata)  # made before, or seen already
        made = function(*arguments, **keywords or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


def unpredictable(config: ModelConfig) -> str | None:
    """Why what follows would be wrong of a configuration, or None."""
    if any(block.mixer.kind == "lstm" for block in config.kinds):
        return "torch's LSTM keeps a workspace of its own, which no shape tells"
    return None


@dataclass(frozen=True)
class TrainingBytes:
    """Beside weights and optimizer state: what the forward pass keeps for the backward one, the gradients at the end,
    and the most that both and their temporaries take at once."""

    activations: int
    gradients: int
    peak: int


def training(config: ModelConfig, batch: int, context: int) -> TrainingBytes:
    """Of one training step in float32, without the optimizer's update."""
    with _without_data():
        model = _model(config, torch.float32)
        tokens = torch.zeros(batch, context, dtype=torch.int64)
        model.hidden(tokens)  # what a first call makes and keeps is no part of a step
        with Allocations() as seen:
            hidden = model.hidden(tokens)
            x = hidden.x.flatten(0, 1)
            loss = model.ops.linear_cross_entropy(x, model.head.weight, tokens.flatten(), model.head.bias)
            loss = loss + sum(used.balance for used in hidden.routing)
            del x, hidden
            activations = seen.live
            loss.backward()
            del loss
            return TrainingBytes(activations, seen.live, seen.peak)


def prefill(config: ModelConfig, batch: int, context: int, dtype: torch.dtype = torch.float32) -> int:
    """The most that reading a prompt into an empty state takes beside the weights, the state included."""
    with _without_data():
        # gradients stay enabled, since compiled kernels take tensors without data only as autograd sees them
        model = _model(config, dtype).eval().requires_grad_(False)
        tokens = torch.zeros(batch, context, dtype=torch.int64)
        model.hidden(tokens)  # what a first call makes and keeps is no part of a prefill
        with Allocations() as seen:
            logits, _ = model.prefill(tokens, model.make_state(batch, context))
            del logits
            return seen.peak


@contextmanager
def _without_data() -> Iterator[None]:
    """Tensors made inside have shapes only; so have tables that are kept for later calls, which must not find them."""
    forget_tables()
    try:
        with FakeTensorMode():
            yield
    finally:
        forget_tables()


def _model(config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    model = LanguageModel(config, seed=None, device="cpu", dtype=dtype)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
    model.tie()
    return model
