"""Speed over context length, batch and execution mode: a training step, prefill, decode, and each mixer's operation by
itself, beside the machine's ceilings; and the lengths from which on one arm is faster than another."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from experiments import cells
from experiments.measurement.speed import OPERATORS
from experiments.numbers import listed, multiple, number, plural
from experiments.rows import per_step, percentiles, rate, row, turn_ms
from experiments.spec import Experiment
from experiments.store import Cell, RunDirectory
from experiments.studies.pairing import comparability
from experiments.training import DTYPES
from models import cost
from models.config import ModelConfig

MAKES = "build"
PHASES = {"step": "train", "prefill": "prefill", "decode": "decode", "forward": "operator", "backward": "operator"}
LATENCY = {"train": "step_ms", "prefill": "time_to_first_token_ms", "decode": "ms_per_token"}
RESAMPLES = 2000  # of the turns, for intervals


def plan(experiment: Experiment) -> list[Cell]:
    """The cells that take turns, directly after each other."""
    settings, configs = experiment.speed, cells.model_configs(experiment)
    planned = [Cell(arm, seed, "build") for seed in experiment.seeds for arm in configs]
    for seed in experiment.seeds:
        for mode, dtype in product(settings.modes, settings.dtypes):
            for context in settings.train_contexts:
                batch = max(1, settings.train_tokens // context)
                planned += [Cell(arm, seed, "step", context, batch, mode, dtype) for arm in configs]
            for batch in settings.batches:
                for phase in ("prefill", "decode"):
                    for context in settings.contexts:
                        causal = [arm for arm, config in configs.items() if config.causal]
                        planned += [Cell(arm, seed, phase, context, batch, mode, dtype) for arm in causal]
        alone = [arm for arm, config in configs.items() if any(b.mixer.kind in OPERATORS for b in config.kinds)]
        for kind, dtype in product(("forward", "backward"), settings.dtypes):
            for context in settings.operator_contexts:
                planned += [Cell(arm, seed, kind, context, 1, "eager", dtype) for arm in alone]
    return planned


def turns(cell: Cell, experiment: Experiment) -> tuple | None:
    """The arms of one measurement take turns, at every length where `_every_length`."""
    if cell.kind == "build":
        return None
    if _every_length(cell, experiment):
        return (cell.seed, cell.kind, None if cell.kind == "step" else cell.batch, cell.mode, cell.dtype)
    return (cell.seed, cell.kind, cell.batch, cell.mode, cell.dtype, cell.context)


def together(cell: Cell, experiment: Experiment) -> tuple | None:
    of_turns = turns(cell, experiment)
    return (cell.arm, *of_turns) if of_turns is not None and _every_length(cell, experiment) else None


def _every_length(cell: Cell, experiment: Experiment) -> bool:
    """Whether an arm has one process for all lengths. Of decode, whose cost over the length is a question of its own:
    where a process's memory came to lie is worth as much as a length. On a GPU of everything: there a process takes
    longer to start than most cells."""
    return cell.kind == "decode" or experiment.device == "cuda"


def lengths(experiment: Experiment, causal: bool) -> dict[str, int]:
    settings = experiment.speed
    needs = {"speed.train_contexts": settings.train_contexts[-1]}
    return needs | (
        {"speed.contexts and decode_tokens": settings.contexts[-1] + settings.decode_tokens} if causal else {}
    )


def work(cell: Cell, experiment: Experiment) -> tuple[Callable[..., Any], tuple]:
    if cell.kind == "build":
        return cells.build_cell, (experiment.arms[cell.arm], cell.seed, "float32")
    return cells.speed_cell, (cell.kind, cell.context, cell.batch, cell.mode, cell.dtype)


def work_together(shared: list[Cell], experiment: Experiment) -> tuple[Callable[..., Any], tuple]:
    first = shared[0]
    return cells.speed_cells, (first.kind, [(cell.context, cell.batch) for cell in shared], first.mode, first.dtype)


def rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    if cell.kind == "build":
        return
    assert cell.context is not None
    assert cell.batch is not None
    phase = PHASES[cell.kind]
    common = {"backend": result["backend"]}
    times = percentiles(turn_ms(result).tolist())
    name = "tokens_per_s" if phase != "operator" else f"{cell.kind}_tokens_per_s"
    speed = rate(times, result["tokens_per_sample"])
    yield row(cell, phase, name, unit="tokens/s", direction="higher", **speed, **common)
    if phase == "operator":
        return
    steps = result["tokens_per_sample"] / cell.batch if phase == "decode" else 1
    yield row(cell, phase, LATENCY[phase], unit="ms", direction="lower", **per_step(times, steps), **common)
    yield row(cell, phase, "first_call_ms", result["first_call_ms"], "ms", "none", **common)
    config = cells.kept_config(run.folder(cell))
    yield from _achieved(cell, phase, config, result, speed, common)


def _achieved(
    cell: Cell, phase: str, config: ModelConfig, result: dict[str, Any], speed: dict[str, float], common: dict
) -> Iterator[dict]:  # fmt: skip
    """Arithmetic done per second, of decode bytes read, beside what the machine can do, and its share of that, formed
    turn by turn; of decode also the tokens/s that the machine's memory would allow. speed: of tokens per second."""
    context, batch = cell.context or 0, cell.batch or 0
    if phase == "decode":
        element = DTYPES[cell.dtype or "float32"].itemsize
        what, unit, size = "bytes", "bytes/s", cost.decode_bytes(config, batch, context, element) / batch
    else:
        what, unit = "flops", "FLOP/s"
        size = cost.training_flops_per_token(config, context) if phase == "train" else (
            cost.forward_flops_per_token(config, context, predicted=1 / context))  # fmt: skip
    done = {key: value if key == "n" else size * value for key, value in speed.items()}
    yield row(cell, phase, f"{what}_per_s", unit=unit, direction="higher", **done, **common)
    ceilings = {name: np.array([one[name] for one in result["ceilings"]]) for name in result["ceilings"][0]}
    for name, values in ceilings.items():
        in_unit = "bytes/s" if name == "bytes_per_s" else "FLOP/s"
        of_machine = percentiles(values.tolist())
        yield row(cell, phase, f"ceiling_{name}", unit=in_unit, direction="none", **of_machine, **common)
    ceiling = ceilings[f"{what}_per_s"]
    shares = percentiles((size * speeds_of_turns(result) / ceiling).tolist())
    share = "bandwidth_utilisation" if what == "bytes" else "flops_utilisation"
    yield row(cell, phase, share, unit="share", direction="higher", **shares, **common)
    if phase == "decode":
        roof = float(np.median(ceiling)) / size
        yield row(cell, phase, "roofline_tokens_per_s", roof, "tokens/s", "none", **common)


