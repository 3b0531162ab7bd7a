"""What the report of the lineage says before the comparison's sections."""

from experiments.numbers import DASH, count, interval, number, scale
from experiments.report.document import Block, Column, Figure, Section, Table, Text, Verdict
from experiments.report.record import Record, Row
from experiments.report.tables import WITHIN, reads_test, resolution, room, together

HISTORY = {  # by the family of the model: since when, and what was new
    "lstm": ("1997", "A recurrent cell with gates: a memory of fixed size, carried from token to token."),
    "gpt1": ("2018", "Attention: every earlier token can be looked up. Learned positions, norms after the branches."),
    "transformer": ("2023, as in Llama", "Norms before the branches, rotary positions, a gated feed-forward layer."),
    "sliding": ("2023, as in Mistral 7B", "Attention to the latest tokens only, so that the cache stops growing."),
    "mamba": ("2023", "A recurrence again: a state of fixed size, and each token decides what is kept in it."),
    "mamba2": ("2024", "One decay for each head, so that the recurrence becomes products of matrices."),
    "mamba3": ("2026", "A state that rotates, and a more exact rule for its steps."),
    "hybrid": ("2024, as in Jamba", "Mamba with a few layers of attention. It stands last since it combines both."),
}  # fmt: skip


def family(record: Record, arm: str) -> str:
    """The first part of the preset's name, by which `HISTORY` knows it."""
    return str(record.result["arms"].get(arm, {}).get("model", "")).partition("-")[0]


def chronological(record: Record) -> bool:
    """Whether the arms stand in the order of `HISTORY`, as far as it knows them."""
    order = list(HISTORY)
    known = [order.index(name) for arm in record.arms if (name := family(record, arm)) in HISTORY]
    return known == sorted(known)


def quality(record: Record) -> list[Row]:
    """Test bits per byte over seeds of the arms that have them, in the order of the run."""
    rows = [record.row(arm, "quality", "test_bits_per_byte") for arm in record.arms]
    return [row for row in rows if row is not None and row.value is not None]


def kept(record: Record) -> list[Row]:
    """Cache or state after the longest measured context, in the order of the run."""
    contexts = record.contexts("decode", "state_bytes")
    rows = [record.row(arm, "decode", "state_bytes", contexts[-1]) for arm in record.arms] if contexts else []
    return [row for row in rows if row is not None and row.value]


def sections(record: Record) -> list[Section]:
    ordered = chronological(record)
    order = f"in the order of {'history' if ordered else 'this run, which is not that of history'}"
    intro = (
        f"Architectures {order}, with as many parameters each beside the embeddings, trained on the "
        "same batches. Each is compared with the one before it: how well it predicts unseen text (bits per byte, lower "
        "is better), how fast it trains and writes, and how many bytes it keeps of what it has read. In parentheses "
        "stand 95% intervals over paired seeds; Holm's correction covers the steps, and the way from the first arm to "
        f"the last, question by question.{room(record)}{together(record)}"
    )
    whole = [one["sentence"] for one in record.findings if one["kind"] == "overall"]
    steps = [one for one in record.findings if one["kind"] == "step"]
    blocks: list[Block] = [Verdict("note", sentence, "all steps together", "") for sentence in whole]
    if quality(record):
        blocks.append(Figure("lineage", _alt(record), _caption(record)))
    for one in steps:
        tone, standing = resolution(one, "quality")
        blocks.append(Verdict(tone, one["sentence"], standing, ""))
    if not steps:
        why = "a step takes two trained neighbours"
        if not reads_test(record):
            why = "a step is judged on the test split, which this run did not read"
        blocks.append(Text(f"No arm can be compared with the one before it: {why}."))
    table = Table(f"The arms {order}", [Column("Arm", key=True), Column("Since"), Column("What was new")])
    for arm in record.arms:
        since, new = HISTORY.get(family(record, arm), (DASH, DASH))
        table.add(arm, since, new)
    blocks.append(table)
    blocks.append(Text(
        "What this does not show: what each step bought at the sizes and budgets for which it was made. An "
        "architecture of the past is trained here as the later ones are, with today's optimizer, initialisation and "
        "tokenizer. Speeds are those of this lab's code on this machine: how far the code of each arm is tuned is "
        "part of every ratio."
    ))  # fmt: skip
    title = "What each step of history bought" if ordered else "What each step bought"
    return [Section("lineage", title, intro, blocks)]


def _caption(record: Record) -> str:
    text = f"Test bits per byte, from the first arm down, mean over seeds with its {WITHIN}: further left is better."
    if not kept(record):
        return text
    context = count(kept(record)[0].context or 0)
    return f"{text} Beside it the cache or state of a sequence after {context} tokens, on a logarithmic axis."


def _alt(record: Record) -> str:
    told = [f"{row.arm} {interval(row.known, row.ci_low, row.ci_high, least=3)}" for row in quality(record)]
    text = f"Test bits per byte: {'; '.join(told)}."
    if kept(record):
        factor, unit = scale([row.known / record.batch for row in kept(record)], "bytes")
        held = [f"{row.arm} {number(row.known / record.batch * factor)}" for row in kept(record)]
        after = f"after {count(kept(record)[0].context or 0)} tokens"
        text += f" Cache or state of a sequence {after}, {unit}: {'; '.join(held)}."
    return text
