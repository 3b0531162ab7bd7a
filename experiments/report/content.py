"""What a report says, in order, from a `Record`: verdict, results, curves, memory, samples, settings."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from experiments.report import curves
from experiments.report.document import (
    Block,
    Cell,
    Code,
    Column,
    Document,
    Figure,
    Notice,
    Section,
    Table,
    Text,
    Tone,
    Verdict,
)
from experiments.report.numbers import (
    DASH,
    count,
    interval,
    number,
    percent,
    places,
    plural,
    probability,
    scale,
)
from experiments.report.record import Record, Row

HEADLINES = 8  # verdicts told as sentences; the table of comparisons has every one
RESIDUAL_LIMIT = 0.05  # measured against analytic bytes; beyond it there is something to explain
WITHIN = "95% interval"


class Metric(NamedTuple):
    phase: str
    metric: str
    title: str


QUALITY = (
    Metric("quality", "test_bits_per_byte", "Test bits per byte"),
    Metric("quality", "validation_bits_per_byte", "Validation bits per byte"),
    Metric("quality", "test_token_perplexity", "Test token perplexity"),
    Metric("quality", "initial_test_bits_per_byte", "Untrained bits per byte"),
)
TRAINING = (
    Metric("train", "tokens_per_s", "Training throughput"),
    Metric("train", "step_ms", "Time per training step"),
    Metric("train", "peak_bytes", "Training memory peak"),
    Metric("train", "flops_per_token", "Arithmetic per token"),
)
LOADING = (
    Metric("load", "file_bytes", "Checkpoint file on disk"),
    Metric("load", "host_peak_bytes", "Host peak while loading"),
    Metric("load", "device_peak_bytes", "GPU peak while loading"),
    Metric("load", "resident_bytes", "Resident after loading"),
    Metric("load", "load_ms", "Time to load"),
)
PREFILL = (
    Metric("prefill", "tokens_per_s", "Prefill throughput"),
    Metric("prefill", "time_to_first_token_ms", "Time to first token"),
    Metric("prefill", "peak_bytes", "Prefill memory peak"),
    Metric("prefill", "working_bytes", "Prefill working memory"),
)
DECODE = (
    Metric("decode", "tokens_per_s", "Decode throughput"),
    Metric("decode", "ms_per_token", "Time per decoded token"),
    Metric("decode", "peak_bytes", "Decode memory peak"),
    Metric("decode", "working_bytes", "Decode working memory"),
    Metric("decode", "state_bytes", "Cache or state"),
)
ANALYTIC = (
    Metric("load", "resident_bytes_analytic", "Resident after loading, by formula"),
    Metric("decode", "state_bytes_analytic", "Cache or state, by formula"),
)
TITLES = {
    (one.phase, one.metric): one.title for one in QUALITY + TRAINING + LOADING + PREFILL + DECODE + ANALYTIC
}
SPEED = {"tokens_per_s", "time_to_first_token_ms", "ms_per_token"}


def document(record: Record) -> Document:
    sections = [verdict(record)]
    if record.sweep:
        sections += [sweep(record), training_curves(record)]
    else:
        sections += [results(record), training_curves(record), position(record)]
        sections += [throughput(record), memory(record)]
    sections += [samples(record), settings(record), troubles(record), repeat(record)]
    result, environment = record.result, record.environment
    facts = [("Run", result["run_id"]), ("Experiment", result["experiment"])]
    facts += [("Profile", result["profile"])] if result["profile"] else []
    facts += [("Started", result["created"] or DASH), ("Finished", result["finished"] or DASH)]
    facts += [
        ("Arms", ", ".join(record.arms)),
        ("Seeds", ", ".join(map(str, record.seeds)) or "none finished"),
    ]
    if environment:
        facts.append(("Machine", _machine(environment)))
    return Document(result["title"], facts, notices(record), sections)


# --- what must be known before any number is read ---------------------------------------------------


def notices(record: Record) -> list[Notice]:
    found = []
    if record.result["status"] != "complete":
        points = [f"{one['cell'] or 'the run'}: {one['message']}" for one in record.failures]
        failed = {one["cell"] for one in record.failures}
        points += [f"{cell}: missing" for cell in record.missing if cell not in failed]
        title = (
            f"This run is partial: {plural(len(record.missing), 'planned cell')} missing. "
            "What follows rests on the rest alone."
        )
        found.append(Notice("failure", title, _first(points)))
    elif record.failures:
        points = [f"{one['cell'] or 'the run'}: {one['message']}" for one in record.failures]
        found.append(
            Notice("failure", f"{plural(len(record.failures), 'failure')} during this run", _first(points))
        )
    refused = Counter(
        (row.arm, row.phase, row.reason or "no reason recorded")
        for row in record.rows
        if not row.comparable and row.seed is None
    )
    if refused:
        points = [
            f"{arm}, {phase} ({plural(lines, 'number')}): {reason}"
            for (arm, phase, reason), lines in refused.items()
        ]
        title = "Some numbers must not be compared across arms; they are marked and decide nothing"
        found.append(Notice("warning", title, _first(points)))
    differing = _differing_data(record)
    if differing:
        title = "The arms of these seeds were trained on different tokens: their difference means nothing"
        found.append(Notice("failure", title, _first([f"seed {seed}" for seed in differing])))
    return found


def _first(points: list[str], limit: int = 8) -> tuple[str, ...]:
    rest = len(points) - limit
    more = (f"and {rest} more, listed under warnings and failures",) if rest > 0 else ()
    return tuple(points[:limit]) + more


def _differing_data(record: Record) -> list[str]:
    """Seeds whose arms report different hashes of the training tokens."""
    found: dict[str, set[str]] = {}
    for arm in record.result["arms"].values():
        for seed, digest in (arm.get("data_sha256") or {}).items():
            found.setdefault(seed, set()).add(digest)
    return sorted(seed for seed, digests in found.items() if len(digests) > 1)


# --- verdict ----------------------------------------------------------------------------------------


def verdict(record: Record) -> Section:
    blocks: list[Block] = []
    if record.sweep:
        intro = (
            "A sweep chooses a learning rate on the validation split. The test split was not read, so this run "
            "says nothing about which architecture is better."
        )
        blocks += _best_rates(record)
    else:
        intro = (
            "Arms are paired by seed: the same batches in the same order, the same recipe. A difference is called "
            "resolved when its 95% interval over the seeds leaves out zero (for a ratio: one) and it survives Holm's "
            "correction for making several comparisons."
        )
        chosen = headlines(record.verdicts)
        for one in chosen:
            tone, standing = _standing(one)
            blocks.append(Verdict(tone, one["sentence"], standing, _evidence(one)))
        rest = len(record.verdicts) - len(chosen)
        if rest > 0:
            blocks.append(Text(f"{plural(rest, 'further comparison')}: see the table of paired comparisons."))
        if not record.verdicts:
            alone = len(record.arms) < 2
            said = (
                "This run has one arm, so it compares nothing."
                if alone
                else "This run recorded no comparison."
            )
            blocks.append(Text(said))
    blocks.append(Text(_limits(record)))
    return Section("verdict", "Verdict", intro, blocks)


def headlines(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts told as sentences: quality first; of a metric at several contexts, the longest."""
    longest: dict[tuple, dict[str, Any]] = {}
    for one in verdicts:
        key = (one["phase"], one["metric"], one["a"], one["b"])
        if key not in longest or (one["context"] or 0) > (longest[key]["context"] or 0):
            longest[key] = one
    order = ["quality", "train", "load", "prefill", "decode"]
    ranked = sorted(
        longest.values(), key=lambda one: order.index(one["phase"]) if one["phase"] in order else 9
    )
    return ranked[:HEADLINES]


