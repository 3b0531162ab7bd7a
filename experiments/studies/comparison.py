"""The comparison: arms are trained and evaluated, paired by seed, and the trained models measured."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from experiments import cells
from experiments.numbers import SLIGHT, apart, fitting, left_out, multiple, number, plural, signed
from experiments.objectives import SELECTED
from experiments.rows import (
    PAGE,
    READ_IN_PAGES,
    SEES,
    bytes_row,
    load_rows,
    on_card,
    per_step,
    percentiles,
    rate,
    row,
    turn_ms,
)
from experiments.spec import Experiment
from experiments.statistics import Comparison, Interval, holm, more_seeds, paired_difference, paired_ratio
from experiments.store import Cell, RunDirectory
from models import cost

MAKES = "train"
TIMED = ("train", "prefill", "decode")  # the kinds of cells whose speeds are compared
RESOLVED = 0.05  # Holm-corrected p below which a difference counts as resolved


def plan(experiment: Experiment) -> list[Cell]:
    """Every cell in the order in which it runs. Arms alternate, and swap places from seed to seed, so that a
    machine that slows down in time does not slow down one arm."""
    arms = list(experiment.cells())
    ordered = [(seed, arms if i % 2 == 0 else arms[::-1]) for i, seed in enumerate(experiment.seeds)]
    planned = [Cell(arm, seed, "train") for seed, order in ordered for arm in order]
    if not experiment.measurement.enabled:
        return planned
    phases: list[tuple[str, int | None]] = [("load", None)]
    phases += [(kind, context) for kind in ("prefill", "decode") for context in experiment.measurement.contexts]
    configs = cells.model_configs(experiment)
    planned += [
        Cell(arm, seed, kind, context)
        for seed, order in ordered for kind, context in phases for arm in order
        if kind == "load" or configs[arm].causal
    ]  # fmt: skip
    return planned


def turns(cell: Cell, experiment: Experiment) -> tuple | None:
    """Where speed is measured on a CPU, which other programs use too, the arms of a seed take turns, so that one that
    grows slower in between grows slower for all of them. A GPU is each arm's alone, with all its memory."""
    if experiment.device == "cuda" or not experiment.measurement.enabled or cell.kind not in TIMED:
        return None
    return (cell.seed, cell.kind, cell.context, cell.batch)


def together(cell: Cell, experiment: Experiment) -> None:
    """Each has a process of its own."""


def lengths(experiment: Experiment, causal: bool) -> dict[str, int]:
    """The longest sequences that the run makes, by the settings that say so."""
    measured, sampled = experiment.measurement, experiment.evaluation
    needs = {"training.context": experiment.training.context}
    if measured.enabled and causal:
        needs["measurement.contexts and decode_tokens"] = measured.contexts[-1] + measured.decode_tokens
    if sampled.samples and causal:
        needs[cells.AFTER_A_PROMPT] = cells.PROMPT + sampled.sample_tokens
    return needs


def work(cell: Cell, experiment: Experiment) -> tuple[Callable[..., Any], tuple]:
    """The function that does it in a fresh process, and its arguments after the experiment."""
    if cell.kind == "train":
        return cells.train_cell, (cell.arm, experiment.cells()[cell.arm], cell.seed)
    return cells.measure_cell, (cell.kind, cell.context, cell.batch)


def rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    if cell.kind == "train":
        yield from _quality_rows(cell, result, experiment.cells()[cell.arm].objective)
        yield from _training_rows(cell, result, experiment, run)
    elif cell.kind == "load":
        yield from load_rows(cell, result, batch=None, mode="eager", dtype=experiment.measurement.dtype)
    else:
        yield from _phase_rows(cell, result, experiment)


