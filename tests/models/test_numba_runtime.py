"""The vector mathematics of the compiled kernels, and where these are kept."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.ops.kernels import numba_runtime, numba_scan
from models.ops.kernels.numba_runtime import compiled, exp2, run_tasks, sigmoid, softplus


@compiled
def _apply(x, out_exp2, out_sigmoid, out_softplus):
    for i in range(len(x)):
        out_exp2[i] = exp2(x[i])
        out_sigmoid[i] = sigmoid(x[i])
        out_softplus[i] = softplus(x[i])


def apply(x: np.ndarray) -> list[np.ndarray]:
    results = [np.empty_like(x) for _ in range(3)]
    _apply(x, *results)
    return results


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 5e-7), (np.float64, 1e-14)])
def test_within_a_few_units_in_the_last_place(dtype, tolerance):
    # sigmoid and softplus take exponents in units of ln 2, whose rounding costs |x| units in the last place
    x = np.linspace(-20, 20, 400_001, dtype=dtype)
    exact = x.astype(np.longdouble)
    got = apply(x)
    for y, expected, allowed in [
        (got[0], np.exp2(exact), tolerance),
        (got[1], 1 / (1 + np.exp(-exact)), 6 * tolerance),
        (got[2], np.log1p(np.exp(exact)), 6 * tolerance),
    ]:
        assert np.max(np.abs(y - expected) / expected) < allowed


def test_the_whole_range_of_exponents():
    x = np.linspace(-125, 127, 100_001, dtype=np.float32)
    got, expected = apply(x)[0], np.exp2(x.astype(np.float64))
    assert np.max(np.abs(got - expected) / expected) < 5e-7
    whole = np.arange(-125, 128, dtype=np.float32)
    assert np.array_equal(
        apply(whole)[0], np.ldexp(np.float32(1), whole.astype(int))
    )  # 1 at 0 above all: no decay is no decay
    assert apply(np.array([-1e30, -np.inf, -126, -150], np.float32))[0].tolist() == [2.0**-125] * 4
    assert apply(np.array([1e30, np.inf, 128], np.float32))[0].tolist() == [2.0**127] * 3


@given(st.floats(width=32))
def test_nan_alone_gives_nan(x):
    y = apply(np.array([x, 1.0, x], np.float32))
    assert np.isnan(y[0][[0, 2]]).all() == np.isnan(x)
    assert not np.isnan(y[0][1])
    if np.isnan(x):
        assert np.isnan(y[1][0])
        assert np.isnan(y[2][0])


def test_no_task_is_no_call():
    calls: list[tuple[int, int]] = []
    run_tasks(lambda first, last: calls.append((first, last)), 0)
    assert all(first == last for first, last in calls)


def test_a_kernel_is_kept_under_the_contents_of_what_it_calls():
    digest = hashlib.sha256(Path(numba_runtime.__file__).read_bytes()).hexdigest()[:12]
    assert f"numba-{digest}" in numba_scan._forward.stats.cache_path
