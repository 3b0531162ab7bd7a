"""The tables of numbers: one function for a cell, one for a line, and the tables made of them."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from experiments.numbers import (
    DASH,
    MINUS,
    after_holm,
    count,
    interval,
    left_out,
    number,
    percent,
    places,
    plural,
    probability,
    scale,
)
from experiments.report import curves
from experiments.report.document import Cell, Column, Table, Tone
from experiments.report.record import Record, Row
from experiments.rows import OTHER_LOSS, READ_IN_PAGES, mean_of

ARROW = {"lower": "↓", "higher": "↑"}
ARROWS = "↓: lower is better, ↑: higher"
REPEATS = "one seed, so no interval; in parentheses the 5th to 95th percentile of its timed repeats"
REFUSED = "not comparable: "
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
    Metric("quality", "initial_test_bits_per_byte", "Bits per byte before training"),
    Metric("quality", "test_masked_token_loss", "Test loss of hidden tokens"),
    Metric("quality", "test_masked_accuracy", "Hidden test tokens guessed"),
)


TRAINING = (
    Metric("train", "tokens_per_s", "Training throughput"),
    Metric("train", "step_ms", "Time per training step"),
    Metric("train", "peak_bytes", "Training memory peak"),
    Metric("train", "reserved_peak_bytes", "Peak reserved by torch in training"),
    Metric("train", "process_bytes", "Process on the GPU in training"),
    Metric("train", "flops_per_token", "Arithmetic per token"),
    Metric("train", "busiest_expert_load", "Busiest expert (validation), even = 1"),
)


LOADING = (
    Metric("load", "file_bytes", "Checkpoint file on disk"),
    Metric("load", "host_peak_bytes", "Host peak while loading"),
    Metric("load", "device_peak_bytes", "GPU peak while loading"),
    Metric("load", "reserved_peak_bytes", "Peak reserved by torch while loading"),
    Metric("load", "process_bytes", "Process on the GPU, loaded"),
    Metric("load", "resident_bytes", "Resident after loading"),
    Metric("load", "load_ms", "Time to load"),
)


PREFILL = (
    Metric("prefill", "tokens_per_s", "Prefill throughput"),
    Metric("prefill", "time_to_first_token_ms", "Time to first token"),
    Metric("prefill", "peak_bytes", "Prefill memory peak"),
    Metric("prefill", "working_bytes", "Prefill working memory"),
    Metric("prefill", "reserved_peak_bytes", "Peak reserved by torch in prefill"),
    Metric("prefill", "process_bytes", "Process on the GPU in prefill"),
)


DECODE = (
    Metric("decode", "tokens_per_s", "Decode throughput"),
    Metric("decode", "ms_per_token", "Time per decoded token"),
    Metric("decode", "peak_bytes", "Decode memory peak"),
    Metric("decode", "working_bytes", "Decode working memory"),
    Metric("decode", "reserved_peak_bytes", "Peak reserved by torch in decode"),
    Metric("decode", "process_bytes", "Process on the GPU in decode"),
    Metric("decode", "state_bytes", "Cache or state"),
)


ANALYTIC = (
    Metric("load", "resident_bytes_analytic", "Resident after loading, by formula"),
    Metric("decode", "state_bytes_analytic", "Cache or state, by formula"),
)


IN_TEXT = (
    Metric("train", "bytes_per_s", "Training throughput in bytes of text"),
    Metric("decode", "bytes_per_s", "Decode throughput in bytes of text"),
)


TITLES = {
    (one.phase, one.metric): one.title for one in QUALITY + TRAINING + LOADING + PREFILL + DECODE + ANALYTIC + IN_TEXT
}


ON_CARD = (
    "Peaks are of tensors. Reserved is the most that torch's allocator had taken from the driver for them, free blocks "
    "included; the process is all that the driver counts as its own when the phase ends: CUDA's context, workspaces of "
    "libraries and what is reserved then. Both are absolute, peaks are over the process before it loaded the model."
)


def tells_card(record: Record) -> bool:
    """Whether rows say what the process holds on a GPU: those of a run on one."""
    return any(row.metric == "process_bytes" for row in record.rows)


def neutral(one: dict[str, Any]) -> float:
    """The estimate that means no difference."""
    return 0.0 if one["kind"] == "difference" else 1.0


def same_at_every_seed(one: dict[str, Any]) -> bool:
    """Whether a comparison found none, over several seeds: that is no difference that is open."""
    return one["n"] > 1 and one["ci_low"] == one["ci_high"] == neutral(one)


def standing(one: dict[str, Any]) -> tuple[Tone, str]:
    """How a verdict stands, from its record alone: nothing here decides anew."""
    if not one["comparable"]:
        return "blocked", "not comparable"
    if one["resolved"]:
        return "resolved", f"resolved: {one['better']} is better" if one["better"] else "resolved"
    if one["n"] == 0:
        return "open", "not resolved: no seed has both arms"
    if same_at_every_seed(one):
        return "open", "the same at every seed"
    if one["ci_low"] is None or one["ci_high"] is None:
        return "open", "not resolved: one seed has no interval" if one["n"] == 1 else "not resolved: no interval"
    if one["more_seeds"]:
        return "open", f"not resolved, even odds with about {plural(one['more_seeds'], 'more seed')}"
    if not one["ci_low"] <= neutral(one) <= one["ci_high"]:
        return "open", "not resolved after the correction for several comparisons"
    return "open", "not resolved"


def resolution(one: dict[str, Any], what: str = "") -> tuple[Tone, str]:
    """How a study's finding stands that rests on a comparison, of `what` in it."""
    what = f"{what} " if what else ""
    if not one.get("comparable", True):  # absent in older records
        return "blocked", f"{what}not comparable"
    if one.get("identical") or (one.get("n", 0) > 1 and one.get("estimate") == one["ci_low"] == one["ci_high"] == 0):
        return "resolved", f"{what}the same at every seed"
    return ("resolved", f"{what}resolved") if one["resolved"] else ("open", f"{what}not resolved")


