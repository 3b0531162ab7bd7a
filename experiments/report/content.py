"""What a report says, in order, from a `Record`: verdict, results, curves, memory, samples, settings."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from experiments.kernels.verdict import by_form
from experiments.numbers import DASH, count, interval, number, plural, size
from experiments.printable import without_gaps
from experiments.report import curves, lineage, moe, sparse
from experiments.report import masking as masking_study
from experiments.report import memory as memory_study
from experiments.report import speed as speed_study
from experiments.report import vocabulary as vocabulary_study
from experiments.report.document import Block, Cell, Code, Column, Document, Figure, Notice, Section, Table, Text, Tone
from experiments.report.record import Record
from experiments.report.tables import (
    ARROWS,
    DECODE,
    LOADING,
    ON_CARD,
    PREFILL,
    TRAINING,
    WITHIN,
    add_line,
    arms_table,
    by_context,
    comparisons,
    context_columns,
    gates_table,
    main_table,
    other_loss,
    placing,
    residuals,
    room,
    seed_counts,
    tells_card,
    together,
    training_context,
    value_cell,
)
from experiments.report.verdict import machine, notices, verdict
from experiments.store import INTERRUPTED

SPEED = {"tokens_per_s", "time_to_first_token_ms", "ms_per_token"}


# the sections of a study that has its own; what a study that compares arms says before the comparison's sections
STANDALONE: dict[str, Callable[[Record], list[Section]]] = {
    "memory": memory_study.sections, "speed": speed_study.sections, "vocabulary": vocabulary_study.sections,
}  # fmt: skip
SAYING: dict[str, Callable[[Record], list[Section]]] = {
    "masking": masking_study.sections,
    "lineage": lineage.sections,
    "sparse": sparse.sections,
    "moe": moe.sections,
}  # fmt: skip


def document(record: Record) -> Document:
    if record.study in STANDALONE:
        sections = [*STANDALONE[record.study](record), Section("arms", "What was measured", "", [arms_table(record)])]
    elif record.sweep:
        sections = [verdict(record), sweep(record), training_curves(record), samples(record)]
    else:
        sections = SAYING[record.study](record) if record.study in SAYING else []
        sections += [verdict(record), results(record), training_curves(record), position(record)]
        sections += [throughput(record), memory(record), samples(record)]
    sections += [settings(record), troubles(record), repeat()]
    result, environment = record.result, record.environment
    facts = [("Run", result["run_id"]), ("Experiment", result["experiment"])]
    facts += [("Profile", result["profile"])] if result["profile"] else []
    last = "Written, with cells missing" if record.missing else "Finished"
    facts += [("Started", _moment(result["created"])), (last, _moment(result["finished"]))]
    arms = list(curves.sweep_rates(record)) if record.sweep else record.arms
    facts += [
        ("Arms", ", ".join(arms)),
        ("Seeds", f"{len(record.seeds)} ({', '.join(map(str, record.seeds))})" if record.seeds else "none finished"),
    ]
    if environment:
        facts.append(("Machine", machine(environment)))
    return Document(result["title"], facts, notices(record), _with_gaps(sections, record))


def _with_gaps(sections: list[Section], record: Record) -> list[Section]:
    """Every figure says what it has no point or bar for, since a cell has no result."""
    lost = [one["cell"] for one in record.failures if one["cell"]] + record.missing
    if not lost:
        return sections
    rest = f" and {len(lost) - 2} more" if len(lost) > 2 else ""
    told = (
        f" Without a result in this run: {', '.join(lost[:2])}{rest}. What is missing is not drawn, lines pass over "
        "it, and means are of the rest."
    )
    for section in sections:
        section.blocks[:] = [
            replace(block, caption=block.caption + told) if isinstance(block, Figure) else block
            for block in section.blocks
        ]
    return sections


def results(record: Record) -> Section:
    intro = (
        "Bits per byte is how many bits the model needs, on average, to store one byte of unseen text: "
        "lower is better, and it does not depend on the vocabulary. Prefill reads a given text, decode "
        "then writes one token at a time. Every number is the mean over seeds with a 95% Student t "
        "interval over seeds in brackets; 1 kB, MB, GB = 10³, 10⁶, 10⁹ bytes."
    )
    intro += together(record)
    if len({(one["a"], one["b"]) for one in record.verdicts}) == 1:
        intro += " Beside a quantity stands its paired comparison, where one was planned; bold is resolved as better."
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
            "Loading, prefill and decode were not measured in this run (measurement.enabled = false), so "
            "nothing is said about them."
        )
    return "This run recorded no measurement of loading, prefill or decode; see warnings and failures."


def training_curves(record: Record) -> Section:
    intro = (
        "Loss is the average surprise per token in nats (natural logarithm): lower is better. Of an untrained model "
        "it is near the logarithm of the vocabulary's size, where every token is equally likely, and it falls as "
        "the model learns."
    )
    intro += _other_losses(record)
    blocks: list[Block] = []
    if record.curves:
        name = "sweep-curves" if record.sweep else "losses"
        blocks.append(Figure(name, _loss_alt(record), _loss_caption(record)))
        blocks.append(_loss_table(record))
    else:
        blocks.append(Text("No log of a training step is in this folder (a cell's metrics.jsonl): there is no curve."))
    return Section("curves", "Loss while training", intro, blocks, terminal=False)


def _other_losses(record: Record) -> str:
    """Which arms' losses are not to be set beside the others'."""
    told = [f"{arm} ({reason})" for arm in record.arms if (reason := other_loss(record, arm))]
    return f" Not comparable with the others: {'; '.join(told)}." if told else ""


def _loss_caption(record: Record) -> str:
    bold = (
        "Thin lines are single seeds, the bold line is the mean of those that came furthest; both "
        "against the tokens trained on."
    )
    if record.sweep:
        return f"Validation loss on a fixed subset for every learning rate, one panel per arm. {bold}"
    window = curves.window(record)
    smoothed = f", as a moving mean over {plural(window, 'step')}" if window > 1 else ""
    return (
        f"Left (on a phone: above) the training loss{smoothed}; "
        f"right (below) the loss on a fixed subset of the validation split. {bold}"
    )


def _loss_alt(record: Record) -> str:
    parts = []
    for arm in record.arms:
        mean = curves.mean_validation(record, arm)
        if mean is not None:
            tokens, loss = mean
            parts.append(
                f"{arm} from {number(loss[0], 3)} to {number(loss[-1], 3)} nats/token after "
                f"{count(tokens[-1])} tokens ({_mean_of(record, arm)})"
            )
    told = "; ".join(parts) if parts else "no validation points"
    return f"Validation loss against tokens: {told}.{_other_losses(record)}"


def _mean_of(record: Record, arm: str) -> str:
    every = curves.validation(record, arm)
    seeds, early = len(curves.furthest(every)), _ended_early(record, arm)
    return ("one seed" if seeds == 1 else f"mean of {seeds} seeds") + (f"; {early}" if early else "")


def _ended_early(record: Record, arm: str) -> str | None:
    every = curves.validation(record, arm)
    early = len(every) - len(curves.furthest(every))
    return f"{plural(early, 'seed')} that ended early left out" if early else None


def _loss_table(record: Record) -> Table:
    """Start and end of the curves, both on the validation text, with what the start should be near."""
    columns = [Column("Arm", key=True), Column("Loss before training", numeric=True)]
    columns += [Column("ln V", numeric=True), Column("Last validation point", numeric=True)]
    columns += [Column("at tokens", numeric=True), Column("n", numeric=True)]
    table = Table("Start and end of the validation curves, nats/token", columns)
    spread = "the smallest and the largest over the seeds, not an interval"
    for arm in record.arms:
        starts = [one.get("initial") or {} for one in record.evaluations.get(arm, {}).values()]
        expected = [start["expected_loss"] for start in starts if start.get("expected_loss") is not None]
        ends = [
            [(float(at[i]), float(loss[i])) for i in (0, -1)]
            for at, loss in curves.furthest(curves.validation(record, arm))
        ]
        absent = record.absence(arm, "quality", "validation_bits_per_byte")
        other = other_loss(record, arm)
        refused = f"not comparable across arms: {other}" if other else None
        first = [loss for (at, loss), _ in ends if at == 0]
        cells: list[Cell | str] = [arm]
        cells.append(_range(table, first, "not evaluated before training" if ends else absent, refused, spread))
        cells.append(number(expected[0], 3) if expected else table.cell(DASH, absent))
        cells.append(_range(table, [loss for _, (_, loss) in ends], absent, refused, spread))
        cells.append(_span([at for _, (at, _) in ends]) if ends else table.cell(DASH, absent))
        cells.append(table.cell(str(len(ends)), _ended_early(record, arm)))
        table.add(*cells)
    return table


def _range(table: Table, values: list[float], absent: str, refused: str | None, spread: str) -> Cell:
    if not values:
        return table.cell(DASH, absent)
    if not np.isfinite(values).all():
        return table.cell(DASH, "the loss is not finite")
    mean = number(float(np.mean(values)), 3)
    if len(values) == 1:
        return table.cell(mean, refused, "one seed, so no interval")
    return table.cell(f"{mean} ({number(min(values), 3)} to {number(max(values), 3)})", refused, spread)


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def position(record: Record) -> Section:
    split = record.split
    intro = (
        "The loss at each position of the context, counted from its start: a model that uses what it has "
        "read predicts later tokens better than the first ones, so the curve falls as far as its memory "
        "reaches."
    )
    intro += _other_losses(record)
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
            f"Loss by position on the {split} split, averaged within thirds of an octave. Thin lines are "
            "single seeds, bold lines their mean."
        )
        alt = f"Loss by position in the context: {'; '.join(ends)}.{_other_losses(record)}"
        blocks.append(Figure("position", alt, caption))
    table = Table(
        f"Loss at single positions, nats/token, mean over n seeds with {WITHIN}",
        [Column("Position", key=True), *(Column(arm, numeric=True) for arm in record.arms), Column("n", numeric=True)],
    )
    for at in record.contexts("quality", "test_loss_at_position"):
        cells = [Cell(count(at))]
        rows = [record.row(arm, "quality", "test_loss_at_position", at) for arm in record.arms]
        cells += [value_cell(table, record, arm, "quality", "test_loss_at_position", at, 1.0) for arm in record.arms]
        table.add(*cells, seed_counts(rows))
    if not table.empty:
        blocks.append(table)
    if not blocks:
        blocks.append(Text("No arm was evaluated, so there is no loss by position."))
    return Section("position", "Loss by position in the context", intro, blocks, terminal=False)


def _position_mean(record: Record, arm: str) -> str:
    seeds = len(record.evaluations.get(arm, {}))
    return "one seed" if seeds == 1 else f"mean of {seeds} seeds"


def throughput(record: Record) -> Section:
    intro = (
        "Prefill reads the whole context in one pass; decode writes one token after another with that "
        "context behind it. An architecture whose work per token grows with the context slows down to the "
        "right. Training throughput counts a whole optimizer step."
    ) + together(record)
    blocks: list[Block] = []
    if _drawable(record, SPEED_LINES):
        caption = (
            "Tokens per second against context length, both axes logarithmic. Points are means over seeds "
            f"with their {WITHIN}, cut off below a quarter of the mean; with one seed, the median of its "
            "repeats with the 5th to 95th percentile."
        )
        blocks.append(Figure("throughput", _throughput_alt(record), caption))
    table = Table(f"Speed by context length, mean over n seeds with {WITHIN}. {ARROWS}", context_columns(record))
    for one in PREFILL + DECODE:
        if one.metric in SPEED:
            by_context(table, record, one)
    for one in TRAINING[:2]:
        if record.has(one.phase, one.metric):
            table.group(one.title)
            add_line(table, record, one, _trained_at(record), training_context(record))
    blocks.append(table)
    if not record.measured:
        blocks.append(Text(_unmeasured(record)))
    blocks += _how(record)
    return Section("throughput", "Throughput", intro, [block for block in blocks if not _empty(block)])


def _how(record: Record) -> list[Block]:
    """Mode, precision and batch, which are the same for every arm."""
    modes, precisions = (
        {phase: sorted({value for row in record.rows if row.phase == phase and (value := getattr(row, name))})
         for phase in ("train", "prefill", "decode")}
        for name in ("mode", "dtype")
    )  # fmt: skip
    told = []
    for what, by_phase in (("Execution mode", modes), ("Precision", precisions)):
        by_phase = {phase: found for phase, found in by_phase.items() if found}
        if by_phase:
            same = len({tuple(found) for found in by_phase.values()}) == 1
            each = [", ".join(found) + ("" if same else f" ({phase})") for phase, found in by_phase.items()]
            told.append(f"{what} of every arm: {', '.join(dict.fromkeys(each))}.")
    batch = record.spec.get("measurement", {}).get("batch") if record.measured else None
    if batch:
        told.append(f"Batch of prefill and decode: {batch}.")
    return [Text(" ".join(told))] if told else []


SPEED_LINES = (("prefill", "tokens_per_s"), ("decode", "tokens_per_s"))


STATE_LINES = (("decode", "state_bytes"), ("decode", "state_bytes_analytic"))


def _drawable(record: Record, lines: Iterable[tuple[str, str]]) -> bool:
    wanted = set(lines)
    return any((row.phase, row.metric) in wanted and row.value for row in record.rows)


def _trained_at(record: Record) -> str:
    context = record.spec.get("training", {}).get("context")
    return f"context {count(context)}" if context else "as trained"


def _throughput_alt(record: Record) -> str:
    parts = []
    for phase, metric in SPEED_LINES:
        for arm in record.arms:
            ends = _ends(record, arm, phase, metric)
            if ends:
                told = [f"{number(value)} at {count(context)}" for context, value in ends]
                parts.append(f"{phase}, {arm}: {' and '.join(told)}")
    return "Tokens per second against context length. " + "; ".join(parts) + "."


def _ends(record: Record, arm: str, phase: str, metric: str) -> list[tuple[int, float]]:
    """(context, value) at the shortest and at the longest context that has a value."""
    rows = [(context, record.row(arm, phase, metric, context)) for context in record.contexts(phase, metric)]
    known = [(context, row.value) for context, row in rows if row is not None and row.value is not None]
    return known if len(known) < 2 else [known[0], known[-1]]


def memory(record: Record) -> Section:
    intro = (
        "Loading costs the file on disk, the highest host memory while it is read, and what stays "
        "resident. The peak of prefill and of decode includes the weights, over the process before it loaded "
        "the model; working memory counts only what that phase adds to what it starts from, which in decode "
        "is the state as well. Peaks are of a call, in training of a step, that is not timed, whose "
        "allocator hands back what is freed. The cache "
        f"or state is what {_decoded_at_once(record)} between decoded tokens: keys and values for attention, which "
        "grow with the context, or a fixed recurrent state. Each cell was measured in a fresh process."
    )
    blocks: list[Block] = []
    if not record.measured:
        return Section("memory", "Memory: loading against inference", intro, [Text(_unmeasured(record))])
    if curves.memory_lines(record):
        caption = (
            "Loading against inference, 1 MB = 10⁶ bytes; the number beside a peak is its context in "
            "tokens. Whiskers are 95% intervals over seeds, where there are several."
        )
        blocks.append(Figure("memory", _memory_alt(record), caption))
    if _drawable(record, STATE_LINES):
        caption = (
            "Bytes of cache or state for one batch against context length, both axes logarithmic: markers "
            "are measured, lines are the analytic figure."
        )
        blocks.append(Figure("state", _state_alt(record), caption))
    table = Table(f"Memory, mean over n seeds with {WITHIN}.{room(record)} {ARROWS}", context_columns(record))
    present = [one for one in LOADING if one.metric.endswith("_bytes") and record.has(one.phase, one.metric)]
    if present:
        table.group("Loading")
    for one in present:
        add_line(table, record, one, one.title, None)
    for one in PREFILL + DECODE:
        if one.metric.endswith("_bytes"):
            by_context(table, record, one)
    blocks += [table, residuals(record)]
    if tells_card(record):
        blocks.append(Text(ON_CARD))
    formulas = [
        f"{name}: {arm['state_bytes_formula']}"
        for name, arm in record.result["arms"].items()
        if arm.get("state_bytes_formula")
    ]
    if formulas:
        blocks.append(Text("Cache or state of one sequence, by formula. " + "; ".join(formulas) + ".", terminal=False))
    title = "Memory: loading against inference"
    return Section("memory", title, intro, [block for block in blocks if not _empty(block)])


def _decoded_at_once(record: Record) -> str:
    """Whose cache or state the tables of a comparison show."""
    batch = record.spec.get("measurement", {}).get("batch", 1)
    return "one sequence keeps" if batch == 1 else f"the {count(batch)} sequences of a batch keep together"


def _memory_alt(record: Record) -> str:
    parts = []
    for title, phase, metric, context in curves.memory_lines(record):
        told = []
        for arm in record.arms:
            row = record.row(arm, phase, metric, context)
            value = None if row is None else row.value
            told.append(f"{arm} not measured" if value is None else f"{arm} {number(value / 1e6)}")
        parts.append(f"{title}: {', '.join(told)}")
    return "Memory in MB. " + "; ".join(parts) + "."


def _state_alt(record: Record) -> str:
    parts = []
    for arm in record.arms:
        told = []
        for context, value in _ends(record, arm, "decode", "state_bytes"):
            told.append(f"{size(value)} at context {count(context)}")
        if told:
            parts.append(f"{arm}: {' and '.join(told)}")
    return "Cache or state against context length, measured. " + "; ".join(parts) + "."


def sweep(record: Record) -> Section:
    intro = (
        "Every arm was trained at every learning rate of the grid, with the same tuning budget. Bits per "
        "byte is how many bits the model needs, on average, to store one byte of unseen text; lower is "
        "better. The best rate is the one with the lowest mean over seeds on the validation split, of those with a "
        "result at every seed."
    )
    table = Table(
        f"Validation bits per byte by learning rate, mean over n seeds with {WITHIN}",
        [
            Column("Arm", key=True),
            Column("Learning rate", numeric=True, key=True),
            Column("Validation bits per byte", numeric=True),
            Column("n", numeric=True),
            Column(""),
        ],
    )
    told = []
    for base, rates in curves.sweep_rates(record).items():
        values = curves.rate_rows(record, base)
        best, whole = curves.best_rate(record, base), curves.whole_rates(record, base)
        for rate, arm in rates.items():
            cell = value_cell(table, record, arm, "quality", "validation_bits_per_byte", None, 1.0)
            lowest = rate == best
            counted = rate not in values or rate in whole
            mark = Cell("lowest", strong=True) if lowest else Cell("" if counted else "not counted: a seed is missing")
            table.add(base, f"{rate:g}", replace(cell, strong=lowest), seed_counts([values.get(rate)]), mark)
        if best is not None:
            row = values[best]
            told.append(
                f"{base}: lowest {interval(row.known, row.ci_low, row.ci_high, least=3)} bits/byte at "
                f"{best:g}, n = {plural(row.n, 'seed')}, of {plural(len(rates), 'rate')} from "
                f"{min(rates):g} to {max(rates):g}"
            )
    blocks: list[Block] = [table, arms_table(record)]
    if told:
        caption = (
            "Validation bits per byte against the peak learning rate (logarithmic). Thin lines are single "
            "seeds, the bold line is their mean with 95% intervals, a ring marks the lowest mean of the rates with "
            "a result at every seed."
        )
        alt = "Validation bits per byte by learning rate. " + "; ".join(told) + "."
        blocks.insert(0, Figure("sweep", alt, caption))
    return Section("sweep", "Learning rate", intro, blocks)


def samples(record: Record) -> Section:
    intro = (
        "Text that the trained models wrote, unedited, except that control characters are shown as visible signs and "
        "long runs of empty lines are counted. A small model trained briefly writes fragments. Samples illustrate, "
        "they prove nothing. For a seed all arms draw with the same random numbers, so models that know little yet "
        "write alike."
    )
    blocks: list[Block] = []
    for arm in _sampled(record):
        for seed, evaluation in sorted(record.evaluations.get(arm, {}).items()):
            for one in evaluation.get("samples", []):
                label = f"{arm}, seed {seed}, temperature {one['temperature']:g}: the prompt, a bar, the model's words"
                blocks.append(Code(label, without_gaps(one["text"]), prompt=one["prompt"]))
    if not blocks:
        blocks.append(Text("This run generated no samples."))
    return Section("samples", "Samples", intro, blocks, terminal=False)


def _sampled(record: Record) -> list[str]:
    """Every arm; of a sweep, each base arm at its best rate."""
    if not record.sweep:
        return record.arms
    bases = curves.sweep_rates(record)
    chosen = {base: curves.best_rate(record, base) for base in bases}
    return [bases[base][rate] for base, rate in chosen.items() if rate is not None]


def settings(record: Record) -> Section:
    intro = "Everything that decided the result: the resolved specification, the machine, the versions and the data."
    blocks: list[Block] = [_environment_table(record)]
    hashes = _hash_table(record)
    blocks += [table for table in (hashes, gates_table(record)) if not table.empty]
    blocks.append(Code("spec.toml, resolved", record.spec_text.rstrip("\n")))
    for name, arm in record.result["arms"].items():
        if arm.get("config"):
            lines = [f"{key} = {value}" for key, value in _flat(_used(arm["config"]))]
            blocks.append(Code(f"Resolved model configuration of {name}", "\n".join(lines), folded=True))
    return Section("settings", "Settings and environment", intro, blocks, terminal=False)


def _used(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration without the blocks that its pattern does not name."""
    hybrid = config.get("hybrid")
    if not hybrid:
        return config
    blocks = {letter: block for letter, block in hybrid["blocks"].items() if letter in hybrid["pattern"]}
    return config | {"hybrid": hybrid | {"blocks": blocks}}


