"""The ways in which people load a model, from the files of `models.checkpoint` to parameters that can be used.

    read     the whole file is read, decoded, and copied into a model that was initialised first
    mapped   the file is mapped into memory, and its pages become the parameters of a model without any, on a GPU its
             copies of them (`models.checkpoint.load`)
    direct   the parameters are allocated on the device and the file's tensors are put there one after another

On the CPU a mapped parameter is a page of the file: the system can take it back and read it again, and processes that
map the same file share it; a direct one is the process's own. Every way ends with each weight having been read, since
a mapped page is in memory only then.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load as decode
from torch import Tensor

from models import checkpoint
from models.language_model import LanguageModel


def read(folder: Path, device: torch.device) -> LanguageModel:
    tensors = decode((folder / checkpoint.WEIGHTS).read_bytes())
    model = LanguageModel(checkpoint.read_config(folder), seed=0, device=device, dtype=_dtype(tensors))
    model.load_state_dict(tensors, strict=False)  # a tied head is absent
    return model


def direct(folder: Path, device: torch.device) -> LanguageModel:
    path = folder / checkpoint.WEIGHTS
    model = LanguageModel(checkpoint.read_config(folder), seed=None, device=device)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        for name, kind in ((name, one["dtype"]) for name, one in header.items() if name != "__metadata__"):
            begin, end = header[name]["data_offsets"]
            tensor = torch.empty(header[name]["shape"], dtype=_DTYPES[kind])
            file.seek(8 + header_bytes + begin)
            if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != end - begin:
                raise OSError(f"{path} ends within '{name}'")
            owner, _, leaf = name.rpartition(".")
            parameter = torch.nn.Parameter(tensor.to(device))
            setattr(model.get_submodule(owner), leaf, parameter)
    model.tie()
    return model


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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
    return torch.float32 if all(t.dtype == torch.float32 for t in tensors.values()) else next(
        t.dtype for t in tensors.values() if t.dtype != torch.float32)  # fmt: skip
