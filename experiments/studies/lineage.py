"""The lineage: architectures in the order of history, each compared with the one before it.

Arms are trained, evaluated and measured as in a comparison. Their order in the specification is that of history."""

from itertools import pairwise
from typing import Any

from experiments import cells
from experiments.numbers import listed, number, size
from experiments.spec import Experiment
from experiments.store import RunDirectory
from experiments.studies import comparison, pairing, wording
from experiments.studies.pairing import PairedMeans, Question

MAKES, plan, turns, together = comparison.MAKES, comparison.plan, comparison.turns, comparison.together
lengths, work, rows = comparison.lengths, comparison.work, comparison.rows


def steps(experiment: Experiment) -> list[tuple[str, str]]:
    """Each arm with its predecessor, and the last with the first where there is something between them."""
    arms = list(experiment.arms)
    return [*pairwise(arms), *([(arms[0], arms[-1])] if len(arms) > 2 else [])]


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """The comparison's questions of every step; Holm's correction over the steps, question by question."""
    asked: dict[tuple[str, str], list[Question]] = {}
    for a, b in steps(experiment):
        for one in comparison.questions(experiment, a, b):
            asked.setdefault((one.phase, one.metric), []).append(one)
    return [
        verdict for one in asked.values()
        for verdict in pairing.compared(rows, one, experiment.device, experiment.seeds)
    ]  # fmt: skip


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """What each step bought, and what all of them did."""
    told = {(one["a"], one["b"], one["phase"], one["metric"]): one for one in verdicts(rows, experiment)}
    arms, found = list(experiment.arms), []
    for a, b in pairwise(arms):
        one = _step(rows, experiment, a, b, {key[2:]: verdict for key, verdict in told.items() if key[:2] == (a, b)})
        found += [one] if one else []
    quality = pairing.paired_means(rows, arms, "quality", "test_bits_per_byte", experiment.seeds)
    whole = told.get((arms[0], arms[-1], "quality", "test_bits_per_byte"))
    if len(found) > 1 and len(found) == len(arms) - 1 and quality.counted and whole:
        found.append(_overall(found, whole, quality, [arm for arm in arms if arm not in quality.counted]))
    return found


def _step(rows: list[dict], experiment: Experiment, a: str, b: str, told: dict[tuple, dict]) -> dict | None:
    """One sentence: quality, training, decode, memory of b against its predecessor a."""
    quality = told.get(("quality", "test_bits_per_byte"))
    if quality is None:
        return None
    figures: dict[str, Any] = {key: quality[key] for key in ("resolved", "comparable")}
    figures["identical"] = wording.identical(quality)
    figures["bits_per_byte"] = quality["estimate"]
    parts, who = [wording.predicts(quality)], b  # named first, since the arm that predicts better may be a
    decoding = experiment.measurement.enabled and all(cells.model_configs(experiment)[arm].causal for arm in (a, b))
    for phase, word in (("train", "trains"), ("decode", "decodes")):
        one = told.get((phase, "tokens_per_s"))
        if one is None and phase == "decode" and decoding:
            parts.append(f"how fast {who} decodes is not known, for want of a result")
        if one:
            figures[f"{phase}_speed_ratio"] = one["estimate"]
            where = f" after {one['context']:,} tokens" if one["context"] else ""
            parts.append(f"{who} {word}{where} {wording.faster(one)}")
            who = "it"
    longest = experiment.measurement.contexts[-1]
    before, after = (pairing.mean_over_seeds(rows, arm, "decode", "state_bytes", longest) for arm in (a, b))
    if before is not None and after is not None:
        before, after = (held / experiment.measurement.batch for held in (before, after))
        figures |= {"state_bytes_before": before, "state_bytes": after}
        instead = "as before" if before == after else f"instead of {size(before)}"
        parts.append(f"{who} keeps {size(after)} {instead} as cache or state of a sequence")
    sentence = f"{a} → {b}: {'; '.join(parts)}.{wording.without(quality)}"
    return {"kind": "step", "arm": b, "against": a, **figures, "sentence": sentence}


def _overall(found: list[dict], whole: dict, quality: PairedMeans, left_out: list[str]) -> dict:
    """quality: of the arms whose bits per byte compare; left_out: the others."""
    blocked = [one for one in found if not one["comparable"]]
    lower = [one for one in found if one["resolved"] and one["bits_per_byte"] < 0]
    higher = [one for one in found if one["resolved"] and one["bits_per_byte"] > 0]
    same = [one for one in found if one["comparable"] and one["identical"]]
    open_ = len(found) - len(lower) - len(higher) - len(blocked) - len(same)
    least = min(quality.means.values(), default=None)
    best = [arm for arm, mean in quality.means.items() if mean == least]
    if len({one["bits_per_byte"] for one in found}) == 1 and len(same) == len(found):
        lowest = "All have the same mean"
    elif least is None:
        lowest = "No seed has a value of every arm, so no mean is named as the lowest"
    else:
        lowest = f"The lowest mean is that of {listed(best)}, {number(least, 3)} bits per byte{quality.over}"
    text = (
        f"Of {len(found)} steps {len(lower)} lowered bits per byte, {len(higher)} raised them and "
        f"{open_} {'is' if open_ == 1 else 'are'} not resolved"
        f"{f'; {len(same)} changed nothing' if same else ''}{f'; {len(blocked)} do not compare' if blocked else ''}. "
        f"From {whole['a']} to {whole['b']}: {wording.predicts(whole)}.{wording.without(whole)} {lowest}"
        f"{f' (not counted: {listed(left_out)})' if left_out else ''}"
    )
    sizable = max(lower, key=lambda one: -one["bits_per_byte"], default=None)
    if sizable:
        text += f"; the largest resolved gain came from {sizable['against']} to {sizable['arm']}"
    return {
        "kind": "overall", "arm": whole["b"], "against": whole["a"], "bits_per_byte": whole["estimate"],
        "lowered": len(lower), "raised": len(higher), "best": best[0] if best else None,
        "sentence": f"{text}.",
    }  # fmt: skip
