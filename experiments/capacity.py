"""Whether the largest cell of a run on a CPU fits into this machine's memory, told before anything is trained or
measured. Otherwise the system would run out of memory in the middle of it, and kill a process that may be another.

By shapes alone (models.replay): what a cell holds beside them, its copy of the text and of Python, is not counted, nor
what else is alive; swap is. So what is refused cannot fit, and what is not refused may not fit either. Nothing is said
of forms that are not the CPU's own, nor of vocabularies whose loss is made in very many chunks: their replay would take
minutes.

B: batch   T: tokens of context   D: width
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil

from experiments import cells
from experiments.errors import EnvironmentLacksError
from experiments.limits import free_memory
from experiments.measurement.operations import PIECE
from experiments.numbers import size
from experiments.spec import Experiment
from experiments.studies import STUDIES
from experiments.training import DTYPES
from models import cost, replay
from models.config import ModelConfig
from models.ops.cross_entropy import CHUNK_BYTES

# float32 numbers for each layer and each of B x T x D: more than any preset holds, what is outside its layers included
GENEROUS = {"train": 128, "prefill": 48, "decode": 48}
MARGIN = 1.05  # measured peaks are up to 1.5% below what shapes say, and longer lengths are told from shorter ones
LARGEST_VOCABULARY = 1 << 16
OF = {"train": "a training step of", "prefill": "reading a prompt of", "decode": "decoding after"}
ROWS, CONTEXT = 16, 2048  # B and T up to which shapes are replayed, and more while the loss is made in few chunks


class Work(NamedTuple):
    """What a cell computes. kind: "train"; "prefill" of reading a prompt into an empty state; "decode" of doing so in
    pieces, to go on from."""

    arm: str
    kind: str
    batch: int
    context: int
    dtype: str


def check(experiment: Experiment) -> None:
    """Raises EnvironmentLacksError. A GPU that is full says so itself, and the cell that filled it fails alone."""
    if experiment.device != "cpu":
        return
    free = free_memory() + psutil.swap_memory().free
    configs = cells.model_configs(experiment)
    for work in largest(experiment):
        config = configs[work.arm]
        if generous_bytes(config, work) <= free or not _replayed(config):
            continue
        needed = least_bytes(config, work)
        if needed > MARGIN * free:
            what = f"{OF[work.kind]} {work.batch} x {work.context:,} tokens"
            raise EnvironmentLacksError(
                f"{what} takes '{work.arm}' about {size(needed)} by its shapes, and {size(free)} of memory are free "
                f"here, swap included: choose fewer tokens or a smaller batch"
            )


def _replayed(config: ModelConfig) -> bool:
    own = all(block.mixer.backend in ("auto", "numba") for block in config.kinds)
    return own and config.vocabulary <= LARGEST_VOCABULARY and not replay.unpredictable(config)


def largest(experiment: Experiment) -> list[Work]:
    """Of every arm, by kind; of decode that which keeps the most tokens and that which reads the most at once."""
    found: dict[tuple[str, str, Callable[[Work], int]], Work] = {}
    for work in _works(experiment):
        for tokens in (_kept, _at_once):
            known = found.setdefault((work.arm, work.kind, tokens), work)
            if work.batch * tokens(work) > known.batch * tokens(known):
                found[work.arm, work.kind, tokens] = work
    return list(dict.fromkeys(found.values()))


def _kept(work: Work) -> int:
    return work.context


def _at_once(work: Work) -> int:
    return min(work.context, PIECE) if work.kind == "decode" else work.context


def _works(experiment: Experiment) -> Iterator[Work]:
    """Of the cells whose tokens are known before the text is: not of the vocabulary study, whose lengths are bytes."""
    training, measured = experiment.training, experiment.measurement
    dtype = experiment.memory.dtype if experiment.study == "memory" else measured.dtype
    for cell in STUDIES[experiment.study].plan(experiment) if experiment.study != "vocabulary" else ():
        if cell.kind == "train":
            yield Work(cell.arm, "train", training.batch, training.context, training.precision)
        elif cell.kind in ("step", "prefill", "decode") and cell.context is not None:
            kind = "train" if cell.kind == "step" else cell.kind
            yield Work(cell.arm, kind, cell.batch or measured.batch, cell.context, cell.dtype or dtype)


def generous_bytes(config: ModelConfig, work: Work) -> int:
    """More than a preset takes."""
    activations = GENEROUS[work.kind] * 4 * config.width * config.layers * work.batch * work.context
    return 5 * cost.weight_bytes(config, 4) + activations


def least_bytes(config: ModelConfig, work: Work) -> int:
    """Weights, what the optimizer keeps of them, and what shapes say of the rest. From some size on that grows as it
    did before, or faster: of what grows more slowly one is the cache of a window, which is counted exactly, the other
    the logits, of which a chunk exists and a copy of one before."""
    element = DTYPES[work.dtype].itemsize

    def state(rows: int, context: int) -> int:
        return 0 if work.kind == "train" else cost.state_bytes(config, rows, context, element)

    def beside_state(rows: int, context: int) -> int:
        if work.kind == "train":
            return replay.training(config, rows, context, precision=work.dtype).peak
        return replay.prefill(config, rows, context, DTYPES[work.dtype]) - state(rows, context)

    at_once = _at_once(work)
    two_chunks = CHUNK_BYTES["cpu"] // (2 * config.vocabulary)  # of tokens

    def of_rows(rows: int) -> int:
        half = max(CONTEXT // 2, -(-two_chunks // rows))
        return _grown(lambda context: beside_state(rows, context), at_once, half)

    weights = 3 * cost.weight_bytes(config, 4) if work.kind == "train" else cost.weight_bytes(config, element)
    half = max(ROWS // 2, -(-two_chunks // at_once))
    return weights + state(work.batch, work.context) + _grown(of_rows, work.batch, half)


def _grown(bytes_of: Callable[[int], int], size: int, half: int) -> int:
    """`bytes_of(size)`; of a size above two halves, on the line through those of one half and two."""
    if size <= 2 * half:
        return bytes_of(size)
    whole = bytes_of(2 * half)
    return whole + (whole - bytes_of(half)) * (size - 2 * half) // half
