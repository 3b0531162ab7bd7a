"""From an experiment to a finished run directory: prepare the data, then arms x seeds x phases, then the report."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from experiments import capacity, cells, report, store
from experiments.data import corpora, tokenizer
from experiments.data.batches import require_length
from experiments.data.dataset import default_cache
from experiments.data.prepared import Prepared, prepare_all, tokens_per_byte
from experiments.environment import describe, source_sha256
from experiments.errors import EnvironmentLacksError, LabError, RunFailedError, SpecError
from experiments.kernels.check import kernels_of, of_this_gpu
from experiments.limits import available_cores
from experiments.measurement.process import CellFailedError, Job, run_fresh, take_turns
from experiments.result import build_result
from experiments.spec import Experiment
from experiments.store import Cell, RunDirectory, write_json
from experiments.studies import STUDIES
from experiments.training import DTYPES
from models import checkpoint
from models.config import ModelConfig
from models.errors import ConfigError, nearest
from models.feedforward import FEEDFORWARDS
from models.mixers import MIXERS
from models.ops.kernels import has_triton

# of the environment, what a run that goes on must find as it was: its numbers would not compare with new ones
SETTLED = (
    "source_sha256", "cpu", "cpu_instructions", "cores", "gpu", "gpu_driver", "threads", "gomp_spincount", "packages",
    "python",
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something a person may want to see. kind: note, start, step, finish, skip, failure, warning.

    done, total: cells for start and finish, training steps for step.
    """

    kind: str
    message: str = ""
    cell: str | None = None
    done: int = 0
    total: int = 0


Listener = Callable[[Event], None]


class InterruptedRunError(LabError):
    """Ctrl-C. Every finished cell is kept."""

    def __init__(self, run: RunDirectory, missing: list[str]) -> None:
        self.run, self.missing = run, missing
        super().__init__(f"interrupted; {len(missing)} cells missing in {run.path}")


