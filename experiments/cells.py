"""The work of one cell, as it runs in its own process: training an arm at a seed, or measuring one phase of it."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import environment, gates
from experiments.data.batches import Batches, StreamHash
from experiments.data.dataset import Dataset
from experiments.errors import RunFailedError
from experiments.evaluation import MaskedQuality, Quality, evaluate, evaluate_masked, expert_load, mean_loss
from experiments.measurement.card import remember_cards
from experiments.measurement.loading import load
from experiments.measurement.memory import keep_freed_memory
from experiments.measurement.phases import measure_decode, measure_load, measure_prefill, measure_step, measure_training
from experiments.measurement.process import side_by_side
from experiments.measurement.speed import Subject, measure_speed
from experiments.objectives import Objective
from experiments.spec import Arm, Experiment, Measurement
from experiments.store import again
from experiments.training import DTYPES, token_loss, train
from models import checkpoint, cost, folders, replay
from models.config import ModelConfig
from models.errors import ConfigError
from models.folders import configuration
from models.generation import Sampling, generate
from models.language_model import LanguageModel
from models.ops.kernels.tuning import untimed

Send = Callable[[Any], None]
WARM_UP_STEPS = 5  # left out of the reported step time
TURN_MS = 500.0  # of training steps in a turn, at least
LOADS = 3  # timed, per cell of the memory study
PROMPT = 32  # tokens of a prompt, of a longer text
AFTER_A_PROMPT = f"evaluation.sample_tokens after a prompt of {PROMPT}"


def model_config(arm: Arm, vocabulary: int) -> ModelConfig:
    """The arm's preset or folder, with the tokenizer's vocabulary and the arm's overrides. An arm that starts from the
    folder's weights keeps its vocabulary, which may be padded. Raises ConfigError."""
    config, entries = configuration(arm.model), Objective(arm.objective, vocabulary).model_vocabulary
    if arm.start == "scratch":
        config = config.with_overrides({"vocabulary": entries} | arm.overrides)
    if arm.objective == "causal" and not config.causal:
        raise ConfigError(
            f"{arm.model} sees the token that it is to predict (causal = false), and its bits per byte would mean "
            f"nothing: set objective = masked, or causal = true"
        )
    if arm.objective == "unmasked" and config.causal:
        raise ConfigError(f"{arm.model} has its mask: objective = unmasked needs overrides.mixer.causal = false")
    if arm.start == "scratch":
        return config
    if arm.overrides:
        raise ConfigError(f"the weights in {arm.model} have their shape already: overrides need start = scratch")
    if config.vocabulary < entries:
        raise ConfigError(f"{arm.model} knows {config.vocabulary} tokens, but the run's tokenizer has {entries}")
    return config


def model_configs(experiment: Experiment) -> dict[str, ModelConfig]:
    """Of each of `Experiment.cells`. Raises ConfigError."""
    return {name: model_config(arm, experiment.vocabulary_of(name)) for name, arm in experiment.cells().items()}


def kept_config(folder: Path) -> ModelConfig:
    """Of the model that was made in the folder of its cell. Raises RunFailedError."""
    try:
        return checkpoint.read_config(folder / "checkpoint")
    except ConfigError as error:
        raise RunFailedError(f"{error}; delete that folder {again(folder)}") from None


def folder_hashes(experiment: Experiment) -> dict[str, str]:
    """Of each arm whose model is a folder: SHA-256 of its configuration, and of the weights that it starts from."""
    found = {}
    for name, arm in experiment.arms.items():
        folder = Path(arm.model)
        if not folders.is_model(folder):
            continue
        digest = hashlib.sha256()
        weights = sorted(folder.glob("*.safetensors")) if arm.start == "weights" else []
        for file in [folder / checkpoint.CONFIG, *weights]:
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        found[name] = digest.hexdigest()
    return found


def first_model(arm: Arm, config: ModelConfig, seed: int, device: torch.device) -> LanguageModel:
    """Initialised by the seed, or with the weights of the arm's folder."""
    if arm.start == "weights":
        return folders.load(Path(arm.model), device).float()  # a 16-bit file too is trained in float32
    return LanguageModel(config, seed=seed, device=device)


def prepare_process(experiment: Experiment) -> torch.device:
    """Threads and allocator, the same for every cell that is timed, and how full the GPU is before it uses it."""
    keep_freed_memory()
    if experiment.device == "cuda":
        remember_cards()
    threads = environment.threads(experiment.threads)
    if experiment.threads or threads < torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.device(experiment.device)


