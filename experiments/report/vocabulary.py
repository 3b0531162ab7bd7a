"""The sections of a vocabulary study's report."""

from experiments.numbers import DASH, count, number
from experiments.report.document import Block, Cell, Column, Figure, Section, Table, Text, Tone, Verdict
from experiments.report.record import Record, Row
from experiments.report.tables import WITHIN, comparisons, resolution, seed_counts, together, value_cell
from experiments.report.verdict import limits


def by_arm(record: Record) -> dict[str, dict[int, str]]:
    """arm -> entries of the vocabulary (ascending) -> the arm's name at that size."""
    found: dict[str, dict[int, str]] = {}
    for name, one in record.result["arms"].items():
        size = one["config"]["vocabulary"]
        found.setdefault(name.removesuffix(f"-v{size}"), {})[size] = name
    return {arm: dict(sorted(sizes.items())) for arm, sizes in found.items()}


def sizes(record: Record) -> list[int]:
    return sorted({size for each in by_arm(record).values() for size in each})


def lines(record: Record, arm: str, phase: str, metric: str) -> dict[int, Row]:
    """Rows over seeds that have a value, by entries of the vocabulary."""
    found = {size: _row(record, name, phase, metric) for size, name in by_arm(record)[arm].items()}
    return {size: row for size, row in found.items() if row is not None and row.value is not None}


def sections(record: Record) -> list[Section]:
    return [verdict(record), quality(record), parameters(record), speed(record), memory(record)]


def verdict(record: Record) -> Section:
    intro = (
        "A model reads text as tokens, pieces of it from a fixed vocabulary. At 257 entries every token is one byte, "
        "and one more entry marks the end of a text; a larger vocabulary adds pieces that are frequent in the training "
        "text, and each entry is a row of the embedding. Every arm was trained at every size, paired by seed, as many "
        "updates on windows that begin at the same places of the same text. A difference is called resolved when a "
        "paired t test over the seeds gives p < 0.05 after Holm's correction, or when it is the same at every seed."
    )
    blocks: list[Block] = [_block(one) for one in record.findings]
    if not blocks:
        blocks.append(Text("No arm was trained at two sizes, so nothing can be said about the vocabulary."))
    blocks.append(Text(limits(record)))
    blocks.append(Text(_caution(record)))
    return Section("verdict", "What does a larger vocabulary change?", intro, blocks)


def _block(one: dict) -> Verdict:
    tone: Tone
    if one["kind"] in ("best-size", "bytes-per-s"):
        tone, standing = resolution(one)
        if one["kind"] == "best-size" and one["against"] is None:
            tone, standing = "resolved", "measured"
    else:
        shapes = one["kind"] in ("embedding-share", "state-per-byte")
        tone, standing = "resolved", "exact, from shapes" if shapes else "counted"
    return Verdict(tone, one["sentence"], standing, "")


def _caution(record: Record) -> str:
    seen = [row.known for arm in by_arm(record) for row in lines(record, arm, "text", "bytes_seen").values()]
    data = record.environment.get("data", {})
    learned = data.get("learned_bytes")
    text = (
        "One learning rate serves every size of an arm, and no sweep has chosen it for any of them. All sizes "
        "get as much text, not as much computation: a small vocabulary reads more tokens, a large one weighs each "
        "against more entries. At equal computation the order of the sizes may be another. Windows span as many "
        "bytes of the training text, from which the tokenizers were learned; of other text a larger vocabulary may "
        "need more tokens than that, and its windows then span less of it."
    )
    if not seen or not learned:
        return text
    whole = data["bytes"]["train"]
    part = f"the training split's {whole / 1e6:.3g} MB"
    part = part if learned == whole else f"the first {learned / 1e6:.3g} MB of {part}"
    return (
        f"{text} Each tokenizer was learned from {part}; a model was trained on at most {max(seen) / 1e6:.3g} MB of "
        f"that split ({100 * max(seen) / whole:.2g}%), so entries that are rare have been met seldom or never."
    )