def _quality_rows(cell: Cell, result: dict[str, Any], objective: str) -> Iterator[dict]:
    common = {"backend": result["backend"]["name"]}
    if objective == "unmasked":
        common |= {"comparable": False, "reason": SEES}
    for split, quality in result["splits"].items():
        if "masked_token_loss" in quality:
            common["n"] = quality["tokens"]
            loss, accuracy = quality["masked_token_loss"], quality["masked_accuracy"]
            yield row(cell, "quality", f"{split}_masked_token_loss", loss, "nats/token", "lower", **common)
            yield row(cell, "quality", f"{split}_masked_accuracy", accuracy, "share", "higher", **common)
            reason = "a masked model gives no likelihood of a text"
            yield row(cell, "quality", f"{split}_bits_per_byte", None, "bits/byte", "lower", reason=reason, **common)
    if not any("bits_per_byte" in quality for quality in result["splits"].values()):
        return
    initial = result["initial"]["test_bits_per_byte"]
    if initial is not None:
        common["n"] = result["splits"]["test"]["tokens"]
        yield row(cell, "quality", "initial_test_bits_per_byte", initial, "bits/byte", "none", **common)
    for split, quality in result["splits"].items():
        common["n"] = quality["tokens"]
        bits = quality["bits_per_byte"]
        yield row(cell, "quality", f"{split}_bits_per_byte", bits, "bits/byte", "lower", **common)
        if split == "test":
            perplexity = quality["token_perplexity"]
            reason = {"reason": common.get("reason") or "too large for a number"} if perplexity is None else {}
            yield row(cell, "quality", "test_token_perplexity", perplexity, "perplexity", "lower", **common | reason)
            losses = quality["loss_at_position"]
            positions = sorted(
                {2**i for i in range(len(losses).bit_length())} & {*range(1, len(losses) + 1)} | {len(losses)}
            )
            for position in positions:
                at = {"context": position, "n": quality["windows"]}
                if position == len(losses):
                    at |= {"comparable": True, "reason": None}  # what follows a window no model sees
                yield row(
                    cell, "quality", "test_loss_at_position", losses[position - 1], "nats/token", "lower",
                    **common | at,
                )  # fmt: skip


def _training_rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    train, settings = result["train"], experiment.training
    common = {
        "backend": result["backend"]["name"], "context": settings.context,
        "batch": settings.batch * settings.accumulate, "mode": "eager", "dtype": settings.precision,
    }  # fmt: skip
    times = percentiles(train["step_ms"])
    yield row(cell, "train", "step_ms", unit="ms", direction="lower", **times, **common)
    yield row(
        cell, "train", "tokens_per_s", unit="tokens/s", direction="higher",
        **rate(times, train["tokens_per_step"]), **common,
    )  # fmt: skip
    yield bytes_row(cell, "train", "peak_bytes", train["peak_bytes"], **common)
    yield from on_card(cell, "train", train, **common)
    predicted = SELECTED if experiment.cells()[cell.arm].objective == "masked" else 1.0
    flops = cost.training_flops_per_token(cells.kept_config(run.folder(cell)), settings.context, predicted)
    yield row(cell, "train", "flops_per_token", flops, "FLOP/token", "none", **common)
    loads = result.get("expert_load")
    if loads:
        busiest = max(max(load) * len(load) for load in loads)
        yield row(cell, "train", "busiest_expert_load", busiest, "x", "lower", **common)


def _phase_rows(cell: Cell, result: dict[str, Any], experiment: Experiment) -> Iterator[dict]:
    common = {
        "batch": result["batch"], "mode": result.get("mode", "eager"), "dtype": experiment.measurement.dtype,
        "backend": result["backend"],
    }  # fmt: skip
    times = percentiles(turn_ms(result).tolist())
    if cell.kind == "prefill":
        tokens, steps, latency = result["context"], 1, "time_to_first_token_ms"
    else:
        tokens = steps = result["tokens_per_sample"]
        latency = "ms_per_token"
    speed = rate(times, result["batch"] * tokens)
    yield row(cell, cell.kind, "tokens_per_s", unit="tokens/s", direction="higher", **speed, **common)
    yield row(cell, cell.kind, latency, unit="ms", direction="lower", **per_step(times, steps), **common)
    metrics = ["peak_bytes", "working_bytes"]
    if cell.kind == "decode":
        metrics += ["state_bytes", "state_bytes_analytic"]
    for metric in metrics:
        reason = UNCOUNTED if result[metric] is None else None
        yield bytes_row(cell, cell.kind, metric, result[metric], reason=reason, **common)
    yield from on_card(cell, cell.kind, result, **common)


# what the verdict speaks about: phase, metric, kind, and at which context where there are several
_QUESTIONS = (
    ("quality", "test_bits_per_byte", "difference", None),
    ("quality", "test_masked_token_loss", "difference", None),
    ("train", "tokens_per_s", "ratio", None),
    ("prefill", "tokens_per_s", "ratio", "longest"),
    ("decode", "tokens_per_s", "ratio", "longest"),
    ("load", "resident_bytes", "ratio", None),
    ("decode", "peak_bytes", "ratio", "longest"),
    ("decode", "state_bytes", "ratio", "longest"),
)