LABELS = {
    "created": "Started",
    "command": "Command",
    "lab_version": "Lab version",
    "spec_sha256": "Specification SHA-256",
    "source_sha256": "Source SHA-256",
    "git_commit": "Git commit",
    "git_dirty": "Uncommitted changes",
    "cpu": "CPU",
    "cpu_instructions": "CPU instructions",
    "gpu": "GPU",
    "gpu_capability": "Compute capability",
    "cuda": "CUDA",
    "gpu_driver": "GPU driver",
    "folders": "Model folders",
    "gomp_spincount": "GOMP_SPINCOUNT",
    "threads": "Threads used",
    "memory_bytes": "Memory",
    "page_bytes": "Page of memory",
    "gpu_memory_bytes": "GPU memory",
}
WITHOUT = {
    "git_commit": "the lab did not run from a git checkout of its own",
    "git_dirty": "the lab did not run from a git checkout of its own",
    "gpu": "the run used no GPU",
    "gpu_capability": "the run used no GPU",
    "gpu_memory_bytes": "the run used no GPU",
    "gpu_driver": "the run used no GPU, or NVML does not tell",
    "kernels": "they are checked on GPUs",
    "cuda": "this build of torch has no CUDA",
    "folders": "no arm takes its model from a folder",
    "gomp_spincount": "the variable was not set",
}