def quality(record: Record) -> Section:
    intro = (
        "Tokens per byte says how finely a tokenizer cuts the test text: fewer tokens are fewer steps for the model. "
        "Bits per byte is how many bits the model needs, on average, to store one byte of that text; it is per byte, "
        "so sizes of vocabulary compare by it, while loss or perplexity per token would not. Lower is better."
    )
    what = "context in tokens; bits per byte by the frequencies of tokens alone, and of the model"
    table = Table(f"Text and quality by size of the vocabulary: {what}, mean over n seeds with {WITHIN}", [
        Column("Arm", key=True), Column("Entries", numeric=True, key=True), Column("Tokens/byte", numeric=True),
        Column("Context", numeric=True), Column("Bytes to predict", numeric=True),
        Column("Frequencies alone", numeric=True), Column("Test bits per byte", numeric=True),
        Column("n", numeric=True),
    ])  # fmt: skip
    told = []
    for arm, names in by_arm(record).items():
        for size, name in names.items():
            cells: list[Cell | str] = [arm, count(size)]
            cells.append(_plain(table, record, name, "text", "tokens_per_byte", 3))
            seen = _row(record, name, "text", "bytes_seen")
            cells.append(table.cell(DASH, _absent(record, name)) if seen is None else count(seen.context or 0))
            cells.append(_plain(table, record, name, "text", "bytes_seen", 0))
            cells.append(_plain(table, record, name, "text", "unigram_bits_per_byte", 3))
            cells.append(_value(table, record, name, "quality", "test_bits_per_byte"))
            row = _row(record, name, "quality", "test_bits_per_byte")
            table.add(*cells, str(row.n if row is not None else 0))
        found = lines(record, arm, "quality", "test_bits_per_byte")
        told.append(f"{arm} " + ", ".join(f"{number(row.known, 3)} at {size:,}" for size, row in found.items()))
    blocks: list[Block] = [table]
    if any(lines(record, arm, "quality", "test_bits_per_byte") for arm in by_arm(record)):
        caption = (
            "Left (on a phone: above): tokens that a byte of the test text takes. Right (below): bits per byte of the "
            f"same text after training, mean over seeds with {WITHIN}. Both against the entries of the vocabulary, on "
            "a logarithmic axis."
        )
        blocks.insert(0, Figure("vocabulary-quality", "Test bits per byte: " + "; ".join(told) + ".", caption))
    if record.verdicts:
        blocks.append(comparisons(record))
    lzma = (record.result["baselines"] or {}).get("lzma_bits_per_byte")
    if lzma is not None:
        blocks.append(Text(f"To place these numbers: lzma, a general compressor, stores the same test text in "
                           f"{number(lzma, 3)} bits per byte."))  # fmt: skip
    return Section("quality", "Text per token, and quality", intro, blocks)


def parameters(record: Record) -> Section:
    intro = (
        "Each entry is a vector of the model's width, which here serves both to read a token and to predict it unless "
        "the configuration says otherwise. What a vocabulary costs is therefore its entries times the width."
    )
    table = Table("Parameters by size of the vocabulary", [
        Column("Arm", key=True), Column("Entries", numeric=True, key=True), Column("Parameters", numeric=True),
        Column("in embeddings", numeric=True), Column("Share", numeric=True), Column("all others", numeric=True),
    ])  # fmt: skip
    for arm, names in by_arm(record).items():
        for size, name in names.items():
            total, own = (_row(record, name, "model", metric) for metric in ("parameters", "embedding_parameters"))
            if total is None or own is None:
                absent = table.cell(DASH, _absent(record, name))
                table.add(arm, count(size), absent, absent, absent, absent)
                continue
            share = f"{100 * own.known / total.known:.1f}%"
            table.add(arm, count(size), count(total.known), count(own.known), share, count(total.known - own.known))
    return Section("parameters", "Parameters in the embedding", intro, [table])


