"""Text from the trained arms of a run."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from experiments.errors import SpecError
from experiments.store import Cell, RunDirectory
from models import checkpoint
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


def continuations(
    directory: RunDirectory, prompt: str, tokens: int, sampling: Sampling, *, arm: str | None,
    trained_seed: int | None, seed: int, device: str,
) -> list[Continuation]:  # fmt: skip
    """One per arm, or that of `arm`. Raises SpecError: an empty prompt, an arm or seed that was not trained."""
    experiment = directory.experiment()
    arms = list(experiment.cells())
    if arm is not None and arm not in arms:
        raise SpecError(f"no arm '{arm}' in {directory.path.name}: {nearest(arm, arms)}")
    trained_seed = experiment.seeds[0] if trained_seed is None else trained_seed
    if trained_seed not in experiment.seeds:
        raise SpecError(f"no seed {trained_seed} in {directory.path.name}: it has {list(experiment.seeds)}")
    results = []
    for name in [arm] if arm is not None else arms:
        folder = directory.folder(Cell(name, trained_seed, "train")) / "checkpoint"
        if not folder.is_dir():
            raise SpecError(f"arm '{name}', seed {trained_seed} of {directory.path.name} was never trained to the end")
        tokenizer = Tokenizer.from_file(str(directory.path / "tokenizer.json"))
        ids = tokenizer.encode(prompt).ids
        if not ids:
            raise SpecError("the prompt is empty; give some text to continue")
        model = checkpoint.load(folder, device)
        start = time.perf_counter()
        made = [int(t) for t in generate(model, torch.tensor([ids], device=device), tokens, sampling, seed=seed)]
        elapsed = time.perf_counter() - start
        state = model.make_state(1, len(ids) + tokens).nbytes
        results.append(Continuation(name, prompt, tokenizer.decode(made), tokens, tokens / elapsed, state))
    return results
