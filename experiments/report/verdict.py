"""What stands at the top: what must be known before any number is read, and the verdict with its limits."""

import re
from collections import Counter
from typing import Any

from experiments.numbers import SLIGHT, count, interval, left_out, listed, number, plural, size
from experiments.report import curves
from experiments.report.document import Block, Notice, Section, Text, Tone, Verdict
from experiments.report.record import Record
from experiments.report.tables import (
    WITHIN,
    estimate,
    evidence,
    neutral,
    pair,
    place,
    reads_test,
    same_at_every_seed,
    standing,
    widened_by_pages,
)
from experiments.rows import UNMATCHED
from experiments.statistics import paired_difference

DIVERGED = re.compile(r"loss \S+, gradient norm \S+ at step \d")  # as experiments.training.NonFiniteLossError says
CHOSEN_BY = ("quality", "validation_bits_per_byte")  # a learning rate
TESTED = ("test_bits_per_byte", "test_masked_token_loss")
HEADLINES = 8  # verdicts told one by one; the table of comparisons has every one


def notices(record: Record) -> list[Notice]:
    found = []
    if record.result["status"] != "complete":
        points = [f"{one['cell'] or 'the run'}: {one['message']}" for one in record.failures]
        failed = {one["cell"] for one in record.failures}
        points += [f"{cell}: missing" for cell in record.missing if cell not in failed]
        lost = len({*record.missing, *(one["cell"] for one in record.failures)})
        title = f"This run is partial: {plural(lost, 'planned cell')} gave no result. What follows rests on the rest."
        if record.verdicts:
            title += " It is corrected for the comparisons that are there; of all of them fewer may be resolved."
        found.append(Notice("failure", title, _first(points)))
    elif record.failures:
        points = [f"{one['cell'] or 'the run'}: {one['message']}" for one in record.failures]
        found.append(Notice("failure", f"{plural(len(record.failures), 'failure')} during this run", _first(points)))
    refused = Counter(
        (row.arm, row.phase, row.reason or "no reason recorded")
        for row in record.rows
        if not row.comparable and row.seed is None and row.value is not None
    )
    if refused:
        points = [
            f"{arm}, {phase} ({plural(lines, 'number')}): {reason}" for (arm, phase, reason), lines in refused.items()
        ]
        title = "Some numbers must not be compared across arms; they are marked and decide nothing"
        found.append(Notice("warning", title, _first(points)))
    found += [
        Notice("warning", f"{warning[0].upper()}{warning[1:]}.", ())
        for warning in record.result["warnings"]
        if warning.startswith(UNMATCHED)
    ]
    differing = _differing_data(record)
    if differing:
        title = "The arms of these seeds were trained on different tokens: their difference means nothing"
        found.append(Notice("failure", title, _first([f"seed {seed}" for seed in differing])))
    if beaten := by_frequencies(record):
        found.append(Notice("warning", beaten))
    return found


def _first(points: list[str], limit: int = 8) -> tuple[str, ...]:
    rest = len(points) - limit
    more = (f"and {rest} more, listed under warnings and failures",) if rest > 0 else ()
    return tuple(points[:limit]) + more


def _differing_data(record: Record) -> list[str]:
    """Seeds whose arms report different hashes of the training tokens; where the vocabulary varies, of one size."""
    found: dict[tuple[str, Any], set[str]] = {}
    for arm in record.result["arms"].values():
        size = arm["config"]["vocabulary"] if record.study == "vocabulary" else None
        for seed, digest in (arm.get("data_sha256") or {}).items():
            found.setdefault((seed, size), set()).add(digest)
    return sorted({seed for (seed, _), digests in found.items() if len(digests) > 1})


