"""The sections of a memory study's report."""

from experiments.numbers import DASH, count, number, percent, plural
from experiments.report.document import Block, Cell, Column, Figure, Section, Table, Text, Verdict
from experiments.report.record import Record, Row
from experiments.report.tables import NO_RESULT, ON_CARD, RESIDUAL_LIMIT, room, tells_card

DECODED = ", what a decode step computes on its way to the logits"
UNEXPLAINED = (
    f"beyond {RESIDUAL_LIMIT:.0%}. Not predicted are what the allocator keeps or rounds up, buffers of libraries{{}} "
    "and, of experts, a load that is not even"
)

WAYS = ("read", "mapped", "direct")
PARTS = {"weight_bytes": "weights", "optimizer_bytes": "optimizer state", "gradient_bytes": "gradients",
         "activation_bytes": "activations"}  # fmt: skip


def stages(record: Record, arm: str) -> list[tuple[str, float]]:
    """(title, MB) from the file to decode; prefill and decode at the longest context, at the smallest batch."""
    metric = "device_peak_bytes" if record.environment.get("gpu") else "host_peak_bytes"
    wanted: list[tuple[str, str, str, dict]] = [("file on disk", "load", "file_bytes", {"mode": "mapped"})]
    wanted += [(f"load, {way}", "load", metric, {"mode": way}) for way in WAYS]
    wanted += [("resident, mapped", "load", "resident_bytes", {"mode": "mapped"})]
    for phase in ("prefill", "decode"):
        contexts, batch = record.contexts(phase, "peak_bytes"), smallest_batch(record)
        for at in dict.fromkeys((contexts[0], contexts[-1]) if contexts else ()):
            wanted.append((f"{phase}, {at:,}", phase, "peak_bytes", {"context": at, "batch": batch}))
    found = []
    for title, phase, name, where in wanted:
        rows = record.over_seeds(phase, name, arm, **where)
        if rows and rows[0].value is not None:
            found.append((title, rows[0].value / 1e6))
    return found


def smallest_batch(record: Record) -> int | None:
    return min((row.batch for row in record.rows if row.phase == "decode" and row.batch), default=None)


def sections(record: Record) -> list[Section]:
    found = [verdict(record), loading(record), inference(record), training(record)]
    return [*found, on_card(record)] if tells_card(record) else found


def verdict(record: Record) -> Section:
    intro = (
        "Peaks are measured, each in a fresh process, over the process as it was before the model was loaded; lengths "
        "at which a cache outweighs something follow from shapes and are exact."
    )
    blocks: list[Block] = []
    for one in record.findings:
        if one["kind"] != "loading-against-inference":
            blocks.append(Verdict("resolved", one["sentence"], "exact, from shapes", ""))
        elif not one.get("comparable", True):  # absent in older records
            blocks.append(Verdict("blocked", one["sentence"], "not comparable", ""))
        elif one.get("lost"):  # absent in older records
            blocks.append(Verdict("open", one["sentence"], "measured in part", ""))
        else:
            blocks.append(Verdict("resolved", one["sentence"], "measured", ""))
    told = {one["arm"] for one in record.findings if one["kind"] == "loading-against-inference"}
    blocks += [
        Verdict("open", f"{arm} has no result to weigh loading against inference.", "no result", "")
        for arm in record.arms if arm not in told and record.incomplete(arm)
    ]  # fmt: skip
    if not blocks:
        blocks.append(Text("No arm was measured far enough to say anything."))
    blocks.append(Text(
        "What this run does not show: quality, speed, or memory on another device. The models are initialised, not "
        f"trained, in {record.spec.get('memory', {}).get('dtype', 'float32')}; {plural(len(record.seeds), 'seed')}."
    ))  # fmt: skip
    return Section("verdict", "Does loading cost more than inference?", intro, blocks)


