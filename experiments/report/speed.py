"""The sections of a speed study's report."""

from typing import Any

from experiments.numbers import DASH, count, number, percent
from experiments.report.document import Block, Cell, Column, Figure, Section, Table, Text, Verdict
from experiments.report.record import Record, Row
from experiments.report.tables import NO_RESULT

UNCLEAR = "not resolved: the interval holds 1"
PARTLY = "not measured at every length"
RECORDED = (
    "In the modes of graphs the same tokens are read again and again from a recording: that is what the GPU has to do, "
    "without its host, and what a program"
)
SPREAD = "median over the turns; in parentheses their 5th to 95th percentile"
BARS = "median over the turns, with a bar from their 5th to their 95th percentile"


def sections(record: Record) -> list[Section]:
    return [verdict(record), training(record), inference(record), operators(record)]


def settings_of(record: Record, phase: str) -> list[dict[str, Any]]:
    """Batch, mode and type of what a phase measured, each once; of training without the batch, which goes with the
    context."""
    found = {
        (None if phase == "train" else row.batch, row.mode, row.dtype) for row in record.rows if row.phase == phase
    }  # fmt: skip
    ordered = sorted(found, key=lambda one: (str(one[1]), str(one[2]), one[0] or 0))
    return [
        {"mode": mode, "dtype": dtype} | ({} if phase == "train" else {"batch": batch})
        for batch, mode, dtype in ordered
    ]


def _recorded(record: Record, phase: str) -> bool:
    return any(row.phase == phase and "graph" in (row.mode or "") for row in record.rows)


def lines(record: Record, phase: str, metric: str, arm: str, **where: Any) -> list[Row]:
    """Rows of one seed (its percentiles are the spread of the repeats), by context."""
    seed = record.seeds[0] if record.seeds else None
    found = [
        row for row in record.rows
        if (row.seed, row.arm, row.phase, row.metric) == (seed, arm, phase, metric) and row.value is not None
        and all(getattr(row, name) == value for name, value in where.items())
    ]  # fmt: skip
    return sorted(found, key=lambda row: row.context or 0)


def verdict(record: Record) -> Section:
    shared = (
        "An arm had one process for all lengths of a phase. The arms at all these lengths"
        if record.spec.get("device") == "cuda" else
        "Every cell ran in a process of its own, except that decode of one arm at all lengths shares one. The arms at "
        "one length, and of decode every arm at every length,"
    )  # fmt: skip
    intro = (
        f"{shared} took turns in short slices, and ratios are formed turn by turn: they need not be the quotients of "
        "the medians below. Between measured lengths the ratio of the speeds is taken as straight in the length, as it "
        "is where every earlier token adds as much to the time of one arm's token and nothing to the other's."
    )
    blocks: list[Block] = []
    # what a GPU's host decided says least: behind the rest
    for one in sorted(record.findings, key=lambda one: (one["kind"] == "drift", bool(one.get("host_bound")))):
        if one["kind"] == "drift":
            blocks.append(Verdict("open", one["sentence"], "a limit to what the lengths above say", ""))
            continue
        if not one.get("comparable", True):  # absent in older records
            blocks.append(Verdict("blocked", one["sentence"], "not comparable", ""))
            continue
        if one.get("host_bound"):  # likewise
            blocks.append(Verdict("open", one["sentence"], "as much of the host as of the GPU", ""))
            continue
        measured = "measured by noisy timings" if one.get("noisy") else "measured"  # likewise
        if one["kind"] == "growth":
            sure, standing = not one["ci_low"] <= 1 <= one["ci_high"], measured
            if one.get("lost"):  # likewise
                sure, standing = False, PARTLY
            elif not sure:
                standing = UNCLEAR
            blocks.append(Verdict("resolved" if sure else "open", one["sentence"], standing, ""))
            continue
        ends = {one["ci_low"], one["ci_high"]}
        sure, standing = True, measured
        if one.get("lost"):  # likewise
            sure, standing = False, PARTLY
        elif len(ends) > 1 and ends & {0, None}:
            where = [name for name, bound in (("shortest", 0), ("longest", None)) if bound in ends]
            sure, standing = False, f"open at the {' and the '.join(where)} measured length"
        blocks.append(Verdict("resolved" if sure else "open", one["sentence"], standing, ""))
    if not any(one["kind"] == "crossover" for one in record.findings):
        blocks.append(Text("No two arms were measured at two lengths, so no crossover can be told."))
    blocks.append(Text(
        "What this run does not show: quality, larger models, other machines. The models are initialised, not trained; "
        "one seed. The intervals cover the spread of the turns in this run only: a machine "
        "that is shared with others moves between runs by more than that."
    ))  # fmt: skip
    return Section("verdict", "From which length on is which faster?", intro, blocks)


