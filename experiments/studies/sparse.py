"""Sparse attention: a sliding window against full attention, by position and over context lengths.

Arms are trained, evaluated and measured as in a comparison, at a context longer than the windows. The first arm without
a window is what the others are compared with."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import cells
from experiments.numbers import fitting, number, signed, size
from experiments.spec import Experiment
from experiments.statistics import Comparison, binned, mean_interval, paired_difference
from experiments.store import Cell, RunDirectory
from experiments.studies import comparison, pairing, wording
from models.config import ModelConfig
from models.mixers.attention import AttentionConfig

MAKES, plan, turns, together = comparison.MAKES, comparison.plan, comparison.turns, comparison.together
lengths, work, rows = comparison.lengths, comparison.work, comparison.rows


def windows(config: ModelConfig) -> list[int] | None:
    """Of every layer; None where some layer has none, so that nothing bounds what the model sees."""
    found = [block.mixer.window for block in config.blocks if isinstance(block.mixer, AttentionConfig)]
    bounded = [window for window in found if window is not None]
    return bounded if bounded and len(bounded) == len(config.blocks) else None


def reach(config: ModelConfig) -> int | None:
    """How many tokens, itself included, can influence a position: each layer reaches window - 1 further back, and what
    it finds there holds as many more as a short convolution before it has taps, less one."""
    found = windows(config)
    if found is None:
        return None
    taps = sum((getattr(block.mixer, "conv_width", None) or 1) - 1 for block in config.blocks)
    return 1 + taps + sum(window - 1 for window in found)


def baseline(experiment: Experiment) -> str | None:
    """The arm that the others are compared with."""
    return next((arm for arm, config in cells.model_configs(experiment).items() if windows(config) is None), None)


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """The comparison's, against full attention where the run has it."""
    base = baseline(experiment) or next(iter(experiment.arms))
    asked = [one for arm in experiment.arms if arm != base for one in comparison.questions(experiment, base, arm)]
    return pairing.compared(rows, asked, experiment.device, experiment.seeds)


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """Of every window: the loss before it is full and after, what it keeps, how fast it is; and which of them lose."""
    base = baseline(experiment)
    configs = cells.model_configs(experiment)
    bounded = {arm: config for arm, config in configs.items() if windows(config)}
    if base is None:
        return []
    found, told = _qualities(rows, experiment, base, bounded, run), verdicts(rows, experiment)
    found += [one for arm in bounded if (one := _cost(rows, told, experiment, base, arm))]
    full = [one for one in found if one["kind"] == "quality" and one["after"]]
    after, growth = ({one["arm"]: one[zone] for one in full} for zone in ("after", "growth"))
    lost = [arm for arm in bounded if not any((one["kind"], one["arm"]) == ("quality", arm) for one in found)]
    several = after and len(after) + len(lost) > 1
    return found + ([_overall(base, after, growth, lost)] if several else [])


def _losses(experiment: Experiment, arm: str, run: RunDirectory) -> dict[int, np.ndarray]:
    """seed -> (T,) mean loss by position, of the test text or of what the run evaluated instead."""
    found = {}
    for seed in experiment.seeds:
        splits = (run.result(Cell(arm, seed, MAKES)) or {}).get("splits", {})
        losses = splits.get("test", splits.get("validation", {})).get("loss_at_position")
        if losses:
            found[seed] = np.asarray(losses, dtype=float)
    return found


def _qualities(
    rows: list[dict], experiment: Experiment, base: str, bounded: dict[str, ModelConfig], run: RunDirectory
) -> list[dict]:
    """The paired differences of every window and zone, and how much each grows once the window is full, with one
    correction over all of them. What chance in training does to a model it does to early and late positions much alike,
    so that the growth may be known far more closely than the difference itself."""
    drafts: list[tuple[dict, Comparison]] = []
    curves: dict[str, dict[str, Any]] = {}
    plain = _losses(experiment, base, run)
    for arm, config in bounded.items():
        own = _losses(experiment, arm, run)
        seeds = [seed for seed in own if seed in plain]
        if not seeds:
            continue
        judged = [
            row for row in rows
            if row["phase"] == "quality" and row["arm"] in (base, arm) and row["seed"] in seeds
        ]  # fmt: skip
        curves[arm] = _curve([own[seed] - plain[seed] for seed in seeds])
        without = {name: [seed for seed in experiment.seeds if seed not in had]
                   for name, had in ((base, plain), (arm, own))}  # fmt: skip
        lacking = {name: those for name, those in without.items() if those}
        zones = _zones(config, len(own[seeds[0]]))
        means = {
            name: [[float(side[seed][first - 1 : last].mean()) for seed in seeds] for side in (plain, own)]
            for name, (first, last) in zones.items()
        }
        if "after" in zones:
            zones["growth"] = zones["after"]
            means["growth"] = [
                [late - early for late, early in zip(*sides, strict=True)]
                for sides in zip(means["after"], means["before"], strict=True)
            ]
        for name, (first, last) in zones.items():
            head = {
                "zone": name, "first": first, "last": last, "a": base, "b": arm, "kind": "difference",
                "direction": "lower", "lacking": lacking, **pairing.comparability(judged),
            }  # fmt: skip
            drafts.append((head, paired_difference(*means[name])))
    settled = pairing.settled(drafts)
    return [
        _quality(base, arm, config, {one["zone"]: one for one in settled if one["b"] == arm}, curves[arm])
        for arm, config in bounded.items() if arm in curves
    ]  # fmt: skip


