"""How numbers are printed, in reports, findings and messages: three significant digits, thousands separators, one scale
per line of a table.

An interval decides the digits of its value: enough to show two digits of its half-width, so
2.0312 +- 0.0201 prints as "2.031 [2.011, 2.051]".
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

DASH = "–"  # stands for a missing value; its reason is always a footnote
MINUS = "−"
SLIGHT = 0.05  # a ratio nearer to 1 is told as such, resolved or not


def places(value: float, digits: int = 3) -> int:
    """Decimal places that show `digits` significant digits of `value`; negative: tens, hundreds, ..."""
    if value == 0:
        return 0
    shown = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, shown)  # 9.996 becomes 10.0, which needs one place fewer
    return digits - 1 - math.floor(math.log10(abs(rounded)))


def number(value: float, at: int | None = None, sign: bool = False) -> str:
    """`value` at `at` decimal places, or with three significant digits."""
    if abs(value) >= 1e15:  # of a model that has diverged: the perplexity
        return f"{MINUS if value < 0 else ''}{abs(value):.3g}"
    at = places(value) if at is None else at
    rounded = round(float(value), at) + 0.0  # + 0.0: no "-0"
    text = f"{abs(rounded):,.{max(at, 0)}f}"
    if rounded < 0:
        return MINUS + text
    return f"+{text}" if sign and rounded > 0 else text


def apart(value: float, neutral: float, at: int) -> int:
    """At least `at` decimal places: as many as it takes that a value beside `neutral` is not printed as that."""
    while abs(value - neutral) > 1e-9 and round(value, at) == neutral:
        at += 1
    return at


def multiple(value: float) -> str:
    """What is as much as something else is 1.00 times that, and nothing else is."""
    return number(value, apart(value, 1.0, places(value)))


def signed(value: float, at: int) -> str:
    """With a sign, at `at` decimal places or more: 0 is printed of none that is not."""
    return number(value, apart(value, 0.0, at), sign=True)


def fitting(value: float, low: float | None, high: float | None, least: int = 3) -> int:
    """Decimal places of a difference in a sentence, at least `least`: of a small one as many as its interval's
    half-width has two digits with, but no more than three digits of the largest."""
    if low is None or high is None or high == low:
        return least
    return max(least, min(places((high - low) / 2, 2), places(max(abs(value), abs(low), abs(high)))))


def interval(
    value: float,
    low: float | None,
    high: float | None,
    *,
    factor: float = 1.0,
    sign: bool = False,
    least: int | None = None,
    neutral: float | None = None,
) -> str:
    """`value [low, high]` times `factor`, all with the same decimal places, at least `least`; else `value` alone. A
    bound far below or above the others has two digits of its own, or none behind the point. neutral: what means no
    difference, and is printed of nothing else, though it take more places."""
    value *= factor

    def clear(value: float, at: int) -> str:
        return number(value, at if neutral is None else apart(value, neutral * factor, at), sign)

    if low is None or high is None:
        return clear(value, places(value) if least is None else max(least, places(value)))
    low, high = low * factor, high * factor
    at = places(max(abs(value), abs(low), abs(high)))
    at = at if least is None else max(at, least)
    half = (high - low) / 2
    if half > 0:
        at = min(max(at, places(half, 2)), at + 3)
    if low > 0 and round(value, at) == 0:  # of what cannot be 0
        at = places(value, 2)
    lowest = max(at, places(low, 2)) if 0 < low < 0.5 * 10.0**-at else at
    highest = min(at, 0) if high >= 1000 * max(abs(value), 1) else at
    return f"{clear(value, at)} [{clear(low, lowest)}, {clear(high, highest)}]"


def count(value: float) -> str:
    """A whole number in full, e.g. 4,521,984."""
    return f"{value:,.0f}"


def plural(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """E.g. "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def left_out(verdict: dict[str, Any]) -> str:
    """E.g. "seed 2 of mamba", of the seeds that a comparison lacks; older records do not say."""
    return listed([
        f"seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])} of {arm}"
        for arm, seeds in verdict.get("lacking", {}).items()
    ])  # fmt: skip


def probability(value: float) -> str:
    """Two digits, and more where rounding would carry a p value over 0.05."""
    if value < 0.001:
        return "< 0.001"
    digits = 2
    while digits < 6 and (round(value, places(value, digits)) < 0.05) != (value < 0.05):
        digits += 1
    return number(value, places(value, digits))


def after_holm(p: float) -> str:
    """E.g. "p = 0.012 after Holm's correction"."""
    text = probability(p)
    return f"p {text if text.startswith('<') else f'= {text}'} after Holm's correction"


def percent(fraction: float) -> str:
    """A signed share, e.g. "+0.31%"; below 0.005% of a difference counts as none."""
    share = 100 * fraction
    if abs(share) < 0.005:
        return "0.00%"
    return number(share, max(0, min(places(share), 2)), sign=True) + "%"


def scale(values: Iterable[float | None], unit: str) -> tuple[float, str]:
    """(factor, unit) that prints all `values` of one line well: bytes as B, kB, MB or GB (powers of ten)."""
    top = max((abs(value) for value in values if value is not None), default=0.0)
    if unit in ("bytes", "byte", "B"):
        return _step(top, (("GB", 1e9, 1e10), ("MB", 1e6, 1e6), ("kB", 1e3, 1e3)), "B")
    if unit.startswith("FLOP"):
        steps = (("T", 1e12, 1e13), ("G", 1e9, 1e9), ("M", 1e6, 1e6))
        return _step(top, tuple((prefix + unit, size, least) for prefix, size, least in steps), unit)
    return 1.0, "×" if unit == "x" else unit


def size(amount: float) -> str:
    """Bytes in words, e.g. "8.45 MB"."""
    factor, unit = scale([amount], "bytes")
    return f"{number(amount * factor)} {unit}"


def _step(top: float, steps: tuple[tuple[str, float, float], ...], otherwise: str) -> tuple[float, str]:
    for name, size, least in steps:
        if top >= least:
            return 1 / size, name
    return 1.0, otherwise
