"""Text from the trained arms of a run, or from a model in a folder of its own."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from experiments import reading, store
from experiments.data.tokenizer import load
from experiments.errors import SpecError
from experiments.store import Cell, RunDirectory
from models import checkpoint, folders
from models.errors import nearest
from models.generation import Sampling, check_room, steps
from models.language_model import LanguageModel

READINGS, ENOUGH_S = 10, 0.5  # of a prompt: at most so many, and none more after so many seconds
OTHERS = 4  # likeliest tokens shown beside the one chosen


@dataclass(frozen=True)
class Candidate:
    """A token that may come next. text: as `reading.name` shows it."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class Choice:
    """chosen: the token that was taken; others: the likeliest of those that were not, none of probability 0."""

    chosen: Candidate
    others: tuple[Candidate, ...]


@dataclass(frozen=True)
class Continuation:
    """What an arm wrote, in this one call.

    prefill_tokens_per_s: tokens of the prompt over the least time to the first new token of up to ten readings.
    decode_tokens_per_s: of the tokens after the first, written once; None where there is only one. state_bytes: the
    cache or state at the end.
    """

    arm: str
    prompt: str
    prompt_tokens: int
    text: str
    token_ids: tuple[int, ...]
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    state_bytes: int
    choices: tuple[Choice, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without `choices` where none were asked for."""
        values = asdict(self)
        return {key: value for key, value in values.items() if key != "choices" or value is not None}


class InterruptedWritingError(KeyboardInterrupt):
    """Ctrl-C, after some tokens: what was written by then."""

    def __init__(self, made: Continuation) -> None:
        self.made = made
        super().__init__()


@dataclass(frozen=True)
class Writer:
    """A model in a folder, and the prompt in the ids (T,) of its tokenizer."""

    arm: str
    folder: Path
    tokenizer: Tokenizer
    prompt: str
    ids: tuple[int, ...]


def source(name: str, out: Path) -> RunDirectory | Path:
    """The run that `name` means in the folder `out` of runs, 'latest' for the latest, or a folder with a model.
    Raises LabError."""
    if folders.is_model(name):
        return Path(name)
    if os.sep in name and not store.is_run(Path(name)):
        raise SpecError(f"'{name}' is neither a run directory nor a folder with a model's config.json")
    return store.find(name, out)


def trained(directory: RunDirectory, arms: Sequence[str] = (), seed: int | None = None) -> dict[str, Path]:
    """The folders of the trained models of a run by their arms: of `arms`, or of all; of `seed`, or of the first one.
    Raises SpecError: no such arm or seed, it was never trained to the end, or it has lost a file."""
    experiment = directory.experiment()
    known = list(experiment.cells())
    for arm in arms:
        if arm not in known:
            raise SpecError(f"no arm '{arm}' in {directory.path.name}: {nearest(arm, known)}")
    seed = experiment.seeds[0] if seed is None else seed
    if seed not in experiment.seeds:
        raise SpecError(f"no seed {seed} in {directory.path.name}: it has {list(experiment.seeds)}")
    makers = {arm: Cell(arm, seed, "train") for arm in known}
    places = {arm: directory.folder(cell) / "checkpoint" for arm, cell in makers.items()}
    finished = [arm for arm in known if places[arm].is_dir() or directory.result_file(makers[arm]).is_file()]
    for arm in arms or known:
        if arm not in finished:
            remedy = (
                f"trained are: {', '.join(finished)} (choose by --arms)"
                if finished
                else f"no arm of it was; {store.resumes(directory.path)} goes on"
            )
            raise SpecError(f"arm '{arm}', seed {seed} of {directory.path.name} was never trained to the end; {remedy}")
        if gone := checkpoint.lost(places[arm]):
            raise SpecError(f"{gone[0]} is missing or damaged; {store.resumes(directory.path)} makes the model again")
    return {arm: places[arm] for arm in arms or known}


def check_trains(directory: RunDirectory) -> None:
    """Raises SpecError where the models of a run are initialised and no more."""
    study = directory.experiment()
    if not study.trains:
        raise SpecError(
            f"the {study.study} study trains no model: those of {directory.path.name} are random; name another run "
            f"(lab runs lists them)"
        )


def writers(
    source: RunDirectory | Path, prompt: str, tokens: int, *, arms: Sequence[str] = (), trained_seed: int | None = None
) -> list[Writer]:
    """One for each of `arms` of a run, by default every arm; one for a folder. All is checked before anything is
    loaded. Raises SpecError: an empty prompt, one with a token outside a vocabulary, an arm or seed that was not
    trained, an arm that does not predict the next token; ConfigError: a folder without a model or a tokenizer, more
    tokens than a model has positions."""
    check_prompt(prompt)
    if isinstance(source, Path):
        if arms or trained_seed is not None:
            raise SpecError(f"{source} holds one model: there is no arm and no trained seed to choose")
        chosen = {source.resolve().name: (source, folders.tokenizer_file(source))}
    else:
        check_trains(source)
        places = trained(source, arms, trained_seed)
        chosen = {arm: (folder, source.tokenizer_file(arm)) for arm, folder in places.items()}
        objectives = {arm: one.objective for arm, one in source.experiment().cells().items()}
        able = [arm for arm, objective in objectives.items() if objective == "causal"]
        for arm in chosen:
            if arm not in able:
                does = "fills in hidden tokens" if objectives[arm] == "masked" else "reads the token that it predicts"
                remedy = f"; trained for that are: {', '.join(able)}" if able else ""
                raise SpecError(f"arm '{arm}' {does}, it was not trained to continue a text{remedy}")
    return [_writer(arm, folder, file, prompt, tokens) for arm, (folder, file) in chosen.items()]


def _writer(arm: str, folder: Path, tokenizer_file: Path, prompt: str, tokens: int) -> Writer:
    tokenizer = read_tokenizer(tokenizer_file)
    ids = tuple(encoded(tokenizer, prompt))
    if not ids:
        raise SpecError("the prompt has no tokens; give some text to continue")
    config = folders.read_config(folder)
    if max(ids) >= config.vocabulary:
        outside = next(token for token in ids if token >= config.vocabulary)
        raise SpecError(
            f"{folder}: '{reading.name(tokenizer, outside)}' of the prompt is token {outside}, outside the model's "
            f"vocabulary of {config.vocabulary}: the tokenizer is another model's"
        )
    check_room(config, len(ids), tokens)
    return Writer(arm, folder, tokenizer, prompt, ids)


def write(
    writer: Writer, tokens: int, sampling: Sampling, *, seed: int, device: str, choices: bool = False,
    heard: Callable[[str], object] = lambda piece: None,
) -> Continuation:  # fmt: skip
    """Load the model and continue the prompt by `tokens` >= 1 tokens. heard: is given the prompt once the model is
    ready, then the text in pieces of complete characters, as they come. choices: also what else was likely at every
    token. Raises SpecError, ConfigError, and InterruptedWritingError."""
    model = folders.load(writer.folder, device)
    prompt = torch.tensor([writer.ids], device=device)
    _rehearse(model, prompt, tokens, writer.folder)
    heard(writer.prompt)
    reader = reading.Reader(writer.tokenizer, writer.ids)
    running = steps(model, prompt, tokens, sampling, seed=seed)
    pieces: list[str] = []
    made: list[int] = []
    seconds: list[float] = []  # for each token
    likely: list[Choice] = []
    state_bytes, interrupted = 0, False
    try:
        for _ in range(tokens):
            start = time.perf_counter()
            step = next(running)
            made.append(int(step.token))  # waits for the device
            seconds.append(time.perf_counter() - start)
            state_bytes = step.state.nbytes
            pieces.append(reader.add(made[-1]))
            heard(pieces[-1])
            if choices:
                likely.append(_choice(made[-1], distribution(step.logits, sampling)[0], writer.tokenizer))
    except KeyboardInterrupt:
        if not seconds:
            raise
        interrupted = True
    pieces.append(reader.rest())
    heard(pieces[-1])
    prefill, *decode = seconds
    if not interrupted:
        prefill = _fastest_reading(model, prompt, prefill)
    written = Continuation(
        arm=writer.arm, prompt=writer.prompt, prompt_tokens=len(writer.ids), text="".join(pieces),
        token_ids=tuple(made), prefill_tokens_per_s=len(writer.ids) / prefill,
        decode_tokens_per_s=len(decode) / sum(decode) if decode else None, state_bytes=state_bytes,
        choices=tuple(likely) if choices else None,
    )  # fmt: skip
    if interrupted:
        raise InterruptedWritingError(written)
    return written


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) -> (B, V): the probabilities that a token was drawn from. Greedy decoding draws nothing: the softmax of
    the logits, of which it takes the highest."""
    return logits.float().softmax(1) if sampling.greedy else sampling.probabilities(logits)


def described(sampling: Sampling) -> str:
    """The rule, and which probabilities `distribution` gives."""
    if sampling.greedy:
        return "greedy: the highest score is always taken; probabilities are the softmax of the scores"
    rule = [f"temperature {sampling.temperature:g}"]
    rule += [f"top-k {sampling.top_k}"] if sampling.top_k is not None else []
    rule += [f"top-p {sampling.top_p:g}"] if sampling.top_p is not None else []
    return f"sampled at {', '.join(rule)}; probabilities are those that the tokens were drawn with"


def _choice(token: int, p: Tensor, tokenizer: Tokenizer) -> Choice:
    """p (V,) -> what stood to be chosen."""

    def candidate(one: int) -> Candidate:
        return Candidate(one, reading.name(tokenizer, one), float(p[one]))

    likeliest = p.topk(min(OTHERS + 1, len(p))).indices.tolist()
    others = [candidate(one) for one in likeliest if one != token][:OTHERS]
    return Choice(candidate(token), tuple(one for one in others if one.probability > 0))


def _rehearse(model: LanguageModel, prompt: Tensor, tokens: int, folder: Path) -> None:
    """Read the weights and compile the kernels, neither of which is part of a speed. The whole prompt: a GPU's kernels
    are compiled, and chosen, for its length."""
    for step in steps(model, prompt, min(2, tokens), Sampling()):
        if not step.logits.isfinite().all():
            raise SpecError(f"{folder}: the model's scores are not finite numbers; its weights are of no use")


def _fastest_reading(model: LanguageModel, prompt: Tensor, first: float) -> float:
    """Seconds that the prompt takes, which took `first` before: a single time of a short one may be that of a thread
    which was woken late."""
    seconds = [first]
    while len(seconds) < READINGS and sum(seconds) < ENOUGH_S:
        start = time.perf_counter()
        int(next(steps(model, prompt, 1, Sampling())).token)  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def check_prompt(prompt: str) -> None:
    """Raises SpecError."""
    if not prompt:
        raise SpecError("the prompt is empty; give some text to continue")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise SpecError(f"the prompt is not text: no character at place {error.start + 1}") from None


def encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Raises SpecError where the tokenizer has no tokens for the text."""
    try:
        return tokenizer.encode(prompt).ids
    except Exception as error:  # the library raises no narrower class
        raise SpecError(f"the tokenizer cannot read the prompt: {error}") from None


def read_tokenizer(file: Path) -> Tokenizer:
    """As `experiments.data.tokenizer.load` does: a prompt is read as texts are in training. Raises SpecError."""
    try:
        return load(file)
    except Exception as error:  # the library raises no narrower class
        raise SpecError(f"{file} is no tokenizer: {error}") from None
