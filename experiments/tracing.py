"""Models taken apart on one prompt: where a model and its tokenizer come from, and everything of its trace as data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from experiments import inference, reading, store
from experiments.errors import EnvironmentLacksError, SpecError
from experiments.limits import free_memory
from experiments.spec import assigned
from models import cost, folders
from models.config import ModelConfig
from models.errors import ConfigError, nearest
from models.language_model import LanguageModel
from models.presets import LISTS, PRESETS, preset
from models.trace import AttentionTrace, MemoryTrace, Trace, trace

BYTES = 256


@dataclass(frozen=True)
class Subject:
    """A model to take apart. origin: where its weights come from, in words. folder: of its weights; None, `config` is a
    preset's, is initialised by `seed`, and reads bytes. trains: whether the run that it is of trains its models.
    objective: what it was trained to."""

    name: str
    origin: str
    config: ModelConfig
    tokenizer: Tokenizer
    folder: Path | None
    seed: int = 0
    trains: bool = True
    objective: str = "causal"

    @property
    def untrained(self) -> bool:
        return self.folder is None or not self.trains


@dataclass(frozen=True)
class Traced:
    """names: of the prompt's tokens. text: what the chosen token adds to the prompt."""

    subject: Subject
    names: tuple[str, ...]
    trace: Trace
    text: str

    def name(self, id: int) -> str:
        return reading.name(self.subject.tokenizer, id)

    def to_dict(self) -> dict[str, Any]:
        """Everything as data: nested lists, null where a token is masked, no number that is not finite."""
        subject, found = self.subject, self.trace
        return {
            "model": subject.name,
            "origin": subject.origin,
            "untrained": subject.untrained,
            "config": subject.config.to_dict(),
            "tokens": [{"id": id, "text": name} for id, name in zip(found.tokens, self.names, strict=True)],
            "stages": [asdict(stage) for stage in found.stages],
            "blocks": [
                {"name": block.name, "mixer": _mixer(block.mixer), "experts": _experts(block.experts)}
                for block in found.blocks
            ],
            "lens": [
                {
                    "after": depth.after, "likeliest": self._candidate(depth.likeliest.id, depth.likeliest.probability),
                    "chosen_probability": depth.chosen_probability, "chosen_rank": depth.chosen_rank,
                }
                for depth in found.lens
            ],
            "candidates": [self._candidate(one.id, one.probability) for one in found.candidates],
            "logits": found.logits.tolist(),
            "chosen": {"id": found.chosen, "text": self.text},
        }  # fmt: skip

    def _candidate(self, id: int, probability: float) -> dict[str, Any]:
        return {"id": id, "text": self.name(id), "probability": probability}


def _mixer(said: AttentionTrace | MemoryTrace | None) -> dict[str, Any] | None:
    if isinstance(said, AttentionTrace):
        scores = said.scores.masked_fill(~said.seen, float("nan")).tolist()
        return {
            "kind": "attention",
            "seen": said.seen.tolist(),
            "scores": [[[None if s != s else s for s in row] for row in head] for head in scores],
            "weights": said.weights.tolist(),
            "weighted_sums": said.mixed.tolist(),
        }
    if isinstance(said, MemoryTrace):
        return {
            "kind": "memory",
            "unit": said.unit,
            "half_life": [
                {"shortest": low, "median": middle, "longest": high} for low, middle, high in said.half_life.tolist()
            ],
            "written": said.written.tolist(),
            "left": said.left.tolist(),
            "matrix": None if said.matrix is None else said.matrix.tolist(),
        }  # fmt: skip
    return None


def _experts(choice: Any) -> dict[str, Any] | None:
    return None if choice is None else {name: value.tolist() for name, value in vars(choice).items()}


def subjects(
    name: str, out: Path, *, against: str | None = None, arms: Sequence[str] = (), trained_seed: int | None = None,
    settings: Sequence[str] = (), seed: int | None = None,
) -> list[Subject]:  # fmt: skip
    """What `name` means, then what `against` means: a preset, a folder with a model, or a run in `out` ('latest' for
    the latest) with each of its arms. arms, trained_seed: of the run `name`. settings: `key=value` of the preset
    `name`. seed: of the weights of presets, 0 where None. Raises LabError, ConfigError."""
    found = _meant(name, out, arms, trained_seed, settings, 0 if seed is None else seed)
    if against is not None:
        found += _meant(against, out, (), None, (), 0 if seed is None else seed)
    if seed is not None and not any(one.folder is None for one in found):
        raise SpecError("--seed initialises the weights of a preset; no preset is here")
    named: list[Subject] = []
    for one in found:
        same = sum(other.name == one.name for other in found[: len(named)])
        named.append(replace(one, name=f"{one.name} ({same + 1})") if same else one)
    return named


