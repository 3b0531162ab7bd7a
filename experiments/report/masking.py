"""What a masking study's report says before the sections of a comparison."""

import json
from typing import Any

from experiments.numbers import DASH, MINUS, after_holm, interval, number, plural
from experiments.printable import without_gaps
from experiments.report.document import Block, Cell, Code, Column, Figure, Section, Table, Text, Verdict
from experiments.report.record import Record, Row
from experiments.report.tables import WITHIN, seed_counts, value_cell

WAYS = ("greedy", "sampled")
TRUE = "true"


def sections(record: Record) -> list[Section]:
    return [verdict(record), decoders(record), texts(record), blanks(record)]


def having(record: Record, objective: str) -> list[str]:
    return [name for name in record.arms if record.objective(name) == objective]


def judge(record: Record) -> str:
    return having(record, "causal")[0]


def writers(record: Record) -> list[str]:
    """The decoders, the judge among them."""
    return [name for name in record.arms if name not in having(record, "masked")]


def judged(record: Record, arm: str, way: str) -> Row | None:
    """What `arm` writes in this way, nats per token under the judge, over the seeds."""
    rows = record.over_seeds("quality", "judged_nats_per_token", arm, mode=way)
    return rows[0] if rows and rows[0].value is not None else None


def costs(record: Record) -> list[tuple[str, str, Row]]:
    """(title, arm, row) of every kind of text that was judged, the true one first."""
    wanted = [("the true text", judge(record), TRUE)]
    wanted += [(f"{arm}, {way}", arm, way) for arm in writers(record) for way in WAYS]
    return [(title, arm, row) for title, arm, way in wanted if (row := judged(record, arm, way)) is not None]


def verdict(record: Record) -> Section:
    intro = (
        "A decoder learns to predict each next token, at every place of a text at once. Its causal mask lets each "
        "token see only itself and those before it. Without the mask a token also sees those after it, and so the "
        "very one that is to be predicted. An encoder has no mask either, but another task: some tokens are hidden "
        "from it, and it guesses them from both sides. Arms are paired by seed; a comparison is resolved when a "
        "paired t test over the seeds gives p < 0.05 after Holm's correction, or when it is the same at every seed."
    )
    blocks: list[Block] = [_told(one) for one in record.findings if one["kind"] not in ("texts", "examples")]
    if not blocks:
        blocks.append(Text("No two arms of one seed came far enough to be compared."))
    return Section("masking", "What is a causal mask for?", intro, blocks)


def _told(one: dict[str, Any]) -> Verdict:
    if one["kind"] == "pseudo-perplexity":
        return Verdict("blocked", one["sentence"], "not comparable with a perplexity", "")
    value = interval(one["difference"], one["ci_low"], one["ci_high"], sign=True, neutral=0.0)
    unit = "of the tokens" if one["kind"] == "blanks" else "nats/token"
    numbers = f"{one['arm']} {MINUS} {one['against']}: {value} {unit}; n = {plural(one['n'], 'paired seed')}"
    if one["p_holm"] is not None:
        numbers += f"; {after_holm(one['p_holm'])}"
    if not one.get("comparable", True):  # absent in older records
        return Verdict("blocked", one["sentence"], "not comparable", numbers)
    if one["resolved"]:
        return Verdict("resolved", one["sentence"], "resolved", numbers)
    few = "not resolved: one seed has no interval" if one["n"] < 2 else f"not resolved with {one['n']} seeds"
    return Verdict("open", one["sentence"], few, numbers)


def decoders(record: Record) -> Section:
    judging = judge(record)
    intro = (
        "Left, what each decoder is trained on: its own loss. Right, what its text is worth: after prompts from "
        f"validation text each decoder goes on writing, and {judging}'s model of the same seed says how surprising "
        "each written token is. An arm without a mask cannot keep what it has read, because every new token changes "
        "what it makes of all earlier ones; it reads the whole text again for each. Low is not good by itself: a "
        "model that repeats itself is cheap to predict. The text that really follows is the yardstick."
    )
    caption = (
        "Decoders, nats/token: training loss over the last tenth of the steps, test loss at the last place of a "
        f"window, and what the text that each writes costs under {judging}; mean over n seeds (training / text) with "
        f"{WITHIN}"
    )
    table = Table(caption, [
        Column("Arm", key=True), Column("Training loss", numeric=True), Column("Last place", numeric=True),
        *(Column(f"Text, {way}", numeric=True) for way in WAYS), Column("n", numeric=True),
    ])  # fmt: skip
    last = record.spec.get("training", {}).get("context")
    for arm in writers(record):
        cells: list[Cell | str] = [arm]
        cells.append(value_cell(table, record, arm, "quality", "final_training_loss", None, 1.0))
        cells.append(value_cell(table, record, arm, "quality", "test_loss_at_position", last, 1.0))
        cells += [_judged_cell(table, record, arm, way) for way in WAYS]
        rows = [record.row(arm, "quality", "final_training_loss"), judged(record, arm, WAYS[0])]
        table.add(*cells, seed_counts(rows))
    true = judged(record, judging, TRUE)
    if true is not None:
        absent = table.cell(DASH, "nobody's model wrote it")
        own = _judged_cell(table, record, judging, TRUE)
        table.add("the text that really follows", absent, absent, own, own, seed_counts([true]))
    blocks: list[Block] = [table]
    if costs(record) and record.curves:
        told = "; ".join(f"{title} {number(row.known)}" for title, _, row in costs(record))
        ends = "; ".join(
            f"{arm} {number(row.value)}" for arm in writers(record)
            if (row := record.row(arm, "quality", "final_training_loss")) is not None and row.value is not None
        )  # fmt: skip
        caption = (
            "Left (on a phone: above) the training loss, as a moving mean: thin lines are single seeds, the bold line "
            f"is their mean. Right (below) nats per token of what was written, under {judging}'s model; whiskers are "
            "95% intervals over seeds, where there are several."
        )
        alt = f"Training loss at the end: {ends} nats/token. Cost of text under {judging}: {told} nats/token."
        blocks.insert(0, Figure("masking-decoders", alt, caption))
    return Section("masking-decoders", "What decoders are trained on, and what they write", intro, blocks)


