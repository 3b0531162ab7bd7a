"""Models on disk: `config.json` and `model.safetensors` in one folder. Loading one executes nothing."""

import json
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file as _save_file

from models.config import ModelConfig
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.tensor_file import TensorFile

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: LanguageModel, folder: Path) -> None:
    """Write the configuration and the parameters; a tied head is written once, as the embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.named_parameters())  # shared parameters appear once
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")


def lost(folder: Path) -> list[Path]:
    """What `load` needs of the folder and does not find there whole: by its ends, no tensor is read."""
    files = []
    try:
        read_config(folder)
    except ConfigError:
        files.append(folder / CONFIG)
    try:
        TensorFile(folder / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError, ConfigError):
        files.append(folder / WEIGHTS)
    return files


def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, which lets nobody but the owner read the file; here it has the mode of every other new file."""
    part = path.with_name(f"{path.name}.part")
    part.touch()
    mode = stat.S_IMODE(part.stat().st_mode)
    _save_file(tensors, part, metadata=metadata)
    part.chmod(mode)
    part.replace(path)


def load(folder: Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The model of `save`, on `device`. The file is memory-mapped and its tensors become the parameters, so the
    host never holds a second copy. Dropout is off. Raises ConfigError: no checkpoint, damaged, or of another shape."""
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS, device=str(device))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is no checkpoint: {WEIGHTS} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{folder}: damaged checkpoint: {error}") from None
    model = LanguageModel(config, seed=None, device=device)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ConfigError(
            f"{folder}: {len(names)} tensors do not fit the configuration, first '{names[0]}': "
            f"expected {expected.get(names[0])}, found {found.get(names[0])}"
        )
    model.load_state_dict(tensors, strict=False, assign=True)  # names checked above; a tied head is absent
    model.tie()
    return model.eval()


def read_config(folder: Path) -> ModelConfig:
    """The configuration of `save`. Raises ConfigError."""
    values = read_table(folder, CONFIG)
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None


def read_table(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a folder with a model. Raises ConfigError: missing, damaged, not a table."""
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is no checkpoint: {name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ConfigError(f"{folder}: damaged checkpoint: {name}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{folder}: {name} must hold a table, not {values!r}")
    return values
