"""The vocabulary study: every arm at every size of vocabulary, trained on the same text cut into different tokens.

Lengths are in bytes of text. A training sequence of `vocabulary.window_bytes` is as many tokens as a tokenizer makes of
it on average, so each size has a context of its own; sequences begin at the same places of the text for all of them,
and every size has the same number of updates. What differs is how much computation the same text takes.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments import cells
from experiments.data.dataset import Dataset
from experiments.data.places import PlacedBatches, token_bytes
from experiments.data.prepared import tokens_per_byte
from experiments.numbers import fitting, listed, multiple, number, plural, scale, signed
from experiments.rows import row
from experiments.spec import Arm, Experiment
from experiments.store import Cell, RunDirectory
from experiments.studies import comparison, pairing, wording
from experiments.studies.pairing import PairedMeans, Question
from experiments.training import DTYPES
from models import cost

MAKES = "train"
turns, together = comparison.turns, comparison.together
ABOUT_EQUAL = 0.05  # spread of the bytes seen, as a share, beyond which they are not called about the same
PHASES = {"train": "trains on", "decode": "writes"}


def plan(experiment: Experiment) -> list[Cell]:
    """Training, then decode; arms and sizes alternate, and the order turns round from seed to seed."""
    every = list(experiment.cells())
    order = [(seed, every if i % 2 == 0 else every[::-1]) for i, seed in enumerate(experiment.seeds)]
    kinds = ("train", "decode") if experiment.measurement.enabled else ("train",)
    return [Cell(arm, seed, kind) for kind in kinds for seed, arms in order for arm in arms]


def lengths(experiment: Experiment, causal: bool) -> dict[str, int]:
    """At a token per byte, which no tokenizer exceeds by more than its ends of documents."""
    settings, measured = experiment.vocabulary, experiment.measurement
    needs = {"vocabulary.window_bytes in the smallest vocabulary": settings.window_bytes}
    if measured.enabled:
        needs["vocabulary.text_bytes and measurement.decode_tokens"] = settings.text_bytes + measured.decode_tokens
    return needs


def work(cell: Cell, experiment: Experiment) -> tuple[Callable[..., Any], tuple]:
    if cell.kind == "train":
        return train_cell, (cell.arm, experiment.cells()[cell.arm], cell.seed)
    return decode_cell, ()


def train_cell(
    send: cells.Send, experiment: Experiment, name: str, arm: Arm, seed: int, dataset_folder: Path, folder: Path
) -> Generator[None, None, dict[str, Any]]:
    """As the comparison trains, on windows that begin at the same places of the text for every size."""
    dataset = Dataset.load(dataset_folder)
    seen = experiment.seen_with(tokens_per_byte(dataset.facts, dataset.vocabulary))
    settings, tokens = seen.training, dataset.splits["train"].tokens
    batches = PlacedBatches(
        tokens, token_bytes(dataset.tokenizer), context=settings.context, batch=settings.batch, seed=seed,
        window_bytes=experiment.vocabulary.window_bytes,
    )  # fmt: skip
    assert batches.text_bytes == dataset.splits["train"].bytes
    result = yield from cells.train_cell(send, seen, name, arm, seed, dataset_folder, folder, batches)
    text_bytes, places = batches.seen(settings.steps * settings.accumulate)
    return result | {"text_bytes": text_bytes, "places_sha256": places}


def decode_cell(
    send: cells.Send, experiment: Experiment, dataset_folder: Path, folder: Path
) -> Generator[None, None, dict[str, Any]]:
    dataset = Dataset.load(dataset_folder)
    seen = experiment.seen_with(tokens_per_byte(dataset.facts, dataset.vocabulary))
    return cells.measure_cell(send, seen, "decode", seen.measurement.contexts[0], None, dataset_folder, folder)


def rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    """Those of the comparison, and what a byte of text costs."""
    facts, vocabulary = run.environment()["data"], experiment.vocabulary_of(cell.arm)
    seen = experiment.seen_with(tokens_per_byte(facts, vocabulary))
    per_byte = tokens_per_byte(facts, vocabulary, "test")
    if cell.kind == "decode":
        found = comparison.rows(replace(cell, context=result["context"]), result, seen, run)
        yield from _with_bytes(found, per_byte)
        return
    trained = result["train"]["tokens"] / result["text_bytes"]
    yield from _with_bytes(comparison.rows(cell, result, seen, run), trained)
    unigram = facts["vocabularies"][str(vocabulary)]["unigram_bits_per_byte"]
    yield row(cell, "text", "tokens_per_byte", per_byte, "tokens/byte", "none")
    yield row(cell, "text", "unigram_bits_per_byte", unigram, "bits/byte", "none")
    yield row(cell, "text", "bytes_seen", result["text_bytes"], "bytes", "none", context=seen.training.context)
    config = cells.kept_config(run.folder(cell))
    count = cost.parameters(config)
    embedding = count.total - count.non_embedding
    yield row(cell, "model", "parameters", count.total, "parameters", "none")
    yield row(cell, "model", "embedding_parameters", embedding, "parameters", "none")
    yield row(cell, "model", "embedding_share", embedding / count.total, "share", "none")
    length, text = seen.measurement.contexts[0], experiment.vocabulary.text_bytes
    state = cost.state_bytes(config, 1, length, DTYPES[seen.measurement.dtype].itemsize)
    yield row(cell, "model", "state_bytes_per_byte", state / text, "bytes/byte", "lower", context=length)


def _with_bytes(found: Iterator[dict], per_byte: float) -> Iterator[dict]:
    """Beside what is said of tokens, what that is for the bytes of text that they stand for."""
    for one in found:
        yield one
        if one["metric"] == "tokens_per_s":
            rates = {key: one[key] / per_byte for key in ("value", "p5", "p95")}
            yield one | rates | {"metric": "bytes_per_s", "unit": "bytes/s"}
        elif one["metric"] == "flops_per_token":
            yield one | {"value": one["value"] * per_byte, "metric": "flops_per_byte", "unit": "FLOP/byte"}


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """Of each arm: every size against the smallest in test bits per byte, the largest against it in bytes per second;
    Holm's correction over all of them."""
    smallest, *larger = experiment.vocabulary.sizes
    asked: list[Question] = []
    for arm in experiment.arms:
        first, last = f"{arm}-v{smallest}", f"{arm}-v{larger[-1]}"
        asked += [Question(first, f"{arm}-v{size}", "quality", "test_bits_per_byte", "difference") for size in larger]
        asked += [Question(first, last, phase, "bytes_per_s", "ratio") for phase in PHASES]
    return pairing.compared(rows, asked, seeds=experiment.seeds)


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """What a larger vocabulary changes, as far as the sizes of an arm have been trained."""
    decided = {(one["phase"], one["b"]): one for one in verdicts(rows, experiment)}
    arms = list(experiment.arms)

    def by_size(arm: str, phase: str, metric: str) -> dict[int, float]:
        means = {
            one["arm"]: one["value"] for one in rows
            if (one["seed"], one["phase"], one["metric"]) == (None, phase, metric) and one["value"] is not None
        }  # fmt: skip
        sizes = experiment.vocabulary.sizes
        return {size: means[f"{arm}-v{size}"] for size in sizes if f"{arm}-v{size}" in means}

    found = [_tokens(next((one for arm in arms if len(one := by_size(arm, "text", "tokens_per_byte")) > 1), {}))]
    found.append(_text(
        [size for arm in arms for size in by_size(arm, "text", "bytes_seen").values()], experiment.training.steps
    ))  # fmt: skip
    sizes = experiment.vocabulary.sizes

    def paired(arm: str, phase: str, metric: str) -> PairedMeans:
        return pairing.paired_means(rows, [f"{arm}-v{size}" for size in sizes], phase, metric, experiment.seeds)

    found += [
        _best(
            arm, sizes, paired(arm, "quality", "test_bits_per_byte"), by_size(arm, "text", "unigram_bits_per_byte"),
            decided,
        ) for arm in arms
    ]  # fmt: skip
    found += [
        _parameters(arm, by_size(arm, "model", "parameters"), by_size(arm, "model", "embedding_parameters"))
        for arm in arms
    ]
    found += [
        _speed(arm, phase, sizes, paired(arm, phase, "bytes_per_s"), rows, decided) for phase in PHASES for arm in arms
    ]  # fmt: skip
    text = experiment.vocabulary.text_bytes
    found += [_state(arm, by_size(arm, "model", "state_bytes_per_byte"), text) for arm in arms]
    return [one for one in found if one]


