"""Text from the trained arms of a run, or from a model in a folder of its own."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from experiments import store
from experiments.errors import SpecError
from experiments.store import Cell, RunDirectory
from models import folders
from models.errors import nearest
from models.generation import Sampling, generate


@dataclass(frozen=True)
class Continuation:
    """tokens_per_s counts the prefill of the prompt; state_bytes is the cache or state at the end."""

    arm: str
    prompt: str
    text: str
    tokens: int
    tokens_per_s: float
    state_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def source(name: str, out: Path) -> RunDirectory | Path:
    """The run that `name` means in the folder `out` of runs, 'latest' for the latest, or a folder with a model.
    Raises LabError."""
    if folders.is_model(name):
        return Path(name)
    return store.find(None if name == "latest" else name, out)


def trained(directory: RunDirectory, arm: str | None = None, seed: int | None = None) -> dict[str, Path]:
    """The folders of the trained models of a run by their arms: of all, or of `arm`; of the first seed, or of `seed`.
    Raises SpecError: no such arm or seed, or it was never trained to the end."""
    experiment = directory.experiment()
    arms = list(experiment.cells())
    if arm is not None and arm not in arms:
        raise SpecError(f"no arm '{arm}' in {directory.path.name}: {nearest(arm, arms)}")
    seed = experiment.seeds[0] if seed is None else seed
    if seed not in experiment.seeds:
        raise SpecError(f"no seed {seed} in {directory.path.name}: it has {list(experiment.seeds)}")
    found = {}
    for name in [arm] if arm is not None else arms:
        found[name] = directory.folder(Cell(name, seed, "train")) / "checkpoint"
        if not found[name].is_dir():
            raise SpecError(f"arm '{name}', seed {seed} of {directory.path.name} was never trained to the end")
    return found


def continuations(
    source: RunDirectory | Path, prompt: str, tokens: int, sampling: Sampling, *, arm: str | None,
    trained_seed: int | None, seed: int, device: str,
) -> list[Continuation]:  # fmt: skip
    """One per arm of a run, or that of `arm`; one of a folder. Raises SpecError: an empty prompt, an arm or seed that
    was not trained; ConfigError: a folder without a model or a tokenizer."""
    if isinstance(source, Path):
        if arm is not None or trained_seed is not None:
            raise SpecError(f"{source} holds one model: there is no arm and no trained seed to choose")
        tokenizer = _tokenizer(folders.tokenizer_file(source))
    else:
        tokenizer = _tokenizer(source.path / "tokenizer.json")
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise SpecError("the prompt is empty; give some text to continue")
    chosen = {source.resolve().name: source} if isinstance(source, Path) else trained(source, arm, trained_seed)
    results = []
    for name, folder in chosen.items():
        model = folders.load(folder, device)
        if max(ids) >= model.config.vocabulary:
            raise SpecError(f"{folder}: the tokenizer says {max(ids)}, the vocabulary has {model.config.vocabulary}")
        start = time.perf_counter()
        made = [int(t) for t in generate(model, torch.tensor([ids], device=device), tokens, sampling, seed=seed)]
        elapsed = time.perf_counter() - start
        state = model.make_state(1, len(ids) + tokens).nbytes
        results.append(Continuation(name, prompt, tokenizer.decode(made), tokens, tokens / elapsed, state))
    return results


def _tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise SpecError(f"{file} is no tokenizer: {error}") from None