def speeds_of_turns(result: dict[str, Any]) -> np.ndarray:
    """Tokens per second in each turn."""
    return 1e3 * result["tokens_per_sample"] / turn_ms(result)


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """None: what the study says are lengths, with the spread of repeated timings, not differences over seeds."""
    return []


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """Per phase, batch, mode and type: from which length on the other arms are faster than the first, and how decode
    grows with the length; then how far the machine moved meanwhile."""
    first, *others = experiment.arms
    operations = {arm: _operations(config) for arm, config in cells.model_configs(experiment).items()}
    found = []
    for one in _measured(experiment, run):
        asked = [row for row in rows
                 if (row["phase"], row["mode"], row["dtype"]) == (PHASES[one.kind], one.mode, one.dtype)]  # fmt: skip
        if one.kind != "backward":
            found += [_crossover(one, first, other, asked, operations) for other in others]
        if one.kind == "decode":
            found += [_growth(one, arm, asked) for arm in experiment.arms]
    return [one for one in found if one] + _drift(rows, experiment)


@dataclass
class _Measured:
    """One kind of cell at one batch (None: of training, a matter of the context), mode and type. speeds: tokens/s of
    each turn, by context and arm. planned: the contexts of each arm. host_bound, noisy: the arms and contexts at which
    a GPU waited for its host, so that the host's speed is in them, and at which the timing was noisy."""

    kind: str
    batch: int | None
    mode: str | None
    dtype: str | None
    speeds: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    planned: dict[str, set[int]] = field(default_factory=dict)
    host_bound: set[tuple[str, int]] = field(default_factory=set)
    noisy: set[tuple[str, int]] = field(default_factory=set)

    @property
    def head(self) -> dict[str, Any]:
        return {"phase": self.kind, "batch": self.batch, "mode": self.mode, "dtype": self.dtype}

    def of(self, *arms: str) -> dict[int, list[np.ndarray]]:
        """The speeds of these arms, by context, where all of them have a result."""
        found = self.speeds.items()
        return {at: [by_arm[arm] for arm in arms] for at, by_arm in found if by_arm.keys() >= set(arms)}

    def lost(self, *arms: str) -> dict[str, list[int]]:
        """The contexts at which an arm was to be measured and has no result."""
        every = {arm: [at for at in sorted(self.planned[arm]) if arm not in self.speeds.get(at, {})] for arm in arms}
        return {arm: contexts for arm, contexts in every.items() if contexts}

    def doubts(self, *arms: str, at: Iterable[int]) -> dict[str, bool]:
        """Whether any of these decides by a timing that is in doubt."""
        deciding = {(arm, context) for arm in arms for context in at}
        return {"host_bound": bool(deciding & self.host_bound), "noisy": bool(deciding & self.noisy)}