def pair(one: dict[str, Any]) -> str:
    return f"{one['b']} {MINUS if one['kind'] == 'difference' else '/'} {one['a']}"


def place(one: dict[str, Any]) -> str:
    title = TITLES.get((one["phase"], one["metric"]), f"{one['phase']} {one['metric']}")
    title = title if one["context"] is None else f"{title}, context {count(one['context'])}"
    return title if one.get("batch") in (None, 1) else f"{title}, batch {one['batch']}"


def refusal(one: dict[str, Any]) -> str | None:
    """Why the estimate of a verdict is withheld, if it is."""
    if not one["comparable"]:
        return REFUSED + (one.get("reason") or "see the marked numbers of its arms")
    return "no seed has both arms" if one["estimate"] is None else None


def estimate(one: dict[str, Any]) -> str:
    """`estimate [low, high] unit`; a difference always shows its sign. A dash where it is withheld."""
    if refusal(one):
        return DASH
    values = (one["estimate"], one["ci_low"], one["ci_high"])
    factor, unit = scale(values, one["unit"])
    text = interval(*values, factor=factor, sign=one["kind"] == "difference", neutral=neutral(one))
    if unit == "×":
        value, _, limits = text.partition(" ")
        return f"{value}× {limits}".rstrip()
    return f"{text} {unit}"


def widened_by_pages(record: Record, one: dict[str, Any]) -> bool:
    """Whether the interval of a comparison covers also what its memory is read to."""
    paged = record.environment.get("device") == "cpu" and one["metric"] in READ_IN_PAGES
    return paged and one["kind"] == "ratio" and one["ci_low"] is not None


def evidence(record: Record, one: dict[str, Any]) -> str:
    """Under a headline: the arms' own values, n and p."""
    refused = refusal(one)
    if refused:
        return f"{place(one)}: {refused.removeprefix(REFUSED)}"
    context = _context_of(record, one["phase"], one["context"])
    batch = {} if one.get("batch") is None else {"batch": one["batch"]}
    rows = _over_pairs(record, one, context=context, **batch)
    factor, unit = line_scale(rows)
    told = []
    for row in rows:
        if row is not None and row.value is not None:
            value = interval(row.value, row.ci_low, row.ci_high, factor=factor, least=_least(row.unit))
            told.append(f"{row.arm} {value}")
    parts = [f"{place(one)}: {', '.join(told)} {unit}".rstrip()] if told else [place(one)]
    if widened_by_pages(record, one):
        parts.append(f"read to {count(record.page)} bytes, which the ratio's interval covers")
    parts.append(f"n = {plural(one['n'], 'paired seed')}")
    if one["p_holm"] is not None:
        parts.append(after_holm(one["p_holm"]))
    return "; ".join(parts)


