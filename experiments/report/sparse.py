"""What the report of the study of sliding windows says before the comparison's sections."""

from experiments.numbers import count, number
from experiments.report.document import Block, Figure, Section, Text, Verdict
from experiments.report.record import Record
from experiments.report.tables import reads_test, resolution, room, together

CUT = 3  # times the largest difference: beyond it intervals are cut off in the figure


def sections(record: Record) -> list[Section]:
    intro = (
        "With a sliding window a token attends to the latest tokens only, itself included, so that cache and work "
        "stop growing. What lies further back can still come through the layers in between: each reaches a window "
        "further. Here full attention and windows are trained on the same texts, longer than the windows, and "
        "compared at each position. In parentheses stand 95% intervals over paired seeds; of the losses, Holm's "
        f"correction covers all that are told.{room(record)}{together(record)}"
    )
    if any(one.get("growth") for one in record.findings):
        intro += (
            " Where both see all that was read, they differ by what training made of each, by chance as well; how much "
            "the difference grows once the window is full is nearer to what the bound itself costs."
        )
    if not reads_test(record):
        intro += " The losses here are of the validation text: this run did not read the test split."
    by_kind = {kind: [one for one in record.findings if one["kind"] == kind] for kind in ("overall", "quality", "cost")}
    blocks: list[Block] = [Verdict("note", one["sentence"], "all windows together", "") for one in by_kind["overall"]]
    if by_kind["quality"]:
        blocks.append(Figure("sparse", _alt(record), _caption(record)))
    for one in by_kind["quality"]:
        tone, standing = resolution(one["after"] or one["before"])
        if one["after"]:
            standing = f"after the window is full: {standing}"
        if growth := one.get("growth"):  # absent in older records
            sure, grows = resolution(growth, "growth of the difference:")
            tone = sure if tone == "open" else tone
            standing += f"; {grows}"
        blocks.append(Verdict(tone, one["sentence"], standing, ""))
    blocks += [Verdict("note", one["sentence"], "cache counted, speed measured", "") for one in by_kind["cost"]]
    if not by_kind["quality"]:
        blocks.append(Text("No trained arm with a window stands beside one without, so no losses are compared."))
    blocks.append(Text(
        "What this does not show: what a window loses on texts whose parts depend on each other over long distances, "
        "or after longer training. A model that has not learned to use distant tokens loses nothing without them. "
        "Where the curves part is told by the interval at each position by itself."
    ))  # fmt: skip
    return [Section("sparse", "What a window loses, and what it saves", intro, blocks)]


def _caption(record: Record) -> str:
    text = (
        "Loss of each window less that of full attention, by position in the text, averaged within thirds of an "
        "octave: above 0 the window predicts worse. Bars are 95% intervals over paired seeds, where there are "
        f"several, cut off at {CUT} times the largest difference; dotted lines mark where each window is full."
    )
    if not _cached(record):
        return text
    return f"{text} Beside it the cache of a sequence against context length, both axes logarithmic."


def _cached(record: Record) -> bool:
    return bool(record.contexts("decode", "state_bytes"))


def _alt(record: Record) -> str:
    told = []
    for one in record.findings:
        if one["kind"] == "quality":
            curve = one["curve"]
            ends = [f"{number(curve['difference'][at], 3)} around {count(curve['positions'][at])}" for at in (0, -1)]
            told.append(f"{one['arm']} {ends[0]}, {ends[1]}")
    return f"Loss less that of full attention, nats/token, at the first and the last positions: {'; '.join(told)}."
