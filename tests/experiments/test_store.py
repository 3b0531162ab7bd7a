"""Rows, verdicts and hashes that follow from cells' files written by hand."""

import errno
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.cells import model_config
from experiments.errors import RunFailedError
from experiments.result import _few_steps, _over_seeds, _unmatched, build_result
from experiments.runner import run_hash
from experiments.spec import Experiment, load
from experiments.store import RunDirectory, write_json
from experiments.studies.comparison import UNCOUNTED, plan
from models import cost

VOCABULARY = 512
STEP_MS = [4.0, 5.0, 6.0, 7.0, 40.0]
PHASE_MS, PHASE_TURNS = [1.0, 2.0, 3.0, 4.0, 10.0], [2, 2, 1]  # medians of the turns: 1.5, 3.5, 10
FACTS = {"vocabulary": VOCABULARY, "baselines": {"unigram_bits_per_byte": 4.0, "lzma_bits_per_byte": 2.0, "bytes": 9}}
EXPERIMENT = load("compare", profile="smoke", assignments=["measurement.contexts=[8]", "measurement.batch=2"])
FALLBACK = "numba: not here"


def train_result(arm: str, seed: int) -> dict[str, Any]:
    bits = {"transformer": 3.0, "mamba": 2.9}[arm] + 0.01 * seed * (1 if arm == "mamba" else 2)
    quality = {
        "bits_per_byte": bits, "nats_per_token": 1.0, "token_perplexity": 2.0, "tokens": 99, "bytes": 50, "windows": 3,
        "loss_at_position": [1.0 + i for i in range(6)],
    }  # fmt: skip
    return {
        "arm": arm, "seed": seed, "initial": {"test_bits_per_byte": 5.0, "expected_loss": 6.2},
        "splits": {"validation": quality, "test": quality}, "samples": [],
        "gates": [{"name": "causality", "value": 0.0, "limit": 0.0, "passed": True}],
        "backend": {"name": "numba", "asked": "auto", "fallback": None}, "data_sha256": f"hash{seed}",
        "train": {"tokens": 1000, "tokens_per_step": 512, "step_ms": STEP_MS, "peak_bytes": 1000 + seed},
    }  # fmt: skip


def measured(kind: str, arm: str) -> dict[str, Any]:
    if kind == "load":
        return {
            "file_bytes": 10, "host_peak_bytes": 20, "device_peak_bytes": None, "resident_bytes": 30,
            "resident_bytes_analytic": 31, "samples": {"ms": PHASE_MS}, "noisy": False,
        }  # fmt: skip
    common = {"context": 8, "batch": 2, "backend": "numba", "peak_bytes": 40, "working_bytes": 5, "noisy": True}
    common |= {"samples": {"ms": PHASE_MS}, "turns": PHASE_TURNS}
    state = {"transformer": 100, "mamba": 50}[arm]
    decode = {"tokens_per_sample": 4, "state_bytes": state, "state_bytes_analytic": state}
    return common | (decode if kind == "decode" else {})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "20250101T000000Z-compare-0")
    backends = {arm: {"name": "numba", "fallback": None} for arm in EXPERIMENT.arms}
    environment = {"backends": backends, "created": "2025-01-01T00:00:00+00:00", "device": "cpu"}
    write_json(directory.path / "environment.json", environment)
    for cell in plan(EXPERIMENT):
        if cell.kind == "train":
            directory.finish(cell, train_result(cell.arm, cell.seed))
            config = model_config(EXPERIMENT.arms[cell.arm], VOCABULARY)
            write_json(directory.folder(cell) / "checkpoint" / "config.json", config.to_dict())
        else:
            directory.finish(cell, measured(cell.kind, cell.arm))
    return directory


def change(run: RunDirectory, arm: str, seed: int, edit) -> None:
    for cell in plan(EXPERIMENT):
        if (cell.arm, cell.seed, cell.kind) == (arm, seed, "train"):
            result = run.result(cell)
            assert result is not None
            edit(result)
            run.finish(cell, result)


