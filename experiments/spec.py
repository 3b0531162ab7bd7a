"""The experiment as a value: what is compared, on what data, and how it is measured.

A catalog file (TOML) holds defaults and, under `[profiles.<name>]`, what each profile changes. `load`
merges file, profile and `--set` assignments, validates strictly, and returns an `Experiment`; its
`to_toml()` is the resolved specification that a run directory keeps and that `lab run` accepts again.
"""

import glob
import os
import tomllib
from collections.abc import Mapping, Sequence, Set
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from experiments.errors import SpecError
from models.errors import nearest

PROFILES = ("smoke", "cpu", "cuda")
Split = Literal["validation", "test"]
Dtype = Literal["float32", "bfloat16"]


class Settings(BaseModel):
    """Frozen and strict: an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if min(values) < 1 or list(values) != sorted(set(values)):
        raise ValueError("must be positive, distinct and ascending")
    return values


def _once(values: tuple) -> tuple:
    if len(set(values)) != len(values):
        raise ValueError("each may appear once")
    return values


def _not_negative(values: tuple) -> tuple:
    if any(value < 0 for value in values):
        raise ValueError("must not be negative")
    return values


Ascending = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_ascending)]
Once, NotNegative = AfterValidator(_once), AfterValidator(_not_negative)


class Arm(Settings):
    """One side of the comparison."""

    model: str = Field(description="preset name, see `lab models`, or a model folder")
    start: Literal["scratch", "weights"] = Field(
        default="scratch", description="initialise anew, or start from the weights in the model folder"
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak learning rate, chosen on validation by a sweep; needed where arms train"
    )
    objective: Literal["causal", "masked", "unmasked"] = Field(
        default="causal",
        description="predict the next token, tokens that were hidden (BERT), or the next token with the mask left out",
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="model settings that differ from the preset, e.g. mixer.state = 32"
    )


class Data(Settings):
    corpus: str = Field(default="stdlib", description="stdlib, installed-python or text")
    path: str = Field(default="", description="file, folder or glob; for corpus = text")
    vocabulary: int = Field(default=2048, ge=257, le=1_000_000, description="entries of the tokenizer")
    tokenizer: str = Field(
        default="", description="a tokenizer.json, or the model folder that has one; without it a BPE is trained"
    )
    validation_fraction: float = Field(default=0.02, gt=0, lt=0.5, description="of the corpus's bytes")
    test_fraction: float = Field(default=0.02, gt=0, lt=0.5, description="of the corpus's bytes")
    max_bytes: int = Field(default=0, ge=0, description="use at most this many bytes of text; 0: all")


class Training(Settings):
    """One recipe for every arm; only the peak learning rate belongs to the arm."""

    context: int = Field(default=256, ge=2, description="tokens per sequence, T")
    batch: int = Field(default=8, ge=1, description="sequences per micro-batch, B")
    accumulate: int = Field(default=1, ge=1, description="micro-batches per optimizer step")
    steps: int = Field(default=300, ge=1)
    warmup_steps: int = Field(default=30, ge=0)
    final_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Dtype = Field(default="float32", description="bfloat16: autocast, parameters stay float32")
    validate_every: int = Field(default=50, ge=1, description="steps between points of the validation curve")

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Training":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} must be below steps = {self.steps}: "
                             f"set training.warmup_steps too")  # fmt: skip
        return self


class Evaluation(Settings):
    splits: Annotated[tuple[Split, ...], Once] = ("validation", "test")
    batch: int = Field(default=16, ge=1)
    curve_sequences: int = Field(default=16, ge=1, description="validation sequences per point of the curve")
    samples: int = Field(default=2, ge=0, description="pieces of generated text per arm and seed")
    sample_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.8, ge=0)


class Measurement(Settings):
    """Load, prefill and decode, each cell in a fresh process. See docs/method.md."""

    enabled: bool = True
    contexts: Ascending = (128, 512, 2048)
    batch: int = Field(default=1, ge=1)
    repeats: int = Field(default=10, ge=1, description="at least this many turns per timed cell, of a call or more")
    seconds: float = Field(default=1.0, ge=0, description="and at least this long")
    decode_tokens: int = Field(default=16, ge=1, description="tokens per timed decode repeat")
    decode_mode: Literal["eager", "graph"] = Field(
        default="eager", description="of every arm; graph: the step is repeated from a CUDA graph"
    )
    dtype: Dtype = Field(default="float32", description="of file, weights and state")


class Memory(Settings):
    """What the memory study varies. Models are initialised, not trained: memory does not depend on the weights."""

    contexts: Ascending = Field(default=(128, 512, 2048), description="tokens that prefill reads, or decode stands on")
    batches: Ascending = Field(default=(1,), description="sequences at once in prefill and decode")
    train_contexts: Ascending = Field(default=(256,), description="tokens per sequence of a training step")
    train_batch: int = Field(default=1, ge=1, description="sequences of a training step")
    decode_tokens: int = Field(default=8, ge=1, description="tokens that a decode cell writes")
    dtype: Dtype = Field(
        default="float32", description="of file, weights and state; training keeps float32 weights under autocast"
    )


class Speed(Settings):
    """What the speed study varies. Models are initialised, not trained: speed does not depend on the weights."""

    contexts: Ascending = Field(default=(128, 512, 2048), description="tokens that prefill reads, or decode stands on")
    batches: Ascending = Field(default=(1,), description="sequences at once in prefill and decode")
    train_contexts: Ascending = Field(default=(256,), description="tokens per sequence of a training step")
    train_tokens: int = Field(default=2048, ge=1, description="tokens of a training step, or one sequence if longer")
    operator_contexts: Ascending = Field(default=(256,), description="tokens for a mixer's operation by itself")
    modes: Annotated[tuple[Literal["eager", "compiled", "graph", "compiled-graph"], ...], Once] = Field(
        default=("eager",), min_length=1, description="each for every arm: torch.compile, CUDA graphs, both"
    )
    repeats: int = Field(default=10, ge=6, description="at least this many turns per cell, of a timed call or more")
    seconds: float = Field(default=1.0, ge=0, description="and at least so many seconds of timed calls")
    decode_tokens: int = Field(default=16, ge=1, description="tokens per timed decode repeat")
    dtypes: Annotated[tuple[Dtype, ...], Once] = Field(
        default=("float32",), min_length=1,
        description="each for every arm: of weights and state; training keeps float32 weights under autocast",
    )  # fmt: skip


class Masking(Settings):
    """What the masking study does with the trained models, beside what a comparison does."""

    prompts: int = Field(default=8, ge=1, description="places of the validation text where models go on writing")
    windows: int = Field(default=4, ge=1, description="windows of validation text whose tokens are hidden one by one")


class Experts(Settings):
    """What the study of experts varies beside the comparison's settings."""

    batches: Ascending = Field(
        default=(1, 64), description="sequences that decode at once, at the shortest of measurement.contexts"
    )