def speed(record: Record) -> Section:
    intro = (
        "A token of a larger vocabulary stands for more bytes, but predicting it takes a comparison with every entry. "
        "Tokens per second therefore flatters a small vocabulary: what a reader waits for is text, bytes per second. "
        "In training the bytes are those of the windows that were trained on; in decode, tokens per second over the "
        "test text's tokens per byte: what a model writes by itself may have another. A training step holds the same "
        "text at every size, so fewer tokens."
    ) + together(record)
    shown = (("train", "tokens_per_s"), ("train", "bytes_per_s"), ("decode", "tokens_per_s"), ("decode", "bytes_per_s"))
    caption = f"Speed by size of the vocabulary, mean over n seeds (training / decode) with {WITHIN}. Higher is better"
    table = Table(caption, [
        Column("Arm", key=True), Column("Entries", numeric=True, key=True),
        *(Column(f"{'Training' if phase == 'train' else 'Decode'}, {metric.partition('_')[0]}/s", numeric=True)
          for phase, metric in shown),
        Column("Arithmetic in training, FLOP/byte", numeric=True), Column("n", numeric=True),
    ])  # fmt: skip
    told = []
    for arm, names in by_arm(record).items():
        for size, name in names.items():
            cells = [_value(table, record, name, phase, metric) for phase, metric in shown]
            arithmetic = _plain(table, record, name, "train", "flops_per_byte", 0)
            seeds = seed_counts([_row(record, name, phase, "bytes_per_s") for phase in ("train", "decode")])
            table.add(arm, count(size), *cells, arithmetic, seeds)
        for phase in ("train", "decode"):
            found = lines(record, arm, phase, "bytes_per_s")
            if found:
                values = ", ".join(f"{number(row.known)} at {size:,}" for size, row in found.items())
                told.append(f"{arm}, {'training' if phase == 'train' else phase}: {values}")
    if not told:
        return Section("speed", "Speed in tokens and in text", intro, [Text("No speed was measured.")])
    caption = (
        "Tokens (left) and bytes of text (right; on a phone each below the other) per second against the entries of "
        f"the vocabulary, all axes logarithmic; mean over seeds with {WITHIN}, cut off below a quarter of the mean; "
        "with one seed, the median of its repeats with the 5th to 95th percentile."
    )
    figure = Figure("vocabulary-speed", "Bytes of text per second. " + "; ".join(told) + ".", caption)
    return Section("speed", "Speed in tokens and in text", intro, [figure, table])


def memory(record: Record) -> Section:
    text, dtype = record.spec["vocabulary"]["text_bytes"], record.spec["measurement"].get("dtype", "float32")
    intro = (
        "What one sequence keeps while it is being continued: attention's cache has an entry for every token, so it "
        "shrinks with the tokens of a text; a recurrent state has one size. Per byte of text, after "
        f"{text:,} bytes at the training text's tokens per byte, in {dtype}, by formula from shapes; beside it the "
        "bytes that the decode cells measured, "
        "whose cache also has room for what they wrote."
    )
    table = Table(f"Cache or state after {text:,} bytes of training text", [
        Column("Arm", key=True), Column("Entries", numeric=True, key=True), Column("Text in tokens", numeric=True),
        Column("Bytes per byte of text", numeric=True), Column("Measured in decode, bytes", numeric=True),
        Column("by formula", numeric=True),
    ])  # fmt: skip
    told = []
    for arm, names in by_arm(record).items():
        for size, name in names.items():
            row = _row(record, name, "model", "state_bytes_per_byte")
            tokens = table.cell(DASH, _absent(record, name)) if row is None else count(row.context or 0)
            table.add(
                arm, count(size), tokens, _plain(table, record, name, "model", "state_bytes_per_byte", 1),
                *(_plain(table, record, name, "decode", metric, 0, record.batch)
                  for metric in ("state_bytes", "state_bytes_analytic")),
            )  # fmt: skip
        found = lines(record, arm, "model", "state_bytes_per_byte")
        if found:
            told.append(f"{arm} " + ", ".join(f"{number(row.known, 1)} at {size:,}" for size, row in found.items()))
    blocks: list[Block] = [table]
    if told:
        caption = (
            f"Bytes of cache or state for each byte of a text of {text:,} bytes, by formula, against the entries of "
            "the vocabulary, both axes logarithmic."
        )
        alt = "Bytes of cache or state per byte of text: " + "; ".join(told) + "."
        blocks.insert(0, Figure("vocabulary-state", alt, caption))
    return Section("memory", "Cache or state per byte of text", intro, blocks)


def _row(record: Record, name: str, phase: str, metric: str) -> Row | None:
    return next(iter(record.over_seeds(phase, metric, name)), None)


def _absent(record: Record, name: str) -> str:
    return record.absence(name, "quality", "test_bits_per_byte")


def _plain(
    table: Table, record: Record, name: str, phase: str, metric: str, at: int | None = None, divisor: int = 1
) -> Cell:
    """A number that has no spread worth showing."""
    row = _row(record, name, phase, metric)
    if row is None or row.value is None:
        return table.cell(DASH, record.absence(name, phase, metric) if phase == "decode" else _absent(record, name))
    return Cell(number(row.value / divisor, at))


def _value(table: Table, record: Record, name: str, phase: str, metric: str) -> Cell:
    row = _row(record, name, phase, metric)
    return value_cell(table, record, name, phase, metric, None if row is None else row.context, 1.0)
