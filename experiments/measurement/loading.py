"""The ways in which people load a model, from the files of `models.checkpoint` to parameters that can be used.

    read     the whole file is read, decoded, and copied into a model that was initialised first
    mapped   the file is mapped into memory, and its pages become the parameters of a model without any, on a GPU its
             copies of them (`models.checkpoint.load`)
    direct   the parameters are allocated on the device and the file's tensors are put there one after another

On the CPU a mapped parameter is a page of the file: the system can take it back and read it again, and processes that
map the same file share it; a direct one is the process's own. Every way ends with each weight having been read, since
a mapped page is in memory only then.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load as decode
from torch import Tensor

from models import checkpoint
from models.language_model import LanguageModel
from models.tensor_file import TensorFile


def read(folder: Path, device: torch.device) -> LanguageModel:
    tensors = decode((folder / checkpoint.WEIGHTS).read_bytes())
    model = LanguageModel(checkpoint.read_config(folder), seed=0, device=device, dtype=_dtype(tensors))
    model.load_state_dict(tensors, strict=False)  # a tied head is absent
    return model


def direct(folder: Path, device: torch.device) -> LanguageModel:
    file = TensorFile(folder / checkpoint.WEIGHTS)
    model = LanguageModel(checkpoint.read_config(folder), seed=None, device=device)
    for name, stored in file.tensors.items():
        place = torch.empty(stored.shape, dtype=file.dtype(name), device=device)
        file.read_into(name, place)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(place))
    model.tie()
    return model


WAYS: dict[str, Callable[[Path, torch.device], LanguageModel]] = {
    "read": read, "mapped": checkpoint.load, "direct": direct,
}  # fmt: skip


def load(folder: Path, device: torch.device, way: str = "mapped") -> LanguageModel:
    """The model in `folder`, ready for its first token."""
    model = WAYS[way](folder, device).eval()
    for parameter in model.parameters():
        parameter.sum()
    return model


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Of the weights, apart from those that a mixer keeps in float32."""
    return next((t.dtype for t in tensors.values() if t.dtype != torch.float32), torch.float32)