def falling(values: dict[int, float]) -> bool:
    """Whether each value is below the one before it."""
    steps = list(values.values())
    return all(after < before for before, after in pairwise(steps))


def _listed(values: dict[int, float], at: int) -> str:
    return ", ".join(f"{number(value, at)} at {size:,}" for size, value in values.items())


def _tokens(values: dict[int, float]) -> dict | None:
    if len(values) < 2:
        return None
    monotone = falling(values)
    listed = f"tokens per byte of the test text by entries of the vocabulary: {_listed(values, 3)}"
    sentence = (
        f"A larger vocabulary reads fewer tokens at every step of size; {listed}." if monotone else
        f"A larger vocabulary does not read fewer tokens at every step of size; {listed}."
    )  # fmt: skip
    return {"kind": "tokens-per-byte", "arm": None, "values": list(values.values()), "sizes": list(values),
            "falling": monotone, "sentence": sentence}  # fmt: skip


def _text(seen: list[float], steps: int) -> dict | None:
    if len(seen) < 2:
        return None
    low, high = min(seen), max(seen)
    spread = high / low - 1
    after = (
        f"In {plural(steps, 'update')} a model had {low:,.0f} to {high:,.0f} bytes of text to predict, mean over seeds"
    )
    if spread <= ABOUT_EQUAL:
        share = f"within {100 * spread:.1f}%" if spread else "the same amount"
        sentence = f"{after}, from the same places of the text: {share}."
    else:
        sentence = (
            f"{after}, from the same places of the text. They differ by {100 * spread:.0f}%, so the sizes were not "
            f"trained on equal amounts of text, and bits per byte compares with that in mind."
        )
    return {"kind": "text-seen", "arm": None, "low": low, "high": high, "sentence": sentence}


