"""What every benchmark here does: each side lives in a fresh process of its own, as it would in use; the sides take
turns, one at a time; ratios are formed round by round.

Absolute speeds move with the machine and the minute; a ratio of neighbours in one round moves little. In one process
a side would inherit the other's freed memory: a step that reuses it skips page faults that it pays for in use.
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.environment import describe
from experiments.measurement.memory import keep_freed_memory
from experiments.statistics import paired_ratio

Turn = Callable[[], tuple[int, Any]]  # does some work; the tokens it processed, and what they gave
Side = Callable[[], Turn]  # builds the model; picklable


def needs(package: str) -> None:
    """Leave with one line where it is not installed."""
    if importlib.util.find_spec(package) is None:
        print(f"this benchmark needs {package}: pip install -e '.[bench]'", file=sys.stderr)
        raise SystemExit(3)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    return parser


def arms(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that names some of them, separated by commas."""

    def some_of(text: str) -> list[str]:
        named = text.split(",")
        unknown = [arm for arm in named if arm not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose among {', '.join(known)}")
        return named

    return some_of


def _serve(pipe: Connection, side: Side, threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the lab's own cells do; a newcomer's script would not
    turn = side()
    while pipe.recv():
        start = time.perf_counter()
        tokens, gave = turn()
        pipe.send((tokens / (time.perf_counter() - start), gave))


def rates_over_sittings(sides: Mapping[str, Side], rounds: int, sittings: int) -> dict[str, list[float]]:
    """Tokens per second of each side in each sitting: new processes, and the geometric mean of their rounds.

    The same step differs by several percent between processes, by where their memory came to lie; rounds within one
    pair of processes share that, sittings do not.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(sittings):
        for name, values in rates(sides, rounds)[0].items():
            found[name].append(statistics.geometric_mean(values))
    return found


def rates(
    sides: Mapping[str, Side], rounds: int, slow: frozenset[str] = frozenset(), warm_ups: int = 1
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Tokens per second of each side in each round, after unmeasured turns; and what each side's last turn gave.

    Sides in `slow` take minutes a turn: they run in the first two rounds only, unwarmed, which flatters the others by
    far less than a percent.
    """
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(theirs, side, torch.get_num_threads()), daemon=True)
        worker.start()
        theirs.close()
        workers.append(worker)

    def take_turn(name: str) -> tuple[float, Any]:
        pipes[name].send(True)
        return pipes[name].recv()

    for name in sides.keys() - slow:
        for _ in range(warm_ups):
            take_turn(name)
    found: dict[str, list[float]] = {name: [] for name in sides}
    gave: dict[str, Any] = {}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            if name not in slow or turn < 2:
                rate, gave[name] = take_turn(name)
                found[name].append(rate)
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send(False)
        worker.join()
    return found, gave


def ratio(numerator: list[float], denominator: list[float], at_least: float | None) -> dict[str, Any]:
    """Ratio of rates over the rounds that both sides ran, with its 95% interval, beside the ratio aimed at, if any."""
    both = min(len(numerator), len(denominator))
    interval = paired_ratio(denominator[:both], numerator[:both]).interval
    return {
        "ratio": interval.estimate, "ci_low": interval.low, "ci_high": interval.high, "rounds": both,
        "at_least": at_least, "met": None if at_least is None else interval.estimate >= at_least,
    }  # fmt: skip


def publish(
    name: str, settings: dict[str, Any], found: dict[str, list[float]], ratios: dict[str, Any], as_json: bool,
    device: str = "cpu", unit: str = "tokens",
):  # fmt: skip
    """Print the object, or a Markdown table of it. unit: of what the rates count."""
    medians = {side: statistics.median(values) for side, values in found.items()}
    if as_json:
        print(json.dumps({
            "benchmark": name, "settings": settings, f"{unit}_per_s": medians, "samples": found, "ratios": ratios,
            "environment": describe(device, torch.get_num_threads()),
        }, indent=1))  # fmt: skip
        return
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    print(f"{name}: {', '.join(f'{key} {value}' for key, value in plain.items())}\n")
    print(f"| side | {unit}/s (median) |\n|---|---|")
    for side, value in medians.items():
        print(f"| {side} | {value:,.0f} |")
    for side, peak in settings.get("memory", {}).items():
        print(f"\n{side}: peak {peak['peak_bytes'] / 1e6:.1f} MB, {peak['peak_over_weights']:.2f} of the weights")
    print("\n| ratio | value | 95% interval | aimed at |\n|---|---|---|---|")
    for what, one in ratios.items():
        aim = "-" if one["at_least"] is None else f"{one['at_least']:g}"
        print(f"| {what} | {one['ratio']:.2f} | {one['ci_low']:.2f} to {one['ci_high']:.2f} | {aim} |")