def _standing(one: dict[str, Any]) -> tuple[Tone, str]:
    if not one["comparable"]:
        return "blocked", "not comparable"
    if one["resolved"]:
        return "resolved", f"resolved: {one['better']} is better" if one["better"] else "resolved"
    if one["ci_low"] is None:
        return "open", "not resolved: one seed has no interval" if one[
            "n"
        ] == 1 else "not resolved: no interval"
    more = one["more_seeds"]
    return "open", f"not resolved, about {plural(more, 'more seed')} would" if more else "not resolved"


def _pair(one: dict[str, Any]) -> str:
    return f"{one['b']} {'−' if one['kind'] == 'difference' else '/'} {one['a']}"


def _place(one: dict[str, Any]) -> str:
    title = TITLES.get((one["phase"], one["metric"]), f"{one['phase']} {one['metric']}")
    return title if one["context"] is None else f"{title}, context {count(one['context'])}"


def _estimate(one: dict[str, Any]) -> str:
    """`estimate [low, high] unit`; a difference always shows its sign."""
    if one["estimate"] is None:
        return DASH
    values = (one["estimate"], one["ci_low"], one["ci_high"])
    factor, unit = scale(values, one["unit"])
    scaled = [None if value is None else value * factor for value in values]
    text = interval(scaled[0], scaled[1], scaled[2], sign=one["kind"] == "difference")
    if unit == "×":
        value, _, limits = text.partition(" ")
        return f"{value}× {limits}".rstrip()
    return f"{text} {unit}"


def _evidence(one: dict[str, Any]) -> str:
    parts = [f"{_place(one)}: {_pair(one)} = {_estimate(one)}", f"n = {plural(one['n'], 'seed')}"]
    if one["ci_low"] is not None:
        parts[0] += f" ({WITHIN})"
    if one["p_holm"] is not None:
        parts.append(f"p {_equals(one['p_holm'])} after Holm's correction")
    return "; ".join(parts)