class Vocabulary(Settings):
    """What the vocabulary study varies. Lengths are in bytes of text; each tokenizer says how many tokens they are."""

    sizes: Ascending = Field(default=(257, 1024, 4096), description="entries of each tokenizer, 257 being bytes alone")
    window_bytes: int = Field(default=512, ge=8, description="text of a training sequence, about")
    text_bytes: int = Field(default=2048, ge=8, description="text that decode stands on, about")

    @field_validator("sizes")
    @classmethod
    def _several(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(sizes) < 2 or sizes[0] < 257 or sizes[-1] > 1_000_000:
            raise ValueError("must be two sizes or more, from 257 to 1000000")
        return sizes


TRAINS = {"training", "evaluation", "measurement"}
SECTIONS = {  # what each study reads beside names, seeds, device, arms and data
    "comparison": TRAINS | {"learning_rates"},
    "lineage": TRAINS,
    "sparse": TRAINS,
    "moe": TRAINS | {"experts"},
    "memory": {"memory"},
    "speed": {"speed"},
    "masking": TRAINS | {"masking"},
    "vocabulary": TRAINS | {"vocabulary"},
}
UNREAD: dict[str, dict[str, set[str]]] = {  # and what of those tables it does not read
    "vocabulary": {
        "data": {"vocabulary", "tokenizer"},
        "training": {"context"},
        "evaluation": {"samples", "sample_tokens", "temperature"},
        "measurement": {"contexts"},
    },
}
HIGHEST_SEED = 2**32 - 1  # torch's generator of a CPU takes 32 bits of a seed
MOST_SEEDS = 1000
Study = Literal["comparison", "lineage", "sparse", "moe", "masking", "vocabulary", "memory", "speed"]


class Experiment(Settings):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    study: Study = Field(default="comparison", description="the kind of question: what is done with the arms")
    profile: str = Field(default="", description="the profile it was resolved with")
    seeds: Annotated[tuple[int, ...], Once, NotNegative] = Field(default=(0, 1, 2), min_length=1, max_length=MOST_SEEDS)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(
        default=0, ge=0, description="CPU threads; 0: as torch chooses, and no more than this process may use"
    )
    cell_timeout_s: int = Field(
        default=3600,
        ge=1,
        description="seconds after which a cell, or those that share a process, are stopped, as failed",
    )
    arms: dict[str, Arm] = Field(min_length=1)
    learning_rates: Annotated[tuple[float, ...], Once, NotNegative] = Field(
        default=(), description="a sweep: every arm at each of these rates instead of its own"
    )
    data: Data = Data()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    measurement: Measurement = Measurement()
    memory: Memory = Memory()
    speed: Speed = Speed()
    masking: Masking = Masking()
    experts: Experts = Experts()
    vocabulary: Vocabulary = Vocabulary()

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "Experiment":
        every = {name for sections in SECTIONS.values() for name in sections}
        for name in sorted(self.model_fields_set & (every - SECTIONS[self.study])):
            raise ValueError(f"the {self.study} study does not read '{name}'")
        for table, keys in UNREAD.get(self.study, {}).items():
            for key in sorted(getattr(self, table).model_fields_set & keys):
                raise ValueError(f"the {self.study} study does not read '{table}.{key}'")
        for name, arm in self.arms.items():
            if self.trains and arm.learning_rate is None and not self.learning_rates:
                raise ValueError(f"arm '{name}' needs a learning_rate")
            unread = set() if self.trains else {"learning_rate", "objective"}
            for key in sorted(arm.model_fields_set & unread):
                raise ValueError(f"the {self.study} study does not read '{key}' of arm '{name}'")
        return self

    @model_validator(mode="after")
    def _turns_not_seeds(self) -> "Experiment":
        if self.study == "speed" and len(self.seeds) > 1:
            raise ValueError("the speed study takes one seed: its models are not trained, its intervals are over turns")
        return self

    @model_validator(mode="after")
    def _somebody_judges(self) -> "Experiment":
        if self.study == "masking" and not any(arm.objective == "causal" for arm in self.arms.values()):
            raise ValueError("the masking study needs an arm with objective = causal, which judges what others write")
        return self

    @field_validator("seeds")
    @classmethod
    def _different_streams(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if max(seeds, default=0) > HIGHEST_SEED:
            raise ValueError(f"a seed must be at most {HIGHEST_SEED}")
        return seeds

    @field_validator("learning_rates")
    @classmethod
    def _learns(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if 0 in rates:
            raise ValueError("a rate of 0 learns nothing")
        return rates

    @model_validator(mode="after")
    def _weights_have_their_tokenizer(self) -> "Experiment":
        for name, arm in self.arms.items():
            if arm.start == "weights" and not self.data.tokenizer:
                raise ValueError(
                    f"arm '{name}' starts from the weights in {arm.model}, which mean nothing without their tokenizer: "
                    f"set data.tokenizer={arm.model}"
                )
        return self

    @model_validator(mode="after")
    def _vocabularies_can_vary(self) -> "Experiment":
        if self.study != "vocabulary":
            return self
        if "test" not in self.evaluation.splits:
            raise ValueError("the vocabulary study compares test bits per byte: evaluation.splits must name test")
        for name, arm in self.arms.items():
            if arm.objective != "causal":
                raise ValueError(f"the vocabulary study compares bits per byte, which objective {arm.objective} "
                                 f"of arm '{name}' has not")  # fmt: skip
            if arm.start == "weights" or "vocabulary" in arm.overrides:
                raise ValueError(f"the vocabulary study gives arm '{name}' its vocabulary: "
                                 f"leave out start = weights and overrides.vocabulary")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _arm_names_are_folders(self) -> "Experiment":
        for name in self.arms:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"arm name '{name}' must be letters, digits, '-' and '_' (it names a folder)")
        return self

    @property
    def trains(self) -> bool:
        return SECTIONS[self.study] >= TRAINS

    def cells(self) -> "dict[str, Arm]":
        """The arms that actually train: with `learning_rates`, one per (arm, rate), named `arm-lr<rate>`; of the
        vocabulary study one per (arm, size), named `arm-v<size>`."""
        if self.study == "vocabulary":
            return {f"{name}-v{size}": arm for size in self.vocabulary.sizes for name, arm in self.arms.items()}
        if not self.learning_rates:
            return dict(self.arms)
        return {
            f"{name}-lr{rate!r}": arm.model_copy(update={"learning_rate": rate})
            for name, arm in self.arms.items()
            for rate in self.learning_rates
        }

    def arm_of(self, cell: str) -> str:
        """The arm that one of `cells` comes from."""
        mark = "-v" if self.study == "vocabulary" else "-lr"
        return cell.rpartition(mark)[0] if self.study == "vocabulary" or self.learning_rates else cell

    def vocabulary_of(self, cell: str) -> int:
        """The entries of the tokenizer that one of `cells` reads with."""
        return int(cell.rpartition("-v")[2]) if self.study == "vocabulary" else self.data.vocabulary

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """The sizes of all tokenizers."""
        return self.vocabulary.sizes if self.study == "vocabulary" else (self.data.vocabulary,)

    def tokenizer_file(self, cell: str) -> str:
        """The name, in the run directory, of the tokenizer that one of `cells` reads with."""
        return f"tokenizer-{self.vocabulary_of(cell)}.json" if self.study == "vocabulary" else "tokenizer.json"

    def seen_with(self, tokens_per_byte: float) -> "Experiment":
        """The experiment as those cells see it whose tokenizer spends so many tokens on a byte of training text: with
        the lengths of the vocabulary study in tokens. Any other study as it is."""
        if self.study != "vocabulary":
            return self
        tokens = {
            name: max(2, round(size * tokens_per_byte))
            for name, size in (("window", self.vocabulary.window_bytes), ("text", self.vocabulary.text_bytes))
        }
        return self.model_copy(update={
            "training": self.training.model_copy(update={"context": tokens["window"]}),
            "evaluation": self.evaluation.model_copy(update={"samples": 0}),
            "measurement": self.measurement.model_copy(update={"contexts": (tokens["text"],)}),
        })  # fmt: skip

    def resolved(self) -> dict[str, Any]:
        """Every field that the study reads, as plain values; validates to this experiment again."""
        every = {name for sections in SECTIONS.values() for name in sections}
        unread: dict[str, Any] = dict.fromkeys(every - SECTIONS[self.study], True)
        unread |= UNREAD.get(self.study, {})
        if not self.trains:
            unread["arms"] = {"__all__": {"learning_rate", "objective"}}
        return self.model_dump(mode="json", exclude=unread, exclude_none=True)

    def to_toml(self) -> str:
        """`resolved`; `load` of this text gives this experiment back."""
        return _toml(self.resolved())


def catalog() -> dict[str, str]:
    """Names of the built-in experiments and their titles."""
    found = {}
    for entry in sorted(resources.files("experiments.catalog").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            found[entry.name.removesuffix(".toml")] = tomllib.loads(entry.read_text(encoding="utf-8"))["title"]
    return found


def load(
    name_or_path: str,
    *,
    profile: str | None = None,
    assignments: Sequence[str] = (),
    arms: Sequence[str] = (),
    seeds: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Experiment:
    """Resolve an experiment from the catalog or a TOML file.

    profile: one of `PROFILES`; None takes `cuda` on a CUDA device and `cpu` otherwise, and leaves a file
        without profiles as it is.
    assignments: `dotted.key=value`, the value in TOML syntax (a bare word counts as a string).
    arms: keep only these, in this order; none: the file's `default_arms`, or all. seeds: use the first N seeds 0..N-1.
    Raises SpecError, with the place and the nearest valid name.
    """
    text, source = _read(name_or_path)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{source}: not valid TOML: {error}") from None
    profiles = raw.pop("profiles", {})
    for name, table in {"profiles": profiles, "arms": raw.get("arms", {})}.items():
        if not isinstance(table, dict) or not all(isinstance(value, dict) for value in table.values()):
            raise SpecError(f"{source}: {name} must be a table of tables, such as [{name}.NAME]")
    if profile is not None and profile not in PROFILES:
        raise SpecError(f"unknown profile '{profile}': {nearest(profile, PROFILES)}")
    if profile is not None and not profiles:
        raise SpecError(f"{source} has no profiles; leave --profile away")
    if profiles:
        profile = profile or ("cuda" if device == "cuda" else "cpu")
        if profile not in profiles:
            raise SpecError(f"{source} has no profile '{profile}': {nearest(profile, profiles)}")
        raw = _merged(raw, profiles[profile])
        raw["profile"] = profile
        raw["device"] = device
    elif device != "cpu" or "device" not in raw:
        raw["device"] = device
    usual = raw.pop("default_arms", ())
    if usual and arms and set(arms) != set(usual) and not raw.get("learning_rates"):
        raw["title"] = _between(arms)
    arms, others = arms or usual, set()
    if arms:
        known = raw.get("arms", {})
        for arm in arms:
            if arm not in known:
                raise SpecError(f"unknown arm '{arm}' in {source}: {nearest(arm, known)}")
        if len(set(arms)) != len(arms):
            raise SpecError(f"each arm may appear once, got {', '.join(arms)}")
        raw["arms"] = {arm: known[arm] for arm in arms}
        others = known.keys() - set(arms)
    if seeds is not None:
        if not 1 <= seeds <= MOST_SEEDS:
            raise SpecError(f"--seeds must be from 1 to {MOST_SEEDS}, got {seeds}")
        raw["seeds"] = list(range(seeds))
    for assignment in assignments:
        _assign(raw, assignment, others)
    _from_here(raw)
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        raise SpecError(f"{source}: {_first_problem(error)}") from None


def _between(arms: Sequence[str]) -> str:
    """What a comparison of other arms than those of its title asks."""
    if len(arms) == 1:
        return f"{arms[0]}, by itself"
    return f"{', '.join(arms[:-1])} or {arms[-1]}?"


def _from_here(raw: dict[str, Any]) -> None:
    """Paths that are relative to the folder of this process become absolute, so that what is kept of a run means the
    same wherever it is read: where text and tokenizer are, and models that are folders."""
    data, arms = raw.get("data"), raw.get("arms", {})
    for table, key in [(data, "path"), (data, "tokenizer"), *((arm, "model") for arm in arms.values())]:
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str) and value.strip() and not value.startswith("~"):
            table[key] = _absolute(value) if key != "model" or _is_folder(value) else value


def _absolute(path: str) -> str:
    """Of a pattern too, where this folder's own name must not be taken for a part of one."""
    if os.path.isabs(path) or os.path.exists(path) or not glob.has_magic(path):
        return os.path.abspath(path)
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), path))


