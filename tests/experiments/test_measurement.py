"""Fresh processes, peaks of memory and repeated timing do what the numbers that rest on them assume."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numba.core.registry import cpu_target

from experiments.data.batches import Batches
from experiments.errors import CorpusError
from experiments.measurement import memory, phases, process, timing
from experiments.measurement.memory import PeakMemory, keep_freed_memory, resident_bytes, return_freed_memory, settle
from experiments.measurement.process import CellFailedError, all_turns, run_fresh, side_by_side, take_turns
from experiments.measurement.timing import MOST_REPEATS, WARM_UP, Samples, timed, timed_in_turns
from experiments.objectives import Objective
from experiments.spec import Measurement, Training
from models import checkpoint
from models.language_model import LanguageModel
from models.ops.attention import kept_tables, rotary_table
from models.ops.kernels.numba_form import rms_norm
from models.presets import preset

CPU = torch.device("cpu")
MB = 1 << 20


def noting(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the phases measure with, note when it is called."""

    class Peak(PeakMemory):
        def __enter__(self) -> PeakMemory:
            order.append("peak")
            return super().__enter__()

    def noted(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **keywords: order.append(name) or inner(*args, **keywords)

    monkeypatch.setattr(phases, "PeakMemory", Peak)
    for name, inner in (
        ("return_freed_memory", return_freed_memory), ("keep_freed_memory", keep_freed_memory),
        ("timed", timed), ("timed_in_turns", timed_in_turns),
    ):  # fmt: skip
        monkeypatch.setattr(phases, name, noted(name, inner))


def _add(send, a, b):
    send(("at", a))
    send(("at", b))
    return a + b, os.getpid()


def _first_kernel(send):
    """How much the collector passes over, and what numba has made ready before a kernel runs and after."""
    registries = vars(cpu_target.target_context)["_registries"]
    before = len(registries)
    rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)
    return gc.get_freeze_count(), before, len(registries)


def _raise(send, error):
    raise error


def _multiply(send):
    torch.nn.functional.linear(torch.zeros(2, 3), torch.zeros(4, 5))


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


