"""What a computation allocates, from shapes alone: it is run on tensors without data, and every storage that it makes
is counted while it lives. The forms are those that would run on the device, kernels included, so this is what those
forms need, and not a formula beside them. What a kernel takes for itself while it runs is not seen, nor to what sizes
an allocator rounds. What would run on a GPU is replayed where there is one.

B: batch   T: tokens of context
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.config import ModelConfig
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.ops.attention import forget_tables
from models.ops.kernels.without_data import kernels_without_data


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
        if function is torch.ops.aten.addmm.dtype_out:  # torch 2.11 to 2.13 cannot tell its shapes
            return (keywords or {})["out"]
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


def training(
    config: ModelConfig, batch: int, context: int, device: str = "cpu", precision: str = "float32"
) -> TrainingBytes:
    """Of one training step with float32 weights, without the optimizer's update. precision: float32, or bfloat16 under
    autocast."""
    with _without_data(config, device):
        model = _model(config, torch.float32, device)
        tokens = torch.zeros(batch, context, dtype=torch.int64, device=device)
        with _autocast(device, precision):
            model.hidden(tokens)  # what a first call makes and keeps is no part of a step
        with Allocations() as seen:
            with _autocast(device, precision):
                hidden = model.hidden(tokens)
                x = hidden.x.flatten(0, 1)
                loss = model.ops.linear_cross_entropy(x, model.head.weight, tokens.flatten(), model.head.bias)
            loss = loss + sum(used.balance for used in hidden.routing)
            del x, hidden
            activations = seen.live
            loss.backward()
            del loss
            return TrainingBytes(activations, seen.live, seen.peak)


def prefill(
    config: ModelConfig, batch: int, context: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> int:
    """The most that reading a prompt into an empty state takes beside the weights, the state included."""
    with _without_data(config, device):
        # gradients stay enabled, since compiled kernels take tensors without data only as autograd sees them
        model = _model(config, dtype, device).eval().requires_grad_(False)
        tokens = torch.zeros(batch, context, dtype=torch.int64, device=device)
        model.hidden(tokens)  # what a first call makes and keeps is no part of a prefill
        with Allocations() as seen:
            logits, _ = model.prefill(tokens, model.make_state(batch, context))
            del logits
            return seen.peak


def _autocast(device: str, precision: str) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@contextmanager
def _without_data(config: ModelConfig, device: str) -> Iterator[None]:
    """Tensors made inside have shapes only; so have tables that are kept for later calls, which must not find them."""
    for block in config.kinds:  # tries the kernels, which takes data
        MIXERS[block.mixer.kind].select(block.mixer, config.width, torch.device(device))
    forget_tables()
    try:
        with kernels_without_data() if device == "cuda" else nullcontext(), FakeTensorMode():
            yield
    finally:
        forget_tables()


def _model(config: ModelConfig, dtype: torch.dtype, device: str) -> LanguageModel:
    model = LanguageModel(config, seed=None, device=device, dtype=dtype)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty))
    model.tie()
    return model