UNCOUNTED = "the steps of a recording work in memory that it has set aside, which no count of allocations shows"
_QUALIFIED = {"peak_bytes", "state_bytes", "test_masked_token_loss"}  # a second question about their phase


class Question(NamedTuple):
    """Of b against a: kind is difference or ratio; context and batch None where the rows need no telling apart."""

    a: str
    b: str
    phase: str
    metric: str
    kind: str
    context: int | None = None
    batch: int | None = None


def questions(experiment: Experiment, a: str, b: str) -> list[Question]:
    """All that the comparison asks of b against a."""
    measured = experiment.measurement
    longest = (measured.contexts[-1], measured.batch)
    return [
        Question(a, b, phase, metric, kind, *(longest if where else (None, None)))
        for phase, metric, kind, where in _QUESTIONS
    ]


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """Every arm against the first, on every question; Holm's correction over all of them. A sweep has none."""
    if experiment.learning_rates:
        return []
    first, *others = experiment.arms
    asked = [one for other in others for one in questions(experiment, first, other)]
    return compared(rows, asked, experiment.device, experiment.seeds)


def compared(rows: list[dict], asked: Sequence[Question], device: str = "cpu", seeds: Sequence[int] = ()) -> list[dict]:
    """A verdict for every question that the rows can answer; Holm's correction over all of these. device: where the
    memory is, which a GPU's allocator counts to the byte, and a process on a CPU in pages. seeds: of the run, else
    those in the rows."""
    paged = READ_IN_PAGES if device == "cpu" else set()
    run = set(seeds) or {row["seed"] for row in rows} - {None}
    drafts: list[tuple[dict, Comparison]] = []
    for one in asked:
        a, b = (by_seed(rows, arm, *one[2:4], context=one.context, batch=one.batch) for arm in (one.a, one.b))
        valued = [{seed for seed, row in side.items() if _compares(row["value"], one.kind)} for side in (a, b)]
        pairable = [seed for seed in a if seed in valued[0] & valued[1]]
        if not pairable:
            continue
        values = [[side[seed]["value"] for seed in pairable] for side in (a, b)]
        lacking = {arm: sorted(run - had) for arm, had in zip((one.a, one.b), valued, strict=True) if run - had}
        pairs = [side[seed] for side in (a, b) for seed in pairable]
        by_shapes = _by_shapes(rows, one)
        head = {
            "id": one.phase if one.metric not in _QUALIFIED else f"{one.phase}-{one.metric}",
            "phase": one.phase, "metric": one.metric, "context": one.context, "batch": one.batch,
            "a": one.a, "b": one.b, "kind": one.kind, "unit": pairs[0]["unit"] if one.kind == "difference" else "x",
            "direction": pairs[0]["direction"], **comparability(pairs), "by_shapes": by_shapes, "lacking": lacking,
        }  # fmt: skip
        if one.kind == "difference":
            drafts.append((head, paired_difference(*values)))
            continue
        ratio = paired_ratio(*values, resolution=PAGE if one.metric in paged else 0)
        told = values[1][0] / values[0][0]
        if one.metric == "state_bytes" and len(pairable) == 1 and told == by_shapes != 1:
            ratio = replace(ratio, exact=True, interval=Interval(told, told, told, 1))  # shapes say it of every seed
        drafts.append((head, ratio))
    return [
        verdict | {"sentence": _sentence(verdict) + _against_shapes(verdict) + without(verdict)}
        for verdict in settled(drafts)
    ]


def _compares(value: float | None, kind: str) -> bool:
    return value is not None and math.isfinite(value) and (kind == "difference" or value > 0)


def _by_shapes(rows: list[dict], one: Question) -> float | None:
    """The ratio of b to a that formulas give, of what has one."""
    where = {"context": one.context, "batch": one.batch}
    a, b = (by_seed(rows, arm, one.phase, f"{one.metric}_analytic", **where) for arm in (one.a, one.b))
    return next((b[seed]["value"] / a[seed]["value"] for seed in a if seed in b and a[seed]["value"]), None)


def _against_shapes(v: dict) -> str:
    """Said where a resolved difference lies on the other side than that of what is stored, so on what comes with it."""
    if v["by_shapes"] is None or not v["resolved"] or (v["by_shapes"] - 1) * (v["estimate"] - 1) >= 0:
        return ""
    return f" By shapes alone it is {number(v['by_shapes'])} times: what differs lies beside the weights."


def without(v: dict) -> str:
    """Which seeds of the run are not in it: an arm that failed there may be the worse for it."""
    left = left_out(v)
    return f" It leaves out {left}, where there is no value." if left else ""


