"""Numbers as they are printed, against the numbers themselves."""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from experiments import numbers

VALUES = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


def parsed(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


@given(VALUES)
def test_three_significant_digits(value: float) -> None:
    shown = parsed(numbers.number(value))
    assert math.isclose(shown, value, rel_tol=0.5e-2 + 1e-9, abs_tol=0)
    digits = re.sub(r"[^\d]", "", numbers.number(value)).lstrip("0")
    assert value == 0 or len(digits) >= 3


@given(VALUES, st.floats(min_value=0, max_value=1e9), st.floats(min_value=0, max_value=1e9))
def test_interval_keeps_its_three_numbers(value: float, below: float, above: float) -> None:
    low, high = value - below, value + above
    assume(max(abs(low), abs(value), abs(high)) > 1e-9)
    text = numbers.interval(value, low, high)
    found = re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", text)
    assert found
    largest = max(abs(low), abs(value), abs(high))
    for shown, true in zip(found.groups(), (value, low, high), strict=True):
        assert abs(parsed(shown) - true) <= 0.5e-2 * largest * (1 + 1e-9)
    at, at_low, at_high = (len(shown.partition(".")[2]) for shown in found.groups())
    assert at_low == at or 0 < low < 0.5 * 10.0**-at
    assert at_high == at or high >= 1000 * max(abs(value), 1)
    assert (parsed(found[2]) > 0) == (low > 0)
    assert parsed(found[2]) <= parsed(found[1]) <= parsed(found[3])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((2.03124, 2.0111, 2.0514), "2.031 [2.011, 2.051]"),
        ((-0.0429, -0.0483, -0.0375), "−0.0429 [−0.0483, −0.0375]"),
        ((0.0003, -0.0197, 0.0203), "0.0003 [−0.0197, 0.0203]"),
        ((12345.6, 11111.0, 13579.0), "12,300 [11,100, 13,600]"),
        ((18.1, 18.1, 18.1), "18.1 [18.1, 18.1]"),
        ((5.0, None, None), "5.00"),
    ],
)
def test_intervals(arguments: tuple, text: str) -> None:
    assert numbers.interval(*arguments) == text


def test_factor_and_least_places() -> None:
    assert numbers.interval(2.5e6, 2e6, 3e6, factor=1e-6) == "2.50 [2.00, 3.00]"
    assert numbers.interval(2.0, None, None, least=3) == "2.000"
    assert numbers.interval(1.0055, 0.0004, 2620.0) == "1.0 [0.00040, 2,620]"  # a ratio is not 0
    assert numbers.interval(0.453, 0.0133, 15.4) == "0.5 [0.013, 15.4]"
    assert numbers.interval(0.5, 0.4, 0.6, sign=True) == "+0.500 [+0.400, +0.600]"


@given(st.floats(-1e3, 1e3), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 1.0]))
def test_what_means_no_difference_is_printed_of_nothing_else(
    value: float, below: float, above: float, neutral: float
) -> None:
    """However near: a bound that leaves out 0, or a ratio's 1, does so as it is printed."""
    assume(all(x == neutral or abs(x - neutral) > 1e-8 for x in (value, value - below, value + above)))
    text = numbers.interval(value, value - below, value + above, neutral=neutral)
    found = re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", text)
    assert found
    for shown, true in zip(found.groups(), (value, value - below, value + above), strict=True):
        assert np.sign(parsed(shown) - neutral) == np.sign(true - neutral)
    assert np.sign(parsed(numbers.multiple(value)) - 1) == np.sign(value - 1) or abs(value - 1) <= 1e-8
    assert np.sign(parsed(numbers.signed(value, 3))) == np.sign(value) or abs(value) <= 1e-8


def test_digits_that_keep_a_bound_apart() -> None:
    assert numbers.interval(-0.0911, -0.1619, -0.0003, neutral=0.0) == "−0.091 [−0.162, −0.0003]"
    assert numbers.interval(1.0121, 1.0004, 1.0242, neutral=1.0) == "1.012 [1.0004, 1.024]"
    assert numbers.interval(1.0121, 1.0, 1.0242, neutral=1.0) == "1.012 [1.000, 1.024]"
    assert numbers.interval(1.5, 0.9999, 2.0, factor=1e3, neutral=1.0) == "1,500 [999.9, 2,000]"
    assert numbers.interval(0.5, 1e-12, 1.0, neutral=0.0) == "0.50 [0.0000000000010, 1.00]"
    assert numbers.multiple(1 + 1e-12) == "1.00"  # rounding's own
    assert (numbers.multiple(0.99996), numbers.multiple(1.00042), numbers.multiple(1.0)) == (
        "0.99996",
        "1.0004",
        "1.00",
    )
    assert (numbers.signed(-0.00001234, 4), numbers.signed(0.0, 4)) == ("−0.00001", "0.0000")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7e79, "7e+79"),
        (-1.5e15, "−1.5e+15"),
        (9.996, "10.0"),
        (0.0999999, "0.100"),
        (999.6, "1,000"),
        (0, "0"),
        (-0.0, "0"),
        (1234567, "1,230,000"),
    ],
)
def test_rounding_that_gains_a_digit(value: float, text: str) -> None:
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([999], "bytes", (1.0, "B")),
        ([1500, None], "bytes", (1e-3, "kB")),
        ([131_072, 8_388_608], "bytes", (1e-6, "MB")),
        ([9.9e9], "bytes", (1e-6, "MB")),
        ([1e10], "bytes", (1e-9, "GB")),
        ([2.7e7], "FLOP/token", (1e-6, "MFLOP/token")),
        ([0.9], "x", (1.0, "×")),
        ([2.0], "bits/byte", (1.0, "bits/byte")),
        ([], "bytes", (1.0, "B")),
    ],
)
def test_scale(values: list, unit: str, expected: tuple) -> None:
    factor, shown = numbers.scale(values, unit)
    assert math.isclose(factor, expected[0])
    assert shown == expected[1]


@given(st.floats(min_value=0, max_value=1))
def test_a_p_value_never_crosses_the_threshold(p: float) -> None:
    text = numbers.probability(p)
    if text.startswith("<"):
        assert p < 0.001
    else:
        assert (parsed(text) < 0.05) == (p < 0.05) or abs(p - 0.05) < 1e-6


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.349, 0.299, 0.398, 3), (-1.0, -1.0006, -0.9994, 3), (0.0008, 0.0004, 0.0012, 5), (0.05, 0.0495, 0.0505, 4),
        (0.2, None, None, 3), (0.0, 0.0, 0.0, 3), (0.00012, -0.03, 0.03, 3),
    ],
)  # fmt: skip
def test_a_small_difference_has_the_places_that_its_interval_deserves(
    value: float, low: float | None, high: float | None, expected: int
) -> None:
    assert numbers.fitting(value, low, high) == expected


@pytest.mark.parametrize(("share", "text"), [(0.08, "+8.00%"), (-0.0171, "−1.71%"), (1e-7, "0.00%"), (1.18, "+118%")])
def test_percent(share: float, text: str) -> None:
    assert numbers.percent(share) == text
