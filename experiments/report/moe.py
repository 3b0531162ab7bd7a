"""What the report of the study of experts says before the comparison's sections."""

from experiments.numbers import number, scale
from experiments.report.document import Block, Figure, Section, Text, Verdict
from experiments.report.record import Record
from experiments.report.tables import resolution


def sections(record: Record) -> list[Section]:
    intro = (
        "A mixture of experts has several feed-forward layers where a dense model has one, and sends each token to a "
        "few of them. All of them must be loaded; one token touches only its own, and the tokens of a batch together "
        "touch more. A mixture is compared with each dense arm, with one that has as many active parameters (what one "
        "token uses) and one that has as many in total where the run has them. Bytes follow from shapes and are of "
        f"weights alone, in {record.spec.get('measurement', {}).get('dtype', 'float32')}; the rest is measured. In "
        "parentheses stand 95% intervals over paired seeds."
    )
    by_kind = {kind: [one for one in record.findings if one["kind"] == kind] for kind in ("bytes", "bought", "load")}
    blocks: list[Block] = []
    ordered = sorted(by_kind["bytes"], key=lambda one: not one["experts"])  # arms with experts first
    blocks += [Verdict("note", one["sentence"], "from shapes", "") for one in ordered]
    if by_kind["bytes"]:
        blocks.append(Figure("moe", _alt(record), _caption(record)))
    for one in by_kind["bought"]:
        tone, standing = (
            resolution(one, "quality") if one["bits_per_byte"] is not None else ("note", "quality not known")
        )
        blocks.append(Verdict(tone, one["sentence"], standing, ""))
    if not by_kind["bought"]:
        blocks.append(Text("This run has no arm with experts beside one without, so nothing is compared."))
    blocks += [Verdict("note", one["sentence"], "measured on validation text", "") for one in by_kind["load"]]
    blocks.append(Text(
        "What this does not show: memory traffic itself. A processor reads what is touched from its caches where it "
        "fits there, as weights of this size may. Tokens that are alike choose alike, and touch fewer experts than "
        "independent ones would: neighbours in a text, and the sequences of a batch whose decoding was timed, which "
        "continue pieces of one text greedily and often write the same token. Speeds are those of this lab's code for "
        "experts on this machine."
    ))  # fmt: skip
    return [Section("moe", "Loaded, touched, and what it bought", intro, blocks)]


def _caption(record: Record) -> str:
    text = "Bytes of weights by arm: what must be loaded, and what a decode step touches at each batch."
    if not any(one["kind"] == "load" for one in record.findings):
        return text
    return (
        f"{text} Beside it the load of the experts of each layer over an even share, on validation text: one dot per "
        "expert, ordered by load within the layer, mean over seeds; 1 is an even load."
    )


def _alt(record: Record) -> str:
    found = [one for one in record.findings if one["kind"] == "bytes"]
    factor, unit = scale([one["loaded_bytes"] for one in found], "bytes")
    told = []
    for one in found:
        touched = [f"{number(held * factor)} touched at batch {batch}" for batch, held in one["touched_bytes"].items()]
        told.append(f"{one['arm']} {number(one['loaded_bytes'] * factor)} loaded, {', '.join(touched)}")
    loads = []
    for one in record.findings:
        if one["kind"] == "load":
            drawn = [share * len(shares) for shares in one["loads"] for share in shares]
            ends = f"{number(min(drawn))} to {number(max(drawn))}"
            loads.append(f" Load of {one['arm']}'s experts over an even share: {ends}.")
    return f"Bytes of weights in {unit}: {'; '.join(told)}.{''.join(loads)}"