def compile_kernels(send: Send, experiment: Experiment, dataset_folder: Path) -> dict[str, dict[str, str | None]]:
    """Build each arm's model and run one tiny training step and decode, so that kernels are compiled (and cached on
    disk) before anything is measured. Of each arm the `name` of the form that ran and its `fallback`, see
    `models.ops.kernels.Selection`. What an arm raises has a note that names it."""
    device = prepare_process(experiment)
    vocabulary = Dataset.load(dataset_folder).vocabulary
    backends = {}
    for name, arm in experiment.arms.items():
        try:
            model = LanguageModel(model_config(arm, vocabulary), seed=0, device=device)
            _check_counts(model)
            with untimed(device):
                _try(model)
        except Exception as error:
            error.add_note(f"arm '{name}'")
            raise
        backends[name] = {"name": model.backend.name, "fallback": model.backend.fallback}
    return backends


def _check_counts(model: LanguageModel) -> None:
    """What is said of a model's size follows from its configuration: of an own mixer, from what that says of itself."""
    counted, there = cost.parameters(model.config).total, sum(weight.numel() for weight in model.parameters())
    if counted != there:
        raise ConfigError(f"by its configuration it has {counted:,} parameters, and the model has {there:,}: what its "
                          f"mixer or its feed-forward layer counts as `parameters` is wrong")  # fmt: skip
    if not model.config.causal:
        return
    T = min(17, model.config.positions or 17)
    counted, there = cost.state_bytes(model.config, 2, T, model.dtype.itemsize), model.make_state(2, T).nbytes
    if counted != there:
        raise ConfigError(f"by its configuration its state for 2 x {T} tokens takes {counted:,} bytes, and the model's "
                          f"takes {there:,}: what its mixer counts as `state_bytes` is wrong")  # fmt: skip


def _try(model: LanguageModel) -> None:
    tokens = torch.zeros(2, 8, dtype=torch.int64, device=model.device)
    loss, balance = token_loss(model, tokens, tokens)
    (loss + balance).backward()
    with torch.inference_mode():
        for rows in (1, 2) if model.config.causal else ():
            _, state = model.prefill(tokens[:rows], model.make_state(rows, 17))
            _, state = model.prefill(tokens[:rows], state)
            model.step(tokens[:rows, 0], state)