def _is_folder(model: str) -> bool:
    if not os.path.isdir(model):  # no preset is one, and most models are presets
        return False
    from models.folders import is_folder  # imports torch, without which a specification can be read

    return is_folder(model)


def _read(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.suffix == ".toml" or "/" in name_or_path:
        if path.is_dir():
            raise SpecError(f"{name_or_path} is a folder; name a specification, a .toml file")
        if not path.is_file():
            raise SpecError(f"no such file: {name_or_path}")
        try:
            return path.read_text(encoding="utf-8-sig"), str(path)  # some editors put a mark at the beginning
        except UnicodeDecodeError:
            raise SpecError(f"{path}: not a text file; a specification is TOML in UTF-8") from None
    known = catalog()
    if name_or_path not in known:
        raise SpecError(f"unknown experiment '{name_or_path}': {nearest(name_or_path, known)}")
    file = resources.files("experiments.catalog") / f"{name_or_path}.toml"
    return file.read_text(encoding="utf-8"), f"experiment '{name_or_path}'"


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def assigned(assignment: str) -> tuple[str, Any]:
    """`a.b=c` -> ("a.b", c), c in TOML syntax; a bare word counts as a string. Raises SpecError."""
    key, equals, literal = assignment.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"--set takes KEY=VALUE, got '{assignment}'")
    try:
        return key.strip(), tomllib.loads(f"value = {literal.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), literal.strip()


def _assign(raw: dict[str, Any], assignment: str, others: Set[str]) -> None:
    """Apply `a.b=c`; the key must exist in the specification's schema (checked here for a near name). others: arms that
    there are beside those of the run."""
    key, value = assigned(assignment)
    parts = key.split(".")
    if parts[0] == "arms" and len(parts) > 1 and parts[1] in others:
        raise SpecError(f"arm '{parts[1]}' is not among those of this run, {', '.join(raw['arms'])}: name it in --arms")
    _check_key(parts, raw)
    table = raw
    for depth, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise SpecError(f"'{'.'.join(parts[: depth + 1])}' is a value, it has no '{parts[depth + 1]}'")
    table[parts[-1]] = value


def _check_key(parts: list[str], raw: Mapping[str, Any]) -> None:
    schema: type[BaseModel] = Experiment
    for depth, part in enumerate(parts):
        where = ".".join(parts[: depth + 1])
        field = schema.model_fields.get(part)
        if field is None and part in Arm.model_fields:
            raise SpecError(f"unknown key '{where}': an arm has '{part}', e.g. arms.{next(iter(raw['arms']))}.{part}")
        if field is None:
            raise SpecError(f"unknown key '{where}': {nearest(part, schema.model_fields)}")
        if part == "overrides":
            return  # free-form; the model's own configuration checks it
        if part == "arms":
            if len(parts) > depth + 1 and parts[depth + 1] not in raw.get("arms", {}):
                raise SpecError(f"unknown arm '{parts[depth + 1]}': {nearest(parts[depth + 1], raw['arms'])}")
            return _check_arm_key(parts[depth + 2 :])
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            schema = annotation
        elif depth + 1 < len(parts):
            raise SpecError(f"'{where}' is a value, it has no '{parts[depth + 1]}'")
    if len(parts) == 1 and schema is not Experiment:
        raise SpecError(
            f"'{parts[0]}' is a table; set one of its keys, e.g. {parts[0]}.{next(iter(schema.model_fields))}"
        )


def _check_arm_key(rest: list[str]) -> None:
    if not rest:
        raise SpecError("an arm is a table; set one of its keys, e.g. arms.mamba.learning_rate")
    if rest[0] not in Arm.model_fields:
        raise SpecError(f"unknown key '{rest[0]}' of an arm: {nearest(rest[0], Arm.model_fields)}")


_PLAIN = {  # in place of what pydantic says in the words of Python
    "tuple_type": "must be a list, in brackets", "too_short": "must not be empty", "int_parsing": "must be an integer",
    "int_type": "must be an integer", "int_from_float": "must be an integer", "float_parsing": "must be a number",
    "float_type": "must be a number", "bool_parsing": "must be true or false", "bool_type": "must be true or false",
    "string_type": "must be text",
}  # fmt: skip


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    # a misspelt key also leaves the right one missing: speak of the spelling
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        schema: Any = Experiment
        for part in problem["loc"][:-1]:
            field = schema.model_fields.get(part) if hasattr(schema, "model_fields") else None
            schema = field.annotation if field else Arm
        known = getattr(schema, "model_fields", {})
        return f"unknown key '{where}': {nearest(str(problem['loc'][-1]), known)}"
    message = _PLAIN.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    got = problem.get("input")
    shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | list | tuple) else ""
    return f"{where}: {message}{shown}" if where else message


def _toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Enough TOML for a specification: scalars, arrays of scalars, nested tables."""
    lines = [f"{_key(k)} = {_value(v)}" for k, v in table.items() if not isinstance(v, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{_key(key)}"
            inner = _toml(value, f"{name}.")
            lines.append(f"\n[{name}]\n{inner}".rstrip())
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return repr(value)