def training(record: Record) -> Section:
    intro = (
        "A whole optimizer step: forward, loss, backward, clipping, AdamW, the same number of tokens at every context "
        "where it fits. Utilisation is the arithmetic of the formula over the time taken, as a share of what a large "
        "matrix product reached in the same process at the start of each turn."
    )
    if _recorded(record, "train"):
        intro += f" {RECORDED} does not get from other batches."
    table = _table(record, "Training step", "train", "step_ms", "ms per step", flops=True)
    if table.empty:
        return Section("training", "Training", intro, [Text("No training step was measured.")])
    alt = _alt(record, "train", "tokens_per_s")
    caption = f"Training tokens per second against context, both axes logarithmic; {BARS}."
    return Section("training", "Training", intro, [Figure("speed-training", alt, caption), table])


def inference(record: Record) -> Section:
    intro = (
        "Prefill reads a prompt in one pass; decode writes one token after another behind it. The roofline is the "
        "tokens/s that the measured bandwidth would allow if every weight that a step meets, and the cache or state, "
        "were read once from memory; a model that fits into the processor's caches can pass it."
    )
    if any((row.batch or 1) > 1 for row in record.rows if row.phase in ("prefill", "decode")):
        intro += " Tokens per second are of all sequences of a batch together, milliseconds are what each waits for."
    if record.spec.get("device") == "cuda":
        intro += (
            " In mode eager a GPU waits for its host, which asks for each operation by itself: of a short prompt, and "
            "of every decoded token, that is most of the time. What a first call costs more in mode eager is the "
            "loading and choosing of kernels; in mode graph these went before, and it is a replay like any other."
        )
    else:
        intro += (
            " One process decodes at all lengths of an arm: of its first calls only that at the shortest length loads "
            "what is compiled."
        )
    if _recorded(record, "prefill"):
        intro += f" {RECORDED} does not get from other prompts."
    prefill = _table(record, "Prefill", "prefill", "time_to_first_token_ms", "ms to the first token", flops=True)
    decode = _table(record, "Decode", "decode", "ms_per_token", "ms per token", flops=False)
    phases = (("prefill", prefill), ("decode", decode))
    blocks: list[Block] = [table for _, table in phases if not table.empty]
    if not blocks:
        return Section("inference", "Prefill and decode", intro, [Text("Nothing was measured.")])
    caption = f"Tokens per second against context, both axes logarithmic; {BARS}."
    alt = " ".join(_alt(record, phase, "tokens_per_s") for phase, shown in phases if not shown.empty)
    blocks.insert(0, Figure("speed-inference", alt, caption))
    caption = f"Milliseconds per decoded token against the tokens before it, both axes logarithmic; {BARS}."
    blocks.insert(1, Figure("speed-decode", _alt(record, "decode", "ms_per_token"), caption))
    return Section("inference", "Prefill and decode", intro, blocks)


def operators(record: Record) -> Section:
    intro = (
        "The operation that mixes the sequence by itself, on random inputs of the shapes that the first layer gives "
        "it: attention, the selective scan, the chunked scan of Mamba-2. Batch 1, tokens per second; backward includes "
        "the forward pass. This is one operation, of which a model has one in every layer: Mamba has about two layers "
        "where a transformer of its size has one. The lengths above count all that a model has."
    )
    table = Table(f"Operations alone: {SPREAD}", [
        Column("Arm", key=True), Column("Type", key=True), Column("Context", numeric=True, key=True),
        Column("Forward, tokens/s", numeric=True), Column("Forward and backward, tokens/s", numeric=True),
        Column("Backend"),
    ])  # fmt: skip
    each = [(arm, where) for where in settings_of(record, "operator") for arm in record.arms]
    for arm, where in each:
        backward = {row.context: row for row in lines(record, "operator", "backward_tokens_per_s", arm, **where)}
        for row in lines(record, "operator", "forward_tokens_per_s", arm, **where):
            other = backward.get(row.context)
            absent = record.absence(arm, "operator", "backward_tokens_per_s")
            both = table.cell(DASH, absent) if other is None else _spread(other)
            table.add(arm, row.dtype or DASH, count(row.context or 0), _spread(row), both, row.backend or DASH)
    if table.empty:
        return Section("operators", "Operations alone", intro, [Text("None was measured.")])
    caption = f"Forward pass of the operation alone, tokens per second against context; {BARS}."
    figure = Figure("speed-operators", _alt(record, "operator", "forward_tokens_per_s"), caption)
    return Section("operators", "Operations alone", intro, [figure, table])