def train_cell(
    send: Send, experiment: Experiment, name: str, arm: Arm, seed: int, dataset_folder: Path, folder: Path,
    batches: Batches | None = None,
) -> Generator[None, None, dict[str, Any]]:  # fmt: skip
    """Train, evaluate, sample, and keep everything under `folder`. Messages: ("step", done, total). batches: None draws
    windows of the training tokens. A turn is half a second of steps; what comes before them and after is in the first
    and the last."""
    device = prepare_process(experiment)
    dataset = Dataset.load(dataset_folder)
    settings, evaluation = experiment.training, experiment.evaluation
    config = model_config(arm, dataset.vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    if batches is None:
        batches = Batches(dataset.splits["train"].tokens, context=settings.context, batch=settings.batch, seed=seed)
    length = {"context": settings.context, "precision": settings.precision}
    curve = {"sequences": evaluation.curve_sequences, **length}
    objective = Objective(arm.objective, dataset.vocabulary, seed)
    validation = dataset.splits["validation"]

    assert arm.learning_rate is not None  # the specification sees to it
    model = first_model(arm, config, seed, device)
    passed = _gates(model, dataset, arm)
    del model
    memory = measure_training(lambda: first_model(arm, config, seed, device), batches, settings, objective, device)
    step_ms, stream = [], StreamHash()
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as log:
        model = first_model(arm, config, seed, device)

        def record(line: dict[str, Any]) -> None:
            log.write(json.dumps(line) + "\n")
            log.flush()

        record({"step": 0, "validation_loss": mean_loss(model, validation, objective, **curve)})
        yield
        of_turn_ms = 0.0
        for step in train(model, batches, settings, arm.learning_rate, stream, objective):
            record(asdict(step))
            step_ms.append(step.step_ms)
            send(("step", step.step, settings.steps))
            if step.step % settings.validate_every == 0 or step.step == settings.steps:
                loss = mean_loss(model, validation, objective, **curve)
                record({"step": step.step, "validation_loss": loss})
            of_turn_ms += step.step_ms
            if of_turn_ms >= TURN_MS and step.step < settings.steps:
                yield
                of_turn_ms = 0.0

    def quality(model: LanguageModel, split: str) -> Quality | MaskedQuality:
        if arm.objective == "masked":
            return evaluate_masked(model, dataset.splits[split], objective, batch=evaluation.batch, **length)
        return evaluate(model, dataset.splits[split], batch=evaluation.batch, **length)

    splits = {split: quality(model, split).to_dict() for split in evaluation.splits}
    first = first_model(arm, config, seed, device)
    passed += _gradient_gates(first, _gradient_tokens(first, dataset), settings.precision)
    initial = {"expected_loss": math.log(config.vocabulary), "test_bits_per_byte": None}
    if "test" in evaluation.splits and arm.objective != "masked":
        initial["test_bits_per_byte"] = evaluate(
            first, dataset.splits["test"], batch=evaluation.batch, **length
        ).bits_per_byte
    checkpoint.save(model, folder / "checkpoint")
    if measured_folder(experiment, folder) != folder / "checkpoint":
        checkpoint.save(model.cast(DTYPES[experiment.measurement.dtype]), measured_folder(experiment, folder))
    samples = _samples(model, dataset, experiment, seed) if arm.objective == "causal" else []
    tokens_per_step = settings.accumulate * settings.batch * settings.context
    timed_ms = step_ms[WARM_UP_STEPS:] or step_ms
    return {
        "arm": name, "seed": seed, "initial": initial, "splits": splits, "samples": samples,
        "gates": [gate.to_dict() for gate in passed],
        "expert_load": expert_load(
            model, validation, objective, context=settings.context, sequences=evaluation.curve_sequences
        ),
        "backend": asdict(model.backend),
        "data_sha256": stream.hexdigest(),
        "train": {
            "tokens": settings.steps * tokens_per_step,
            "tokens_per_step": tokens_per_step,
            "step_ms": timed_ms,
            "median_step_ms": statistics.median(timed_ms),
            **memory,
        },
    }  # fmt: skip


def _gates(model: LanguageModel, dataset: Dataset, arm: Arm) -> list[gates.Gate]:
    """Those of a model as it starts."""
    tokens = _text(dataset, 2, gates.length(model.config, model.device.type) + 1).to(model.device)
    with untimed(model.device):
        return gates.check(model, tokens[:, :-1], untrained=arm.start == "scratch")


def _gradient_tokens(model: LanguageModel, dataset: Dataset) -> torch.Tensor:
    """(rows, T + 1), for inputs and targets of T tokens."""
    rows, length = gates.gradient_shape(model.config, model.device.type)
    return _text(dataset, rows, length + 1).to(model.device)


def _gradient_gates(model: LanguageModel, tokens: torch.Tensor, precision: str) -> list[gates.Gate]:
    """In float32 and in the precision of training. What did not train has no choice of Triton's, and these few tokens
    are to make none."""
    found = []
    for one in dict.fromkeys(("float32", precision)):
        with nullcontext() if one == precision else untimed(model.device):
            found.append(gates.check_gradients(model, tokens[:, :-1], tokens[:, 1:], one))
    return found


def spread(tokens: np.ndarray, count: int, length: int) -> torch.Tensor:
    """(count, length): windows at even distances over a split, the first at its start."""
    starts = [int(i * (len(tokens) - length) / max(1, count)) for i in range(count)]
    at = np.array(starts, dtype=np.int64)[:, None] + np.arange(length)
    return torch.from_numpy(tokens[at].astype(np.int64))


def _samples(model: LanguageModel, dataset: Dataset, experiment: Experiment, seed: int) -> list[dict[str, Any]]:
    """Continuations of the starts of validation text, the same prompts for every arm and seed."""
    settings = experiment.evaluation
    tokens = dataset.splits["validation"].tokens
    samples = []
    model.eval()
    for prompt in spread(tokens, settings.samples, min(PROMPT, len(tokens) // 2)).to(model.device):
        sampling = Sampling(temperature=settings.temperature)
        ids = [int(t) for t in generate(model, prompt[None], settings.sample_tokens, sampling, seed=seed)]
        samples.append({
            "prompt": dataset.tokenizer.decode(prompt.tolist()),
            "text": dataset.tokenizer.decode(ids),
            "temperature": settings.temperature,
        })  # fmt: skip
    return samples


def measured_folder(experiment: Experiment, folder: Path) -> Path:
    """The checkpoint of the trained model in `folder` that is measured: another one where it is measured in another
    type than it was trained in."""
    settings = experiment.measurement
    same = settings.dtype == "float32" or not settings.enabled
    return folder / ("checkpoint" if same else f"checkpoint-{settings.dtype}")


def measure_cell(
    send: Send, experiment: Experiment, phase: str, context: int | None, batch: int | None, dataset_folder: Path,
    folder: Path,
) -> Generator[None, None, dict[str, Any]]:  # fmt: skip
    """One phase of the trained model in `folder`: load, prefill or decode, these turn by turn; batch None: that of the
    settings."""
    device = prepare_process(experiment)
    settings, folder = experiment.measurement, measured_folder(experiment, folder)
    if phase == "load":
        return measure_load(folder, settings, device)
    assert context is not None
    tokens = _text(Dataset.load(dataset_folder), batch or settings.batch, context)
    measure = measure_prefill if phase == "prefill" else measure_decode
    return (yield from measure(folder, settings, context, tokens, device))


def build_cell(
    send: Send, experiment: Experiment, arm: Arm, seed: int, dtype: str, dataset_folder: Path, folder: Path
) -> dict[str, Any]:
    """An initialised model, checked and written under `folder`, for studies that do not train."""
    device = prepare_process(experiment)
    dataset = Dataset.load(dataset_folder)
    model = first_model(arm, model_config(arm, dataset.vocabulary), seed, device)
    passed = _gates(model, dataset, arm)
    tokens = _gradient_tokens(model, dataset)
    with untimed(device):
        passed.append(gates.check_gradients(model, tokens[:, :-1], tokens[:, 1:], "float32"))
    checkpoint.save(model.cast(DTYPES[dtype]), folder / "checkpoint")
    return {"gates": [gate.to_dict() for gate in passed], "backend": asdict(model.backend)}


def memory_cell(
    send: Send, experiment: Experiment, phase: str, context: int | None, batch: int | None, way: str | None,
    dataset_folder: Path, folder: Path,
) -> Generator[None, None, dict[str, Any]]:  # fmt: skip
    """The memory of one phase of the model in `folder`: load in one of the ways, prefill, decode, a training step. Of
    prefill and of a training step also what shapes alone say of it."""
    device, settings = prepare_process(experiment), experiment.memory
    folder = folder / "checkpoint"
    if way is not None:
        return measure_load(folder, Measurement(repeats=LOADS, seconds=0), device, way)
    assert context is not None
    assert batch is not None
    config = checkpoint.read_config(folder)
    with untimed(device):
        if phase == "step":
            tokens = _text(Dataset.load(dataset_folder), batch, context + 1)
            measured = measure_step(folder, tokens, device, settings.dtype)
            return measured | _predicted(
                config, lambda: asdict(replay.training(config, batch, context, device.type, settings.dtype))
            )
        measure = measure_prefill if phase == "prefill" else measure_decode
        tokens = _text(Dataset.load(dataset_folder), batch, context)
        once = Measurement(decode_tokens=settings.decode_tokens)
        measured = yield from measure(folder, once, context, tokens, device, times=False)
    if phase == "decode":
        return measured
    dtype = DTYPES[settings.dtype]
    return measured | _predicted(
        config, lambda: {"peak": replay.prefill(config, batch, context, dtype, device.type)}
    )  # fmt: skip


def _predicted(config: ModelConfig, replayed: Callable[[], dict[str, int]]) -> dict[str, Any]:
    """What `replayed` gives, or why there is nothing: what was measured is not lost for want of a prediction."""
    reason = replay.unpredictable(config)
    if reason is None:
        try:
            return {"predicted": replayed()}
        except Exception as error:
            reason = f"the replay failed: {type(error).__name__}: {error}".splitlines()[0]
    return {"predicted": None, "unpredicted": reason}


def speed_cell(
    send: Send, experiment: Experiment, phase: str, context: int, batch: int, mode: str, dtype: str,
    dataset_folder: Path, folder: Path,
) -> Generator[None, None, dict[str, Any]]:  # fmt: skip
    """The speed of one phase of the model in `folder`, in one execution mode and type, turn by turn."""
    subject = _subject(experiment, mode, dtype, folder)
    return measure_speed(subject, phase, _text(Dataset.load(dataset_folder), batch, context + 1))


def speed_cells(
    send: Send, experiment: Experiment, phase: str, shapes: list[tuple[int, int]], mode: str, dtype: str,
    dataset_folder: Path, folder: Path,
) -> Generator[None, None, list[Any]]:  # fmt: skip
    """Those of one phase at several shapes (context, batch), of one model in one process."""
    subject, dataset = _subject(experiment, mode, dtype, folder), Dataset.load(dataset_folder)
    works = [measure_speed(subject, phase, _text(dataset, batch, context + 1)) for context, batch in shapes]
    return side_by_side(works)


def _subject(experiment: Experiment, mode: str, dtype: str, folder: Path) -> Subject:
    model = load(folder / "checkpoint", prepare_process(experiment), "direct")
    return Subject(model, experiment.speed, mode, dtype)


def _text(dataset: Dataset, rows: int, length: int) -> torch.Tensor:
    """(rows, length): the start of the validation text, repeated where that is shorter."""
    tokens = dataset.splits["validation"].tokens
    at = np.arange(rows * length).reshape(rows, length) % len(tokens)
    return torch.from_numpy(tokens[at].astype(np.int64))
