"""The vector mathematics of the compiled kernels, and where these are kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core.codegen import get_host_cpu_features

from models.ops.kernels import numba_runtime, numba_scan
from models.ops.kernels.numba_runtime import compiled, exp, exp2, run_tasks, sigmoid, softplus


@compiled
def _apply(x, out_exp2, out_exp, out_sigmoid, out_softplus):
    for i in range(len(x)):
        out_exp2[i] = exp2(x[i])
        out_exp[i] = exp(x[i])
        out_sigmoid[i] = sigmoid(x[i])
        out_softplus[i] = softplus(x[i])


def apply(x: np.ndarray) -> list[np.ndarray]:
    results = [np.empty_like(x) for _ in range(4)]
    _apply(x, *results)
    return results


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 5e-7), (np.float64, 1e-14)])
def test_within_a_few_units_in_the_last_place(dtype, tolerance):
    x = np.linspace(-86, 88, 1_000_001, dtype=dtype)
    exact = x.astype(np.longdouble)
    of_two, of_e, gate, step = apply(x)
    for y, expected in [
        (of_two, np.exp2(exact)),
        (of_e, np.exp(exact)),
        (gate, 1 / (1 + np.exp(-exact))),
        (step, np.log1p(np.exp(exact))),
    ]:
        assert np.max(np.abs(y - expected) / expected) < tolerance


def test_vectors_are_as_wide_as_the_cpu_has_them():
    if "+avx512f" not in get_host_cpu_features().split(","):
        pytest.skip("a CPU without vectors of 512 bits")
    apply(np.zeros(1, np.float32))
    assembly = "".join(_apply.inspect_asm().values())
    assert assembly.count("%zmm") > assembly.count("%ymm")


@pytest.mark.parametrize("chosen", [{"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, {"NUMBA_ENABLE_AVX": "0"}])
def test_what_a_person_chose_for_numba_stays(chosen):
    code = (
        "from numba.core import config; before = config.CPU_NAME, config.CPU_FEATURES;"
        "import models.ops.kernels.numba_runtime;"
        "assert (config.CPU_NAME, config.CPU_FEATURES) == before, before"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | chosen, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    ends = apply(np.array([-np.inf, -1e30, -90, 0, 90, 1e30, np.inf], np.float32))[1]
    assert ends.tolist() == pytest.approx([2.0**-125] * 3 + [1] + [2.0**127] * 3, rel=1e-5)
    assert ends[3] == 1
    steps = apply(np.array([-1e30, 0, 1e30, np.inf], np.float32))[3]
    assert steps.tolist() == pytest.approx([0, np.log(2), 1e30, np.inf], rel=1e-6, abs=1e-37)


@given(st.floats(width=32))
def test_nan_alone_gives_nan(x):
    y = apply(np.array([x, 1.0, x], np.float32))
    assert np.isnan(y[0][[0, 2]]).all() == np.isnan(x)
    assert not np.isnan(y[0][1])
    if np.isnan(x):
        assert all(np.isnan(of[0]) for of in y)


def test_no_task_is_no_call():
    calls: list[tuple[int, int]] = []
    run_tasks(lambda first, last: calls.append((first, last)), 0)
    assert all(first == last for first, last in calls)


def test_a_kernel_is_kept_under_the_contents_of_all_that_may_be_compiled_into_it(tmp_path):
    here = Path(numba_runtime.__file__).parent
    assert f"numba-{numba_runtime.version_of(here)}" in numba_scan._forward.stats.cache_path
    for file in here.glob("numba_*.py"):
        shutil.copy(file, tmp_path)
    versions = {numba_runtime.version_of(here), numba_runtime.version_of(tmp_path)}
    assert len(versions) == 1
    for file in tmp_path.iterdir():
        with file.open("a") as changed:
            changed.write("#")
        versions.add(numba_runtime.version_of(tmp_path))
    assert len(versions) == 1 + len(list(tmp_path.iterdir())) > 10
