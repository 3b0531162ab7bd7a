"""Folders in Hugging Face's form: `config.json`, safetensors in one file or several, `tokenizer.json`. They are data:
nothing in them is executed, and pickled weights are not read."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import CONFIG, WEIGHTS, read_table, save_file
from models.config import ModelConfig
from models.errors import ConfigError
from models.hf.architectures import (
    ARCHITECTURES,
    HEAD,
    SPELLINGS,
    counterpart,
    from_settings,
    named,
    to_settings,
    to_tensors,
)
from models.hf.layout import Entry
from models.language_model import LanguageModel
from models.tensor_file import TensorFile

INDEX, TOKENIZER, TOKENIZER_CONFIG = "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHOWN = 3  # names in a message


def read_config(folder: Path) -> ModelConfig:
    """Raises ConfigError: no such file, damaged, or a setting that our models do not have."""
    values = read_table(folder, CONFIG)
    try:
        return from_settings(values)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None


def load(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """The model in `folder`, on `device`. On a CPU the files are memory-mapped and their tensors become the parameters;
    those that we join (Llama's queries, keys and values; gate and up) or convert are read into their place, as is all
    that goes to another device, so that the host holds no weight twice.

    dtype: of the parameters, None for that of the files; what a mixer keeps in float32 is in float32 either way.
    Raises ConfigError: not such a folder, damaged, pickled, tensors that do not fit the configuration.
    """
    config = read_config(folder)
    layout = ARCHITECTURES[named(read_table(folder, CONFIG))].layout(config)
    files = _files(folder)
    try:
        weights = _Weights(folder, files)
        weights.settle_the_head(config, layout)
        model = LanguageModel(config, seed=None, device=device, dtype=dtype or weights.dtype(layout[0].theirs[0]))
        parameters = dict(model.named_parameters())
        weights.check_names({
            name: shape for entry in layout for name, shape in entry.shapes(tuple(parameters[entry.ours].shape)).items()
        })  # fmt: skip
        kept = {name: parameters[entry.ours].dtype for entry in layout for name in entry.theirs}
        weights.check_types(kept, mixed=dtype is not None)
        tensors = {
            entry.ours: weights.parameter(entry, parameters[entry.ours], torch.device(device)) for entry in layout
        }
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    model.load_state_dict(tensors, strict=False, assign=True)  # names checked above; a tied head is absent
    model.tie()
    return model


class _Weights:
    """The tensors of a folder by their names, in one spelling. Their data is read when it is asked for."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.owner: dict[str, TensorFile] = {}
        self.there: dict[str, str] = {}  # the name in the file
        for name in files:
            try:
                file = TensorFile(folder / name)
            except FileNotFoundError:
                raise ConfigError(f"'{name}' is missing; {INDEX} names it") from None
            for there in file.tensors:
                here = SPELLINGS.get(there, there)
                if here in self.owner:
                    raise ConfigError(f"{here!r} is there twice, the second time in {name}")
                if not here.endswith("rotary_emb.inv_freq"):  # of old folders: follows from the settings
                    self.owner[here], self.there[here] = file, there

    def parameter(self, entry: Entry, ours: Tensor, device: torch.device) -> Tensor:
        """What takes the place of `ours`, which has a shape and a type but no data."""
        first = entry.theirs[0]
        if len(entry.theirs) == 1 and self.dtype(first) == ours.dtype and device.type == "cpu":
            return entry.join([self.owner[first].mapped(self.there[first])])
        made = torch.empty(ours.shape, dtype=ours.dtype, device=device)
        for name, part in zip(entry.theirs, entry.split(made), strict=True):
            self.owner[name].read_into(self.there[name], part)
        return made

    def dtype(self, name: str) -> torch.dtype:
        """float32 for what is missing, which `check_names` reports. Raises ConfigError."""
        return self.owner[name].dtype(self.there[name]) if name in self.owner else torch.float32

    def shape(self, name: str) -> tuple[int, ...]:
        return self.owner[name].tensors[self.there[name]].shape

    def equal(self, a: str, b: str) -> bool:
        """Read piece by piece, so that neither stays in memory."""
        pieces = (self.owner[name].pieces(self.there[name]) for name in (a, b))
        return self.shape(a) == self.shape(b) and all(torch.equal(x, y) for x, y in zip(*pieces, strict=True))

    def settle_the_head(self, config: ModelConfig, layout: list[Entry]) -> None:
        """Of a tied model: a head in the file must be the embedding, or stands for it where that is left out."""
        if not config.tie_embeddings or HEAD not in self.owner:
            return
        embedding = layout[0].theirs[0]
        if embedding not in self.owner:
            self.owner[embedding], self.there[embedding] = self.owner[HEAD], self.there[HEAD]
        elif not self.equal(HEAD, embedding):
            raise ConfigError(f"tie_word_embeddings = true, but '{HEAD}' differs from '{embedding}': set it to false")
        del self.owner[HEAD], self.there[HEAD]

    def check_names(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        found = {name: self.shape(name) for name in self.owner}
        misshapen = [
            f"{name!r} (expected {expected[name]}, found {found[name]})"
            for name in expected
            if name in found and found[name] != expected[name]
        ]
        problems = {
            "missing": [repr(name) for name in expected if name not in found],
            "not of this model": [repr(name) for name in found if name not in expected],
            "of another shape": misshapen,
        }
        said = [_some(names, what) for what, names in problems.items() if names]
        if said:
            raise ConfigError(f"the tensors do not fit {CONFIG}: {'; '.join(said)}")

    def check_types(self, kept: Mapping[str, torch.dtype], *, mixed: bool) -> None:
        """Floating point; and, unless `mixed`, of one type, but for those that a mixer keeps in a wider one, which may
        be in that already. kept: the type of each in the model."""
        first = next(iter(kept))
        usual = self.dtype(first)
        for name, dtype in kept.items():
            found = self.dtype(name)
            if not mixed and found not in (usual, dtype):
                raise ConfigError(
                    f"types are mixed: '{first}' is {_word(usual)}, {name!r} {_word(found)}; say which with dtype"
                )


def _files(folder: Path) -> list[str]:
    """Names of the files with weights. Raises ConfigError."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_table(folder, INDEX).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{folder}: {INDEX} needs a weight_map, a table of tensors and the files that hold them")
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ConfigError(f"{folder}: {INDEX} names '{name}': only safetensors in the folder itself are read")
        return list(dict.fromkeys(names))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        what = f"only pickled weights ({pickles[0]}), which can run code when read"
        raise ConfigError(f"{folder} has {what}: save the model as safetensors")
    raise ConfigError(f"{folder} has no weights: {WEIGHTS} or {INDEX} is missing")


def _some(names: list[str], what: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def export(
    model: LanguageModel,
    folder: Path,
    tokenizer_json: Path | None = None,
    *,
    architecture: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Write a folder that `transformers.AutoModelForCausalLM` loads, with the same logits; returns its architecture.

    architecture: by default the counterpart of the configuration. settings: more keys of their `config.json`, such as
    max_position_embeddings or eos_token_id. Raises ConfigError, before anything is written, where no architecture of
    theirs is this model.
    """
    architecture = architecture or counterpart(model.config)
    values = to_settings(model.config, architecture) | {"dtype": _word(model.dtype)} | dict(settings or {})
    tensors = to_tensors(dict(model.named_parameters()), model.config, architecture)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, values)
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(host, folder / WEIGHTS, metadata={"format": "pt"})
    if tokenizer_json is not None:
        shutil.copyfile(tokenizer_json, folder / TOKENIZER)
        _write_json(folder / TOKENIZER_CONFIG, _tokenizer_settings(read_table(folder, TOKENIZER), values))
    return architecture


def _tokenizer_settings(tokenizer: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Without these, transformers would take the tokenizer that usually goes with the architecture."""
    texts = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    special = {
        f"{role}_token": texts[values[f"{role}_token_id"]]
        for role in ("bos", "eos", "pad")
        if values.get(f"{role}_token_id") in texts
    }
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