def verdict(record: Record) -> Section:
    blocks: list[Block] = []
    if record.sweep:
        intro = (
            "A sweep chooses a learning rate on the validation split. The test split was not read, so "
            "this run says nothing about which architecture is better."
        )
        blocks += _best_rates(record)
    else:
        intro = (
            "Arms are paired by seed: the same batches in the same order, the same recipe. A difference "
            "is called resolved when a paired t test over the seeds gives p < 0.05 after Holm's "
            "correction for making several comparisons, or when what was counted is the same at every seed."
        )
        chosen = headlines(record.verdicts)
        if len(chosen) > HEADLINES and len({one["a"] for one in chosen}) == 1:
            blocks += _by_question(chosen)
        else:
            chosen = chosen[:HEADLINES]
            for one in chosen:
                tone, text = standing(one)
                blocks.append(Verdict(tone, one["sentence"], text, evidence(record, one)))
        blocks += [Text(sentence) for sentence in on_validation(record)]
        rest = len(record.verdicts) - len(chosen)
        if rest > 0:
            blocks.append(Text(f"{plural(rest, 'further comparison')}: see the table of paired comparisons."))
        if record.verdicts and not any(record.has("quality", metric) for metric in TESTED):
            blocks.append(Text("Quality on the test text was not evaluated: nothing says which arm predicts better."))
        if not record.verdicts:
            alone = len(record.arms) < 2
            said = "This run has one arm, so it compares nothing." if alone else "This run recorded no comparison."
            failed = sorted({one["cell"].partition("/")[0] for one in record.failures if one["cell"]})
            blocks.append(Text(f"{said} Cells of {listed(failed)} failed." if failed else said))
    blocks.append(Text(limits(record)))
    return Section("verdict", "Verdict", intro, blocks)


def by_frequencies(record: Record) -> str | None:
    """Which arms have learned no more than how frequent tokens are, if any."""
    known: float | None = (record.result["baselines"] or {}).get("unigram_bits_per_byte")
    if known is None:
        return None
    rows = {arm: record.row(arm, "quality", "test_bits_per_byte") for arm in record.arms}
    values = {arm: row.value for arm, row in rows.items()
              if row and row.value is not None and record.objective(arm) != "unmasked"}  # fmt: skip
    arms = [arm for arm, value in values.items() if value >= known]
    if not arms:
        return None
    sentence = (
        f"{listed(arms)} {'predicts' if len(arms) == 1 else 'predict'} the test text no better than the frequencies of "
        f"its tokens in the training text, {number(known, 3)} bits per byte"
    )
    if len(values) < 2:
        return f"{sentence}."
    return f"{sentence}: which of the arms learns more once they have learned something, this run cannot say."


def on_validation(record: Record) -> list[str]:
    """Whether the validation text, another sample of the corpus, says the same as the test text where that resolves a
    difference in quality: whether its interval lies on the same side of 0."""
    same, other = [], []
    for one in record.verdicts:
        if one["metric"] != "test_bits_per_byte" or not one["resolved"]:
            continue
        a, b = (
            {row.seed: row.known for row in record.per_seed(arm, "quality", "validation_bits_per_byte")}
            for arm in (one["a"], one["b"])
        )
        seeds = [seed for seed in a if seed in b]
        if len(seeds) < 2:
            continue
        there = paired_difference([a[seed] for seed in seeds], [b[seed] for seed in seeds]).interval
        assert there.low is not None
        assert there.high is not None
        agree = there.low > 0 if one["estimate"] > 0 else there.high < 0
        value = interval(there.estimate, there.low, there.high, sign=True, neutral=0.0, least=3)
        (same if agree else other).append(f"{pair(one)}, {value}")
    says = "On quality the validation text {} the same: {} bits per byte."
    told = [says.format("says", "; ".join(same))] if same else []
    return told + ([says.format("does not say", "; ".join(other))] if other else [])