def row(result: dict[str, Any], arm: str, seed: int | None, phase: str, metric: str) -> dict[str, Any]:
    wanted = (arm, seed, phase, metric)
    (found,) = [r for r in result["rows"] if (r["arm"], r["seed"], r["phase"], r["metric"]) == wanted]
    return found


def test_tokens_per_second_are_tokens_over_elapsed_time(run: RunDirectory) -> None:
    result = build_result(run, EXPERIMENT, FACTS)
    assert row(result, "mamba", 0, "train", "tokens_per_s")["value"] == pytest.approx(512 / 6e-3)
    assert row(result, "mamba", 0, "prefill", "tokens_per_s")["value"] == pytest.approx(2 * 8 / 3.5e-3)
    assert row(result, "mamba", 0, "decode", "tokens_per_s")["value"] == pytest.approx(2 * 4 / 3.5e-3)
    assert row(result, "mamba", 0, "prefill", "time_to_first_token_ms")["value"] == pytest.approx(3.5)
    assert row(result, "mamba", 0, "decode", "ms_per_token")["value"] == pytest.approx(3.5 / 4)


def test_percentiles_of_a_rate_change_places(run: RunDirectory) -> None:
    result = build_result(run, EXPERIMENT, FACTS)
    fast, slow = np.percentile(STEP_MS, [5, 95])
    times, rate = (row(result, "mamba", 0, "train", metric) for metric in ("step_ms", "tokens_per_s"))
    assert (times["p5"], times["p95"], times["n"]) == (pytest.approx(fast), pytest.approx(slow), 5)
    assert (rate["p5"], rate["p95"]) == (pytest.approx(512e3 / slow), pytest.approx(512e3 / fast))
    assert rate["p5"] < rate["value"] < rate["p95"]


def test_rows_over_seeds(run: RunDirectory) -> None:
    result = build_result(run, EXPERIMENT, FACTS)
    one = row(result, "transformer", None, "quality", "test_bits_per_byte")
    assert (one["value"], one["n"]) == (pytest.approx(3.01), 2)
    # t(0.975, 1) = 12.7062, s / sqrt 2 = 0.01
    assert (one["ci_low"], one["ci_high"]) == (pytest.approx(3.01 - 0.127062), pytest.approx(3.01 + 0.127062))
    seeded = row(result, "transformer", 0, "quality", "test_bits_per_byte")
    assert (seeded["ci_low"], seeded["p5"], seeded["n"]) == (None, None, 99)
    positions = [
        (r["context"], r["value"]) for r in result["rows"]
        if (r["arm"], r["seed"], r["metric"]) == ("mamba", 0, "test_loss_at_position")
    ]  # fmt: skip
    assert positions == [(1, 1.0), (2, 2.0), (4, 4.0), (6, 6.0)]


@pytest.mark.parametrize("what", ["arm", "phase", "metric", "context", "batch", "mode", "dtype"])
def test_a_row_over_seeds_is_of_seeds_that_differ_in_nothing_else(run: RunDirectory, what: str) -> None:
    one = row(build_result(run, EXPERIMENT, FACTS), "mamba", 0, "decode", "state_bytes")
    made = [one | {what: other, "seed": seed, "value": value + seed}
            for other, value in ((8, 10), (16, 20)) for seed in (0, 1)]  # fmt: skip
    assert [(mean[what], mean["value"], mean["n"]) for mean in _over_seeds(made)] == [(8, 10.5, 2), (16, 20.5, 2)]


def test_verdicts(run: RunDirectory) -> None:
    verdicts = {v["id"]: v for v in build_result(run, EXPERIMENT, FACTS)["verdicts"]}
    quality = verdicts["quality"]
    assert (quality["a"], quality["b"], quality["kind"], quality["n"]) == ("transformer", "mamba", "difference", 2)
    assert quality["estimate"] == pytest.approx(-0.105)
    state = verdicts["decode-state_bytes"]
    assert (state["estimate"], state["resolved"], state["better"]) == (pytest.approx(0.5), True, "mamba")
    assert state["sentence"].endswith(": mamba is better here.")
    assert verdicts["train"]["better"] is None  # equal at every seed
    json.dumps(verdicts, allow_nan=False)