def _table(record: Record, title: str, phase: str, latency: str, heading: str, flops: bool) -> Table:
    columns = [Column("Arm", key=True), Column("Mode", key=True), Column("Type", key=True)]
    columns += [Column("Batch", numeric=True, key=True), Column("Context", numeric=True, key=True)]
    columns.append(Column("Tokens/s", numeric=True))
    columns.append(Column(heading, numeric=True))
    if flops:
        columns += [Column("GFLOP/s", numeric=True), Column("ceiling", numeric=True), Column("share", numeric=True)]
    else:
        columns += [Column("GB/s read", numeric=True), Column("ceiling", numeric=True), Column("share", numeric=True)]
        columns.append(Column("roofline, tokens/s", numeric=True))
    columns.append(Column("first call, ms", numeric=True))
    table = Table(f"{title}: {SPREAD}", columns)
    kind = "flops" if flops else "bytes"
    share = "flops_utilisation" if flops else "bandwidth_utilisation"
    for where in settings_of(record, phase):
        by_arm = {
            arm: {(row.context or 0, row.batch or 0): row for row in lines(record, phase, "tokens_per_s", arm, **where)}
            for arm in record.arms
        }
        for arm, found in by_arm.items():
            for context, batch in sorted({place for every in by_arm.values() for place in every}):
                row = found.get((context, batch))
                if row is None:
                    if record.incomplete(arm):
                        how = [where["mode"] or DASH, where["dtype"] or DASH, str(batch), count(context)]
                        table.add(arm, *how, *[table.cell(DASH, NO_RESULT)] * (len(columns) - 1 - len(how)))
                    continue
                at = where | {"context": row.context, "batch": row.batch}
                one = {
                    name: lines(record, phase, name, arm, **at)[0]
                    for name in (latency, f"{kind}_per_s", f"ceiling_{kind}_per_s", share, "first_call_ms")
                }
                cells: list[Cell | str] = [arm, row.mode or DASH, row.dtype or DASH, str(row.batch)]
                cells += [count(row.context or 0), _spread(row), _spread(one[latency])]
                cells += [number(one[name].known / 1e9) for name in (f"{kind}_per_s", f"ceiling_{kind}_per_s")]
                cells.append(percent(one[share].known).lstrip("+"))
                if not flops:
                    cells.append(number(lines(record, phase, "roofline_tokens_per_s", arm, **at)[0].known))
                table.add(*cells, number(one["first_call_ms"].known))
    return table


def _spread(row: Row) -> str:
    if row.p5 is None or row.p95 is None:
        return number(row.known)
    return f"{number(row.known)} ({number(row.p5)} to {number(row.p95)})"


def _alt(record: Record, phase: str, metric: str) -> str:
    told = []
    batches = {where.get("batch") for where in settings_of(record, phase)}
    for where in settings_of(record, phase):
        for arm in record.arms:
            found = lines(record, phase, metric, arm, **where)
            if found:
                ends = [
                    f"{number(row.known)} at {count(row.context or 0)}" for row in dict.fromkeys((found[0], found[-1]))
                ]
                batch = where.get("batch")
                of_batch = f"batch {batch}" if batch is not None and len(batches) > 1 else None
                how = ", ".join(filter(None, (arm, where["mode"], where["dtype"], of_batch)))
                told.append(f"{how}: {' and '.join(ends)}")
    return f"{metric.replace('_', ' ')} of {phase} against context. " + "; ".join(told) + "."