def _best(
    arm: str, sizes: Sequence[int], quality: PairedMeans, unigram: dict[int, float], decided: dict
) -> dict | None:
    """quality: of the sizes whose bits per byte compare. The others are not counted, and said to be left out."""
    if len(quality.counted) < 2:
        return None
    smallest, *larger = sizes  # all questions are about the smallest
    values = _by_size(arm, sizes, quality)
    if not values:
        sentence = f"At which size {arm} predicts best is not said: no seed has a value of every size."
        return {"kind": "best-size", "arm": arm, "size": None, "value": None, "edge": False, "against": smallest,
                "resolved": False, "comparable": False, "sentence": sentence}  # fmt: skip
    best = min(values, key=lambda size: values[size])
    lowest = f"{number(values[best], 3)}{quality.over}"
    head = f"Of these sizes {arm} has its lowest test bits per byte, {lowest}, at {best:,} entries"
    verdict = None if best == smallest else decided.get(("quality", f"{arm}-v{best}"))
    if best == smallest:
        worse = [
            size for size in larger
            if (one := decided.get(("quality", f"{arm}-v{size}"))) and one["resolved"] and one["estimate"] > 0
        ]  # fmt: skip
        sentence = f"{head}, the smallest, with {len(worse)} of {len(larger)} larger sizes resolved as worse"
    elif verdict is None and smallest not in values:
        sentence = f"{head}; the smallest size, {smallest:,}, gave no result"
    elif verdict is None:
        sentence = f"{head}; the smallest size has no seed in common with it"
    elif not verdict["comparable"]:
        sentence = f"{head}, which does not compare with {smallest:,} ({verdict['reason']})"
    else:
        sentence = f"{head}: {_interval(verdict, 'bits per byte')} against {smallest:,} entries, {_standing(verdict)}"
    left_out = [f"{size:,}" for size in larger if size not in values]
    sentence += f" (not counted: {listed(left_out)})" if left_out else ""
    edge = best == larger[-1]
    sentence += ". It is the largest size tried, so a larger one might do better still." if edge else "."
    below = [size for size in values if size in unigram and values[size] >= unigram[size]]
    if below:
        at = listed([f"{size:,}" for size in below])
        sentence += f" At {at} entries it has not learned more than the frequencies of single tokens."
    return {"kind": "best-size", "arm": arm, "size": best, "value": values[best], "edge": edge,
            "against": None if best == smallest else smallest, "resolved": bool(verdict and verdict["resolved"]),
            "comparable": verdict is None or verdict["comparable"], "sentence": sentence}  # fmt: skip


def _by_size(arm: str, sizes: Sequence[int], found: PairedMeans) -> dict[int, float]:
    return {size: found.means[f"{arm}-v{size}"] for size in sizes if f"{arm}-v{size}" in found.means}


def _interval(one: dict, unit: str) -> str:
    """Estimate of a verdict with its interval."""
    estimate, low, high = one["estimate"], one["ci_low"], one["ci_high"]
    sign = one["kind"] == "difference"
    at = fitting(estimate, low, high)
    size = f"{signed(estimate, at)} {unit}" if sign else f"{multiple(estimate)} times {unit}"
    if low is None:
        return f"{size} ({plural(one['n'], 'paired seed')})"
    ends = " to ".join(signed(end, at) if sign else multiple(end) for end in (low, high))
    return f"{size} (95% interval {ends}, {plural(one['n'], 'paired seed')})"