def test_different_tokens_compare_to_nothing(run: RunDirectory) -> None:
    change(run, "mamba", 1, lambda result: result.update(data_sha256="other"))
    with pytest.raises(RunFailedError, match="the arms of seed 1 were trained on different tokens"):
        build_result(run, EXPERIMENT, FACTS)


@pytest.mark.parametrize(("state_bytes", "end"), [(94, "better here."), (96, "better here, by less than 5%.")])
def test_a_resolved_but_slight_difference_says_so(run: RunDirectory, state_bytes: int, end: str) -> None:
    for cell in plan(EXPERIMENT):
        if (cell.arm, cell.kind) == ("mamba", "decode"):
            run.finish(cell, measured("decode", "mamba") | {"state_bytes": state_bytes})
    verdicts = {v["id"]: v for v in build_result(run, EXPERIMENT, FACTS)["verdicts"]}
    assert verdicts["decode-state_bytes"]["sentence"].endswith(f": mamba is {end}")


def test_memory_read_in_pages_is_not_exact(run: RunDirectory) -> None:
    """The run's cells read the same for both seeds."""
    verdicts = {v["id"]: v for v in build_result(run, EXPERIMENT, FACTS)["verdicts"]}
    assert verdicts["decode-state_bytes"]["exact"]
    for one in ("load", "decode-peak_bytes"):
        assert not verdicts[one]["exact"]
        assert verdicts[one]["p"] is not None


def test_sampled_memory_of_training_is_warned_of(run: RunDirectory):
    """A run that measures nothing else has it from there alone."""
    change(run, "mamba", 1, lambda result: result["train"].update(memory_method="sampled every 1 ms"))
    (told,) = [one for one in build_result(run, EXPERIMENT, FACTS)["warnings"] if "memory of processes" in one]
    assert "was sampled every 1 ms" in told


def test_arms_of_several_sizes_and_a_short_test_text_are_told(run: RunDirectory) -> None:
    short = "the test text has only 9 bytes: its bits per byte say little of other text"
    *others, last = build_result(run, EXPERIMENT, FACTS)["warnings"]
    assert last == short
    long = FACTS | {"baselines": FACTS["baselines"] | {"bytes": 10_000}}
    assert build_result(run, EXPERIMENT, long)["warnings"] == others
    deep = EXPERIMENT.arms["mamba"].model_copy(update={"overrides": {"layers": 8}})
    deeper = EXPERIMENT.model_copy(update={"arms": EXPERIMENT.arms | {"mamba": deep}})
    (told,) = build_result(run, deeper, long)["warnings"][len(others) :]
    sizes = [cost.parameters(model_config(arm, EXPERIMENT.data.vocabulary)).active for arm in deeper.arms.values()]
    assert told.startswith(f"the arms are not of one size: mamba has {sizes[1] / sizes[0]:.3g} times transformer's")