def _measured(experiment: Experiment, run: RunDirectory) -> list[_Measured]:
    found: dict[tuple, _Measured] = {}
    for cell in plan(experiment):
        if cell.kind == "build":
            continue
        assert cell.context is not None
        key = (cell.kind, None if cell.kind == "step" else cell.batch, cell.mode, cell.dtype)
        one = found.setdefault(key, _Measured(*key))
        one.planned.setdefault(cell.arm, set()).add(cell.context)
        result = run.result(cell)
        if result is None:
            continue
        one.speeds.setdefault(cell.context, {})[cell.arm] = speeds_of_turns(result)
        for doubt, where in (("host_bound", one.host_bound), ("noisy", one.noisy)):
            if result.get(doubt):  # absent in older runs
                where.add((cell.arm, cell.context))
    return [one for one in found.values() if one.speeds]


def _crossover(
    measured: _Measured, first: str, other: str, asked: list[dict], operations: dict[str, int | None]
) -> dict | None:
    """From which length on `other` is faster than `first`; None where that was not asked at two lengths."""
    planned = measured.planned
    if len(planned.get(first, set()) & planned.get(other, set())) < 2:
        return None
    both = measured.of(first, other)
    one = measured.head | {"kind": "crossover", "arm": other, "against": first, "lost": measured.lost(first, other)}
    one |= comparability([row for row in asked if row["arm"] in (first, other)])
    if len(both) < 2:
        one |= {"comparable": False, "reason": "there are no two lengths at which both gave a result"}
    if measured.kind == "forward":
        times = operations[first], operations[other]
        if None in times:
            return None  # more than one kind of operation, of which one was measured
        one["operations"] = dict(zip((first, other), times, strict=True))
        both = {at: [speed / n for speed, n in zip(speeds, times, strict=True)] for at, speeds in both.items()}
    crossing = crossover({at: (a, b) for at, (a, b) in both.items()}) if len(both) > 1 else NO_CROSSING
    one |= crossing | measured.doubts(first, other, at=deciding(crossing["tokens"], sorted(both)))
    return one | {"sentence": _crossing_sentence(one, sorted(both))}


def _growth(measured: _Measured, arm: str, asked: list[dict]) -> dict | None:
    """How an arm's decode grows; None where it has no two lengths."""
    speeds = {at: of_arm for at, (of_arm,) in measured.of(arm).items()}
    if len(speeds) < 2:
        return None
    outside = [at for at in measured.lost(arm).get(arm, []) if not min(speeds) < at < max(speeds)]
    one = measured.head | {"kind": "growth", "arm": arm, "lost": {arm: outside} if outside else {}}
    one |= comparability([row for row in asked if row["arm"] == arm]) | growth(speeds)
    one |= measured.doubts(arm, at=(one["from"], one["to"]))
    return one | {"sentence": _growth_sentence(one)}


def _operations(config: ModelConfig) -> int | None:
    """How often a model does the operation that is measured by itself; None where it has others beside it."""
    kinds = {block.mixer.kind for block in config.blocks}
    return len(config.blocks) if len(kinds) == 1 else None


