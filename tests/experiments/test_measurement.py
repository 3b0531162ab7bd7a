"""Fresh processes, peaks of memory and repeated timing do what the numbers that rest on them assume."""

import os
import signal
import time

import pytest
import torch

from experiments.errors import CorpusError
from experiments.measurement.memory import PeakMemory, resident_bytes, settle
from experiments.measurement.process import CellFailedError, run_fresh
from experiments.measurement.timing import MOST_REPEATS, WARM_UP, Samples, timed

CPU = torch.device("cpu")
MB = 1 << 20


def _add(send, a, b):
    send(("at", a))
    send(("at", b))
    return a + b, os.getpid()


def _raise(send, error):
    raise error


def _die(send):
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(send):
    os._exit(3)


def _sleep(send):
    time.sleep(60)


def _ask_for_too_much(send):
    torch.empty(1 << 55)


def _allocate(send, megabytes):
    settle()
    before = resident_bytes()
    with PeakMemory(CPU) as peak:
        block = torch.ones(megabytes * MB // 4)
        total = block.sum().item()
        del block
        settle()
    return peak.host_bytes - before, resident_bytes() - before, peak.method, total


def test_result_and_messages() -> None:
    heard = []
    total, pid = run_fresh(_add, 2, 3, on_message=heard.append)
    assert total == 5
    assert pid != os.getpid()
    assert heard == [("at", 2), ("at", 3)]


def test_foreseen_error_keeps_its_line() -> None:
    with pytest.raises(CellFailedError) as caught:
        run_fresh(_raise, CorpusError("the text is empty"))
    assert (str(caught.value), caught.value.detail) == ("the text is empty", "")


def test_unforeseen_error_keeps_its_traceback() -> None:
    with pytest.raises(CellFailedError) as caught:
        run_fresh(_raise, RuntimeError("first\nsecond"))
    assert str(caught.value) == "RuntimeError: first"
    assert "Traceback" in caught.value.detail
    assert "_raise" in caught.value.detail


def test_killed_and_silent_processes() -> None:
    with pytest.raises(CellFailedError, match=r"killed by SIGKILL \(out of memory\?\)"):
        run_fresh(_die)
    with pytest.raises(CellFailedError, match="ended with exit code 3 and no result"):
        run_fresh(_leave)


def test_a_cell_that_takes_too_long_is_stopped() -> None:
    begun = time.monotonic()
    with pytest.raises(CellFailedError, match=r"stopped after 0.5 s \(cell_timeout_s\)"):
        run_fresh(_sleep, timeout_s=0.5)
    assert time.monotonic() - begun < 20


def test_a_lack_of_memory_is_said_in_a_line() -> None:
    with pytest.raises(CellFailedError, match="out of memory: you tried to allocate") as caught:
        run_fresh(_ask_for_too_much)
    assert caught.value.detail == ""


def test_peak_sees_memory_that_was_given_back() -> None:
    peak, after, method, _ = run_fresh(_allocate, 50)
    assert 0.8 * 50 * MB < peak < 1.2 * 50 * MB, method
    assert after < 0.2 * 50 * MB


def test_timed_repeats_without_the_warm_up() -> None:
    calls = []
    samples = timed(
        lambda: calls.append(time.sleep(0.05 if len(calls) < WARM_UP else 0.002)), repeats=7, seconds=0, device=CPU
    )
    assert len(samples.ms) == 7
    assert len(calls) == 7 + WARM_UP
    assert min(samples.ms) >= 2
    assert samples.median < 25  # the slow calls were the warm-up


def test_timed_runs_for_its_seconds() -> None:
    samples = timed(lambda: time.sleep(0.005), repeats=1, seconds=0.1, device=CPU)
    assert sum(samples.ms) >= 90
    assert len(samples.ms) > 3
    assert len(timed(lambda: None, repeats=1, seconds=1e9, device=CPU).ms) == MOST_REPEATS


def test_noisy() -> None:
    assert Samples([1.0] * 18 + [9.0] * 2).noisy
    assert not Samples([1.0, 1.1, 1.2]).noisy