def _equals(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def _limits(record: Record) -> str:
    """What nobody may read into this run."""
    sizes = sorted({arm["parameters"] for arm in record.result["arms"].values() if arm.get("parameters")})
    if not sizes:
        size = "one model size"
    elif sizes[0] == sizes[-1]:
        size = f"one model size ({count(sizes[0])} parameters)"
    else:
        size = f"one model size per arm ({count(sizes[0])} to {count(sizes[-1])} parameters)"
    corpus = record.environment.get("data", {}).get("corpus") or record.spec.get("data", {}).get("corpus")
    text = f"one corpus ({corpus})" if corpus else "one corpus"
    where = f"one machine ({_machine(record.environment)})" if record.environment else "one machine"
    recipe = record.spec.get("training", {})
    budget = ""
    if {"steps", "batch", "accumulate", "context"} <= recipe.keys():
        tokens = recipe["steps"] * recipe["batch"] * recipe["accumulate"] * recipe["context"]
        budget = f", {count(tokens)} training tokens at context {count(recipe['context'])}"
    return (
        f"What this run does not show: it has {size}, {text}{budget} and {where}, and {plural(len(record.seeds), 'seed')}. "
        "It says nothing about larger models, other text, longer training, other hardware or other settings, and an "
        "interval covers the spread over seeds only."
    )


# --- results ----------------------------------------------------------------------------------------


def results(record: Record) -> Section:
    intro = (
        "Bits per byte is how many bits the model needs, on average, to store one byte of unseen text: lower is "
        "better, and it does not depend on the vocabulary. Prefill reads a given text, decode then writes one token "
        "at a time. Every number is the mean over seeds with a 95% Student t interval over seeds in brackets; "
        "1 kB, MB, GB = 10³, 10⁶, 10⁹ bytes."
    )
    blocks: list[Block] = [main_table(record), placing(record), arms_table(record)]
    if record.verdicts:
        blocks.append(comparisons(record))
    if not record.measured:
        blocks.append(Text(_unmeasured(record)))
    return Section("results", "Results", intro, [block for block in blocks if not _empty(block)])


def _empty(block: Block) -> bool:
    return isinstance(block, Table) and block.empty


def _unmeasured(record: Record) -> str:
    if not record.spec.get("measurement", {}).get("enabled", True):
        return (
            "Loading, prefill and decode were not measured in this run (measurement.enabled = false), so nothing is "
            "said about them."
        )
    return "This run recorded no measurement of loading, prefill or decode; see warnings and failures."


def main_table(record: Record) -> Table:
    """One line per metric, one column per arm; with exactly one pair of arms, their comparison beside it."""
    pairs = {(one["a"], one["b"]) for one in record.verdicts}
    lone = next(iter(pairs)) if len(pairs) == 1 else None
    columns = [Column("Quantity", key=True), Column("Unit"), Column("Better")]
    columns += [Column(arm, numeric=True) for arm in record.arms]
    columns.append(Column("n", numeric=True))
    if lone:
        columns.append(Column(f"{lone[1]} against {lone[0]}", numeric=True, terminal=False))
        columns.append(Column("Better arm", terminal=False))
    caption = f"Quality, throughput and memory per arm, mean over n seeds with {WITHIN}"
    caption += "; beside it every comparison that was planned" if lone else ""
    table = Table(caption, columns)
    longest = {phase: max(record.contexts(phase), default=None) for phase in ("prefill", "decode")}
    groups: list[tuple[str, tuple[Metric, ...], int | None]] = [
        ("Quality", QUALITY, None),
        ("Training", TRAINING, None),
        ("Loading", LOADING, None),
    ]
    for name, metrics in (("prefill", PREFILL), ("decode", DECODE)):
        context = longest[name]
        if context is not None:
            title = f"{name.capitalize()} at context {count(context)}, the longest measured"
            groups.append((title, metrics, context))
    for heading, metrics, context in groups:
        present = [one for one in metrics if record.has(one.phase, one.metric)]
        if not present:
            continue
        table.group(heading)
        for one in present:
            _add_line(table, record, one, one.title, context, compared=lone)
    return table


def _add_line(
    table: Table,
    record: Record,
    metric: Metric,
    title: str,
    context: int | None,
    compared: tuple[str, str] | None = None,
) -> None:
    """quantity | unit | better | arms... | n [| comparison | verdict]"""
    rows = [record.row(arm, metric.phase, metric.metric, context) for arm in record.arms]
    factor, unit = _line_scale(
        [
            row
            for row in record.rows
            if (row.phase, row.metric, row.seed) == (metric.phase, metric.metric, None)
        ]
        if context is not None
        else rows
    )
    better = next((row.direction for row in rows if row is not None), "none")
    found = _verdict_for(record, metric, context)
    winner = found["better"] if compared and found and found["resolved"] and found["comparable"] else None
    cells = [Cell(title), Cell(unit), Cell("" if better == "none" else better)]
    for arm in record.arms:
        cell = _value_cell(table, record, arm, metric.phase, metric.metric, context, factor)
        cells.append(Cell(cell.text, cell.marks, strong=arm == winner))
    cells.append(Cell(_seed_counts(rows)))
    if compared:
        if found is None:
            cells += [Cell(""), Cell("")]
        else:
            text = _estimate(found)
            differs = any(row is not None and row.n != found["n"] for row in rows)
            note = f"over the {plural(found['n'], 'seed')} that both arms have" if differs else None
            reason = "no seed has both arms" if found["estimate"] is None else None
            tone, standing = _standing(found)
            cells.append(table.cell(text, note, reason))
            cells.append(
                Cell(
                    standing.removeprefix("resolved: ").removesuffix(" is better"), strong=tone == "resolved"
                )
            )
    table.add(*cells)


def _line_scale(rows: Iterable[Row | None]) -> tuple[float, str]:
    known = [row for row in rows if row is not None]
    units = {row.unit for row in known if row.unit}
    assert len(units) <= 1, f"one quantity in several units: {units}"
    if all(row.value is None for row in known):
        return 1.0, ""
    return scale([row.value for row in known], next(iter(units), ""))


def _seed_counts(rows: list[Row | None]) -> str:
    counts = [row.n if row is not None and row.value is not None else 0 for row in rows]
    return str(counts[0]) if len(set(counts)) == 1 else " / ".join(map(str, counts))


def _verdict_for(record: Record, metric: Metric, context: int | None) -> dict[str, Any] | None:
    wanted = (metric.phase, metric.metric, context)
    return next(
        (one for one in record.verdicts if (one["phase"], one["metric"], one["context"]) == wanted), None
    )


def _value_cell(
    table: Table, record: Record, arm: str, phase: str, metric: str, context: int | None, factor: float
) -> Cell:
    """Mean and interval; of one seed the median with its p5 to p95; or a dash with the reason as footnote."""
    row = record.row(arm, phase, metric, context)
    if row is None or row.value is None:
        return table.cell(DASH, record.absence(arm, phase, metric, context))
    refused = None if row.comparable else f"not comparable across arms: {row.reason or 'no reason recorded'}"
    if row.ci_low is not None and row.ci_high is not None:
        return table.cell(interval(row.value * factor, row.ci_low * factor, row.ci_high * factor), refused)
    single = record.per_seed(arm, phase, metric, context)
    if row.n == 1 and len(single) == 1 and single[0].p5 is not None and single[0].p95 is not None:
        one = single[0]
        low, high = one.p5 * factor, one.p95 * factor  # type: ignore[operator]  # both checked above
        at = max(places(row.value * factor), places(high - low, 2))
        text = f"{number(row.value * factor, at)} ({number(low, at)} to {number(high, at)})"
        note = "one seed, so no interval; in parentheses the 5th to 95th percentile of its timed repeats"
        return table.cell(text, refused, note)
    return table.cell(number(row.value * factor), refused, "one seed, so no interval" if row.n == 1 else None)


def placing(record: Record) -> Table:
    """Where the arms' bits per byte lie between knowing nothing and a strong general compressor."""
    size = (record.result["baselines"] or {}).get("bytes")
    of = f" of {count(size)} bytes" if size else ""
    table = Table(
        f"To place these numbers: the same test text{of}, from worst to best",
        [Column("Method", key=True), Column("Bits per byte", numeric=True), Column("n", numeric=True)],
    )
    fixed = "computed once, without a seed: no interval"
    lines: list[tuple[float, list[Cell]]] = []
    given = record.result["baselines"] or {}
    for key, title in (
        ("unigram_bits_per_byte", "Token frequencies of the training text (unigram)"),
        ("lzma_bits_per_byte", "lzma, preset 9 extreme (sees only the test text)"),
    ):
        if given.get(key) is not None:
            value = given[key]
            lines.append((value, [Cell(title), table.cell(_decimals(value), fixed), table.cell(DASH, fixed)]))
    for arm in record.arms:
        for metric, title in (
            ("initial_test_bits_per_byte", "at initialisation"),
            ("test_bits_per_byte", "trained"),
        ):
            row = record.row(arm, "quality", metric)
            if row is not None and row.value is not None:
                cell = _value_cell(table, record, arm, "quality", metric, None, 1.0)
                lines.append((row.value, [Cell(f"{arm}, {title}"), cell, Cell(str(row.n))]))
    for _, cells in sorted(lines, key=lambda line: -line[0]):
        table.add(*cells)
    return table


def _decimals(value: float) -> str:
    return number(value, max(3, places(value)))


def arms_table(record: Record) -> Table:
    columns = [Column("Arm", key=True), Column("Model"), Column("Parameters", numeric=True)]
    columns += [Column("without embedding", numeric=True), Column("active per token", numeric=True)]
    columns += [Column("Learning rate", numeric=True), Column("Backends")]
    table = Table("What was compared", columns)
    for name, arm in record.result["arms"].items():
        cells: list[Cell | str] = [name, arm.get("model") or table.cell(DASH, "not recorded")]
        for key in ("parameters", "non_embedding_parameters", "active_parameters"):
            value = arm.get(key)
            cells.append(table.cell(DASH, "not recorded") if value is None else count(value))
        rate = arm.get("learning_rate")
        cells.append(table.cell(DASH, "not recorded") if rate is None else f"{rate:g}")
        backends = ", ".join(f"{layer}: {used}" for layer, used in (arm.get("backends") or {}).items())
        cells.append(backends or table.cell(DASH, "not recorded"))
        table.add(*cells)
    return table


def comparisons(record: Record) -> Table:
    table = Table(
        f"Paired comparisons, {WITHIN} over the paired seeds; p after Holm corrects for comparing several times",
        [
            Column("Quantity", key=True),
            Column("Comparison"),
            Column("Estimate", numeric=True),
            Column("n", numeric=True),
            Column("p", numeric=True, terminal=False),
            Column("p after Holm", numeric=True),
            Column("Verdict"),
        ],
    )
    for one in record.verdicts:
        tone, standing = _standing(one)
        few = "no p value: too few paired seeds" if one["n"] < 2 else "no p value was recorded"
        p_values = [
            table.cell(DASH, few) if value is None else Cell(probability(value))
            for value in (one["p"], one["p_holm"])
        ]
        single = "one paired seed, so no interval" if one["n"] == 1 and one["ci_low"] is None else None
        none = "no seed has both arms" if one["estimate"] is None else None
        table.add(
            _place(one), _pair(one), table.cell(_estimate(one), single, none), str(one["n"]), *p_values,
            Cell(standing, strong=tone == "resolved"),
        )  # fmt: skip
    return table


# --- curves -----------------------------------------------------------------------------------------


def training_curves(record: Record) -> Section:
    intro = (
        "Loss is the average surprise per token in nats (natural logarithm): lower is better. It starts near the "
        "logarithm of the vocabulary's size, where every token is equally likely, and falls as the model learns."
    )
    blocks: list[Block] = []
    if record.curves:
        name = "sweep-curves" if record.sweep else "losses"
        blocks.append(Figure(name, _loss_alt(record), _loss_caption(record)))
        blocks.append(_loss_table(record))
    else:
        blocks.append(Text("No arm has logged a training step, so there is no curve."))
    return Section("curves", "Loss while training", intro, blocks, terminal=False)


def _loss_caption(record: Record) -> str:
    bold = (
        "Thin lines are single seeds, the bold line is their mean as far as every seed has come; both against the "
        "tokens trained on."
    )
    if record.sweep:
        return f"Validation loss on a fixed subset for every learning rate, one panel per arm. {bold}"
    window = curves.window(record)
    return (
        f"Left (on a phone: above) the training loss, as a moving mean over {plural(window, 'step')}; right (below) "
        f"the loss on a fixed subset of the validation split. {bold}"
    )


def _loss_alt(record: Record) -> str:
    parts = []
    for arm in record.arms:
        mean = curves.mean_validation(record, arm)
        if mean is not None:
            tokens, loss = mean
            parts.append(
                f"{arm} from {number(loss[0], 3)} to {number(loss[-1], 3)} nats/token after {count(tokens[-1])} "
                f"tokens ({_mean_of(record, arm)})"
            )
    return "Validation loss against tokens: " + ("; ".join(parts) if parts else "no validation points") + "."


def _mean_of(record: Record, arm: str) -> str:
    seeds = len(record.curves.get(arm, {}))
    return "one seed" if seeds == 1 else f"mean of {seeds} seeds"


def _loss_table(record: Record) -> Table:
    """Start and end of the curves, with the gate that the start must pass."""
    columns = [Column("Arm", key=True), Column("Loss at initialisation", numeric=True)]
    columns += [Column("ln V", numeric=True), Column("Last validation point", numeric=True)]
    columns += [Column("at tokens", numeric=True), Column("n", numeric=True)]
    table = Table("Start and end of the curves, nats/token", columns)
    spread = "the smallest and the largest over the seeds, not an interval"
    for arm in record.arms:
        evaluations = record.evaluations.get(arm, {}).values()
        initial = [one["initial"]["loss"] for one in evaluations if one.get("initial")]
        expected = [one["initial"]["expected_loss"] for one in evaluations if one.get("initial")]
        last = [
            (curve.validation_loss[-1], curve.validation_tokens[-1])
            for curve in record.curves.get(arm, {}).values()
            if len(curve.validation_loss)
        ]
        absent = record.absence(arm, "quality", "validation_bits_per_byte")
        cells: list[Cell | str] = [arm]
        cells.append(_range(table, initial, absent, spread))
        cells.append(number(expected[0], 3) if expected else table.cell(DASH, absent))
        cells.append(_range(table, [loss for loss, _ in last], absent, spread))
        cells.append(_span([tokens for _, tokens in last]) if last else table.cell(DASH, absent))
        cells.append(str(len(last)))
        table.add(*cells)
    return table


def _range(table: Table, values: list[float], absent: str, spread: str) -> Cell:
    if not values:
        return table.cell(DASH, absent)
    if not np.isfinite(values).all():
        return table.cell(DASH, "the loss is not finite")
    mean = number(float(np.mean(values)), 3)
    if len(values) == 1:
        return table.cell(mean, "one seed, so no interval")
    return table.cell(f"{mean} ({number(min(values), 3)} to {number(max(values), 3)})", spread)


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def position(record: Record) -> Section:
    split = record.split
    intro = (
        "The loss at each position of the context, counted from its start: a model that uses what it has read "
        "predicts later tokens better than the first ones, so the curve falls as far as its memory reaches."
    )
    blocks: list[Block] = []
    ends = []
    for arm in record.arms:
        found = curves.mean_position(record, arm)
        if found is not None:
            at, loss = found
            early = float(loss[0])
            ends.append(
                f"{arm} from {number(early, 3)} at position 1 to {number(float(loss[-1]), 3)} nats/token "
                f"around position {count(at[-1])} ({_position_mean(record, arm)})"
            )
    if ends:
        caption = (
            f"Loss by position on the {split} split, averaged within thirds of an octave. Thin lines are single "
            "seeds, bold lines their mean."
        )
        blocks.append(
            Figure("position", "Loss by position in the context: " + "; ".join(ends) + ".", caption)
        )
    table = Table(
        f"Loss at single positions, nats/token, mean over n seeds with {WITHIN}",
        [Column("Position", key=True), *(Column(arm, numeric=True) for arm in record.arms)]
        + [Column("n", numeric=True)],
    )
    for at in record.contexts("quality", "test_loss_at_position"):
        cells = [Cell(count(at))]
        rows = [record.row(arm, "quality", "test_loss_at_position", at) for arm in record.arms]
        cells += [
            _value_cell(table, record, arm, "quality", "test_loss_at_position", at, 1.0)
            for arm in record.arms
        ]
        table.add(*cells, _seed_counts(rows))
    if not table.empty:
        blocks.append(table)
    if not blocks:
        blocks.append(Text("No arm was evaluated, so there is no loss by position."))
    return Section("position", "Loss by position in the context", intro, blocks, terminal=False)


def _position_mean(record: Record, arm: str) -> str:
    seeds = len(record.evaluations.get(arm, {}))
    return "one seed" if seeds == 1 else f"mean of {seeds} seeds"


# --- speed and memory -------------------------------------------------------------------------------


def throughput(record: Record) -> Section:
    intro = (
        "Prefill reads the whole context in one pass; decode writes one token after another with that context "
        "behind it. An architecture whose work per token grows with the context slows down to the right. Training "
        "throughput counts a whole optimizer step."
    )
    blocks: list[Block] = []
    if _drawable(record, SPEED_LINES):
        caption = (
            "Tokens per second against context length, both axes logarithmic. Points are means over seeds with their "
            f"{WITHIN}; with one seed, the median of its repeats with the 5th to 95th percentile."
        )
        blocks.append(Figure("throughput", _throughput_alt(record), caption))
    table = Table(f"Speed by context length, mean over n seeds with {WITHIN}", _context_columns(record))
    for one in PREFILL + DECODE:
        if one.metric in SPEED:
            _by_context(table, record, one)
    for one in TRAINING[:2]:
        if record.has(one.phase, one.metric):
            table.group(one.title)
            _add_line(table, record, one, _training_context(record), None)
    blocks.append(table)
    if not record.measured:
        blocks.append(Text(_unmeasured(record)))
    modes = sorted({row.mode for row in record.rows if row.mode})
    batches = sorted({row.batch for row in record.rows if row.batch and row.context})
    if modes:
        sizes = " or ".join(map(str, batches))
        blocks.append(
            Text(f"Execution mode of every arm: {', '.join(modes)}. Batch of prefill and decode: {sizes}.")
        )
    return Section("throughput", "Throughput", intro, [block for block in blocks if not _empty(block)])


SPEED_LINES = (("prefill", "tokens_per_s"), ("decode", "tokens_per_s"))
STATE_LINES = (("decode", "state_bytes"), ("decode", "state_bytes_analytic"))


def _drawable(record: Record, lines: Iterable[tuple[str, str]]) -> bool:
    wanted = set(lines)
    return any((row.phase, row.metric) in wanted and row.value for row in record.rows)


def _training_context(record: Record) -> str:
    context = record.spec.get("training", {}).get("context")
    return f"context {count(context)}" if context else "as trained"


def _context_columns(record: Record) -> list[Column]:
    columns = [Column("Context", key=True), Column("Unit"), Column("Better")]
    columns += [Column(arm, numeric=True) for arm in record.arms]
    return [*columns, Column("n", numeric=True)]


def _by_context(table: Table, record: Record, metric: Metric) -> None:
    contexts = record.contexts(metric.phase, metric.metric)
    if contexts:
        table.group(metric.title)
    for context in contexts:
        _add_line(table, record, metric, f"context {count(context)}", context)


def _throughput_alt(record: Record) -> str:
    parts = []
    for phase, metric in SPEED_LINES:
        for arm in record.arms:
            rows = [record.row(arm, phase, metric, context) for context in record.contexts(phase, metric)]
            known = [row for row in rows if row is not None and row.value is not None]
            if known:
                told = [f"{number(row.value)} at {count(row.context)}" for row in _ends(known)]  # type: ignore[arg-type]
                parts.append(f"{phase}, {arm}: {' and '.join(told)}")
    return "Tokens per second against context length. " + "; ".join(parts) + "."


def _ends(rows: list[Row]) -> list[Row]:
    return rows if len(rows) == 1 else [rows[0], rows[-1]]


def memory(record: Record) -> Section:
    intro = (
        "Loading costs the file on disk, the highest host memory while it is read, and what stays resident. Running "
        "costs more: the peak of prefill and of decode includes the weights, over the process before it loaded the "
        "model; working memory counts only what that phase adds. The cache or state is what one sequence keeps "
        "between decoded tokens: keys and values for attention, which grow with the context, or a fixed recurrent "
        "state. Each cell was measured in a fresh process."
    )
    blocks: list[Block] = []
    if not record.measured:
        return Section("memory", "Memory: loading against inference", intro, [Text(_unmeasured(record))])
    if curves.memory_lines(record):
        caption = (
            "Loading against inference, 1 MB = 10⁶ bytes; the number beside a peak is its context in tokens. Whiskers "
            "are 95% intervals over seeds, where there are several."
        )
        blocks.append(Figure("memory", _memory_alt(record), caption))
    if _drawable(record, STATE_LINES):
        caption = (
            "Bytes of cache or state for one batch against context length, both axes logarithmic: markers are "
            "measured, lines are the analytic figure."
        )
        blocks.append(Figure("state", _state_alt(record), caption))
    table = Table(f"Memory, mean over n seeds with {WITHIN}", _context_columns(record))
    present = [one for one in LOADING if one.metric.endswith("_bytes") and record.has(one.phase, one.metric)]
    if present:
        table.group("Loading")
    for one in present:
        _add_line(table, record, one, one.title, None)
    for one in PREFILL + DECODE:
        if one.metric.endswith("_bytes"):
            _by_context(table, record, one)
    blocks += [table, residuals(record)]
    formulas = [
        f"{name}: {arm['state_bytes_formula']}"
        for name, arm in record.result["arms"].items()
        if arm.get("state_bytes_formula")
    ]
    if formulas:
        blocks.append(
            Text("Formula of the cache or state, in bytes. " + "; ".join(formulas) + ".", terminal=False)
        )
    title = "Memory: loading against inference"
    return Section("memory", title, intro, [block for block in blocks if not _empty(block)])


def residuals(record: Record) -> Table:
    table = Table(
        "Measured against analytic bytes; the residual is measured over analytic, less one",
        [
            Column("Arm", key=True),
            Column("Quantity", key=True),
            Column("Unit"),
            Column("Measured", numeric=True),
        ]
        + [Column("Analytic", numeric=True), Column("Residual", numeric=True), Column("n", numeric=True)],
    )
    lines = [("load", "resident_bytes", None, "resident weights")]
    contexts = record.contexts("decode", "state_bytes")
    lines += [("decode", "state_bytes", at, f"cache or state, context {count(at)}") for at in contexts]
    large = f"beyond {RESIDUAL_LIMIT:.0%}: the formula and the machine disagree, which wants an explanation"
    for arm in record.arms:
        for phase, metric, context, title in lines:
            measured = record.row(arm, phase, metric, context)
            analytic = record.row(arm, phase, f"{metric}_analytic", context)
            if measured is None and analytic is None:
                continue
            factor, unit = _line_scale([measured, analytic])
            cells = [Cell(arm), Cell(title), Cell(unit)]
            cells.append(_value_cell(table, record, arm, phase, metric, context, factor))
            if analytic is None or analytic.value is None:
                cells.append(table.cell(DASH, record.absence(arm, phase, f"{metric}_analytic", context)))
            else:
                cells.append(Cell(number(analytic.value * factor)))
            if measured is None or analytic is None or measured.value is None or not analytic.value:
                cells.append(table.cell(DASH, "needs both the measured and the analytic figure"))
            else:
                residual = measured.value / analytic.value - 1
                cells.append(table.cell(percent(residual), large if abs(residual) > RESIDUAL_LIMIT else None))
            cells.append(Cell(str(measured.n if measured is not None and measured.value is not None else 0)))
            table.add(*cells)
    return table


def _memory_alt(record: Record) -> str:
    parts = []
    for title, phase, metric, context in curves.memory_lines(record):
        told = []
        for arm in record.arms:
            row = record.row(arm, phase, metric, context)
            known = row is not None and row.value is not None
            told.append(f"{arm} {number(row.value / 1e6) if known else 'not measured'}")  # type: ignore[union-attr, operator]
        parts.append(f"{title}: {', '.join(told)}")
    return "Memory in MB. " + "; ".join(parts) + "."


def _state_alt(record: Record) -> str:
    parts = []
    for arm in record.arms:
        rows = [
            record.row(arm, "decode", "state_bytes", at) for at in record.contexts("decode", "state_bytes")
        ]
        known = [row for row in rows if row is not None and row.value is not None]
        if known:
            told = []
            for row in _ends(known):
                factor, unit = scale([row.value], row.unit)
                told.append(f"{number(row.value * factor)} {unit} at context {count(row.context)}")  # type: ignore[operator, arg-type]
            parts.append(f"{arm}: {' and '.join(told)}")
    return "Cache or state against context length, measured. " + "; ".join(parts) + "."


# --- sweep ------------------------------------------------------------------------------------------


def sweep(record: Record) -> Section:
    intro = (
        "Every arm was trained at every learning rate of the grid, with the same tuning budget. Bits per byte is how "
        "many bits the model needs, on average, to store one byte of unseen text; lower is better. The best rate is "
        "the one with the lowest mean over seeds on the validation split."
    )
    blocks: list[Block] = []
    bases = curves.sweep_rates(record)
    table = Table(
        f"Validation bits per byte by learning rate, mean over n seeds with {WITHIN}",
        [Column("Arm", key=True), Column("Learning rate", numeric=True, key=True)]
        + [Column("Validation bits per byte", numeric=True), Column("n", numeric=True), Column("")],
    )
    told = []
    for base, rates in bases.items():
        best = curves.best_rate(record, base)
        table.group(base)
        for rate, arm in rates.items():
            cell = _value_cell(table, record, arm, "quality", "validation_bits_per_byte", None, 1.0)
            row = record.row(arm, "quality", "validation_bits_per_byte")
            lowest = rate == best
            n = str(row.n if row is not None and row.value is not None else 0)
            mark = Cell("lowest" if lowest else "", strong=lowest)
            table.add(base, f"{rate:g}", Cell(cell.text, cell.marks, strong=lowest), n, mark)
        if best is not None:
            row = record.row(rates[best], "quality", "validation_bits_per_byte")
            assert row is not None and row.value is not None
            told.append(
                f"{base}: lowest {_decimals(row.value)} bits/byte at {best:g}, n = {plural(row.n, 'seed')}, "
                f"of {plural(len(rates), 'rate')} from {min(rates):g} to {max(rates):g}"
            )
    if told:
        caption = (
            "Validation bits per byte against the peak learning rate (logarithmic). Thin lines are single seeds, the "
            "bold line is their mean with 95% intervals, a ring marks the lowest mean."
        )
        blocks.append(
            Figure("sweep", "Validation bits per byte by learning rate. " + "; ".join(told) + ".", caption)
        )
    blocks += [table, arms_table(record)]
    return Section("sweep", "Learning rate", intro, blocks)


def _best_rates(record: Record) -> list[Block]:
    blocks: list[Block] = []
    for base, rates in curves.sweep_rates(record).items():
        best = curves.best_rate(record, base)
        if best is None:
            blocks.append(Verdict("blocked", f"{base}: no learning rate has a result.", "no result", ""))
            continue
        row = record.row(rates[best], "quality", "validation_bits_per_byte")
        assert row is not None and row.value is not None
        value = interval(row.value, row.ci_low, row.ci_high)
        numbers = f"Validation bits per byte at {best:g}: {value} bits/byte"
        numbers += (
            f" ({WITHIN}); n = {plural(row.n, 'seed')}"
            if row.ci_low is not None
            else "; n = 1 seed, no interval"
        )
        sentence = f"{base}: of the rates tried, {best:g} has the lowest mean validation bits per byte."
        if best in (min(rates), max(rates)):
            end = (
                "only rate" if len(rates) == 1 else ("lowest rate" if best == min(rates) else "highest rate")
            )
            standing = f"at the grid's edge ({end} tried): widen the grid before using it"
            blocks.append(Verdict("open", sentence, standing, numbers))
        else:
            blocks.append(Verdict("resolved", sentence, "inside the grid", numbers))
    return blocks


# --- samples, settings, troubles, repeat ------------------------------------------------------------


def samples(record: Record) -> Section:
    intro = (
        "Text that the trained models wrote, unedited; control characters are shown as visible signs. A small model "
        "trained briefly writes fragments. Samples illustrate, they prove nothing."
    )
    blocks: list[Block] = []
    for arm in record.arms:
        for seed, evaluation in sorted(record.evaluations.get(arm, {}).items()):
            for one in evaluation.get("samples", []):
                label = f"{arm}, seed {seed}, temperature {one['temperature']:g}; the prompt comes first"
                blocks.append(Code(label, one["text"], prompt=one["prompt"]))
    if not blocks:
        blocks.append(Text("This run generated no samples."))
    return Section("samples", "Samples", intro, blocks, terminal=False)


def settings(record: Record) -> Section:
    intro = "Everything that decided the result: the resolved specification, the machine, the versions and the data."
    blocks: list[Block] = [_environment_table(record)]
    hashes = _hash_table(record)
    blocks += [hashes] if not hashes.empty else []
    blocks.append(Code("spec.toml, resolved", record.spec_text.rstrip("\n")))
    for name, arm in record.result["arms"].items():
        if arm.get("config"):
            lines = [f"{key} = {value}" for key, value in _flat(arm["config"])]
            blocks.append(Code(f"Resolved model configuration of {name}", "\n".join(lines), folded=True))
    return Section("settings", "Settings and environment", intro, blocks, terminal=False)


def _environment_table(record: Record) -> Table:
    table = Table("Environment and data", [Column("What", key=True), Column("Value")])
    environment = record.environment
    if not environment:
        table.add("environment.json", table.cell(DASH, "the file is missing from the run directory"))
        return table
    labels = {
        "lab_version": "Lab version", "source_sha256": "Source SHA-256", "git_commit": "Git commit",
        "git_dirty": "Uncommitted changes", "python": "Python", "platform": "Platform", "cpu": "CPU",
        "cores": "Cores", "threads": "Threads used", "memory_bytes": "Memory", "gpu": "GPU", "cuda": "CUDA",
        "created": "Started", "command": "Command",
    }  # fmt: skip
    absent = {
        "git_commit": "the lab did not run from a git checkout",
        "git_dirty": "the lab did not run from a git checkout",
        "gpu": "the run used no GPU",
        "cuda": "the run used no GPU",
    }
    table.group("Machine and code")
    for key, label in labels.items():
        value = environment.get(key)
        if value is None:
            table.add(label, table.cell(DASH, absent.get(key, "not recorded")))
        elif key == "memory_bytes":
            factor, unit = scale([value], "bytes")
            table.add(label, f"{number(value * factor)} {unit}")
        else:
            table.add(label, _plain(value))
    if environment.get("packages"):
        table.group("Packages")
        for name, version in sorted(environment["packages"].items()):
            table.add(name, _plain(version) if version is not None else table.cell(DASH, "not installed"))
    backends = environment.get("backends") or {}
    if backends:
        table.group("Backends that ran")
        for arm, used in backends.items():
            table.add(arm, ", ".join(f"{layer}: {name}" for layer, name in used.items()))
    if environment.get("data"):
        table.group("Data")
        for key, value in _flat(environment["data"]):
            text = DASH if value == "" else value
            table.add(key.replace("_", " "), text if text != DASH else table.cell(DASH, "not recorded"))
    return table


def _hash_table(record: Record) -> Table:
    table = Table(
        "SHA-256 of the training tokens that each arm consumed; arms of one seed must agree",
        [Column("Seed", key=True), Column("SHA-256"), Column("Arms")],
    )
    found: dict[tuple[int, str], list[str]] = {}
    for name, arm in record.result["arms"].items():
        for seed, digest in (arm.get("data_sha256") or {}).items():
            found.setdefault((int(seed), digest), []).append(name)
    for (seed, digest), arms in sorted(found.items()):
        table.add(str(seed), digest, ", ".join(arms))
    return table


def troubles(record: Record) -> Section:
    warnings = list(record.result["warnings"])
    failures = [f"{one['cell'] or 'the run'}: {one['message']}" for one in record.failures]
    for event in record.events:
        text = f"{event['cell']}: {event['message']}" if event.get("cell") else event.get("message", "")
        if event.get("kind") == "warning" and event.get("message") not in warnings:
            warnings.append(text)
        elif event.get("kind") == "failure":
            failures.append(text)
    warnings += record.remarks
    blocks: list[Block] = []
    listed = [
        ("failure", "Failures", failures),
        ("failure", "Missing cells", record.missing),
        ("warning", "Warnings", warnings),
    ]
    for tone, title, points in listed:
        if points:
            blocks.append(Notice(tone, f"{title} ({len(set(points))})", tuple(dict.fromkeys(points))))  # type: ignore[arg-type]
    if not blocks:
        blocks.append(Text("None were recorded."))
    return Section(
        "troubles", "Warnings and failures", "What went wrong or looked odd while this ran.", blocks
    )


def repeat(record: Record) -> Section:
    command = record.environment.get("repeat")
    intro = "This command repeats the run with exactly these settings; timings move with the machine."
    if not command:
        blocks: list[Block] = [Text("The run directory records no command; `lab run` accepts its spec.toml.")]
    else:
        blocks = [Code("Run again", command)]
    return Section("repeat", "Repeat it", intro, blocks)


# --- small helpers ----------------------------------------------------------------------------------


def _machine(environment: dict[str, Any]) -> str:
    parts = [environment.get("gpu") or environment.get("cpu") or "unnamed machine"]
    if environment.get("threads") and not environment.get("gpu"):
        parts.append(plural(environment["threads"], "thread"))
    return ", ".join(map(_plain, parts))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return DASH
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else DASH
    return count(value) if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested tables as dotted keys, in order."""
    if isinstance(value, dict):
        return [
            line
            for key, item in value.items()
            for line in _flat(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(_plain, value)))]
    return [(prefix, _plain(value))]
