"""Triton's choice among configurations, without a GPU: compiled for one, and timed by nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import gc
import json
import os
import sys
import threading
import weakref

import torch
import triton
import triton.compiler
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from models.ops.kernels.tuning import compile_side_by_side, look_names_up


class Driver:  # of a GPU on which nothing can be started
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *device: 0)


driver.set_active(Driver())
run, compile = JITFunction.run, triton.compiler.compile
happened, pair = [], threading.Barrier(min(2, len(os.sched_getaffinity(0))))


def launched(kernel, *args, warmup, **given):
    run(kernel, *args, warmup=True, **given)
    if not warmup:
        happened.append(("launched", given["size"]))


def compiled(source, **how):
    if threading.current_thread() is not threading.main_thread():
        pair.wait(timeout=60)  # broken unless another is being compiled at the same time
    done = compile(source, **how)
    happened.append(("compiled", *source.constants.values()))
    return done


def timed(call, quantiles):
    call()
    return [1 / happened[-1][1]] * 3  # the larger, the faster


@triton.autotune([triton.Config(dict(size=n)) for n in (16, 32, 64, 128)], key=["length"], do_bench=timed)
@triton.jit
def double(x, length, size: tl.constexpr):
    tl.static_assert(size != 128, "refused")
    at = tl.arange(0, size)
    tl.store(x + at, 2 * tl.load(x + at, at < length), at < length)


JITFunction.run, triton.compiler.compile = launched, compiled
if sys.argv[1] == "ahead":
    compile_side_by_side()
    look_names_up()
x = torch.ones(8)
double[1,](x, 8)
again = len(happened)
double[1,](x, 8)
longer = len(happened)
double[1,](x, 16)
calls = happened[:again], happened[again:longer], happened[longer:]
held = weakref.ref(x)
del x
gc.collect()
assert held() is None, "what a kernel was given is kept"
assert isinstance(double.arg_names, dict) == (sys.argv[1] == "ahead")
print(json.dumps([*calls, double.best_config.kwargs]))
"""


@pytest.mark.oracle
def test_every_configuration_is_compiled_before_the_first_is_timed(tmp_path):
    first, second, longer, best = chosen(tmp_path, "ahead")
    for call in (first, longer):
        assert sorted(call[:3]) == [["compiled", 16], ["compiled", 32], ["compiled", 64]]
        assert call[3:] == [["launched", 16], ["launched", 32], ["launched", 64], ["launched", 64]]
    assert second == [["launched", 64]]
    assert best == {"size": 64}


@pytest.mark.oracle
def test_the_choice_is_that_of_compiling_one_at_a_time(tmp_path):
    first, second, longer, best = chosen(tmp_path, "in turn")
    for call in (first, longer):
        assert call[:3] == [["compiled", 16], ["launched", 16], ["compiled", 32]]
    assert (second, best) == ([["launched", 64]], {"size": 64})


@pytest.mark.oracle
def test_the_form_cuda_has_both_of_its_changes_to_triton() -> None:
    """Whoever imports it, so that the model that a benchmark sets beside ours has them too."""
    for library in ("triton", "mamba_ssm", "causal_conv1d"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    script = (
        "import sys, types\n"
        "for compiled in ('causal_conv1d_cuda', 'selective_scan_cuda'):  # which a machine without a GPU lacks\n"
        "    sys.modules.setdefault(compiled, types.SimpleNamespace())\n"
        "from triton.runtime.autotuner import Autotuner as A\n"
        "assert not hasattr(A.run, '__wrapped__') and not hasattr(A._bench, '__wrapped__')\n"
        "import models.ops.kernels.cuda_form\n"
        "print(A._bench.__wrapped__.__name__, A.run.__wrapped__.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["_bench", "run"], run.stderr


def chosen(folder: Path, how: str) -> list:
    """What happened in the first call of a kernel with four configurations, the last of which does not compile, in the
    second, in one of another length, and the configuration that was taken."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    script = folder / "choose.py"  # Triton reads a kernel's source from its file
    script.write_text(SCRIPT)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, script, how], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
