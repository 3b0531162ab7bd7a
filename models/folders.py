"""Folders with a model, of either kind: our checkpoints and Hugging Face's."""

import os
from pathlib import Path

import torch

from models import checkpoint, hf
from models.config import ModelConfig
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.presets import PRESETS, preset


def is_model(path: str | Path) -> bool:
    """Whether this is a folder that says which model it holds."""
    return os.path.isfile(Path(path) / checkpoint.CONFIG)  # False, not an error, where nobody may look


def load(folder: Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The model in `folder`, in the type of its file. Raises ConfigError."""
    return hf.load(folder, device) if _theirs(folder) else checkpoint.load(folder, device)


def read_config(folder: Path) -> ModelConfig:
    """Raises ConfigError."""
    return hf.read_config(folder) if _theirs(folder) else checkpoint.read_config(folder)


def configuration(name_or_folder: str) -> ModelConfig:
    """Of a preset, or of the model in a folder. Raises ConfigError, for a misspelt preset with the nearest name."""
    return read_config(Path(name_or_folder)) if is_folder(name_or_folder) else preset(name_or_folder)


def is_folder(name_or_folder: str) -> bool:
    """Whether a model is named by its folder: by anything with a slash, or that is a folder and no preset."""
    return name_or_folder not in PRESETS and (os.sep in name_or_folder or os.path.isdir(name_or_folder))


def tokenizer_file(folder: Path) -> Path:
    """Raises ConfigError where there is none."""
    file = folder / hf.TOKENIZER
    if not file.is_file():
        raise ConfigError(f"{folder} has no {hf.TOKENIZER}, without which text means nothing to its model")
    return file


def _theirs(folder: Path) -> bool:
    values = checkpoint.read_table(folder, checkpoint.CONFIG)
    if "model_type" in values or "architectures" in values:
        return True
    if "width" not in values:
        known = "'width' as in our checkpoints, or 'architectures' as in Hugging Face's"
        raise ConfigError(f"{folder}: {checkpoint.CONFIG} is of no model that we know: it has neither {known}")
    return False