def _leave_holes(send, allocator):
    """Sixteen blocks with a quarter of one after each; then, without them, sixteen that are half as large again."""
    if not allocator():
        return None
    torch.ones(MB)  # code and libraries
    settle()
    before = resident_bytes()
    with PeakMemory(CPU) as peak:
        first, small = [], []
        for _ in range(16):
            first.append(torch.ones(MB // 4))
            small.append(torch.ones(MB // 16))
        first.clear()
        second = [torch.ones(3 * MB // 2 // 4) for _ in range(16)]
    del second
    return peak.host_bytes - before


def _decoding(send, folder):
    tokens, settings = torch.arange(512)[None] % 64, Measurement(decode_tokens=8)
    return all_turns(phases.measure_decode(folder, settings, 512, tokens, CPU, times=False))


def test_a_cell_does_not_make_ready_what_its_server_has() -> None:
    frozen, before, after = run_fresh(_first_kernel)
    assert frozen > 100_000
    assert before == after > 0


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
    line = _raise.__code__.co_firstlineno + 1
    assert str(caught.value) == f"RuntimeError: first (test_measurement.py, line {line}, in _raise)"
    assert "Traceback" in caught.value.detail
    assert "_raise" in caught.value.detail


def test_an_error_that_torch_raises_names_the_line_of_ours_that_led_to_it() -> None:
    with pytest.raises(CellFailedError, match=r"\(test_measurement\.py, line \d+, in _multiply\)$"):
        run_fresh(_multiply)


def test_what_an_environment_in_the_project_holds_is_not_ours() -> None:
    root = Path(process.__file__).parents[2]
    assert process._is_ours(root / "models" / "mine.py")
    assert not process._is_ours(root / ".venv" / "lib" / "site-packages" / "torch" / "nn.py")
    assert not process._is_ours(Path("/usr/lib/python3/json.py"))


@pytest.mark.parametrize("error", [CorpusError("no text"), RuntimeError("no text"), MemoryError("no text")])
def test_whose_error_it_was_stands_before_it(error: Exception) -> None:
    error.add_note("arm 'x'")
    with pytest.raises(CellFailedError, match=r"^arm 'x': (RuntimeError: )?no text"):
        run_fresh(_raise, error)


def test_killed_and_silent_processes() -> None:
    with pytest.raises(CellFailedError, match=r"killed by SIGKILL \(out of memory\?\)"):
        run_fresh(_die)
    with pytest.raises(CellFailedError, match="ended with exit code 3 and no result"):
        run_fresh(_leave)


def test_a_peak_is_of_the_model_and_not_of_libraries_first_used(tmp_path: Path) -> None:
    """A window much shorter than the text runs what a shorter text does not."""
    model = LanguageModel(preset("sliding-tiny"), seed=0)
    checkpoint.save(model, tmp_path)
    found = run_fresh(_decoding, tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert weights + found["state_bytes"] < found["peak_bytes"] < weights + found["state_bytes"] + MB


def test_holes_count_only_where_freed_memory_is_kept() -> None:
    returned = run_fresh(_leave_holes, return_freed_memory)
    if returned is None:
        pytest.skip("not glibc's allocator")
    assert 28 * MB < returned < 32 * MB  # what lives at the end
    # a process may have room that takes the blocks without holes
    kept = max(run_fresh(_leave_holes, keep_freed_memory) for _ in range(4))
    assert 38 * MB < kept < 48 * MB


def test_a_cell_that_takes_too_long_is_stopped() -> None:
    begun = time.monotonic()
    with pytest.raises(CellFailedError, match=r"stopped after 0.5 s \(cell_timeout_s\)"):
        run_fresh(_sleep, timeout_s=0.5)
    assert time.monotonic() - begun < 20


def test_a_lack_of_memory_is_said_in_a_line() -> None:
    with pytest.raises(CellFailedError, match="out of memory: you tried to allocate") as caught:
        run_fresh(_ask_for_too_much)
    assert caught.value.detail == ""


def _turns(send, name, log, count, fails_at=None):
    for turn in range(count):
        with open(log, "a") as file:
            file.write(f"{name}{turn} ")
        if turn == fails_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield
    send(("last", name))
    return name, os.getpid()


def test_jobs_take_turns_and_swap_their_order(tmp_path) -> None:
    log, heard = tmp_path / "log", []
    jobs = {name: (_turns, (name, log, count)) for name, count in (("a", 3), ("b", 3), ("c", 1))}
    ended = list(take_turns(jobs, on_message=lambda key, message: heard.append((key, message))))
    # the first turns make ready; then each round runs in the order opposite to the one before
    assert log.read_text().split() == ["a0", "b0", "c0", "a1", "b1", "b2", "a2"]
    assert [key for key, _ in ended] == ["c", "a", "b"]
    assert all(result[0] == key for key, result in ended)
    assert len({result[1] for _, result in ended}) == 3
    assert heard == [(key, ("last", key)) for key in ("c", "a", "b")]


def test_a_job_that_dies_leaves_the_others_their_turns(tmp_path) -> None:
    log = tmp_path / "log"
    jobs = {"a": (_turns, ("a", log, 3)), "b": (_turns, ("b", log, 3, 1)), "c": (_raise, (CorpusError("no text"),))}
    ended = dict(take_turns(jobs))
    assert ended["a"][0] == "a"
    assert str(ended["b"]) == "the process was killed by SIGKILL (out of memory?)"
    assert str(ended["c"]) == "no text"
    assert log.read_text().split() == ["a0", "b0", "a1", "b1", "a2"]


def _slow_turns(send, seconds):
    while True:
        time.sleep(seconds)
        yield


def test_the_limit_of_time_is_for_a_jobs_own_turns() -> None:
    jobs = {"patient": (_turns, ("p", os.devnull, 4)), "slow": (_slow_turns, (0.3,))}
    ended = dict(take_turns(jobs, timeout_s=1.0))
    assert ended["patient"][0] == "p"
    assert "stopped after 1 s" in str(ended["slow"])


def test_a_job_by_itself_has_its_turns_in_a_row(tmp_path) -> None:
    assert run_fresh(_turns, "x", tmp_path / "log", 4)[0] == "x"


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


def test_each_sample_begins_and_ends_with_a_device_that_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(timing, "_synchronise", lambda device: order.append(f"wait for {device}"))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: order.append("clock") or len(order)))
    samples = timed(lambda: order.append("call"), repeats=2, seconds=0, device=CPU)
    assert order == ["call"] * WARM_UP + ["clock"] + ["wait for cpu", "clock", "call", "wait for cpu", "clock"] * 2
    assert samples.ms == [3000.0] * 2  # three entries after the first look at the clock


def test_percentiles_by_hand() -> None:
    """Of 21 values the 2nd, 11th and 20th."""
    samples = Samples([float(value) for value in reversed(range(21))])
    assert (samples.p5, samples.median, samples.p95) == (1.0, 10.0, 19.0)
    assert Samples([8.0, 1.0, 2.0, 3.0]).median == 2.5


def test_noisy() -> None:
    """Where the 95th percentile is more than one and a half medians."""
    assert Samples([1.0] * 18 + [9.0] * 2).noisy
    assert not Samples([1.0, 1.1, 1.2]).noisy
    assert not Samples([2.0] * 19 + [3.0] * 2).noisy
    assert Samples([2.0] * 19 + [3.01] * 2).noisy
    assert not Samples([2.0] * 20 + [9.0]).noisy


@pytest.mark.parametrize(
    ("ms", "asked_ms", "expected"),
    [
        ([10.0, 10.0, 10.0], [9.5, 9.9, 2.0], True),  # half a millisecond was left in the middle one
        ([10.0] * 3, [8.9] * 3, False),  # a tenth and more
        ([1000.0] * 3, [997.0] * 3, False),  # a full queue of a long operation
        ([1000.0] * 3, [999.0] * 3, True),
        ([10.0] * 3, [], False),  # a CPU is its own host
    ],
)
def test_a_gpu_that_had_nothing_left_to_do_waited_for_its_host(
    ms: list[float], asked_ms: list[float], expected: bool
) -> None:
    assert Samples(ms, asked_ms).host_bound is expected


def test_what_a_host_takes_to_ask_is_told_from_what_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation sleeps while it asks, and is done when the wait for the device is over."""
    gpu, queued = torch.device("cuda"), []
    wait = lambda device: queued and time.sleep(queued.pop())  # noqa: E731
    monkeypatch.setattr("experiments.measurement.timing._synchronise", wait)

    def told(asks: float, works: float) -> dict[str, Any]:
        def operation() -> None:
            time.sleep(asks)
            queued.append(works)

        return all_turns(timed_in_turns(operation, repeats=3, seconds=0, device=gpu))

    waiting, working = told(0.02, 0), told(0.002, 0.02)
    assert (waiting["host_bound"], working["host_bound"]) == (True, False)
    for one, asked, works in ((waiting, 20, 0), (working, 2, 20)):
        samples = one["samples"]
        assert len(samples["asked_ms"]) == len(samples["ms"]) == sum(one["turns"])
        assert all(asked <= a <= ms - works for a, ms in zip(samples["asked_ms"], samples["ms"], strict=True))
    of_a_cpu = all_turns(timed_in_turns(lambda: None, repeats=3, seconds=0, device=CPU))
    assert of_a_cpu["host_bound"] is False
    assert list(of_a_cpu["samples"]) == ["ms"]


def _together(send, names, log, fails):
    return side_by_side([_turns(send, name, log, count) if name != fails else _stumbles() for name, count in names])


def _stumbles():
    yield
    raise CorpusError("no text")


def test_cells_that_share_a_process_take_their_turns_within_its_turn(tmp_path) -> None:
    log = tmp_path / "log"
    jobs = {"ab": (_together, ([("a", 3), ("b", 2)], log, "")), "c": (_turns, ("c", log, 2))}
    ended = dict(take_turns(jobs))
    assert log.read_text().split() == ["a0", "b0", "c0", "b1", "a1", "c1", "a2"]
    (a, first), (b, second) = ended["ab"]
    assert (a, b) == ("a", "b")
    assert first == second != ended["c"][1]


def test_a_cell_that_fails_leaves_those_that_share_its_process_alone(tmp_path) -> None:
    jobs = {"abc": (_together, ([("a", 3), ("b", 9), ("c", 2)], tmp_path / "log", "b"))}
    ((_, (a, b, c)),) = take_turns(jobs)
    assert (a[0], c[0]) == ("a", "c")
    assert isinstance(b, CellFailedError)
    assert (str(b), b.detail) == ("no text", "")


@pytest.mark.parametrize("phase", ["load", "prefill", "decode"])
def test_peaks_are_of_calls_that_are_not_timed(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under an allocator that hands back what is freed; the timed ones come after, under one that keeps it."""
    order: list[str] = []

    noting(order, monkeypatch)
    checkpoint.save(LanguageModel(preset("mamba-tiny"), seed=0), tmp_path)
    tokens, once = torch.zeros(1, 9).long(), Measurement(repeats=1, seconds=0, decode_tokens=1)
    measure = {
        "load": lambda **how: phases.measure_load(tmp_path, once, CPU),
        "prefill": lambda **how: all_turns(phases.measure_prefill(tmp_path, once, 9, tokens, CPU, **how)),
        "decode": lambda **how: all_turns(phases.measure_decode(tmp_path, once, 9, tokens, CPU, **how)),
    }[phase]
    found = measure()
    timer = "timed" if phase == "load" else "timed_in_turns"
    assert order == ["return_freed_memory", "peak", "keep_freed_memory", timer]
    assert found["samples"]["ms"]
    if phase != "load":
        order.clear()
        assert "samples" not in measure(times=False)
        assert order == ["return_freed_memory", "peak"]


def test_the_peak_of_training_is_that_of_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one of another model, and the allocator is then left as timed cells want it."""
    order: list[str] = []
    noting(order, monkeypatch)

    def train(model: str, batches: Batches, settings: Training, rate: float, *_: Any) -> Iterator[None]:
        assert (settings.warmup_steps, settings.batch, rate) == (0, 3, 0.0)
        for step in range(settings.steps):
            order.append(f"step {step + 1} of {settings.steps} of {model}")
            yield

    monkeypatch.setattr(phases, "train", train)
    made = iter(("the first model", "the second model"))
    batches = Batches(np.arange(100), context=8, batch=3, seed=0)
    settings, objective = Training(steps=9, warmup_steps=4, batch=3), Objective("causal", 64)
    found = phases.measure_training(lambda: next(made), batches, settings, objective, CPU)  # type: ignore[arg-type]
    assert order == [
        "return_freed_memory", "step 1 of 2 of the first model", "step 1 of 2 of the second model", "peak",
        "step 2 of 2 of the second model", "keep_freed_memory",
    ]  # fmt: skip
    assert set(found) == {"peak_bytes", "memory_method"}


def test_a_measured_step_begins_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted of the step before it, where there are any: not of a weight that is not trained."""
    checkpoint.save(LanguageModel(preset("transformer-tiny"), seed=0), tmp_path)
    order: list[str] = []
    models: list[LanguageModel] = []
    noting(order, monkeypatch)
    load, inner = phases.load, phases.PeakMemory

    def loaded(folder: Path, device: torch.device, way: str) -> LanguageModel:
        models.append(load(folder, device, way))
        models[-1].norm.weight.requires_grad_(False)
        return models[-1]

    class Peak(inner):
        def __enter__(self) -> PeakMemory:
            order.append(f"{sum(p.grad is not None for p in models[-1].parameters())} gradients")
            return super().__enter__()

    monkeypatch.setattr(phases, "load", loaded)
    monkeypatch.setattr(phases, "PeakMemory", Peak)
    found = phases.measure_step(tmp_path, torch.zeros(1, 9).long(), CPU, "float32")
    assert order == ["return_freed_memory", "0 gradients", "peak"]
    assert found["weight_bytes"] == sum(p.nbytes for p in models[-1].parameters())
    assert found["gradient_bytes"] == found["weight_bytes"] - models[-1].norm.weight.nbytes


def test_every_load_is_of_the_way_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(LanguageModel(preset("mamba-tiny"), seed=0), tmp_path)
    load, ways = phases.load, []

    def noted(folder: Path, device: torch.device, way: str = "mapped") -> LanguageModel:
        ways.append(way)
        return load(folder, device, way)

    monkeypatch.setattr(phases, "load", noted)
    phases.measure_load(tmp_path, Measurement(repeats=3, seconds=0), CPU, "direct")
    assert ways == ["direct"] * (2 + WARM_UP + 3)  # a rehearsal, and the peak's


def test_a_gpus_peak_is_counted_from_the_beginning_of_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, order, most = torch.device("cuda"), [], [900]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: order.append("reset") or most.append(0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: order.append("read") or most[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1000)
    monkeypatch.setattr(memory.card, "held", lambda device: SimpleNamespace(bytes=2000, method="stand-in"))
    with PeakMemory(gpu) as peak:
        order.append("phase")
        most.append(most[-1] + 70)
    assert order == ["wait", "reset", "phase", "wait", "read"]
    assert peak.device_bytes == 70
    assert peak.on_card == {"reserved_peak_bytes": 1000, "process_bytes": 2000, "process_method": "stand-in"}


def test_a_peak_is_sampled_where_the_kernels_mark_cannot_be_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the resident set is what the stand-in says: twice some terabytes, then less."""
    sizes, sampled = [7 << 40, 9 << 40], threading.Event()

    class Process:
        def memory_info(self) -> SimpleNamespace:
            if not sizes:
                sampled.set()
            return SimpleNamespace(rss=sizes.pop(0) if sizes else 1)

    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1 << 20)
    monkeypatch.setattr(memory, "psutil", SimpleNamespace(Process=Process))
    with PeakMemory(CPU) as peak:
        assert sampled.wait(20)
    assert (peak.host_bytes, peak.method) == (9 << 40, "sampled every 1 ms")
    assert not any(thread is peak._sampler for thread in threading.enumerate())


def test_a_prompts_peak_counts_from_before_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights are what its process needs, too; after they are there a second baseline tells what reading adds."""
    order: list[str] = []
    load, baseline = phases.load, phases._baseline
    monkeypatch.setattr(phases, "load", lambda *given: order.append("load") or load(*given))
    monkeypatch.setattr(phases, "_baseline", lambda device: order.append("baseline") or baseline(device))
    checkpoint.save(LanguageModel(preset("mamba-tiny"), seed=0), tmp_path)
    settings, tokens = Measurement(repeats=1, seconds=0), torch.zeros(1, 8, dtype=torch.int64)
    all_turns(phases.measure_prefill(tmp_path, settings, 8, tokens, CPU, times=False))
    assert order == ["load", "baseline", "load", "baseline"]  # the first: a rehearsal


def test_what_a_rehearsal_keeps_is_given_back() -> None:
    """Tables of rotary angles are the model's: a peak without them would be too low."""
    phases._rehearse(lambda: rotary_table(64, 8, 1e4, CPU), CPU)
    assert kept_tables() == ()