def _judged_cell(table: Table, record: Record, arm: str, way: str) -> Cell:
    row = judged(record, arm, way)
    if row is None:
        return table.cell(DASH, "not judged in this run")
    refused = None if row.comparable else f"not comparable across arms: {row.reason}"
    judging = record.row(judge(record), "quality", "test_bits_per_byte")
    if judging is not None and not judging.comparable:
        refused = f"its judge is not to be relied on: {judging.reason}"
    alone = "one seed, so no interval" if row.n == 1 else None
    return table.cell(interval(row.known, row.ci_low, row.ci_high), refused, alone)


def texts(record: Record) -> Section:
    intro = (
        "What stands behind those numbers, for the first prompts of one seed: the text that really follows, then what "
        "each decoder wrote, unedited, except that long runs of empty lines are counted. Illustrations prove nothing; "
        "the table above counts all prompts and seeds."
    )
    blocks: list[Block] = []
    for finding in record.findings:
        if finding["kind"] != "texts":
            continue
        for at, written in enumerate(finding["texts"]):
            for one in written:
                who = "the text that really follows" if one["way"] == TRUE else f"{one['arm']}, {one['way']}"
                cost = f"{number(one['nats_per_token'])} nats/token under {finding['arm']}"
                label = f"Prompt {at + 1}, seed {finding['seed']}, {who} ({cost}): the prompt, a bar, what follows"
                blocks.append(Code(label, without_gaps(one["text"]), folded=at > 0, prompt=one["prompt"]))
    if not blocks:
        blocks.append(Text("This run has no judged text."))
    return Section("masking-texts", "Their texts", intro, blocks, terminal=False)


def blanks(record: Record) -> Section:
    judging, encoders = judge(record), having(record, "masked")
    intro = (
        "Single tokens of validation text are hidden, one at a time, and the encoder guesses each from all the "
        f"others; {judging} guesses the same tokens from those before them. Summed over every token of a text, the "
        "logarithms of the probabilities that the encoder gives are its pseudo-log-likelihood (arXiv 1910.14659). "
        "Each of them knows the rest of the text, so together they are no probability of the text: a "
        "pseudo-perplexity compares encoders with one another, never with a perplexity. For the same reason an "
        "encoder writes nothing here: it fills places in a text that stands on both sides of them, and gives no "
        "probability of a text that one could draw from."
    )
    table = Table(f"Hidden tokens, mean over n seeds with {WITHIN}", [
        Column("Arm", key=True), Column("reads"), Column("Tokens guessed, share", numeric=True),
        Column("Pseudo-perplexity", numeric=True), Column("n", numeric=True),
    ])  # fmt: skip
    guessing = [*encoders, judging]
    for arm in guessing:
        row = record.row(arm, "quality", "blanks_guessed")
        cells: list[Cell | str] = [arm, "both sides" if arm in encoders else "the left side"]
        cells.append(value_cell(table, record, arm, "quality", "blanks_guessed", None, 1.0))
        if arm in encoders:
            cells.append(value_cell(table, record, arm, "quality", "pseudo_perplexity", None, 1.0))
        else:
            cells.append(table.cell(DASH, "a model that reads one side has a perplexity, and no pseudo-perplexity"))
        table.add(*cells, seed_counts([row]))
    blocks: list[Block] = [table] if encoders else [Text("This run has no arm that guesses hidden tokens.")]
    shares = guesses(record)
    if encoders and shares:
        told = "; ".join(f"{arm} {100 * row.known:.1f}%" for arm, row in shares)
        caption = "Share of single hidden tokens that were guessed. Whiskers are 95% intervals over seeds."
        blocks.insert(0, Figure("masking-blanks", f"Hidden tokens guessed: {told}.", caption))
    blocks += [
        Code(f"Hidden token {at + 1}, seed {one['seed']}", _example(one, example))
        for one in record.findings if one["kind"] == "examples"
        for at, example in enumerate(one["examples"])
    ]  # fmt: skip
    return Section("masking-blanks", "Filling in blanks", intro, blocks, terminal=False)


def guesses(record: Record) -> list[tuple[str, Row]]:
    """The share of hidden tokens that each arm guessed, over the seeds; encoders first."""
    rows = [(arm, record.row(arm, "quality", "blanks_guessed")) for arm in [*having(record, "masked"), judge(record)]]
    return [(arm, row) for arm, row in rows if row is not None and row.value is not None]


def _example(finding: dict[str, Any], example: dict[str, Any]) -> str:
    lines = [f"{example['left']}▁▁▁{example['right']}", "", f"hidden: {_quoted(example['token'])}"]
    for who, key in (
        (f"{finding['arm']}, both sides", "guesses"),
        (f"{finding['against']}, left alone", "left_guesses"),
    ):
        told = ", ".join(f"{_quoted(one['token'])} {100 * one['probability']:.0f}%" for one in example[key])
        lines.append(f"{who}: {told}")
    return "\n".join(lines)


def _quoted(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)
