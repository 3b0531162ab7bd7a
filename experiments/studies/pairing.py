"""Arms paired by seed: which comparisons the rows allow, what comes out of them, and whether it is resolved after
Holm's correction; means over the seeds that several arms have."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from experiments.numbers import plural
from experiments.rows import PAGE, READ_IN_PAGES
from experiments.statistics import RESOLVED, Comparison, Interval, holm, more_seeds, paired_difference, paired_ratio
from experiments.studies import wording

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
    return [verdict | {"sentence": wording.sentence(verdict) + wording.without(verdict)} for verdict in settled(drafts)]


def _compares(value: float | None, kind: str) -> bool:
    return value is not None and math.isfinite(value) and (kind == "difference" or value > 0)


def _by_shapes(rows: list[dict], one: Question) -> float | None:
    """The ratio of b to a that formulas give, of what has one."""
    where = {"context": one.context, "batch": one.batch}
    a, b = (by_seed(rows, arm, one.phase, f"{one.metric}_analytic", **where) for arm in (one.a, one.b))
    return next((b[seed]["value"] / a[seed]["value"] for seed in a if seed in b and a[seed]["value"]), None)


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