def _environment_table(record: Record) -> Table:
    """environment.json in full: what it lists that is not known here is printed under its own name."""
    table = Table("Environment and data", [Column("What", key=True), Column("Value")])
    environment = record.environment
    if not environment:
        table.add("environment.json", table.cell(DASH, "the file is missing from the run directory"))
        return table
    groups = {"packages": "Packages", "backends": "Backends that ran", "data": "Data"}
    table.group("Machine and code")
    for key, value in environment.items():
        if key in groups or key == "repeat":  # a command that earlier records kept
            continue
        if key == "kernels" and value is not None:
            _kernels(table, value)
            continue
        label = LABELS.get(key, key.replace("_", " ").capitalize())
        if value is None or value == {}:
            table.add(label, table.cell(DASH, WITHOUT.get(key, "not recorded")))
        elif isinstance(value, dict):
            table.add(label, ", ".join(f"{name}: {_plain(item)}" for name, item in value.items()))
        elif key.endswith("_bytes"):
            table.add(label, size(value))
        else:
            table.add(label, _plain(value))
    for group, heading in groups.items():
        if not environment.get(group):
            continue
        table.group(heading)
        for key, text in _flat(environment[group]):
            label = key if group != "data" else key.replace("_", " ")
            table.add(label, text if text not in ("", DASH) else table.cell(DASH, "none"))
    return table