def headlines(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Quality first; of a metric at several contexts, the longest."""
    longest: dict[tuple, dict[str, Any]] = {}
    for one in verdicts:
        key = (one["phase"], one["metric"], one["a"], one["b"])
        if key not in longest or (one["context"] or 0) > (longest[key]["context"] or 0):
            longest[key] = one
    order = ["quality", "train", "load", "prefill", "decode"]
    return sorted(longest.values(), key=lambda one: order.index(one["phase"]) if one["phase"] in order else 9)


def _by_question(verdicts: list[dict[str, Any]]) -> list[Block]:
    """Where many arms stand against one: a verdict for each quantity, of all arms together."""
    questions: dict[str, list[dict[str, Any]]] = {}
    for one in verdicts:
        questions.setdefault(place(one), []).append(one)
    blocks: list[Block] = []
    for question, ones in questions.items():
        base, difference = ones[0]["a"], ones[0]["kind"] == "difference"
        told = []
        for outcome, sentence in _OUTCOMES.items():
            arms = [one["b"] for one in ones if _outcome(one) == outcome]
            if arms:
                told.append(sentence.format(arms=listed(arms), base=base, are="is" if len(arms) == 1 else "are"))
        settled = sum(one["resolved"] for one in ones)
        tone: Tone = "resolved" if settled else "open" if any(one["comparable"] for one in ones) else "blocked"
        unit = f" {ones[0]['unit']}" if difference else ""
        values = ", ".join(f"{one['b']} {estimate(one).removesuffix(unit)}" for one in ones)
        seeds = sorted({one["n"] for one in ones})
        n = plural(seeds[-1], "paired seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} paired seeds"
        numbers = f"{'difference from' if difference else 'ratio to'} {base}: {values}{unit}; n = {n}"
        left = sorted({left_out(one) for one in ones} - {""})
        numbers += f"; left out for want of a value: {listed(left)}" if left else ""
        blocks.append(Verdict(tone, f"{question}: {'; '.join(told)}.", f"{settled} of {len(ones)} resolved", numbers))
    return blocks


_OUTCOMES = {
    "better": "{arms} {are} better than {base}",
    "slightly better": "{arms} {are} better than {base} by less than 5%",
    "worse": "{arms} {are} worse than {base}",
    "slightly worse": "{arms} {are} worse than {base} by less than 5%",
    "same": "{arms} {are} the same as {base}",
    "open": "not resolved for {arms}",
    "alone": "not resolved for {arms}, since one seed says nothing about the spread over seeds",
    "tried": "not resolved, after correcting for several comparisons, for {arms}",
    "refused": "not comparable for {arms}",
}


def _outcome(one: dict[str, Any]) -> str:
    """A key of _OUTCOMES."""
    if not one["comparable"]:
        return "refused"
    if one["resolved"]:
        slight = "slightly " if one["kind"] == "ratio" and abs(one["estimate"] - 1) < SLIGHT else ""
        return slight + ("better" if one["better"] == one["b"] else "worse")
    if same_at_every_seed(one):
        return "same"
    if one["n"] == 1:
        return "alone"
    return "tried" if one["n"] > 1 and not one["ci_low"] <= neutral(one) <= one["ci_high"] else "open"


def limits(record: Record) -> str:
    """What nobody may read into this run."""
    sizes = sorted({arm["parameters"] for arm in record.result["arms"].values() if arm.get("parameters")})
    if not sizes:
        models = "one model size"
    elif sizes[0] == sizes[-1]:
        models = f"one model size ({count(sizes[0])} parameters)"
    else:
        models = f"one model size per arm ({count(sizes[0])} to {count(sizes[-1])} parameters)"
    corpus = record.environment.get("data", {}).get("corpus") or record.spec.get("data", {}).get("corpus")
    text = f"one corpus ({corpus})" if corpus else "one corpus"
    where = f"one machine ({machine(record.environment)})" if record.environment else "one machine"
    recipe = record.spec.get("training", {})
    budget = ""
    if {"steps", "batch", "accumulate", "context"} <= recipe.keys():
        tokens = recipe["steps"] * recipe["batch"] * recipe["accumulate"] * recipe["context"]
        budget = f", {count(tokens)} training tokens at context {count(recipe['context'])}"
    pages = ""
    if any(widened_by_pages(record, one) for one in record.verdicts):
        pages = f"; that of a ratio of memory also the {count(record.page)} bytes to which a process's memory is read"
    return (
        f"What this run does not show: it has {models}, {text}{budget} and {where}, and "
        f"{plural(len(record.seeds), 'seed')}. It says nothing about larger models, other text, longer "
        "training, other hardware or other settings, and an interval covers the spread over seeds only"
        f"{pages}." + _by_heart(record) + _installed(record.environment.get("data", {}))
    )


def _by_heart(record: Record) -> str:
    """What has to be said of a judged text that looks like the training text; older records do not tell."""
    split = "test" if reads_test(record) else "validation"
    share = 100 * record.environment.get("data", {}).get("overlap", {}).get(split, 0)
    if round(share) < 1:
        return ""
    return (
        f" {number(share, 0)}% of the {split} text is in documents whose lines nearly all stand in the training text, "
        "too: there a model may know the answer by heart."
    )


def _installed(data: dict[str, Any]) -> str:
    """What has to be said of a corpus that every machine has another of."""
    if data.get("corpus") != "installed-python":
        return ""
    files, text = sum(data["documents"].values()), sum(data["bytes"].values())
    return (
        f" Its corpus is {plural(files, 'file')} ({size(text)}) of Python source, of that machine's "
        f"standard library and {plural(len(data['packages']), 'installed package')} (listed with the environment): "
        "only the same files give these numbers again, so arms of this run compare with each other, and not with "
        "those of another machine."
    )


def machine(environment: dict[str, Any]) -> str:
    name = environment.get("gpu") or environment.get("cpu") or "unnamed machine"
    threads = environment.get("threads")
    return name if environment.get("gpu") or not threads else f"{name}, {plural(threads, 'thread')}"


def _diverged(record: Record, arm: str) -> bool:
    """Whether its training did, at any seed."""
    told = [one["message"] for one in record.failures if (one["cell"] or "").partition("/")[0] == arm]
    return any(DIVERGED.search(message) for message in told)


def _best_rates(record: Record) -> list[Block]:
    """The chosen rates. One is no choice yet at the edge of what was tried, or beside a rate of which nothing is known;
    a rate at which training diverged is known to be worse."""
    blocks: list[Block] = []
    for base, rates in curves.sweep_rates(record).items():
        values, best = curves.whole_rates(record, base), curves.best_rate(record, base)
        lacking = [f"{rate:g}" for rate in rates if rate not in values]
        diverged = {rate for rate, arm in rates.items() if _diverged(record, arm)}
        unknown = [arm for rate, arm in rates.items() if rate not in values and rate not in diverged]
        if best is None:
            at = " at every seed" if curves.rate_rows(record, base) else ""
            told = f"{base}: no learning rate has a result{at}"
            rows = [row for arm in rates.values() if (row := record.row(arm, *CHOSEN_BY)) and row.value is None]
            why = {row.reason for row in rows if row.reason}
            blocks.append(Verdict("blocked", f"{'; '.join([told, *sorted(why)])}.", f"no result{at}", ""))
            continue
        row = values[best]
        value = interval(row.known, row.ci_low, row.ci_high, least=3)
        numbers = f"Validation bits per byte at {best:g}: {value} bits/byte"
        spread = f" ({WITHIN}); n = {plural(row.n, 'seed')}" if row.ci_low is not None else "; n = 1 seed, no interval"
        if len(values) > 1:
            spread += f"; the lowest of {len(values)} means is on the low side by chance, too"
        tried = "with a result at every seed" if lacking else "tried"
        sentence = f"{base}: of the rates {tried}, {best:g} has the lowest mean validation bits per byte."
        if lacking:
            sentence += f" Not counted: {listed(lacking)}."
        if diverged:
            sentence += f" Training diverged at {listed([f'{rate:g}' for rate in rates if rate in diverged])}."
        refused = next((row for row in values.values() if not row.comparable), None)
        if refused is not None:
            blocks.append(Verdict("blocked", sentence, f"not comparable: {refused.reason}", numbers + spread))
            continue
        doubts = ["not every rate has a result at every seed"] if unknown else []
        if any(cell.partition("/")[0] in unknown for cell in record.missing):
            doubts[0] += ": finish the run before using it"
        known = values.keys() | diverged
        if best in (min(known), max(known)):
            end = "lowest" if best == min(known) else "highest"
            end = "only" if len(known) == 1 else end
            doubts.append(f"at the grid's edge (the {end} rate with a result): widen the grid before using it")
        tone: Tone = "open" if doubts else "resolved"
        blocks.append(Verdict(tone, sentence, "; ".join(doubts) or "inside the grid", numbers + spread))
    return blocks