@pytest.mark.parametrize(("active", "told"), [((1000, 1020), 0), ((1020, 1000), 0), ((1000, 1021), 1)])
def test_two_per_cent_more_parameters_are_another_size(
    active: tuple[int, int], told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = iter(SimpleNamespace(active=one) for one in active)
    monkeypatch.setattr(cost, "parameters", lambda config: next(counted))
    assert len(_unmatched(EXPERIMENT)) == told


def test_a_row_over_seeds_is_cut_off_at_nought(run: RunDirectory) -> None:
    change(run, "mamba", 0, lambda result: result["train"].update(step_ms=[1.0]))
    change(run, "mamba", 1, lambda result: result["train"].update(step_ms=[100.0]))
    (found,) = (
        one for one in build_result(run, EXPERIMENT, FACTS)["rows"]
        if (one["arm"], one["phase"], one["metric"], one["seed"]) == ("mamba", "train", "tokens_per_s", None)
    )  # fmt: skip
    assert found["ci_low"] == 0 < found["value"] < found["ci_high"]


def test_a_failed_gate_taints_every_number_of_its_arm_and_seed(run: RunDirectory) -> None:
    gate = {"name": "causality", "value": 0.5, "limit": 0.0, "passed": False}
    change(run, "mamba", 1, lambda result: result.update(gates=[gate]))
    result = build_result(run, EXPERIMENT, FACTS)
    for one in result["rows"]:
        tainted = one["arm"] == "mamba" and one["seed"] in (1, None)
        assert one["comparable"] is not tainted
        if tainted and one["metric"] != "device_peak_bytes":
            assert one["reason"] == "failed before timing: causality"
    assert any("gate 'causality' failed" in warning for warning in result["warnings"])
    for verdict in result["verdicts"]:
        assert (verdict["comparable"], verdict["resolved"], verdict["better"]) == (False, False, None)
        assert verdict["sentence"].startswith("transformer and mamba do not compare in ")
        assert " (mamba: failed before timing: causality). For the record: " in verdict["sentence"]


def test_a_fallback_taints_speed_and_memory_but_not_quality(run: RunDirectory) -> None:
    for seed in EXPERIMENT.seeds:
        change(run, "mamba", seed, lambda result: result["backend"].update(name="torch", fallback=FALLBACK))
    environment = run.environment()
    environment["backends"]["mamba"] = {"name": "torch", "fallback": FALLBACK}
    write_json(run.path / "environment.json", environment)
    result = build_result(run, EXPERIMENT, FACTS)
    for one in result["rows"]:
        if one["arm"] == "transformer" or one["phase"] == "quality":
            assert one["comparable"], one
    for phase, metric in [
        ("train", "tokens_per_s"), ("train", "peak_bytes"), ("prefill", "tokens_per_s"), ("prefill", "peak_bytes"),
        ("decode", "ms_per_token"), ("decode", "working_bytes"), ("load", "host_peak_bytes"),
    ]:  # fmt: skip
        for seed in (0, 1, None):
            one = row(result, "mamba", seed, phase, metric)
            assert (one["comparable"], one["reason"]) == (False, f"runs a fallback form ({FALLBACK})")
    for phase, metric in (("train", "flops_per_token"), ("load", "file_bytes"), ("decode", "state_bytes")):
        assert row(result, "mamba", None, phase, metric)["comparable"]  # of whichever form
    comparable = {v["id"]: v["comparable"] for v in result["verdicts"]}
    assert comparable["quality"]
    assert not comparable["train"]
    assert any(FALLBACK in warning for warning in result["warnings"])


def test_what_a_recording_works_in_is_not_said_to_be_nothing(run: RunDirectory) -> None:
    for cell in plan(EXPERIMENT):
        if (cell.arm, cell.kind) == ("mamba", "decode"):
            run.finish(cell, measured("decode", "mamba") | {"working_bytes": None})
    result = build_result(run, EXPERIMENT, FACTS)
    for arm, value in (("transformer", 5), ("mamba", None)):
        for seed in (0, 1, None):
            one = row(result, arm, seed, "decode", "working_bytes")
            assert (one["value"], one["comparable"]) == (value, True)
            assert one["reason"] == (UNCOUNTED if value is None else None)


@pytest.mark.parametrize("checked", [None, "failed", "passed"])
def test_on_a_gpu_no_number_of_unchecked_kernels_compares(run: RunDirectory, checked: str | None) -> None:
    """mamba runs the CUDA kernels, which were not checked, or failed, or passed; attention has a library of its own."""
    for arm, form in (("mamba", "cuda"), ("transformer", "sdpa")):
        for seed in EXPERIMENT.seeds:
            change(run, arm, seed, lambda result, form=form: result["backend"].update(name=form))
    rows = [
        {"form": "cuda", "kernel": kernel, "operation": "convolution", "dtype": "bfloat16", "shape": "one token",
         "problem": "y is off by 2" if (kernel, checked) == ("causal_conv1d", "failed") else None}
        for kernel in ("selective_scan", "causal_conv1d")
    ]  # fmt: skip
    kernels = None if checked is None else {"checked": "2030", "problem": None, "absent": {}, "rows": rows}
    write_json(run.path / "environment.json", run.environment() | {"device": "cuda", "kernels": kernels})
    result = build_result(run, EXPERIMENT, FACTS)
    reason = {
        None: "its kernels were not checked on this GPU",
        "failed": "its kernels failed their check on this GPU (cuda: convolution, bfloat16, one token: y is off by 2)",
        "passed": None,
    }[checked]
    for one in result["rows"]:
        doubted = reason is not None and one["arm"] == "mamba"
        assert one["comparable"] is not doubted
        if doubted and one["metric"] != "device_peak_bytes":
            assert one["reason"] == reason
    assert [f"mamba: no number of it is comparable, {reason}"] * (reason is not None) == [
        warning for warning in result["warnings"] if "no number" in warning
    ]
    assert {verdict["comparable"] for verdict in result["verdicts"]} == {reason is None}


def test_missing_and_failed_cells(run: RunDirectory) -> None:
    cells = {cell.name: cell for cell in plan(EXPERIMENT)}
    run.result_file(cells["mamba/seed1/decode-8"]).unlink()
    run.result_file(cells["mamba/seed0/prefill-8"]).unlink()
    run.fail(cells["mamba/seed0/prefill-8"], "it broke", "")
    result = build_result(run, EXPERIMENT, FACTS)
    assert result["status"] == "partial"
    assert result["missing"] == ["mamba/seed1/decode-8"]
    assert result["failures"] == [{"cell": "mamba/seed0/prefill-8", "message": "it broke"}]
    run.finish(cells["mamba/seed0/prefill-8"], measured("prefill", "mamba"))
    run.finish(cells["mamba/seed1/decode-8"], measured("decode", "mamba"))
    assert build_result(run, EXPERIMENT, FACTS)["status"] == "complete"


def test_arms_change_places_from_seed_to_seed() -> None:
    order = [(cell.arm, cell.seed) for cell in plan(EXPERIMENT) if cell.kind == "train"]
    assert order == [("transformer", 0), ("mamba", 0), ("mamba", 1), ("transformer", 1)]
    assert len(plan(EXPERIMENT)) == len(set(plan(EXPERIMENT))) == 4 + 4 * 3


def test_what_is_written_is_for_whom_the_umask_says(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written.json"
    plain.touch()
    write_json(written, {})
    assert written.stat().st_mode == plain.stat().st_mode


def test_a_run_ends_with_its_last_cell(run: RunDirectory) -> None:
    assert run.last_cell_at() is None
    run.event("progress", "started")
    assert run.last_cell_at() is None
    run.event("progress", "finished", "mamba/seed0/train")
    first = run.last_cell_at()
    time.sleep(0.002)  # events have milliseconds
    run.event("progress", "finished", "mamba/seed1/train")
    ended = run.last_cell_at()
    assert first is not None
    assert ended is not None
    assert ended > first
    run.event("progress", "looked at again")
    with (run.path / "events.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"time": "cut')
    assert run.last_cell_at() == ended
    assert build_result(run, EXPERIMENT, FACTS)["finished"] == ended


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"x": float("nan")})
    assert json.loads(file.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, whole = tmp_path / "a.json", Path.write_text
    write_json(file, {"x": 1})

    def some(path: Path, text: str, **how: Any) -> int:
        whole(path, text[:3], **how)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", some)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [file]


def _leaves(table: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, value in table.items():
        inner = isinstance(value, dict) and value
        found += _leaves(value, (*path, key)) if inner else [((*path, key), value)]
    return found


def _other(path: tuple[str, ...], value: Any) -> Any:
    special = {
        "splits": ["validation"], "precision": "bfloat16", "device": "cuda", "contexts": [3, 5], "seeds": [7],
        "learning_rates": [0.5], "overrides": {"layers": 3}, "validation_fraction": 0.3, "test_fraction": 0.3,
        "objective": "masked", "start": "weights", "train_contexts": [7], "batches": [2, 3], "dtype": "bfloat16",
        "operator_contexts": [7], "dtypes": ["bfloat16"], "modes": ["graph"], "decode_mode": "graph",
    }  # fmt: skip
    if path[-1] in special:
        return special[path[-1]]
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + 1 if isinstance(value, int) else value * 0.5


EXPERIMENTS = {"comparison": EXPERIMENT} | {name: load(name, profile="smoke") for name in ("memory", "speed")}
FIELDS = [
    (study, path) for study, one in EXPERIMENTS.items() for path, _ in _leaves(one.resolved()) if path != ("study",)
]


@pytest.mark.parametrize(("study", "path"), FIELDS, ids=lambda part: part if isinstance(part, str) else ".".join(part))
def test_every_field_is_in_the_hash_of_a_run(study: str, path: tuple[str, ...]) -> None:
    base = EXPERIMENTS[study]
    if path[-1] == "start":  # weights need their tokenizer
        base = base.model_copy(update={"data": base.data.model_copy(update={"tokenizer": "x"})})
    changed = base.resolved()
    table = changed
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = _other(path, table[path[-1]])
    dataset: Any = SimpleNamespace(facts={"files": {"train.bin": "0"}})
    other_data: Any = SimpleNamespace(facts={"files": {"train.bin": "1"}})
    hashes = {run_hash(base, dataset), run_hash(Experiment.model_validate(changed), dataset)}
    assert len(hashes) == 2
    assert run_hash(base, dataset) == run_hash(base, dataset)
    assert run_hash(base, other_data) not in hashes


def test_what_the_process_holds_on_a_card_is_a_row_of_every_phase_on_a_gpu_only(run: RunDirectory) -> None:
    metrics = ("reserved_peak_bytes", "process_bytes")
    assert not any(one["metric"] in metrics for one in build_result(run, EXPERIMENT, FACTS)["rows"])
    for cell in plan(EXPERIMENT):
        found = run.result(cell)
        assert found is not None
        known = cell.kind != "load"
        held = {"reserved_peak_bytes": 70 + cell.seed, "process_bytes": 90 + cell.seed if known else None}
        held |= {"process_method": "listed" if known else "not listed"}
        (found["train"] if cell.kind == "train" else found).update(held)
        run.finish(cell, found)
    result = build_result(run, EXPERIMENT, FACTS)
    for phase in ("train", "load", "prefill", "decode"):
        reserved, process = (row(result, "mamba", None, phase, metric) for metric in metrics)
        assert (reserved["value"], reserved["unit"], reserved["direction"]) == (70.5, "bytes", "lower")
        assert (process["value"], process["n"]) == ((None, 0) if phase == "load" else (90.5, 2))
        assert process["reason"] == ("not listed" if phase == "load" else None)
        assert process["context"] == row(result, "mamba", None, phase, "load_ms" if phase == "load" else "peak_bytes")[
            "context"]  # fmt: skip


def test_no_interval_reaches_beyond_what_a_quantity_can_be(run: RunDirectory) -> None:
    def over_seeds(metric: str, unit: str, values: tuple[float, float]) -> dict[str, Any]:
        shared = {"arm": "a", "phase": "quality", "metric": metric, "unit": unit, "context": None, "batch": None,
                  "mode": None, "dtype": None, "comparable": True, "reason": None}  # fmt: skip
        (one,) = _over_seeds([shared | {"seed": seed, "value": value} for seed, value in enumerate(values)])
        return one

    accuracy = over_seeds("test_masked_accuracy", "share", (0.91, 0.95))
    assert (accuracy["value"], accuracy["ci_high"]) == (pytest.approx(0.93), 1.0)
    assert accuracy["ci_low"] == pytest.approx(0.93 - 12.706 * 0.02, rel=1e-3)
    perplexity = over_seeds("test_token_perplexity", "perplexity", (1.2, 1.4))
    assert (perplexity["ci_low"], perplexity["ci_high"]) == (1.0, pytest.approx(1.3 + 12.706 * 0.1, rel=1e-3))
    loss = over_seeds("test_loss_at_position", "nats/token", (0.1, 0.5))
    assert (loss["ci_low"], loss["ci_high"] > 1) == (0.0, True)


@pytest.mark.parametrize(("steps", "said"), [(5, True), (6, False)])
def test_a_training_of_few_steps_says_that_its_times_are_of_the_first(steps: int, said: bool) -> None:
    few = EXPERIMENT.model_copy(update={"training": EXPERIMENT.training.model_copy(update={"steps": steps})})
    assert bool(_few_steps(few)) == said