def comparability(rows: Sequence[dict]) -> dict[str, Any]:
    """Whether all of them may be compared, and why not; where they are of several arms, also of which."""
    refused = next((row for row in rows if not row["comparable"]), None)
    if refused is None:
        return {"comparable": True, "reason": None}
    whose = f"{refused['arm']}: " if len({row["arm"] for row in rows}) > 1 else ""
    return {"comparable": False, "reason": f"{whose}{refused['reason']}"}


def settled(drafts: Sequence[tuple[dict, Comparison]]) -> list[dict]:
    """What each head asked, with its comparison and whether that is resolved after Holm's correction over all that may
    be compared. The others have an estimate, for the record, and no p."""
    told = [comparison if head["comparable"] else replace(comparison, p=None) for head, comparison in drafts]
    corrected = holm([one.p for one in told])
    return [_verdict(head, told, at, corrected[at]) for at, (head, _) in enumerate(drafts)]


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """None: the verdicts say it all."""
    return []


def by_seed(
    rows: list[dict], arm: str, phase: str, metric: str, *, context: int | None = None, batch: int | None = None
) -> dict[int, dict]:
    """The arm's rows of single seeds."""
    return {
        row["seed"]: row for row in rows
        if (row["arm"], row["phase"], row["metric"]) == (arm, phase, metric) and row["seed"] is not None
        and context in (None, row["context"]) and batch in (None, row["batch"])
    }  # fmt: skip


def mean_over_seeds(rows: list[dict], arm: str, phase: str, metric: str, context: int | None = None) -> float | None:
    """None where no seed has a value."""
    found = by_seed(rows, arm, phase, metric, context=context).values()
    values = [row["value"] for row in found if row["value"] is not None]
    return sum(values) / len(values) if values else None


class PairedMeans(NamedTuple):
    """Means of several arms over the same seeds. counted: arms whose values compare; means: none where these have no
    seed in common; over: in words, after "bits per byte", where that is not every seed of the run."""

    counted: list[str]
    means: dict[str, float]
    over: str


def paired_means(
    rows: list[dict], arms: Iterable[str], phase: str, metric: str, seeds: Sequence[int] = ()
) -> PairedMeans:
    """Over the seeds that all these arms have a value of, leaving out arms with none or with one that is refused.
    seeds: of the run, else those in the rows."""
    found = {arm: by_seed(rows, arm, phase, metric) for arm in arms}
    compared = {
        arm: {seed: one["value"] for seed, one in ones.items() if one["value"] is not None}
        for arm, ones in found.items() if all(one["comparable"] for one in ones.values())
    }  # fmt: skip
    compared = {arm: values for arm, values in compared.items() if values}
    run = set(seeds) or {row["seed"] for row in rows} - {None}
    shared = sorted(set.intersection(*map(set, compared.values()))) if compared else []
    means = {arm: fmean(values[seed] for seed in shared) for arm, values in compared.items()} if shared else {}
    common = f" (over {plural(len(shared), 'seed')} of {len(run)}, which all of these have)"
    over = common if len(shared) < len(run) else ""
    return PairedMeans(list(compared), means, over)


def unresolved(verdict: dict) -> str:
    """How it stands with a comparison over several seeds that is open: its own interval may leave out equality."""
    tried = verdict["p"] is not None and verdict["p"] < RESOLVED
    return f"not resolved after correcting for {verdict['tested']} comparisons" if tried else "not resolved"


def identical(verdict: dict) -> bool:
    """Not a difference that is open, but none, over several seeds."""
    return verdict["n"] > 1 and verdict["estimate"] == verdict["ci_low"] == verdict["ci_high"] == 0


def predicts(verdict: dict) -> str:
    """A difference within a sentence, e.g. "mamba predicts better, by 0.210 bits per byte (0.200 to 0.220)"."""
    if not verdict["comparable"]:
        return f"their bits per byte do not compare ({verdict['reason']})"
    if identical(verdict):
        return "their bits per byte are the same at every seed"
    ends = [abs(verdict["estimate"]), *sorted(abs(verdict[end] or 0) for end in ("ci_low", "ci_high"))]
    at = fitting(*(verdict[end] for end in ("estimate", "ci_low", "ci_high")))
    if verdict["resolved"]:
        size, low, high = (f"{end:.{apart(end, 0.0, at)}f}" for end in ends)
        return f"{verdict['better']} predicts better, by {size} bits per byte ({low} to {high})"
    size = signed(verdict["estimate"], at)
    low, high = (signed(verdict[end], at) if verdict["n"] > 1 else "" for end in ("ci_low", "ci_high"))
    spread = f"{low} to {high}" if verdict["n"] > 1 else "one seed"
    return f"the difference in bits per byte is {unresolved(verdict)} ({size}, {spread})"