def resolve_device(asked: str) -> Literal["cpu", "cuda"]:
    """`auto` is the GPU where there is one. Raises EnvironmentLacksError for a GPU that is not there."""
    if asked not in ("auto", "cpu", "cuda"):
        raise SpecError(f"unknown device '{asked}': {nearest(asked, ('auto', 'cpu', 'cuda'))}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLacksError("device cuda was asked for, but torch sees no CUDA GPU; use --device cpu")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def check(experiment: Experiment, begun: bool = False) -> None:
    """Everything that can be known to fail before any work: device, threads, where the text is, models, backends. Not
    memory (experiments.capacity): what a run that was begun asks for is settled, and its cells fail alone.

    Raises EnvironmentLacksError, SpecError, CorpusError, ConfigError, BackendUnavailableError.
    """
    if experiment.learning_rates and experiment.evaluation.splits != ("validation",) and not begun:
        raise SpecError("a sweep over learning_rates chooses on the validation split, and the test split is not for "
                        'choosing: set evaluation.splits=["validation"]')  # fmt: skip
    resolve_device(experiment.device)
    if experiment.threads > (cores := available_cores()):
        raise EnvironmentLacksError(f"threads = {experiment.threads}, but this process may use {cores} cores only")
    corpora.read(experiment.data)  # finds the files, and reads none
    if experiment.data.tokenizer:
        tokenizer.given(Path(experiment.data.tokenizer))
    if experiment.study == "speed":
        for mode in experiment.speed.modes:
            _check_mode(mode, experiment.speed.dtypes, experiment)
    elif experiment.trains and experiment.measurement.enabled:
        _check_mode(experiment.measurement.decode_mode, (experiment.measurement.dtype,), experiment)
    for config in cells.model_configs(experiment).values():
        _check_positions(config, experiment)
        for block in config.kinds:
            MIXERS[block.mixer.kind].select(block.mixer, config.width, torch.device(experiment.device))


def _check_mode(mode: str, dtypes: Sequence[str], experiment: Experiment) -> None:
    """A mode is there for every arm in every type or refused."""
    if mode != "eager" and experiment.device == "cpu":
        reason = "CUDA graphs need a GPU"
        if mode == "compiled":
            reason = "torch.compile cannot trace the kernels that run there"
        refused = f"mode '{mode}' is refused for every arm on a CPU: {reason}"
        if torch.cuda.is_available():
            raise ConfigError(refused)
        if experiment.profile == "cuda":
            raise EnvironmentLacksError(f"profile 'cuda' is for a GPU, and torch sees none here (its {refused}); "
                                        "use --profile cpu")  # fmt: skip
        raise EnvironmentLacksError(f"{refused}, and torch sees no GPU here; a CPU has mode eager")
    if mode != "eager" and not has_triton():
        raise ConfigError(f"mode '{mode}' is refused for every arm: it needs Triton (pip install triton)")
    for name, config in cells.model_configs(experiment).items() if mode != "eager" else ():
        for block in config.kinds:
            kind = None if block.feedforward is None else FEEDFORWARDS[block.feedforward.kind]
            for dtype in dtypes:
                device = torch.device(experiment.device)
                if kind is not None and (reason := kind.needs_host(DTYPES[dtype], device)) is not None:
                    raise ConfigError(f"mode '{mode}' is refused for every arm, since of '{name}' {reason}")


def _check_positions(config: ModelConfig, experiment: Experiment) -> None:
    """Learned positions must reach as far as the run will."""
    for what, tokens in STUDIES[experiment.study].lengths(experiment, config.causal).items():
        if config.positions is not None and tokens > config.positions:
            raise ConfigError(f"the model has {config.positions} learned positions, {what} need {tokens}")


def run(
    experiment: Experiment, out: Path, *, command: str, listener: Listener = lambda event: None,
    cache: Path | None = None, into: RunDirectory | None = None,
) -> RunDirectory:  # fmt: skip
    """Run what is missing of `experiment` and write its report.

    An unfinished run of the same specification, data and code in `out` is continued; otherwise a new directory is
    made. `into` continues that run, and tries its failed cells again. Cells that fail are recorded and their
    neighbours run. Raises LabError and its kin for what a person can mend, InterruptedRunError on Ctrl-C.
    """
    begun = into is not None

    def note(text: str, group: str | None = None) -> None:
        listener(Event("note", text, group))

    check(experiment, begun)
    _check_out(into.path if into else out, begun)
    if experiment.study == "comparison" and len(experiment.arms) == 1 and not experiment.learning_rates:
        note("one arm: it will be trained and measured, and compared with nothing")
    cache = cache or default_cache()
    dataset = prepare_all(experiment.data, experiment.vocabularies, cache, note)
    _check_lengths(experiment, dataset)
    directory = into or _unfinished(experiment, dataset, out)
    if directory is None:
        capacity.check(experiment)
    with _writable(out, begun), ExitStack() as held:
        if directory is None:
            found = _made_ready(experiment, dataset, listener, cache)
            directory = _new_directory(experiment, dataset, out)
            held.enter_context(_alone(directory))
            _begin(directory, experiment, dataset, command, found)
        else:
            held.enter_context(_alone(directory))
            _check_same_run(directory, experiment, dataset)
            note(f"continuing {directory.path}")
            _make_good(directory, experiment, dataset, note)
        todo = _todo(directory, experiment, retry=begun)
        if not todo:
            note(f"{directory.path} has every cell; nothing is left to run")
        try:
            _run_cells(directory, experiment, dataset, todo, listener)
        except KeyboardInterrupt:
            directory.event("warning", store.INTERRUPTED)
            result = _finish(directory, experiment, dataset)
            raise InterruptedRunError(directory, result["missing"]) from None
        result = _finish(directory, experiment, dataset)
    for warning in result["warnings"]:
        listener(Event("warning", warning))
    study = STUDIES[experiment.study]
    if not any(directory.result(cell) for cell in study.plan(experiment) if cell.kind == study.MAKES):
        raise RunFailedError(f"no model could be made, see {directory.path}: {result['failures'][0]['message']}")
    return directory


def run_hash(experiment: Experiment, dataset: Prepared) -> str:
    """Over every field of the resolved specification, the data, the tokenizer, model folders, and the code."""
    parts = [experiment.to_toml(), json.dumps(dataset.facts["files"], sort_keys=True), source_sha256()]
    parts.append(json.dumps(cells.folder_hashes(experiment), sort_keys=True))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _made_ready(experiment: Experiment, dataset: Prepared, listener: Listener, cache: Path) -> dict[str, Any]:
    """Kernels compiled, each model run once, a GPU's kernels checked: what was found, for the environment."""
    listener(Event("note", "compiling kernels"))
    try:
        backends = run_fresh(cells.compile_kernels, experiment, dataset.first.folder)
    except CellFailedError as error:
        raise RunFailedError(f"the models cannot be built and run here: {error}") from None
    kernels = None
    if experiment.device == "cuda":
        called = {kernel for config in cells.model_configs(experiment).values() for kernel in kernels_of(config)}
        kernels = of_this_gpu(cache, lambda text: listener(Event("note", text)), kernels=sorted(called))
    return {"backends": backends, "kernels": kernels}


def _new_directory(experiment: Experiment, dataset: Prepared, out: Path) -> RunDirectory:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = out / f"{stamp}-{experiment.name}-{run_hash(experiment, dataset)}"
    try:
        path.mkdir(parents=True)
    except FileExistsError:  # the same command, in the same second
        raise _in_use(path) from None
    return RunDirectory(path)


@contextmanager
def _alone(directory: RunDirectory) -> Iterator[None]:
    """While no other process is at work on the run: two would train the same cells, and time each other."""
    lock = FileLock(directory.path / store.LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _in_use(directory.path) from None
    try:
        yield
    finally:
        lock.release()


def _in_use(path: Path) -> RunFailedError:
    return RunFailedError(f"another process is at work on {path}: wait until it has ended, or stop it")


def _begin(
    directory: RunDirectory, experiment: Experiment, dataset: Prepared, command: str, found: dict[str, Any]
) -> None:
    (directory.path / "spec.toml").write_text(experiment.to_toml(), encoding="utf-8")
    _keep_tokenizers(directory, experiment, dataset)
    environment = {
        "created": store.now(),
        "command": command,
        "spec_sha256": directory.spec_sha256(),
        "folders": cells.folder_hashes(experiment),
    }
    environment |= describe(experiment.device, experiment.threads)
    environment |= found | {"data": dataset.facts}
    write_json(directory.path / "environment.json", environment)
    directory.event("progress", f"started: {command}")


def _keep_tokenizers(directory: RunDirectory, experiment: Experiment, dataset: Prepared) -> list[Path]:
    """Those that were not there yet, or not whole."""
    kept = []
    for cell in experiment.cells():
        file = directory.path / experiment.tokenizer_file(cell)
        whole = dataset.datasets[experiment.vocabulary_of(cell)].tokenizer_path
        if not file.is_file() or file.read_bytes() != whole.read_bytes():
            part = file.with_suffix(".part")
            shutil.copy(whole, part)
            part.replace(file)
            kept.append(file)
    return kept


def _make_good(
    directory: RunDirectory, experiment: Experiment, dataset: Prepared, note: Callable[..., None]
) -> None:  # fmt: skip
    """What a run has lost since it began: tokenizers are put back; the cells of a model that lost a file are forgotten,
    so that they are done again. note: is told, with the cells' group where it is about one."""
    for file in _keep_tokenizers(directory, experiment, dataset):
        note(f"{file} was missing or damaged and is there again")
    for group, file in _without_model(directory, experiment).items():
        note(f"{file} is missing or damaged: the model and what was measured of it are made again", group)
        for cell in STUDIES[experiment.study].plan(experiment):
            if cell.group == group:
                directory.forget(cell)


def _without_model(directory: RunDirectory, experiment: Experiment) -> dict[str, Path]:
    """Groups of cells whose model was made and has lost a file, or a part of it, and that file."""
    study, found = STUDIES[experiment.study], {}
    for cell in study.plan(experiment):
        if cell.kind == study.MAKES and directory.result(cell) is not None:
            folder = directory.folder(cell)
            folders = dict.fromkeys((folder / "checkpoint", cells.measured_folder(experiment, folder)))
            gone = [file for one in folders for file in checkpoint.lost(one)]
            if gone:
                found[cell.group] = gone[0]
    return found


def _unfinished(experiment: Experiment, dataset: Prepared, out: Path) -> RunDirectory | None:
    suffix = f"-{experiment.name}-{run_hash(experiment, dataset)}"
    for candidate in reversed(store.runs(out)):
        if candidate.path.name.endswith(suffix):
            planned = STUDIES[experiment.study].plan(experiment)
            done = all(candidate.result(c) or candidate.failure(c) for c in planned)
            return None if done else candidate
    return None


def _check_same_run(directory: RunDirectory, experiment: Experiment, dataset: Prepared) -> None:
    then, here = directory.environment(), describe(experiment.device, experiment.threads)
    directory.check_spec(then)
    for key in SETTLED:
        if then[key] != here[key]:
            raise RunFailedError(
                f"{directory.path} was begun with {key} = {then[key]}, and here it is {here[key]}: its numbers would "
                f"not compare with new ones; start a new run in another --out"
            )
    if then.get("folders", {}) != cells.folder_hashes(experiment):
        raise RunFailedError(f"{directory.path} was begun with other models in their folders; start a new run")
    if then["data"]["files"] != dataset.facts["files"]:
        raise RunFailedError(f"{directory.path} was begun with other data; start a new run in another --out")


def _check_lengths(experiment: Experiment, dataset: Prepared) -> None:
    if STUDIES[experiment.study].MAKES != "train":
        return  # its text is repeated where it is short
    for vocabulary, one in dataset.datasets.items():
        context = experiment.seen_with(tokens_per_byte(one.facts, vocabulary)).training.context
        for name in {"train", "validation", *experiment.evaluation.splits}:
            require_length(f"{name} split", one.splits[name].tokens, context)


def _todo(directory: RunDirectory, experiment: Experiment, retry: bool) -> list[Cell]:
    """What is missing. Cells that take turns are done together or not at all, so that all of them are of one sitting:
    where one is missing, the results of the others are dropped."""
    study, todo = STUDIES[experiment.study], []
    for group in _groups(study.plan(experiment), study, experiment):
        wanted = [cell for cell in group if retry or directory.failure(cell) is None]
        if any(directory.result(cell) is None for cell in wanted):
            todo += wanted
            for cell in wanted:
                directory.forget(cell)
    return todo


def _run_cells(
    directory: RunDirectory, experiment: Experiment, dataset: Prepared, todo: list[Cell], listener: Listener
) -> None:
    study = STUDIES[experiment.study]
    ended = 0
    for group in _groups(todo, study, experiment):
        able = []
        for cell in group:
            if cell.kind != study.MAKES and not directory.result(Cell(cell.arm, cell.seed, study.MAKES)):
                message = "the model was not trained" if study.MAKES == "train" else "the model was not built"
                directory.fail(cell, message, "")
                listener(Event("skip", message, cell.name))
                ended += 1
            else:
                able.append(cell)
        jobs: dict[tuple[Cell, ...], Job] = {}
        for shared in _processes(able, study, experiment):
            alone = len(shared) == 1
            work, details = study.work(shared[0], experiment) if alone else study.work_together(shared, experiment)
            folder = dataset.datasets[experiment.vocabulary_of(shared[0].arm)].folder
            jobs[tuple(shared)] = (work, (experiment, *details, folder, directory.folder(shared[0])))
        turns = f", taking turns with {len(able) - 1} more" if len(able) > 1 else ""
        listener(Event("start", cell=f"{able[0].name}{turns}" if able else None, done=ended, total=len(todo)))

        def on_message(shared: tuple[Cell, ...], message: Any) -> None:
            _, step, steps = message
            listener(Event("step", cell=shared[0].name, done=step, total=steps))

        with closing(take_turns(jobs, on_message=on_message, timeout_s=experiment.cell_timeout_s)) as outcomes:
            for shared, outcome in outcomes:
                each = outcome if isinstance(outcome, list) else [outcome] * len(shared)
                for cell, one in zip(shared, each, strict=True):
                    ended += 1
                    _record(directory, cell, one, listener, ended, len(todo))


def _record(directory: RunDirectory, cell: Cell, outcome: Any, listener: Listener, ended: int, total: int) -> None:
    """outcome: a cell's result, or the CellFailedError that it ended with."""
    if not isinstance(outcome, CellFailedError):
        try:
            directory.finish(cell, outcome)
        except ValueError as error:  # JSON has no infinity
            outcome = CellFailedError(f"its result holds a number that is not finite ({error})")
    if isinstance(outcome, CellFailedError):
        if (full := os.strerror(errno.ENOSPC)) in str(outcome):  # no cell after it would fare better
            raise OSError(errno.ENOSPC, full, str(directory.path))
        directory.fail(cell, str(outcome), outcome.detail)
        directory.event("failure", str(outcome), cell.name)
        listener(Event("failure", str(outcome), cell.name))
    else:
        directory.event("progress", "finished", cell.name)
        listener(Event("finish", cell=cell.name, done=ended, total=total))


def _processes(group: list[Cell], study: Any, experiment: Experiment) -> list[list[Cell]]:
    """The cells of a group by the process that they run in."""
    shared: dict[Any, list[Cell]] = {}
    for cell in group:
        key = study.together(cell, experiment)
        shared.setdefault(cell if key is None else key, []).append(cell)
    return list(shared.values())


def _groups(todo: list[Cell], study: Any, experiment: Experiment) -> Iterator[list[Cell]]:
    """Neighbours that take turns together; every other cell by itself."""
    for key, cells_of_key in groupby(todo, lambda cell: study.turns(cell, experiment)):
        group = list(cells_of_key)
        yield from [group] if key is not None else ([cell] for cell in group)


def _finish(directory: RunDirectory, experiment: Experiment, dataset: Prepared) -> dict[str, Any]:
    result = store.sealed(build_result(directory, experiment, dataset.facts))
    write_json(directory.path / "result.json", result)
    report.write_report(directory.path)
    return result


def _check_out(out: Path, begun: bool) -> None:
    """Before minutes of preparation, whether runs can be kept there, or one that was begun there can go on. Raises
    SpecError, EnvironmentLacksError."""
    place = next(place for place in (out, *out.absolute().parents) if os.path.exists(place))
    if not os.path.isdir(place):
        raise SpecError(f"'{place}' is a file, runs need a folder; choose another with --out")
    if not os.access(place, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
        raise EnvironmentLacksError(f"cannot write '{place}': {os.strerror(number)}; {_remedy(number, begun)}")


@contextmanager
def _writable(out: Path, begun: bool) -> Iterator[None]:
    """Turn a folder that cannot be written, or a full disk, into one line; what is finished stays."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except FileNotFoundError as error:
        if out.is_dir():
            raise  # not about the folder: a defect
        raise EnvironmentLacksError(
            f"cannot make '{out}': {error.strerror}; choose another folder with --out"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        where, remedy = error.filename or out, _remedy(error.errno, begun)
        raise EnvironmentLacksError(f"cannot write '{where}': {error.strerror}; {remedy}") from None


def _remedy(number: int, begun: bool) -> str:
    """begun: before this command. Such a run is nowhere else."""
    elsewhere = "choose another folder with --out"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room there, and the same command goes on" + ("" if begun else f"; or {elsewhere}")
    return "make the folder writable" if begun else elsewhere