def _drift(rows: list[dict], experiment: Experiment) -> list[dict]:
    """How far the machine's own ceilings, which every cell measures, moved in the course of the run; of products, which
    are of a cell's type, among the cells of one type."""
    told: list[str] = []
    moved: dict[str, dict[str, float]] = {}
    for metric, unit, what in (("flops_per_s", "GFLOP/s", "matrix products"), ("bytes_per_s", "GB/s", "copies")):
        of_type: dict[str, list[float]] = {}
        for one in rows:
            if one["metric"] == f"ceiling_{metric}" and one["seed"] is not None:
                of_type.setdefault(one["dtype"], []).append(one["value"] / 1e9)
        for dtype, values in of_type.items():
            if len(values) > 1:
                low, high = min(values), max(values)
                of = f" in {dtype}" if len(of_type) > 1 else ""
                told.append(f"{what}{of} from {number(low)} to {number(high)} {unit}")
                moved.setdefault(metric, {})[dtype] = high / low
    if not told:
        return []
    worst = max(ratio for by_type in moved.values() for ratio in by_type.values())
    together = "the arms at one length and of decode every length"
    if experiment.device == "cuda":
        together = "the arms at every length of a phase"
    text = (
        f"From cell to cell the machine's own ceilings moved: {listed(told)}. What took turns, {together}, was "
        f"measured through the same minutes; other differences of speed up to {worst:.2f} times may be the machine's."
    )
    return [{"kind": "drift", "ratios": moved, "sentence": text}]