def _over_pairs(record: Record, one: dict[str, Any], **where: Any) -> list[Row | None]:
    """What the two arms have, over the seeds that both have: a mean over others too would be of another comparison."""
    rows: list[Row | None] = []
    single = {
        arm: {
            row.seed: row.value for row in record.rows
            if (row.arm, row.phase, row.metric) == (arm, one["phase"], one["metric"]) and row.seed is not None
            and row.value is not None and all(getattr(row, name) == value for name, value in where.items())
        }
        for arm in (one["a"], one["b"])
    }  # fmt: skip
    for arm, other in ((one["a"], one["b"]), (one["b"], one["a"])):
        row = next(iter(record.over_seeds(one["phase"], one["metric"], arm, **where)), None)
        both = [value for seed, value in single[arm].items() if seed in single[other]]
        if row is not None and 0 < len(both) < row.n:
            mean = mean_of(both, row.phase, row.unit)
            row = replace(row, value=mean.estimate, ci_low=mean.low, ci_high=mean.high, n=mean.n)
        rows.append(row)
    return rows


def main_table(record: Record) -> Table:
    """One line per metric, one column per arm; with exactly one pair of arms, their comparison beside it."""
    pairs = {(one["a"], one["b"]) for one in record.verdicts}
    lone = next(iter(pairs)) if len(pairs) == 1 else None
    columns = [Column("Quantity", key=True)]
    columns += [Column(arm, numeric=True) for arm in record.arms]
    columns.append(Column("n", numeric=True))
    if lone:
        columns.append(Column(f"{lone[1]} against {lone[0]}", numeric=True, terminal=False))
        columns.append(Column("Verdict", terminal=False))
    table = Table(f"Quality, throughput and memory per arm, mean over n seeds with {WITHIN}. {ARROWS}", columns)
    longest = {phase: max(record.contexts(phase), default=None) for phase in ("prefill", "decode")}
    groups: list[tuple[str, tuple[Metric, ...], int | None]] = [
        ("Quality", QUALITY, None),
        ("Training", TRAINING, training_context(record)),
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
            add_line(table, record, one, one.title, context, compared=lone)
    return table


def add_line(
    table: Table,
    record: Record,
    metric: Metric,
    title: str,
    context: int | None,
    compared: tuple[str, str] | None = None,
) -> None:
    """quantity with unit and direction | arms... | n [| comparison | verdict]; one scale for all contexts."""
    rows = [record.row(arm, metric.phase, metric.metric, context) for arm in record.arms]
    same = (metric.phase, metric.metric, None)
    factor, unit = line_scale([row for row in record.rows if (row.phase, row.metric, row.seed) == same])
    arrow = next((ARROW[row.direction] for row in rows if unit and row is not None and row.direction in ARROW), "")
    found = _verdict_for(record, metric, context) if compared else None
    winner = found["better"] if found and found["resolved"] and found["comparable"] else None
    cells = [Cell(title, unit=f"{unit} {arrow}".strip())]
    for arm in record.arms:
        cell = value_cell(table, record, arm, metric.phase, metric.metric, context, factor)
        cells.append(replace(cell, strong=arm == winner))
    cells.append(Cell(seed_counts(rows)))
    if compared and found is None:
        cells += [Cell(""), Cell("")]
    elif found is not None:
        differs = any(row is not None and row.n != found["n"] for row in rows)
        note = f"over the {plural(found['n'], 'seed')} that both arms have" if differs and found["n"] else None
        tone, text = standing(found)
        verdict = text.removeprefix("resolved: ").removesuffix(" is better")
        cells += [table.cell(estimate(found), refusal(found) or note), Cell(verdict, strong=tone == "resolved")]
    table.add(*cells)


def training_context(record: Record) -> int | None:
    """The context of the training rows, where they carry one."""
    return next((row.context for row in record.rows if row.phase == "train"), None)


def _context_of(record: Record, phase: str, context: int | None) -> int | None:
    """The context under which a verdict's rows are filed: a verdict on training names none."""
    return training_context(record) if phase == "train" and context is None else context


def line_scale(rows: Iterable[Row | None]) -> tuple[float, str]:
    known = [row for row in rows if row is not None]
    units = {row.unit for row in known if row.unit}
    assert len(units) <= 1, f"one quantity in several units: {units}"
    if all(row.value is None for row in known):
        return 1.0, ""
    return scale([row.value for row in known], next(iter(units), ""))


def seed_counts(rows: list[Row | None]) -> str:
    return _counts([row.n if row is not None and row.value is not None else 0 for row in rows])


def _counts(counts: list[int]) -> str:
    """Of each arm, or one for all where they are alike."""
    return str(counts[0]) if len(set(counts)) == 1 else " / ".join(map(str, counts))


def _verdict_for(record: Record, metric: Metric, context: int | None) -> dict[str, Any] | None:
    wanted = (metric.phase, metric.metric, context)
    batches = (None, record.spec.get("measurement", {}).get("batch"))  # the tables show no other
    for one in record.verdicts:
        found = (one["phase"], one["metric"], _context_of(record, one["phase"], one["context"]))
        if found == wanted and one.get("batch") in batches:
            return one
    return None


def _least(unit: str) -> int | None:
    """Decimal places below which a unit is never shown: bits per byte differ in the third."""
    return 3 if unit == "bits/byte" else None


def value_cell(
    table: Table, record: Record, arm: str, phase: str, metric: str, context: int | None, factor: float
) -> Cell:
    """Mean and interval; of one seed the median with its p5 to p95; or a dash with the reason as footnote."""
    row = record.row(arm, phase, metric, context)
    if row is None or row.value is None:
        return table.cell(DASH, record.absence(arm, phase, metric, context))
    refused = None if row.comparable else f"not comparable across arms: {row.reason or 'no reason recorded'}"
    if row.ci_low is None or row.ci_high is None:
        single = record.per_seed(arm, phase, metric, context)
        if row.n == 1 and len(single) == 1 and single[0].p5 is not None and single[0].p95 is not None:
            return table.cell(_of_repeats(row.value, single[0].p5, single[0].p95, factor), refused, REPEATS)
        alone = "one seed, so no interval" if row.n == 1 else "no interval was recorded"
    else:
        alone = None
    text = interval(row.value, row.ci_low, row.ci_high, factor=factor, least=_least(row.unit))
    return table.cell(text, refused, alone)


def _of_repeats(value: float, p5: float, p95: float, factor: float) -> str:
    value, p5, p95 = value * factor, p5 * factor, p95 * factor
    at = max(places(value), places(p95 - p5, 2)) if p95 > p5 else places(value)
    return f"{number(value, at)} ({number(p5, at)} to {number(p95, at)})"


def other_loss(record: Record, arm: str) -> str | None:
    """Why an arm's loss says nothing beside the others', where arms have different objectives."""
    alike = len({record.objective(one) for one in record.arms}) == 1
    return None if alike else OTHER_LOSS.get(record.objective(arm))


def placing(record: Record) -> Table:
    """Where the arms' bits per byte lie between knowing nothing and a strong general compressor."""
    size = (record.result["baselines"] or {}).get("bytes")
    of = f" of {count(size)} bytes" if size else ""
    table = Table(
        f"To place these numbers: the same test text{of}, from worst to best",
        [Column("Method", key=True), Column("Bits per byte", numeric=True), Column("n", numeric=True)],
    )
    fixed = "computed once, without a seed: no interval"
    most = max((row.n for row in record.over_seeds("quality", "test_bits_per_byte")), default=0)
    lines: list[tuple[float, list[Cell]]] = []
    given = record.result["baselines"] or {}
    for key, title in (
        ("unigram_bits_per_byte", "Token frequencies of the training text (unigram)"),
        ("lzma_bits_per_byte", "lzma, preset 9 extreme (sees only the test text)"),
    ):
        if given.get(key) is not None:
            value = given[key]
            lines.append((value, [Cell(title), table.cell(number(value, 3), fixed), table.cell(DASH, fixed)]))
    for arm in record.arms:
        for metric, title in (
            ("initial_test_bits_per_byte", "before training"),
            ("test_bits_per_byte", "trained"),
        ):
            row = record.row(arm, "quality", metric)
            if row is not None and row.value is not None and record.objective(arm) != "unmasked":
                cell = value_cell(table, record, arm, "quality", metric, None, 1.0)
                fewer = "fewer seeds than other arms have, which moves its place" if row.n < most else None
                lines.append((row.value, [Cell(f"{arm}, {title}"), cell, table.cell(str(row.n), fewer)]))
    for _, cells in sorted(lines, key=lambda line: -line[0]):
        table.add(*cells)
    return table


def arms_table(record: Record) -> Table:
    """What was compared; in a sweep, one line per base arm with all its rates."""
    columns = [Column("Arm", key=True), Column("Model"), Column("Parameters", numeric=True)]
    columns += [Column("not embedding", numeric=True), Column("active", numeric=True)]
    columns += [Column("Learning rate", numeric=True), Column("Backends")]
    table = Table("What was compared; active parameters are those that one token uses", columns)
    absent = "not recorded"
    for name, rates in curves.sweep_rates(record).items() if record.sweep else _own_rates(record):
        arm = record.result["arms"][next(iter(rates.values()))]
        cells: list[Cell | str] = [name, arm.get("model") or table.cell(DASH, absent)]
        for key in ("parameters", "non_embedding_parameters", "active_parameters"):
            value = arm.get(key)
            cells.append(table.cell(DASH, absent) if value is None else count(value))
        known = [f"{rate:g}" for rate in rates if rate is not None]
        cells.append(", ".join(known) or table.cell(DASH, "this study does not train"))
        backends = ", ".join(f"{layer}: {used}" for layer, used in (arm.get("backends") or {}).items())
        cells.append(backends or table.cell(DASH, absent))
        table.add(*cells)
    return table


def _own_rates(record: Record) -> list[tuple[str, dict[float, str]]]:
    return [(name, {arm["learning_rate"]: name}) for name, arm in record.result["arms"].items()]


def comparisons(record: Record) -> Table:
    table = Table(
        f"Paired comparisons with {WITHIN} over n paired seeds; a ratio is the geometric mean over the pairs",
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
        tone, text = standing(one)
        few = "no p value: it takes two paired seeds" if one["n"] < 2 else "no p value was recorded"
        if one["n"] > 1 and one["ci_low"] == one["ci_high"] is not None:
            few = "the same for every seed, so there is nothing to test"
        few = refusal(one) or few
        p_values = [
            table.cell(DASH, few) if value is None or refusal(one) else Cell(probability(value))
            for value in (one["p"], one["p_holm"])
        ]
        single = "one paired seed, so no interval" if one["n"] == 1 and one["ci_low"] is None else None
        shown = table.cell(estimate(one), refusal(one) or single)
        verdict = Cell(text, strong=tone == "resolved")
        left = left_out(one)
        n = table.cell(str(one["n"]), f"leaves out {left}, where there is no value" if left else None)
        table.add(place(one), pair(one), shown, n, *p_values, verdict)
    return table


NO_RESULT = "no result: see warnings and failures"


def room(record: Record) -> str:
    """What the bytes of a cache after so many tokens hold beside these, as a sentence to follow another."""
    settings = "memory" if record.study == "memory" else "measurement"
    written = record.spec.get(settings, {}).get("decode_tokens")
    return f" A cache or state has room for the {written} tokens that are decoded, too." if written else ""


def reads_test(record: Record) -> bool:
    """Whether the specification has the test split evaluated."""
    return "test" in record.spec.get("evaluation", {}).get("splits", ["test"])


def together(record: Record) -> str:
    """What figures of several sequences at a time are of, as a sentence to follow another."""
    if record.batch == 1 or not record.measured:
        return ""
    return (
        f" Prefill and decode take {record.batch} sequences at a time where no other batch is named: tokens and bytes "
        "of text per second are of all of them together, milliseconds are what each waits for, and memory is of all "
        "unless it says otherwise."
    )


def context_columns(record: Record) -> list[Column]:
    columns = [Column("Quantity", key=True)]
    columns += [Column(arm, numeric=True) for arm in record.arms]
    return [*columns, Column("n", numeric=True)]


def by_context(table: Table, record: Record, metric: Metric) -> None:
    contexts = record.contexts(metric.phase, metric.metric)
    if contexts:
        table.group(metric.title)
    for context in contexts:
        add_line(table, record, metric, f"context {count(context)}", context)


def residuals(record: Record) -> Table:
    table = Table(
        "Measured against analytic bytes; the residual is measured over analytic, less one",
        [
            Column("Arm", key=True),
            Column("Quantity", key=True),
            Column("Measured", numeric=True),
            Column("Analytic", numeric=True),
            Column("Residual", numeric=True),
            Column("n", numeric=True),
        ],
    )
    lines = [("load", "resident_bytes", None, "resident")]
    contexts = record.contexts("decode", "state_bytes")
    lines += [("decode", "state_bytes", at, f"cache or state, context {count(at)}") for at in contexts]
    large = (
        f"beyond {RESIDUAL_LIMIT:.0%}: what Python keeps beside each tensor, up to about 0.1 MB in all, tells in a "
        "model of a megabyte or two; in a larger one this wants an explanation"
    )
    for arm in record.arms:
        for phase, metric, context, title in lines:
            measured = record.row(arm, phase, metric, context)
            analytic = record.row(arm, phase, f"{metric}_analytic", context)
            if measured is None and analytic is None:
                continue
            factor, unit = line_scale([measured, analytic])
            cells = [Cell(arm), Cell(title, unit=unit)]
            cells.append(value_cell(table, record, arm, phase, metric, context, factor))
            if analytic is None or analytic.value is None:
                cells.append(table.cell(DASH, record.absence(arm, phase, f"{metric}_analytic", context)))
            else:
                cells.append(Cell(number(analytic.value * factor)))
            if measured is None or analytic is None or measured.value is None or not analytic.value:
                cells.append(table.cell(DASH, "needs both the measured and the analytic figure"))
            else:
                residual = measured.value / analytic.value - 1
                cells.append(table.cell(percent(residual), large if abs(residual) > RESIDUAL_LIMIT else None))
            table.add(*cells, seed_counts([measured]))
    return table


def gates_table(record: Record) -> Table:
    """The checks of each model before its training, where the run recorded them: the worst value over its seeds."""
    table = Table(
        "Checks that each model had to pass before it was trained or timed; the worst value over n seeds",
        [Column("Check", key=True), Column("Limit", numeric=True)]
        + [Column(arm, numeric=True) for arm in record.arms]
        + [Column("n", numeric=True)],
    )
    found: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for arm, by_seed in record.evaluations.items():
        for _, evaluation in sorted(by_seed.items()):
            for gate in evaluation.get("gates", []):
                found.setdefault((gate["name"], gate["limit"]), {}).setdefault(arm, []).append(gate)
    for (name, limit), by_arm in found.items():
        cells: list[Cell | str] = [name, f"{limit:g}"]
        for arm in record.arms:
            gates = by_arm.get(arm, [])
            if not gates:
                absent = record.absence(arm, "quality", "validation_bits_per_byte")
                reason = "does not apply to this arm" if record.evaluations.get(arm) else absent
                cells.append(table.cell(DASH, reason))
                continue
            failed = not all(gate["passed"] for gate in gates)
            finite = all(math.isfinite(gate["value"]) for gate in gates)
            text = f"{max(gate['value'] for gate in gates):.2g}" if finite else "not finite"
            cells.append(table.cell(text, "failed: what it taints is marked as not comparable" if failed else None))
        cells.append(_counts([len(by_arm.get(arm, [])) for arm in record.arms]))
        table.add(*cells)
    return table