def _standing(one: dict) -> str:
    if one["n"] < 2:
        return "not resolved: one seed says nothing about the spread over seeds"
    return "resolved" if one["resolved"] else wording.unresolved(one)


def _parameters(arm: str, total: dict[int, float], embedding: dict[int, float]) -> dict | None:
    if len(total) < 2:
        return None
    shares = {size: embedding[size] / total[size] for size in total}
    rest = {total[size] - embedding[size] for size in total}
    first, *_, last = total
    sentence = (
        f"Embeddings take {100 * shares[first]:.1f}% of {arm}'s {total[first]:,.0f} parameters at {first:,} entries "
        f"and {100 * shares[last]:.1f}% of {total[last]:,.0f} at {last:,}"
    )
    if len(rest) == 1:
        sentence += f"; its other {rest.pop():,.0f} are as many at every size."
    else:
        sentence += (
            "; its other parameters are not as many at every size, so the sizes do not compare by vocabulary alone."
        )
    return {"kind": "embedding-share", "arm": arm, "shares": list(shares.values()), "sizes": list(shares),
            "sentence": sentence}  # fmt: skip


def _speed(
    arm: str, phase: str, sizes: Sequence[int], speeds: PairedMeans, rows: list[dict], decided: dict
) -> dict | None:
    """speeds: of the sizes whose bytes per second compare."""
    first, *_, last = sizes
    one = decided.get((phase, f"{arm}-v{last}"))
    values = _by_size(arm, sizes, speeds)
    best = max(values, key=lambda size: values[size], default=None)
    if one is None and len(speeds.counted) < 2:
        return None
    if one is None:
        sentence = (
            f"How many bytes per second {arm} {PHASES[phase]} at {last:,} entries beside {first:,} is not known: "
            f"no seed has a value of both."
        )
        return {"kind": "bytes-per-s", "arm": arm, "phase": phase, "ratio": None, "resolved": False,
                "comparable": False, "fastest": best, "sentence": sentence}  # fmt: skip
    if not one["comparable"]:
        sentence = f"How many bytes per second {arm} {PHASES[phase]} does not compare between sizes: {one['reason']}."
    else:
        tokens = Question(one["a"], one["b"], phase, "tokens_per_s", "ratio")  # over the same pairs of seeds
        ratio = pairing.compared(rows, [tokens])[0]["estimate"]
        times = _interval(one, "the bytes of text per second")
        sentence = (
            f"At {last:,} entries {arm} {PHASES[phase]} {times} that it does at {first:,}, {_standing(one)}; of "
            f"tokens, {number(ratio)} times as many."
        )
        left_out = [f"{size:,}" for size in sizes if f"{arm}-v{size}" not in speeds.counted]
        if best is not None:
            sentence += f" It has its most bytes per second at {best:,} entries{speeds.over}"
            sentence += f" (not counted: {', '.join(left_out)})." if left_out else "."
    return {"kind": "bytes-per-s", "arm": arm, "phase": phase, "ratio": one["estimate"], "resolved": one["resolved"],
            "comparable": one["comparable"], "fastest": best, "sentence": sentence}  # fmt: skip


def _state(arm: str, values: dict[int, float], text_bytes: int) -> dict | None:
    if len(values) < 2:
        return None
    factor, unit = scale([max(values.values()) * text_bytes], "bytes")
    first, *_, last = values
    held = {size: number(values[size] * text_bytes * factor) for size in (first, last)}
    after = f"After {text_bytes:,} bytes of training text"
    if len(set(values.values())) == 1:
        kind = "constant"
        sentence = (
            f"{after} {arm}'s state takes {held[first]} {unit} whatever the vocabulary: "
            f"{number(values[first], 1)} bytes for each of them."
        )
    else:
        kind = "falling" if falling(values) else "mixed"
        course = "falling at every step of size" if kind == "falling" else "not falling at every step of size"
        sentence = (
            f"{after} {arm}'s cache takes {held[first]} {unit} at {first:,} entries and "
            f"{held[last]} {unit} at {last:,}, {course}; for each of them, bytes: {_listed(values, 1)}."
        )
    return {"kind": "state-per-byte", "arm": arm, "course": kind, "values": list(values.values()),
            "sizes": list(values), "sentence": sentence}  # fmt: skip
