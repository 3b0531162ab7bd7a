"""Intervals and tests against scipy, known answers and the properties that define them."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from experiments.statistics import (
    MOST_SEEDS,
    Comparison,
    holm,
    mean_interval,
    more_seeds,
    paired_difference,
    paired_ratio,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12).filter(lambda x: np.ptp(x) > 1e-3)
P = st.lists(st.floats(0, 1) | st.none(), max_size=10)


@given(VALUES)
def test_interval_is_scipys(values: list[float]) -> None:
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    interval = mean_interval(values)
    assert interval.n == len(values)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx(
        (np.mean(values), low, high), rel=1e-9, abs=1e-9
    )


def test_interval_known_answer() -> None:
    # mean 2, s = 1, n = 3, t = 4.302653: 2 +- 4.302653 / sqrt 3
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((2.0, -0.4841377, 4.4841377), abs=1e-6)


def test_one_value_has_no_interval() -> None:
    interval = mean_interval([3.0])
    assert (interval.estimate, interval.low, interval.high, interval.n) == (3.0, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=12))
def test_difference_is_scipys_paired_test(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    assume(np.ptp(np.subtract(b, a)) > 1e-2)
    comparison, expected = paired_difference(a, b), stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert comparison.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert (comparison.interval.low, comparison.interval.high) == pytest.approx((interval.low, interval.high), abs=1e-7)


def test_pairing_cancels_what_pairs_share() -> None:
    shared = [0.0, 100.0, -50.0]
    paired = paired_difference(shared, [x + d for x, d in zip(shared, (1.0, 1.1, 0.9), strict=True)])
    assert paired.interval.estimate == pytest.approx(1.0)
    assert paired.p is not None
    assert paired.p < 0.01


def test_ratio_known_answer() -> None:
    ratio = paired_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0 * 1.001])
    assert ratio.interval.estimate == pytest.approx(2 * 1.001 ** (1 / 3), rel=1e-12)
    assert paired_ratio([1.0, 1.0], [2.0, 8.0]).interval.estimate == pytest.approx(4.0)
    assert paired_ratio([2.0, 8.0], [1.0, 1.0]).interval.estimate == pytest.approx(0.25)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=8))
def test_a_ratio_turned_round_is_its_inverse(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert there.interval.estimate * back.interval.estimate == pytest.approx(1, rel=1e-9)
    if there.p is not None:
        assert there.interval.low * back.interval.high == pytest.approx(1, rel=1e-6)  # type: ignore[operator]
        assert there.p == pytest.approx(back.p, rel=1e-6)


def test_no_spread() -> None:
    same, shifted, one = (
        paired_difference([1, 2], [1, 2]),
        paired_difference([1, 2], [2, 3]),
        paired_difference([1], [3]),
    )
    assert (same.p, same.exact, more_seeds([same], 0)) == (None, False, None)
    assert (shifted.p, shifted.exact, more_seeds([shifted], 0)) == (None, True, None)
    assert (one.p, one.exact, more_seeds([one], 0)) == (None, False, None)
    assert type(shifted.exact) is bool  # json takes no numpy.bool
    assert type(same.exact) is bool


def test_equal_readings_are_no_closer_than_what_they_are_read_to() -> None:
    a, b, page = [1e6, 1e6], [9e5, 9e5], 4096
    counted, read = paired_ratio(a, b), paired_ratio(a, b, page)
    assert (counted.p, counted.exact) == (None, True)
    assert not read.exact
    deviation = math.hypot(page / 1e6, page / 9e5)
    expected = stats.ttest_1samp([math.log(0.9) - deviation / 2**0.5, math.log(0.9) + deviation / 2**0.5], 0)
    assert read.p == pytest.approx(expected.pvalue, rel=1e-6)
    low, high = expected.confidence_interval()
    assert (read.interval.low, read.interval.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-6)
    assert paired_ratio(a, b, 8 * page).p > read.p
    assert 0 < paired_ratio([3, 4], [5, 6], page).p < 1  # less than a page


def test_what_pairs_are_read_to_is_added_to_their_spread() -> None:
    """In squares; of pairs that are read to different shares of themselves, the mean of those squares."""
    a, b, page = [1e5, 4e5], [9e4, 3.8e5], 4096
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    read = np.mean([(page / x) ** 2 + (page / y) ** 2 for x, y in zip(a, b, strict=True)])
    deviation = math.hypot(np.std(logs, ddof=1), math.sqrt(read))
    middle, half = np.mean(logs), deviation / 2**0.5
    expected = stats.ttest_1samp([middle - half, middle + half], 0)  # with that mean and standard deviation
    found = paired_ratio(a, b, page)
    assert found.deviation == pytest.approx(deviation, rel=1e-9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    low, high = expected.confidence_interval()
    assert (found.interval.low, found.interval.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-6)
    apart = paired_difference([1.0, 2.0], [2.0, 5.0], resolution=0.5)  # 1 and 3: 2 = 1 + 1, and twice 0.25
    assert apart.deviation == pytest.approx(math.sqrt(2.5))
    assert apart.p == pytest.approx(stats.ttest_1samp([2 - 1.25**0.5, 2 + 1.25**0.5], 0).pvalue, rel=1e-6)


def test_equal_differences_of_counts_are_no_law() -> None:
    """38 of 252 fewer at both seeds is a coincidence, to within what a count is read to."""
    counted = paired_difference([65 / 252, 70 / 252], [27 / 252, 32 / 252], resolution=1 / 252)
    assert not counted.exact
    assert counted.interval.estimate == pytest.approx(-38 / 252)
    spread = math.sqrt(2) / 252
    around = [-38 / 252 - spread / 2**0.5, -38 / 252 + spread / 2**0.5]  # with that standard deviation
    assert counted.p == pytest.approx(stats.ttest_1samp(around, 0).pvalue, rel=1e-6)


def test_holm_known_example() -> None:
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to 0.06 by the one before), 0.5 * 1
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]


@given(P)
def test_holm_properties(p: list[float | None]) -> None:
    corrected = holm(p)
    known = sorted((a, b) for a, b in zip(p, corrected, strict=True) if a is not None and b is not None)
    assert [x is None for x in corrected] == [x is None for x in p]
    assert all(a <= b <= min(1, max(a * len(known), a)) + 1e-12 for a, b in known)
    assert [b for _, b in known] == sorted(b for _, b in known)
    if known:
        assert known[0][1] == pytest.approx(min(1, known[0][0] * len(known)))


def with_effect(effect: float, n: int) -> Comparison:
    """Of n pairs whose differences have this mean and the standard deviation 1."""
    x = np.linspace(-1, 1, n)
    return paired_difference([0.0] * n, (effect + x / x.std(ddof=1)).tolist())


def p_of(effect: float, n: int) -> float:
    return float(2 * stats.t.sf(effect * math.sqrt(n), n - 1))


@given(st.floats(0.05, 3), st.integers(2, 10), st.integers(1, 7))
def test_more_seeds_resolves_and_one_fewer_does_not(effect: float, n: int, alike: int) -> None:
    """`alike` comparisons of one effect, which Holm resolves together or not at all."""
    assume(p_of(effect, n) * alike >= 0.05)
    more = more_seeds([with_effect(effect, n)] * alike, 0)
    if more is None:
        assert p_of(effect, MOST_SEEDS) * alike >= 0.05
    else:
        assert more >= 1
        assert p_of(effect, n + more) * alike < 0.05
        assert more == 1 or p_of(effect, n + more - 1) * alike >= 0.05


@pytest.mark.parametrize("n", [2, 7])
def test_more_seeds_are_not_asked_for_beyond_a_thousand(n: int) -> None:
    edge = float(stats.t.ppf(0.975, 999)) / math.sqrt(1000)  # the least effect that a thousand resolve
    assert more_seeds([with_effect(edge * 1.00001, n)], 0) == 1000 - n
    assert more_seeds([with_effect(edge * 0.99999, n)], 0) is None


def test_more_seeds_are_those_that_holm_asks_for() -> None:
    """Beside five that are resolved, an open comparison has the last and mildest of Holm's levels."""
    clear, open_ = with_effect(30.0, 3), with_effect(1.2, 3)
    alone = more_seeds([open_], 0)
    assert alone is not None
    assert more_seeds([clear] * 5 + [open_], 5) == alone
    assert p_of(1.2, 3 + alone) > 0.05 / 6  # Bonferroni would ask for more
    two = more_seeds([clear] * 4 + [open_] * 2, 5)
    assert two is not None
    assert two > alone
    assert holm([p_of(30.0, 3 + two)] * 4 + [p_of(1.2, 3 + two)] * 2)[5] < 0.05  # type: ignore[operator]