def _zones(config: ModelConfig, T: int) -> dict[str, tuple[int, int]]:
    """First and last position, from 1: before the smallest window is full, after it, and beyond what layers reach."""
    bounds, end = windows(config), reach(config)
    assert bounds is not None
    assert end is not None
    zones = {"before": (1, min(bounds)), "after": (min(bounds) + 1, T), "beyond": (end + 1, T)}
    if min(bounds) >= T:
        return {"before": (1, T)}
    return {
        name: zone for name, zone in zones.items() if zone[0] <= T and not (name == "beyond" and end == min(bounds))
    }


def _curve(differences: list[np.ndarray]) -> dict[str, Any]:
    """The difference in loss by position, in the bins of the report's curves, with its interval at each."""
    at, _ = binned(differences[0])
    each = [mean_interval(list(values)) for values in zip(*(binned(one)[1] for one in differences), strict=True)]
    return {
        "positions": at.tolist(), "difference": [one.estimate for one in each],
        "ci_low": [one.low for one in each], "ci_high": [one.high for one in each],
    }  # fmt: skip


def parting(curve: dict[str, Any]) -> float | None:
    """The position from which on the loss is higher at every later one, each with its own interval above zero."""
    apart = [low is not None and low > 0 for low in curve["ci_low"]]
    last = max((at for at, one in enumerate(apart) if not one), default=-1)
    return curve["positions"][last + 1] if last + 1 < len(apart) else None


def _quality(base: str, arm: str, config: ModelConfig, zones: dict[str, dict], curve: dict[str, Any]) -> dict:
    before, after, growth, beyond = (zones.get(name) for name in ("before", "after", "growth", "beyond"))
    assert before is not None
    text = (
        f"{arm} against {base}: over the first {before['last']:,} positions, where both see all that was read, "
        f"{_difference(before)}"
    )
    worse = bool(after and after["resolved"] and after["estimate"] > 0)
    part = parting(curve) if worse else None  # intervals position by position tell nothing where their mean does not
    if after is None:
        text += "; the window is never full at the length of these texts"
    else:
        text += f"; after them {_difference(after)}"
        if part is not None:
            text += f", from about position {number(part, 0)} on at every one"
        elif worse:
            text += ", though not at every one from some position on"
    if growth and growth["comparable"]:
        text += f"; {_growth(growth, base)}"
    if beyond:
        layers = f"the {reach(config):,} tokens that its {len(config.blocks)} layers reach together"
        text += f"; beyond {layers} {_difference(beyond)}"
    return {
        "kind": "quality", "arm": arm, "against": base, "windows": windows(config), "reach": reach(config),
        "before": before, "after": after, "growth": growth, "beyond": beyond, "parting": part, "curve": curve,
        "sentence": f"{text}.{wording.without(before)}",
    }  # fmt: skip


def _difference(one: dict) -> str:
    """Of losses within a sentence."""
    if not one["comparable"]:
        return f"the losses do not compare ({one['reason']})"
    if wording.identical(one):
        return "the losses are the same at every seed"
    return f"the loss differs by {_size(one)}"


def _growth(one: dict, base: str) -> str:
    """Of the difference, from the positions before the window is full to those after."""
    if wording.identical(one):
        return f"from the former to the latter it neither loses nor gains against {base}, at any seed"
    lost = one["estimate"] >= 0
    size = _size(one if lost else one | {"estimate": -one["estimate"], **_turned(one)}).removeprefix("+")
    return f"from the former to the latter it {'loses' if lost else 'gains'} {size} against {base}"


