"""Series as they are drawn, against their definitions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from experiments.report import curves
from experiments.statistics import binned


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 8))
def test_smoothing_is_the_mean_of_the_last_steps(values: list[float], width: int) -> None:
    expected = [np.mean(values[max(0, at + 1 - width) : at + 1]) for at in range(len(values))]
    np.testing.assert_allclose(curves.smoothed(np.array(values), width), expected, atol=1e-9)


def test_smoothing_survives_a_step_that_is_not_finite() -> None:
    shown = curves.smoothed(np.array([1.0, np.nan, 3.0, 5.0]), 2)
    np.testing.assert_allclose(shown, [1.0, 1.0, 3.0, 4.0])


def test_a_mean_is_over_the_seeds_that_came_furthest_where_all_of_them_were() -> None:
    long = (np.array([0.0, 10, 20]), np.array([5.0, 4, 3]))
    sparse = (np.array([0.0, 20]), np.array([7.0, 4]))
    ended = (np.array([0.0, 10]), np.array([70.0, 60]))
    found = curves.mean([long, ended, sparse])
    assert found is not None
    np.testing.assert_array_equal(found[0], [0, 20])
    np.testing.assert_array_equal(found[1], [6, 3.5])
    assert curves.mean([]) is None


@given(st.integers(1, 300))
def test_bins_of_positions_cover_every_position_once(T: int) -> None:
    ones, ramp = binned(np.ones(T)), binned(np.arange(1.0, T + 1))
    np.testing.assert_allclose(ones[1], 1)
    assert (np.diff(ones[0]) > 0).all()
    assert ramp[1][0] == 1  # the first position stands alone
    assert ones[0][-1] <= T
