"""Paired comparisons in words, the same for every arm: as sentences, and within the sentences of a study."""

from experiments.numbers import SLIGHT, apart, fitting, left_out, multiple, number, plural, signed
from experiments.statistics import RESOLVED


def sentence(v: dict) -> str:
    """What was asked, what came out, and how it stands; against the shapes, where these say otherwise."""
    return _told(v) + _against_shapes(v)


def _told(v: dict) -> str:
    at = f" at {v['context']} tokens of context" if v["context"] else ""
    at += f" and batch {v['batch']}" if v["batch"] not in (None, 1) else ""
    what = {
        "test_bits_per_byte": "test bits per byte",
        "test_masked_token_loss": "the loss of hidden test tokens",
        "resident_bytes": "memory after loading",
        "peak_bytes": f"peak memory in {v['phase']}{at}",
        "state_bytes": f"cache or state in {v['phase']}{at}",
        "tokens_per_s": f"{v['phase']} tokens/s{at}",
        "bytes_per_s": f"bytes of text per second in {'training' if v['phase'] == 'train' else v['phase']}",
    }[v["metric"]]
    seeds = f"{v['n']} paired seed{'s' if v['n'] > 1 else ''}"
    shown = {
        end: signed(v[end], 4) if v["kind"] == "difference" else multiple(v[end])
        for end in ("estimate", "ci_low", "ci_high") if v[end] is not None
    }  # fmt: skip
    if v["kind"] == "difference":
        size = f"{v['b']} differs from {v['a']} in {what} by {shown['estimate']}"
    else:
        size = f"{v['b']} has {shown['estimate']} times {v['a']}'s {what}"
    interval = f"95% interval {shown['ci_low']} to {shown['ci_high']}, {seeds}" if v["n"] > 1 else seeds
    if not v["comparable"]:
        return f"{v['a']} and {v['b']} do not compare in {what} ({v['reason']}). For the record: {size} ({interval})."
    if v["n"] < 2 and not v["exact"]:
        return f"{size} ({interval}): not resolved, one seed says nothing about the spread over seeds."
    if v["exact"]:
        interval = "the same for every seed"
    if v["resolved"] and v["better"]:
        slight = ", by less than 5%" if v["kind"] != "difference" and abs(v["estimate"] - 1) < SLIGHT else ""
        return f"{size} ({interval}): {v['better']} is better here{slight}."
    if v["resolved"]:
        return f"{size} ({interval})."
    if v["p"] is None:
        return f"{size}: no difference at any seed."
    more = "more seeds might resolve it if the difference is real"
    if v["more_seeds"]:
        more = (
            f"with about {plural(v['more_seeds'], 'more seed')} its chance of being resolved is even, if estimate and "
            f"spread are what they seem"
        )
    return f"{size} ({interval}): {unresolved(v)}; {more}."


def _against_shapes(v: dict) -> str:
    """Said where a resolved difference lies on the other side than that of what is stored, so on what comes with it."""
    if v["by_shapes"] is None or not v["resolved"] or (v["by_shapes"] - 1) * (v["estimate"] - 1) >= 0:
        return ""
    return f" By shapes alone it is {number(v['by_shapes'])} times: what differs lies beside the weights."


def without(v: dict) -> str:
    """Which seeds of the run are not in it: an arm that failed there may be the worse for it."""
    left = left_out(v)
    return f" It leaves out {left}, where there is no value." if left else ""


def unresolved(verdict: dict) -> str:
    """How it stands with a comparison over several seeds that is open: its own interval may leave out equality."""
    tried = verdict["p"] is not None and verdict["p"] < RESOLVED
    return f"not resolved after correcting for {verdict['tested']} comparisons" if tried else "not resolved"


def identical(verdict: dict) -> bool:
    """Not a difference that is open, but none, over several seeds."""
    return verdict["n"] > 1 and verdict["estimate"] == verdict["ci_low"] == verdict["ci_high"] == 0


def predicts(verdict: dict) -> str:
    """A difference within a sentence, e.g. "mamba predicts better, by 0.210 bits per byte (0.200 to 0.220)"."""
    if not verdict["comparable"]:
        return f"their bits per byte do not compare ({verdict['reason']})"
    if identical(verdict):
        return "their bits per byte are the same at every seed"
    ends = [abs(verdict["estimate"]), *sorted(abs(verdict[end] or 0) for end in ("ci_low", "ci_high"))]
    at = fitting(*(verdict[end] for end in ("estimate", "ci_low", "ci_high")))
    if verdict["resolved"]:
        size, low, high = (f"{end:.{apart(end, 0.0, at)}f}" for end in ends)
        return f"{verdict['better']} predicts better, by {size} bits per byte ({low} to {high})"
    size = signed(verdict["estimate"], at)
    low, high = (signed(verdict[end], at) if verdict["n"] > 1 else "" for end in ("ci_low", "ci_high"))
    spread = f"{low} to {high}" if verdict["n"] > 1 else "one seed"
    return f"the difference in bits per byte is {unresolved(verdict)} ({size}, {spread})"


def faster(verdict: dict) -> str:
    """A ratio of speeds within a sentence, e.g. "1.4 times (1.3 to 1.5) as fast"."""
    size = f"{multiple(verdict['estimate'])} times"
    left = left_out(verdict)
    lacking = f"; without {left}" if left else ""
    if not verdict["comparable"]:
        return f"{size} as fast (not comparable: {verdict['reason']}{lacking})"
    if verdict["n"] < 2:
        return f"{size} as fast (one seed, not resolved{lacking})"
    spread = f"{multiple(verdict['ci_low'])} to {multiple(verdict['ci_high'])}"
    return f"{size} ({spread}{'' if verdict['resolved'] else f', {unresolved(verdict)}'}{lacking}) as fast"