def _turned(one: dict) -> dict[str, float | None]:
    """The interval of what is as far on the other side of 0."""
    low, high = (None if one[end] is None else -one[end] for end in ("ci_high", "ci_low"))
    return {"ci_low": low, "ci_high": high}


def _size(one: dict) -> str:
    if one["n"] < 2:
        return f"{signed(one['estimate'], 3)} nats/token (one seed, not resolved)"
    open_ = "" if one["resolved"] else f", {wording.unresolved(one)}"
    at = fitting(*(one[end] for end in ("estimate", "ci_low", "ci_high")))
    size, low, high = (signed(one[end], at) for end in ("estimate", "ci_low", "ci_high"))
    return f"{size} nats/token ({low} to {high}{open_})"


def _cost(rows: list[dict], told: list[dict], experiment: Experiment, base: str, arm: str) -> dict | None:
    """Cache over context lengths, and speed at the longest."""
    contexts, batch = experiment.measurement.contexts, experiment.measurement.batch
    bounds = windows(cells.model_configs(experiment)[arm])
    assert bounds is not None
    kept = {name: _kept(rows, name, contexts) for name in (base, arm)}
    longest = contexts[-1]
    if any(longest not in held for held in kept.values()):
        return None
    here, there = (kept[name][longest] / batch for name in (arm, base))
    same = min(at for at, held in kept[arm].items() if held == kept[arm][longest])
    grows = (
        f", as much as after {same:,}"
        if same < longest
        else ", and still grows there"
        if max(bounds) > longest + experiment.measurement.decode_tokens
        else ", and grows no further"
    )
    text = f"{arm} after {longest:,} tokens: {size(here)} of cache a sequence{grows}, where {base} keeps {size(there)}"
    speeds = {
        one["phase"]: one for one in told
        if one["b"] == arm and one["metric"] == "tokens_per_s" and one["context"] == longest
    }  # fmt: skip
    for phase, word in (("prefill", "reads a text of that length"), ("decode", "decodes after it")):
        if phase in speeds:
            text += f"; {arm} {word} {wording.faster(speeds[phase])}"
    return {
        "kind": "cost", "arm": arm, "against": base, "context": longest, "cache_bytes": here, "full_cache_bytes": there,
        "constant_from": same if same < longest else None,
        **{f"{phase}_speed_ratio": one["estimate"] for phase, one in speeds.items()}, "sentence": f"{text}.",
    }  # fmt: skip


def _overall(base: str, after: dict[str, dict], growth: dict[str, dict], without: list[str]) -> dict:
    """Which windows lose once they are full, and which lose more than before. without: those without a known loss."""
    stand, change = _standing(after), _standing(growth)
    groups = {
        "worse than": stand["above"], "better than": stand["below"], "the same as": stand["same"],
        "not resolved against": stand["open"], "not comparable with": stand["blocked"],
    }  # fmt: skip
    told = [f"{', '.join(arms)}: {what} {base}" for what, arms in groups.items() if arms]
    told += [f"{', '.join(without)}: no result"] if without else []
    sentence = f"Loss at the positions after the window is full. {'; '.join(told)}."
    changes = {
        "loses ground": change["above"], "gains ground": change["below"], "no change": change["same"],
        "not resolved": change["open"],
    }  # fmt: skip
    changed = [f"{', '.join(arms)}: {what}" for what, arms in changes.items() if arms]
    if changed:
        sentence += f" Against {base}, from the positions before to those after. {'; '.join(changed)}."
    return {
        "kind": "overall", "against": base, "worse": stand["above"], "better": stand["below"],
        "loses_ground": change["above"], "gains_ground": change["below"], "sentence": sentence,
    }  # fmt: skip


def _standing(of: dict[str, dict]) -> dict[str, list[str]]:
    """The arms by what is known of their difference."""
    found: dict[str, list[str]] = {name: [] for name in ("above", "below", "same", "open", "blocked")}
    for arm, one in of.items():
        side = "above" if one["estimate"] > 0 else "below"
        name = "same" if wording.identical(one) else side if one["resolved"] else "open"
        found[name if one["comparable"] else "blocked"].append(arm)
    return found


def _kept(rows: list[dict], arm: str, contexts: Sequence[int]) -> dict[int, float]:
    """Bytes of cache by context, mean over seeds, where any seed has them."""
    means = {at: pairing.mean_over_seeds(rows, arm, "decode", "state_bytes", at) for at in contexts}
    return {at: held for at, held in means.items() if held is not None}