def crossover(speeds: dict[int, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The length from which on b is faster than a, for (a, b) tokens/s of each turn by context length: where the median
    of their ratios, turn by turn, crosses 1 for the last time. Between measured lengths the ratio is taken as straight
    in the length, which it is where every earlier token adds as much to the time of a token in the one that falls
    behind, and nothing in the other. 0: at every measured length; None: not at the longest. until: b is faster up to
    that length instead, at all shorter ones and at no longer one. ahead: the measured lengths at which b is faster. The
    95% interval resamples the turns of every length."""
    contexts = sorted(speeds)
    generator = np.random.default_rng(0)
    ratios = [_log_ratios(*speeds[at]) for at in contexts]
    medians = np.array([np.median(one) for one in ratios])
    faster = medians > 0
    until = bool(faster[0] and not faster[-1] and not (faster[1:] & ~faster[:-1]).any())

    def crossing(ahead: np.ndarray) -> float:
        return _crossing(contexts, np.where(ahead == 0, TIE, -ahead) if until else ahead)

    resampled = np.array([_medians(one, generator) for one in ratios]).T  # (RESAMPLES, contexts)
    low, high = np.percentile([crossing(one) for one in resampled], [2.5, 97.5], method="nearest")
    tokens, low, high = (_finite(one) for one in (crossing(medians), low, high))
    ahead = [at for at, one in zip(contexts, faster, strict=True) if one]
    return {"tokens": tokens, "ci_low": low, "ci_high": high, "until": until, "ahead": ahead}


TIE = np.finfo(np.float64).tiny  # ahead by so much: at the first length where b is not ahead any more, it is overtaken
NO_CROSSING = {"tokens": None, "ci_low": None, "ci_high": None, "until": False, "ahead": []}


def deciding(tokens: float | None, contexts: list[int]) -> list[int]:
    """The measured lengths, ascending, on which a crossing rests: those on both sides of it; where there is none, all
    that were measured."""
    if not tokens:
        return contexts
    return [max(at for at in contexts if at <= tokens), min(at for at in contexts if at >= tokens)]


def growth(speeds: dict[int, np.ndarray]) -> dict[str, Any]:
    """How many times as long a token takes at the longest of the lengths as at the shortest, from tokens/s of each turn
    by length: the median of the ratios turn by turn, with a 95% interval that resamples the turns."""
    shortest, longest = min(speeds), max(speeds)
    ratios = _log_ratios(speeds[longest], speeds[shortest])
    low, high = np.percentile(_medians(ratios, np.random.default_rng(0)), [2.5, 97.5])
    estimate, low, high = (float(np.exp(x)) for x in (np.median(ratios), low, high))
    return {"from": shortest, "to": longest, "ratio": estimate, "ci_low": low, "ci_high": high}


def _log_ratios(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """log of b over a, over the turns that both had."""
    both = min(len(a), len(b))
    return np.log(b[:both] / a[:both])


def _medians(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Of RESAMPLES draws with replacement."""
    return np.median(values[generator.integers(len(values), size=(RESAMPLES, len(values)))], axis=1)


def _crossing(contexts: list[int], ahead: np.ndarray) -> float:
    """ahead: log of b's speed over a's. Infinity where b is not ahead at the longest length."""
    if ahead[-1] <= 0:
        return np.inf
    behind = [i for i, value in enumerate(ahead) if value <= 0]
    if not behind:
        return 0.0
    i = behind[-1]
    lacking, over = -math.expm1(ahead[i]), math.expm1(ahead[i + 1])
    return contexts[i] + lacking / (lacking + over) * (contexts[i + 1] - contexts[i])


def _finite(value: float) -> float | None:
    return None if np.isinf(value) else float(value)


def _growth_sentence(one: dict[str, Any]) -> str:
    if not one["comparable"]:
        return f"{one['arm']}: how its decode grows, {one['mode']}, in {one['dtype']}, is not said: {one['reason']}."
    batch = f" at batch {one['batch']}" if one["batch"] and one["batch"] > 1 else ""
    unclear = ": which is longer is not resolved" if one["ci_low"] <= 1 <= one["ci_high"] else ""
    grown, low, high = (multiple(one[key]) for key in ("ratio", "ci_low", "ci_high"))
    return (
        f"{one['arm']} decodes a token{batch}, {one['mode']}, in {one['dtype']}, after {one['to']:,} tokens in "
        f"{grown} times (95% interval {low} to {high}) what it takes after {one['from']:,}{unclear}."
        f"{_not_counted(one)}{_doubts(one)}"
    )


def _crossing_sentence(one: dict[str, Any], contexts: list[int]) -> str:
    do = {"step": "train", "prefill": "prefill", "decode": "decode", "forward": "mix"}[one["phase"]]
    does = {"mix": "mixes"}.get(do, f"{do}s")
    batch = f" at batch {one['batch']}" if one["batch"] else ""
    if one["phase"] == "forward":
        mine, theirs = (one["operations"][one[name]] for name in ("arm", "against"))
        batch = f" (its {plural(mine, 'operation')} alone against {theirs})"
    faster = f"faster than {one['against']}{batch}, {one['mode']}, in {one['dtype']}"
    what = f"{one['arm']} {does} {faster}"
    if not one["comparable"]:
        return f"{what}, or slower: the speeds do not compare ({one['reason']})."
    low, high = (_length(one[key], contexts) for key in ("ci_low", "ci_high"))
    spread = "" if low == high else f" (95% interval over the turns: {low} to {high})"
    every = f"from {contexts[0]:,} to {contexts[-1]:,} tokens"
    if one["tokens"] is None and not one["ahead"]:
        what, where = f"At none of the lengths {every} does {one['arm']} {do} {faster}", ""
    elif one["tokens"] is None:
        where = f" at {listed([f'{at:,}' for at in one['ahead']])} tokens only, of the lengths {every}"
        spread = ""  # it is of the length from which on one stays ahead
    elif one["tokens"] == 0:
        where = f", at every length {every}"
    elif one["until"]:
        where = f", up to about {one['tokens']:,.0f} tokens"
        spread += f" and not from there to {contexts[-1]:,}" if one["tokens"] < contexts[-1] else ""
    else:
        before = [f"{at:,}" for at in one["ahead"] if at < one["tokens"]]
        where = f", from about {one['tokens']:,.0f} tokens on" + (f" and at {listed(before)}" if before else "")
    return f"{what}{where}{spread}.{_not_counted(one)}{_doubts(one)}"


def _not_counted(one: dict[str, Any]) -> str:
    lost = [f"{arm} at {listed([f'{at:,}' for at in lengths])}" for arm, lengths in one["lost"].items()]
    return f" Not counted, for want of a result: {listed(lost)} tokens." if lost else ""


def _doubts(one: dict[str, Any]) -> str:
    waiting = " At a length that decides this the GPU waited for its host." if one["host_bound"] else ""
    return waiting + (" At a length that decides this the timing was noisy." if one["noisy"] else "")


def _length(value: float | None, contexts: list[int]) -> str:
    if value is None:
        return f"beyond {contexts[-1]:,}"
    return f"below {contexts[0]:,}" if value == 0 else f"{value:,.0f}"
