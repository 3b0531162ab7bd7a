"""What every benchmark here does: sides take turns in one process, ratios are formed round by round.

Absolute speeds move with the machine and the minute; a ratio of neighbours in one round moves little.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.environment import describe
from experiments.statistics import paired_ratio

Side = Callable[[], int]  # does some work, returns the tokens it processed


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    return parser


def rates(sides: dict[str, Side], rounds: int, slow: frozenset[str] = frozenset()) -> dict[str, list[float]]:
    """Tokens per second of each side in each round, after one unmeasured turn. Sides in `slow` take minutes a turn:
    they run in the first two rounds only, unwarmed, which flatters the others by far less than a percent."""
    for name, side in sides.items():
        if name not in slow:
            side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        order = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for name in order:
            if name in slow and turn >= 2:
                continue
            start = time.perf_counter()
            tokens = sides[name]()
            found[name].append(tokens / (time.perf_counter() - start))
    return found


def ratio(numerator: list[float], denominator: list[float], at_least: float) -> dict[str, Any]:
    """Ratio of rates over the rounds that both sides ran, with its 95% interval, beside the ratio aimed at."""
    both = min(len(numerator), len(denominator))
    interval = paired_ratio(denominator[:both], numerator[:both]).interval
    return {
        "ratio": interval.estimate, "ci_low": interval.low, "ci_high": interval.high, "rounds": both,
        "at_least": at_least, "met": interval.estimate >= at_least,
    }  # fmt: skip


def publish(name: str, settings: dict[str, Any], found: dict[str, list[float]], ratios: dict[str, Any], as_json: bool):
    """Print the object, or a Markdown table of it."""
    medians = {side: statistics.median(values) for side, values in found.items()}
    if as_json:
        print(json.dumps({
            "benchmark": name, "settings": settings, "tokens_per_s": medians, "samples": found, "ratios": ratios,
            "environment": describe("cpu", torch.get_num_threads()),
        }, indent=1))  # fmt: skip
        return
    print(f"{name}: {', '.join(f'{key} {value}' for key, value in settings.items())}\n")
    print("| side | tokens/s (median) |\n|---|---|")
    for side, value in medians.items():
        print(f"| {side} | {value:,.0f} |")
    print("\n| ratio | value | 95% interval | aimed at |\n|---|---|---|---|")
    for what, one in ratios.items():
        print(f"| {what} | {one['ratio']:.2f} | {one['ci_low']:.2f} to {one['ci_high']:.2f} | {one['at_least']:g} |")
