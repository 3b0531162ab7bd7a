"""What every benchmark here does: each side lives in a fresh process of its own, as it would in use; the sides take
turns, one at a time; ratios are formed round by round.

Absolute speeds move with the machine and the minute; a ratio of neighbours in one round moves little. In one process
a side would inherit the other's freed memory: a step that reuses it skips page faults that it pays for in use.
"""

import argparse
import importlib.util
import json
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.environment import describe
from experiments.measurement.memory import keep_freed_memory
from experiments.measurement.process import CellFailedError
from experiments.statistics import paired_ratio

# does some work; the tokens it processed, what they gave, and how many of its seconds do not count, if any
Turn = Callable[[], tuple[int, Any] | tuple[int, Any, float]]
Side = Callable[[], Turn]  # builds the model; picklable


class PartFailedError(Exception):
    """Why a part of a benchmark has no figures."""


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


def several(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that names some of them, separated by commas."""

    def some_of(text: str) -> list[str]:
        named = text.split(",")
        unknown = [one for one in named if one not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose among {', '.join(known)}")
        return named

    return some_of


Part = tuple[str, ...]  # its name, in words


def parts(measures: Mapping[Part, Callable[[], dict[str, Any]]]) -> tuple[dict[Part, dict[str, Any]], dict[str, str]]:
    """What each part gives, and why the others gave nothing: one that fails takes no other along, and Ctrl-C none that
    is done. Each is told on stderr as it ends, an object in a line: what is left where even the end does not come."""
    found: dict[Part, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for part, measure in measures.items():
        name = ", ".join(part)
        try:
            found[part] = measure()
        except (PartFailedError, CellFailedError) as error:
            failures[name] = f"{error}\n{getattr(error, 'detail', '')}".strip()
        except KeyboardInterrupt:
            failures |= {", ".join(left): "interrupted" for left in list(measures)[len(found) + len(failures) :]}
            break
        print(json.dumps({name: found.get(part, failures.get(name))}), file=sys.stderr, flush=True)
    return found, failures


def leave(failures: Mapping[str, str]) -> None:
    """The end of a benchmark, not 0 where a part has no figures."""
    for name, reason in failures.items():
        print(f"no figures of {name}: {reason}", file=sys.stderr)
    raise SystemExit(1 if failures else 0)


def _serve(pipe: Connection, side: Side, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this process, and ends it
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the lab's own cells do; a newcomer's script would not
    turn = side()
    pipe.send("ready")
    while True:
        pipe.recv()
        start = time.perf_counter()
        tokens, gave, *aside = turn()
        pipe.send((tokens / (time.perf_counter() - start - sum(aside)), gave))


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
    sides: Mapping[str, Side], rounds: int, slow: frozenset[str] = frozenset(), warm_ups: int = 1,
    failures: dict[str, str] | None = None,
) -> tuple[dict[str, list[float]], dict[str, Any]]:  # fmt: skip
    """Tokens per second of each side in each round, after unmeasured turns; and what each side's last turn gave. One
    makes ready after the other: what a kernel's configurations are timed for then, nobody disturbs.

    Sides in `slow` take minutes a turn: they run in the first two rounds only, unwarmed, which flatters the others by
    far less than a percent. Raises PartFailedError where a side's process ends before it is done; but given `failures`,
    says it there, and the other sides go on.
    """
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    found: dict[str, list[float]] = {name: [] for name in sides}
    gave: dict[str, Any] = {}

    def answer(name: str) -> Any:
        try:
            return pipes[name].recv()
        except (EOFError, OSError):
            reason = f"the process of {name} ended, for the reason that it gave above"
            if failures is None:
                raise PartFailedError(reason) from None
            failures[name] = reason
            del found[name]

    def take_turn(name: str) -> tuple[float, Any] | None:
        with suppress(OSError):  # of an end that `answer` tells of
            pipes[name].send(True)
        return answer(name)

    try:
        for name, side in sides.items():
            pipes[name], theirs = context.Pipe()
            workers.append(context.Process(target=_serve, args=(theirs, side, torch.get_num_threads()), daemon=True))
            workers[-1].start()
            theirs.close()
            answer(name)
        for name in [name for name in found if name not in slow]:
            for _ in range(warm_ups):
                if name in found:
                    take_turn(name)
        for turn in range(rounds):
            for name in list(found) if turn % 2 == 0 else list(found)[::-1]:
                if (name not in slow or turn < 2) and (taken := take_turn(name)) is not None:
                    rate, gave[name] = taken
                    found[name].append(rate)
    finally:
        for worker in workers:
            worker.terminate()
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
    device: str = "cpu", unit: str = "tokens", **more: Any,
):  # fmt: skip
    """Print the object, with `more` in it, or a Markdown table of it. unit: of what the rates count."""
    medians = {side: statistics.median(values) for side, values in found.items()}
    if as_json:
        print(json.dumps({
            "benchmark": name, "settings": settings, f"{unit}_per_s": medians, "samples": found, "ratios": ratios,
            **more, "environment": describe(device, torch.get_num_threads()),
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