def _meant(
    name: str, out: Path, arms: Sequence[str], trained_seed: int | None, settings: Sequence[str], seed: int
) -> list[Subject]:
    if name in PRESETS:
        return [_preset(name, arms, trained_seed, settings, seed)]
    if settings:
        raise SpecError(
            f"--set changes a preset; '{name}' is none and is taken as it is: {nearest(name, PRESETS, LISTS)}"
        )
    if not folders.is_model(name) and not _is_run(name, out):
        if Path(name).exists():
            raise SpecError(f"{name} holds neither a model (config.json) nor a run (environment.json)")
        runs = [run.path.name for run in store.runs(out)]
        hint = nearest(name, [*PRESETS, *runs], "lab models and lab runs list them")
        raise SpecError(f"no preset, run or folder '{name}': {hint}")
    source = inference.source(name, out)
    if isinstance(source, Path):
        if arms or trained_seed is not None:
            raise SpecError(f"{source} holds one model: there is no arm and no trained seed to choose")
        tokenizer = inference.read_tokenizer(folders.tokenizer_file(source))
        return [Subject(source.resolve().name, f"the folder {source}", folders.read_config(source), tokenizer, source)]
    experiment = source.experiment()
    shown = experiment.seeds[0] if trained_seed is None else trained_seed
    return [
        Subject(
            arm, f"arm {arm}, seed {shown} of the run {source.path.name}", folders.read_config(folder),
            inference.read_tokenizer(source.tokenizer_file(arm)), folder,
            trains=experiment.trains, objective=experiment.cells()[arm].objective,
        )
        for arm, folder in inference.trained(source, arms, trained_seed).items()
    ]  # fmt: skip


def _preset(name: str, arms: Sequence[str], trained_seed: int | None, settings: Sequence[str], seed: int) -> Subject:
    if arms or trained_seed is not None:
        raise SpecError(f"'{name}' is a preset: there is no arm and no trained seed to choose")
    config = preset(name).with_overrides(dict(assigned(setting) for setting in settings))
    if config.vocabulary < BYTES:
        raise SpecError(f"a preset reads bytes, for which model.vocabulary = {config.vocabulary} has no room: "
                        f"--set vocabulary={BYTES} or more")  # fmt: skip
    size, free = cost.weight_bytes(config, 4), free_memory()
    if size > free:
        raise EnvironmentLacksError(f"the weights of '{name}' take {size / 1e9:.3g} GB and {free / 1e9:.3g} GB of "
                                    "memory are free: fewer layers will do, such as --set layers=2")  # fmt: skip
    changed = f", with {', '.join(settings)}" if settings else ""
    return Subject(name, f"the preset {name}{changed}, initialised by seed {seed}", config, _bytes(), None, seed)


def _bytes() -> Tokenizer:
    """For a model that comes without a tokenizer: token b is the byte b."""
    tokenizer = Tokenizer(models.BPE(vocab=dict(reading.BYTES_BY_SIGN), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _is_run(name: str, out: Path) -> bool:
    if name == "latest" or store.is_run(Path(name)):
        return True
    return any(run.path.name.startswith(name) or run.path.name.endswith(name) for run in store.runs(out))


def take_apart(chosen: Sequence[Subject], prompt: str, device: str) -> list[Traced]:
    """Each model on the same prompt, in the tokens of its own tokenizer. Raises SpecError: an empty prompt, or a model
    whose scores are not finite; ConfigError: a prompt that is too long for a model or for a trace, a token outside the
    vocabulary, a damaged folder."""
    inference.check_prompt(prompt)
    return [_taken_apart(subject, prompt, device) for subject in chosen]


def _taken_apart(subject: Subject, prompt: str, device: str) -> Traced:
    ids = inference.encoded(subject.tokenizer, prompt)
    if subject.folder is not None:
        model = folders.load(subject.folder, device)
    else:
        model = LanguageModel(subject.config, seed=subject.seed, device=device).eval()
    try:
        found = trace(model, ids)
    except ConfigError as error:
        raise ConfigError(f"{subject.name}: {error}") from None
    if not found.logits.isfinite().all():
        raise SpecError(f"{subject.origin}: the model's scores are not finite numbers; its weights are of no use")
    reader = reading.Reader(subject.tokenizer, ids)
    names = tuple(reading.name(subject.tokenizer, id) for id in ids)
    return Traced(subject, names, found, reader.add(found.chosen) + reader.rest())