def faster(verdict: dict) -> str:
    """A ratio of speeds within a sentence, e.g. "1.4 times (1.3 to 1.5) as fast"."""
    size = f"{multiple(verdict['estimate'])} times"
    if not verdict["comparable"]:
        return f"{size} as fast (not comparable: {verdict['reason']})"
    left = left_out(verdict)
    lacking = f"; without {left}" if left else ""
    if verdict["n"] < 2:
        return f"{size} as fast (one seed, not resolved{lacking})"
    spread = f"{multiple(verdict['ci_low'])} to {multiple(verdict['ci_high'])}"
    return f"{size} ({spread}{'' if verdict['resolved'] else f', {unresolved(verdict)}'}{lacking}) as fast"


def _verdict(head: dict, every: Sequence[Comparison], which: int, p_holm: float | None) -> dict:
    """Of one of all comparisons that were made together."""
    comparison = every[which]
    interval = comparison.interval
    resolved = head["comparable"] and (comparison.exact or (p_holm is not None and p_holm < RESOLVED))
    neutral = 0.0 if head["kind"] == "difference" else 1.0
    better = None
    if resolved and head["direction"] != "none":
        b_is_lower = interval.estimate < neutral
        better = head["b"] if b_is_lower == (head["direction"] == "lower") else head["a"]
    return head | {
        "estimate": interval.estimate, "ci_low": interval.low, "ci_high": interval.high, "n": interval.n,
        "p": comparison.p, "p_holm": p_holm, "resolved": resolved, "better": better,
        "exact": comparison.exact, "tested": sum(one.p is not None for one in every),
        "more_seeds": None if resolved or not head["comparable"] else more_seeds(every, which),
    }  # fmt: skip


def _sentence(v: dict) -> str:
    """One honest sentence; the same words for every arm."""
    at = f" at {v['context']} tokens of context" if v["context"] else ""
    at += f" and batch {v['batch']}" if v["batch"] not in (None, 1) else ""
    what = {
        "test_bits_per_byte": "test bits per byte",
        "test_masked_token_loss": "the loss of hidden test tokens",
        "resident_bytes": "memory after loading",
        "peak_bytes": f"peak memory in {v['phase']}{at}",
        "state_bytes": f"cache or state in {v['phase']}{at}",
        "tokens_per_s": f"{v['phase']} tokens/s{at}",
        "bytes_per_s": f"bytes of text per second in {'training' if v['phase'] == 'train' else v['phase']}",
    }[v["metric"]]
    seeds = f"{v['n']} paired seed{'s' if v['n'] > 1 else ''}"
    shown = {
        end: signed(v[end], 4) if v["kind"] == "difference" else multiple(v[end])
        for end in ("estimate", "ci_low", "ci_high") if v[end] is not None
    }  # fmt: skip
    if v["kind"] == "difference":
        size = f"{v['b']} differs from {v['a']} in {what} by {shown['estimate']}"
    else:
        size = f"{v['b']} has {shown['estimate']} times {v['a']}'s {what}"
    interval = f"95% interval {shown['ci_low']} to {shown['ci_high']}, {seeds}" if v["n"] > 1 else seeds
    if not v["comparable"]:
        return f"{v['a']} and {v['b']} do not compare in {what} ({v['reason']}). For the record: {size} ({interval})."
    if v["n"] < 2 and not v["exact"]:
        return f"{size} ({interval}): not resolved, one seed says nothing about the spread over seeds."
    if v["exact"]:
        interval = "the same for every seed"
    if v["resolved"] and v["better"]:
        slight = ", by less than 5%" if v["kind"] != "difference" and abs(v["estimate"] - 1) < SLIGHT else ""
        return f"{size} ({interval}): {v['better']} is better here{slight}."
    if v["resolved"]:
        return f"{size} ({interval})."
    if v["p"] is None:
        return f"{size}: no difference at any seed."
    more = "more seeds might resolve it if the difference is real"
    if v["more_seeds"]:
        more = (
            f"with about {plural(v['more_seeds'], 'more seed')} its chance of being resolved is even, if estimate and "
            f"spread are what they seem"
        )
    return f"{size} ({interval}): {unresolved(v)}; {more}."