def loading(record: Record) -> Section:
    intro = (
        "Three ways to load. Read: the file is read whole and copied into an initialised model, so that file and "
        "model are held at once. Mapped: the file's pages become the parameters; on a CPU the system may drop and "
        "reread them, and processes share them. Direct: each tensor is read into its place. 1 MB = 10⁶ bytes."
    )
    table = Table("Loading, by way", [
        Column("Arm", key=True), Column("Way", key=True), Column("File, MB", numeric=True),
        Column("Host peak, MB", numeric=True), Column("GPU peak, MB", numeric=True),
        Column("Resident, MB", numeric=True), Column("by formula, MB", numeric=True),
        Column("Residual", numeric=True), Column("Time, ms", numeric=True),
    ])  # fmt: skip
    for arm in record.arms:
        for way in WAYS:
            cells: list[Cell | str] = [arm, way]
            metrics = ("file_bytes", "host_peak_bytes", "device_peak_bytes")
            cells += [_megabytes(table, record, arm, "load", metric, mode=way) for metric in metrics]
            cells += _beside_formula(table, record, arm, "load", "resident_bytes", mode=way)
            rows = record.over_seeds("load", "load_ms", arm, mode=way)
            cells.append(number(rows[0].known) if rows else table.cell(DASH, record.absence(arm, "load", "load_ms")))
            table.add(*cells)
    blocks: list[Block] = [table]
    if any(stages(record, arm) for arm in record.arms):
        told = [f"{arm}: " + ", ".join(f"{title} {number(value)}" for title, value in stages(record, arm))
                for arm in record.arms]  # fmt: skip
        caption = (
            "From the file to decode, MB: the file, the peak of each way to load, what stays resident, and the peaks "
            f"of prefill and decode at the shortest and the longest context, batch {smallest_batch(record)}."
        )
        blocks.insert(0, Figure("memory-waterfall", "Memory in MB by stage. " + "; ".join(told) + ".", caption))
    return Section("loading", "From file to first token", intro, blocks)


def inference(record: Record) -> Section:
    intro = (
        "The peak of prefill and of decode includes the weights. The prediction is made from shapes alone: weights and "
        "the table of rotary angles; for decode cache or state, and logits; for prefill the same computation is "
        f"replayed on tensors without data and the storages that live at once are added up.{room(record)}"
    )
    table = Table("Inference, measured and predicted", [
        Column("Arm", key=True), Column("Phase", key=True), Column("Batch", numeric=True, key=True),
        Column("Context", numeric=True, key=True), Column("Peak, MB", numeric=True), Column("predicted", numeric=True),
        Column("Residual", numeric=True), Column("Cache or state, MB", numeric=True),
        Column("by formula", numeric=True), Column("Residual ", numeric=True),
    ])  # fmt: skip
    for arm in record.arms:
        for phase in ("prefill", "decode"):
            found = record.over_seeds(phase, "peak_bytes", None if record.incomplete(arm) else arm)
            for batch, context in sorted({(one.batch or 0, one.context or 0) for one in found}):
                where = {"batch": batch, "context": context}
                cells: list[Cell | str] = [arm, phase, str(batch), count(context)]
                if _one(record, arm, phase, "peak_bytes", where) is None:
                    table.add(*cells, *[table.cell(DASH, NO_RESULT)] * 3, *["" if phase == "prefill" else DASH] * 3)
                    continue
                cells += _beside_formula(table, record, arm, phase, "peak_bytes", **where)
                if phase == "decode":
                    cells += _beside_formula(table, record, arm, phase, "state_bytes", **where)
                else:
                    cells += ["", "", ""]
                table.add(*cells)
    blocks: list[Block] = [] if table.empty else [table]
    if blocks:
        least = record.over_seeds("decode", "peak_bytes", batch=smallest_batch(record))
        told = [f"{row.arm} at {count(row.context or 0)}: {number(row.known / 1e6)}" for row in least]
        caption = (
            "Peak memory against context length, both axes logarithmic: markers are measured, lines predicted from "
            "shapes. Where they part, the difference is what the prediction leaves out."
        )
        blocks.insert(0, Figure("memory-context", "Peak of decode in MB. " + "; ".join(told) + ".", caption))
    formulas = [f"{name}: {arm['state_bytes_formula']}" for name, arm in record.result["arms"].items()]
    blocks.append(Text("Cache or state of one sequence, by formula. " + "; ".join(formulas) + ".", terminal=False))
    return Section("inference", "Inference against context length", intro, blocks)