def _kernels(table: Table, check: dict[str, Any]) -> None:
    """What the check of the kernels on this GPU said, by form."""
    if check["problem"]:
        table.add("Kernels", f"not checked: {check['problem']}")
    for name, reason in check["absent"].items():
        table.add(f"Kernels, form {name}", f"not here: {reason}")
    for form, said in by_form(check["rows"]).items():
        table.add(f"Kernels, form {form}", f"{said} (checked {check['checked']})")


def _hash_table(record: Record) -> Table:
    which = "one seed and vocabulary" if record.study == "vocabulary" else "one seed"
    table = Table(
        f"SHA-256 of the training tokens that each arm consumed; arms of {which} must agree",
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
        message = event.get("message", "")
        if message == INTERRUPTED and not record.missing:
            message = "interrupted, and resumed"
        text = f"{event['cell']}: {message}" if event.get("cell") else message
        if event.get("kind") == "warning" and message not in warnings:
            warnings.append(text)
        elif event.get("kind") == "failure":
            failures.append(text)
    warnings += record.remarks
    blocks: list[Block] = []
    listed: list[tuple[Tone, str, list[str]]] = [
        ("failure", "Failures", failures),
        ("failure", "Missing cells", record.missing),
        ("warning", "Warnings", warnings),
    ]
    for tone, title, points in listed:
        if points:
            blocks.append(Notice(tone, f"{title} ({len(set(points))})", tuple(dict.fromkeys(points))))
    if not blocks:
        blocks.append(Text("None were recorded."))
    return Section("troubles", "Warnings and failures", "What went wrong or looked odd while this ran.", blocks)


def repeat() -> Section:
    told = (
        "In the folder of this report, this command repeats the run with exactly these settings; timings move with "
        "the machine."
    )
    return Section("repeat", "Repeat it", "", [Text(told), Code("Run again", "lab run spec.toml")])


def _moment(text: str) -> str:
    """An ISO time to the second, e.g. "2025-01-02 03:04:05 UTC"; other text as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text or DASH
    zone = "" if moment.tzinfo is None else " UTC"
    return f"{moment.astimezone(UTC) if zone else moment:%Y-%m-%d %H:%M:%S}{zone}"


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
        return [line for key, item in value.items() for line in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(_plain, value)))]
    return [(prefix, _plain(value))]