def training(record: Record) -> Section:
    intro = (
        "One optimizer step in float32 weights with AdamW. Weights, gradients and optimizer state are counted from "
        "their tensors, activations from what the forward pass keeps for the backward one. Gradients grow while "
        "activations are given back, so the measured peak may lie below their sum, and above it where a step needs "
        "room beside them."
    )
    table = Table("Training, MB", [
        Column("Arm", key=True), Column("Context", numeric=True, key=True), Column("Batch", numeric=True),
        *(Column(title.capitalize(), numeric=True) for title in PARTS.values()),
        Column("predicted activations", numeric=True), Column("Residual", numeric=True),
        Column("Peak", numeric=True), Column("predicted", numeric=True), Column("Residual ", numeric=True),
    ])  # fmt: skip
    told = []
    for arm in record.arms:
        found = record.over_seeds("train", "peak_bytes", None if record.incomplete(arm) else arm)
        for context, batch in sorted({(one.context or 0, one.batch or 0) for one in found}):
            where = {"context": context}
            cells: list[Cell | str] = [arm, count(context), str(batch)]
            row = _one(record, arm, "train", "peak_bytes", where)
            if row is None:
                table.add(*cells, *[table.cell(DASH, NO_RESULT)] * (len(table.columns) - len(cells)))
                continue
            cells += [_megabytes(table, record, arm, "train", metric, **where) for metric in list(PARTS)[:-1]]
            cells += _beside_formula(table, record, arm, "train", "activation_bytes", **where)
            cells += _beside_formula(table, record, arm, "train", "peak_bytes", **where)
            table.add(*cells)
            told.append(f"{arm} at {count(context)}: {number(row.known / 1e6)}")
    if table.empty:
        return Section("training", "Training", intro, [Text("No training step was measured.")])
    caption = "What a training step holds, counted, one bar per arm and context; the line is the measured peak."
    figure = Figure("memory-training", "Measured peak of a training step in MB. " + "; ".join(told) + ".", caption)
    return Section("training", "Training", intro, [figure, table])


def on_card(record: Record) -> Section:
    """Of a run on a GPU."""
    table = Table("On the card, MB", [
        Column("Arm", key=True), Column("Phase", key=True), Column("Batch", numeric=True, key=True),
        Column("Context", numeric=True, key=True), Column("Peak of tensors", numeric=True),
        Column("Reserved, peak", numeric=True), Column("Process", numeric=True),
    ])  # fmt: skip
    for arm in record.arms:
        for phase in ("load", "prefill", "decode", "train"):
            peak = "device_peak_bytes" if phase == "load" else "peak_bytes"
            for row in record.over_seeds(phase, "reserved_peak_bytes", arm):
                where = {"context": row.context, "batch": row.batch, "mode": row.mode}
                place = [f"{phase}, {row.mode}" if phase == "load" else phase]
                place += ["" if value is None else count(value) for value in (row.batch, row.context)]
                metrics = (peak, "reserved_peak_bytes", "process_bytes")
                table.add(arm, *place, *(_megabytes(table, record, arm, phase, name, **where) for name in metrics))
    return Section("card", "What the process holds on the card", ON_CARD, [table])


def _one(record: Record, arm: str, phase: str, metric: str, where: dict) -> Row | None:
    return next(iter(record.over_seeds(phase, metric, arm, **where)), None)


def _megabytes(table: Table, record: Record, arm: str, phase: str, metric: str, **where: object) -> Cell:
    row = _one(record, arm, phase, metric, where)
    if row is None or row.value is None:
        return table.cell(DASH, row.reason if row is not None else record.absence(arm, phase, metric))
    return Cell(number(row.value / 1e6))


def _beside_formula(table: Table, record: Record, arm: str, phase: str, metric: str, **where: object) -> list[Cell]:
    """Measured, analytic, residual."""
    cells = [_megabytes(table, record, arm, phase, name, **where) for name in (metric, f"{metric}_analytic")]
    measured, analytic = (_one(record, arm, phase, name, where) for name in (metric, f"{metric}_analytic"))
    if measured is None or analytic is None or measured.value is None or not analytic.value:
        return [*cells, table.cell(DASH, "needs both the measured and the predicted figure")]
    residual = measured.value / analytic.value - 1
    why = UNEXPLAINED.format(DECODED if phase == "decode" else "") if abs(residual) > RESIDUAL_LIMIT else None
    return [*cells, table.cell(percent(residual), why)]
