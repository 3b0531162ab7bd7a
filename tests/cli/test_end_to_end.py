"""From the command to the record: everything that a finished run promises is there, and the numbers agree."""

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Finished, InProcess, Lab

from cli.main import print_speeds
from experiments.printable import clean
from models import cost
from models.config import ModelConfig

ARMS, SEEDS, CONTEXTS = ("transformer", "mamba"), (0, 1), (32, 64, 128)
QUALITY = {
    "initial_test_bits_per_byte", "test_bits_per_byte", "validation_bits_per_byte", "test_token_perplexity",
    "test_loss_at_position",
}  # fmt: skip
TRAIN = {"tokens_per_s", "step_ms", "peak_bytes", "flops_per_token"}
LOAD = {"file_bytes", "host_peak_bytes", "device_peak_bytes", "resident_bytes", "resident_bytes_analytic", "load_ms"}
PREFILL = {"tokens_per_s", "time_to_first_token_ms", "peak_bytes", "working_bytes"}
DECODE = {"tokens_per_s", "ms_per_token", "peak_bytes", "working_bytes", "state_bytes", "state_bytes_analytic"}


@pytest.fixture(scope="module")
def result(smoke: Finished) -> dict[str, Any]:
    assert smoke.process.returncode == 0, smoke.process.stderr
    return json.loads((smoke.directory / "result.json").read_text(encoding="utf-8"))


def rows(result: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]


def value(result: dict[str, Any], **wanted: Any) -> float:
    (row,) = rows(result, **wanted)
    return row["value"]


def test_json_is_all_that_stdout_holds(smoke: Finished, result: dict[str, Any]) -> None:
    assert json.loads(smoke.process.stdout) == result
    assert "Traceback" not in smoke.process.stderr


def test_complete(result: dict[str, Any]) -> None:
    assert (result["status"], result["missing"], result["failures"]) == ("complete", [], [])
    assert list(result["arms"]) == list(ARMS)


@pytest.mark.parametrize("seed", [*SEEDS, None])
@pytest.mark.parametrize("arm", ARMS)
def test_every_metric_of_every_arm_and_seed(result: dict[str, Any], arm: str, seed: int | None) -> None:
    one = {"arm": arm, "seed": seed}
    for phase, metrics in {"quality": QUALITY, "train": TRAIN, "load": LOAD}.items():
        assert {row["metric"] for row in rows(result, phase=phase, **one)} == metrics
    for context in CONTEXTS:
        for phase, metrics in {"prefill": PREFILL, "decode": DECODE}.items():
            assert {row["metric"] for row in rows(result, phase=phase, context=context, **one)} == metrics
    for row in rows(result, **one):
        if row["metric"] == "device_peak_bytes":
            assert row["value"] is None
            assert row["reason"]
        elif row["metric"] == "working_bytes":  # a phase may fit into memory that loading left free
            assert row["value"] >= 0
        else:
            assert row["value"] > 0, row


def test_rows_over_seeds_are_means(result: dict[str, Any]) -> None:
    for row in rows(result, seed=None):
        same = {key: row[key] for key in ("arm", "phase", "metric", "context")}
        values = [value(result, seed=seed, **same) for seed in SEEDS]
        if values[0] is not None:
            assert row["value"] == pytest.approx(sum(values) / len(values), rel=1e-12)
            assert row["n"] == len(SEEDS)
            assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_arms_consumed_the_same_tokens(result: dict[str, Any]) -> None:
    first, second = (result["arms"][arm]["data_sha256"] for arm in ARMS)
    assert first == second
    assert set(first) == {"0", "1"}
    assert first["0"] != first["1"]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("arm", ARMS)
def test_state_is_as_large_as_the_formula_says(result: dict[str, Any], arm: str, context: int) -> None:
    one = {"arm": arm, "seed": 0, "phase": "decode", "context": context}
    assert value(result, metric="state_bytes", **one) == value(result, metric="state_bytes_analytic", **one)


def test_a_cache_grows_with_context_and_a_recurrent_state_does_not(result: dict[str, Any]) -> None:
    sizes = {
        arm: {value(result, arm=arm, seed=0, metric="state_bytes", context=context) for context in CONTEXTS}
        for arm in ARMS
    }
    assert len(sizes["transformer"]) == len(CONTEXTS)
    assert len(sizes["mamba"]) == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_learns(result: dict[str, Any], arm: str, seed: int) -> None:
    before, after = (
        value(result, arm=arm, seed=seed, metric=metric)
        for metric in ("initial_test_bits_per_byte", "test_bits_per_byte")
    )
    assert after < 0.95 * before


def test_training_speed_is_tokens_over_time(result: dict[str, Any]) -> None:
    for arm in ARMS:
        one = {"arm": arm, "seed": 0, "phase": "train"}
        expected = 8 * 64 / (value(result, metric="step_ms", **one) / 1e3)
        assert value(result, metric="tokens_per_s", **one) == pytest.approx(expected, rel=1e-9)


def test_verdicts_cover_quality_speed_and_memory(result: dict[str, Any]) -> None:
    assert {(v["phase"], v["metric"]) for v in result["verdicts"]} == {
        ("quality", "test_bits_per_byte"), ("train", "tokens_per_s"), ("prefill", "tokens_per_s"),
        ("decode", "tokens_per_s"), ("load", "resident_bytes"), ("decode", "peak_bytes"), ("decode", "state_bytes"),
    }  # fmt: skip
    assert all(v["sentence"].endswith(".") for v in result["verdicts"])


def test_files_of_the_run(smoke: Finished, result: dict[str, Any]) -> None:
    for name in ("spec.toml", "environment.json", "events.jsonl", "tokenizer.json", "report.html", "report.md"):
        assert (smoke.directory / name).stat().st_size > 0
    steps = (smoke.directory / "cells/mamba/seed0/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [line["step"] for line in map(json.loads, steps) if "loss" in line] == list(range(1, 41))


def test_report_formats(in_process: InProcess, smoke: Finished, result: dict[str, Any]) -> None:
    shown = {}
    for name in ("table", "md", "html", "csv", "json"):
        code, shown[name], _ = in_process("report", "--out", smoke.out, "--format", name)
        assert code == 0
    assert json.loads(shown["json"]) == result
    assert len(list(csv.DictReader(io.StringIO(shown["csv"])))) == len(result["rows"])
    for name in ("html", "md"):
        assert shown[name].rstrip() == (smoke.directory / f"report.{name}").read_text(encoding="utf-8").rstrip()
    assert all(arm in shown["table"] for arm in ARMS)


def test_runs(in_process: InProcess, smoke: Finished, result: dict[str, Any]) -> None:
    expected = {"run": result["run_id"], "status": "complete", "profile": "smoke", "arms": list(ARMS), "problem": None}
    assert json.loads(in_process("runs", "--out", smoke.out, "--json")[1]) == [expected]
    assert in_process("runs", "--out", smoke.out)[1].splitlines()[1].split()[:2] == [result["run_id"], "complete"]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generate_repeats(in_process: InProcess, smoke: Finished, result: dict[str, Any], temperature: float) -> None:
    def texts(*more: object) -> dict[str, str]:
        arguments = ("generate", "latest", "import ", "--out", smoke.out, "--tokens", 12, "--temperature", temperature)
        code, stdout, stderr = in_process(*arguments, "--json", *more)
        assert code == 0, stderr
        return {one["arm"]: one["text"] for one in json.loads(stdout)}

    first = texts()
    assert list(first) == list(ARMS)
    assert all(first.values())
    assert texts() == first
    if temperature:  # without, nothing is drawn, and a seed is refused
        assert texts("--seed", 0) == first
        assert texts("--seed", 1) != first
    assert texts("--arms", "mamba") == {"mamba": first["mamba"]}
    assert list(texts("--arms", "mamba, transformer")) == ["mamba", "transformer"]


def test_generate_prints_text_and_then_how_fast(in_process: InProcess, smoke: Finished, result: dict[str, Any]) -> None:
    arguments = ("generate", "latest", "import ", "--out", smoke.out, "--tokens", 12)
    made = json.loads(in_process(*arguments, "--json")[1])
    code, stdout, stderr = in_process(*arguments)
    assert code == 0
    assert stdout == "".join(f"[{one['arm']}] import {clean(one['text'])}\n" for one in made)
    heading, *lines = stderr.splitlines()
    assert heading.split() == ["arm", "prompt", "prefill", "new", "decode", "state"]
    for line, one in zip(lines, made, strict=True):
        words = line.split()
        assert words[0] == one["arm"]
        assert words[-2:] == [f"{one['state_bytes']:,}", "bytes"]
        assert words[1] == str(one["prompt_tokens"])
        assert words[4] == str(len(one["token_ids"])) == "12"


def test_generate_shows_probabilities(in_process: InProcess, smoke: Finished, result: dict[str, Any]) -> None:
    arguments = ("generate", "latest", "import ", "--out", smoke.out, "--tokens", 5, "--arms", "mamba")
    for rule, said in (
        (("--temperature", 0), "greedy: "),
        (("--temperature", 2, "--top-k", 3), "temperature 2, top-k 3;"),
    ):
        (made,) = json.loads(in_process(*arguments, *rule, "--show-probabilities", "--json")[1])
        assert "choices" not in json.loads(in_process(*arguments, *rule, "--json")[1])[0]
        assert said in made["sampling"]
        stdout = in_process(*arguments, *rule, "--show-probabilities")[1]
        assert f"\n{made['sampling']}\n" in stdout
        shown = stdout.splitlines()[-6:-1]
        for line, choice, token in zip(shown, made["choices"], made["token_ids"], strict=True):
            assert choice["chosen"]["token"] == token
            assert line.split()[:2] == [choice["chosen"]["text"], f"{choice['chosen']['probability']:.3f}"]
            assert line.endswith(f"{choice['others'][-1]['text']} {choice['others'][-1]['probability']:.3f}")
            if said != "greedy: ":
                assert len(choice["others"]) == 2  # what top-k left


def test_models(in_process: InProcess) -> None:
    by_name = {one["model"]: one for one in json.loads(in_process("models", "--json")[1])}
    for size in ("tiny", "1m", "30m"):
        ratio = by_name[f"mamba-{size}"]["non_embedding"] / by_name[f"transformer-{size}"]["non_embedding"]
        assert ratio == pytest.approx(1, abs=0.01)


def test_columns_of_speeds_stay_apart(capsys: pytest.CaptureFixture[str]) -> None:
    one = SimpleNamespace(
        arm="an-arm-of-a-very-long-name", prompt_tokens=12_001, prefill_tokens_per_s=163_000.0, token_ids=[1] * 1000,
        decode_tokens_per_s=1_000_000.0, state_bytes=123_456_789_012,
    )  # fmt: skip
    print_speeds([one])
    heading, line = capsys.readouterr().err.splitlines()
    assert len(heading) == len(line)
    cells = [one.arm, "12,001", "163,000 tokens/s", "1,000", "1,000,000 tokens/s", "123,456,789,012 bytes"]
    assert re.split("  +", line) == cells


def test_doctor(in_process: InProcess) -> None:
    code, stdout, stderr = in_process("doctor", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    forms = {(one["form"], one["device"]): one["problem"] for one in found["forms"]}
    assert forms["reference", "cpu"] is None
    assert forms["torch", "cpu"] is None
    assert forms["numba", "cpu"] is None
    assert "CUDA" in forms["cuda", "cpu"]
    checked = {row["operation"] for row in found["checks"]}
    assert {"selective scan", "convolution, decode", "ssd", "trapezoid"} <= checked


def test_the_kept_specification_repeats_the_run_bit_for_bit(
    in_process: InProcess, lab: Lab, small: list[str], tmp_path: Path
) -> None:
    """In another process, whose hashes of strings are others."""
    arguments = ("--set", "measurement.enabled=false", "--seeds", 1, "--out", tmp_path / "first", "--json")
    code, first, stderr = in_process("run", *small, *arguments)
    assert code == 0, stderr
    (spec,) = (tmp_path / "first").glob("*/spec.toml")
    process = lab("run", spec, "--out", tmp_path / "second", "--json")
    assert process.returncode == 0, process.stderr
    quality = [
        [{**row, "reason": None} for row in rows(json.loads(stdout), phase="quality")]
        for stdout in (first, process.stdout)
    ]
    assert len(quality[0]) > 20
    assert quality[0] == quality[1]


def test_a_model_measured_in_bfloat16(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    """Trained in float32; file, weights and state of what is measured are of the other type."""
    settings = ("measurement.dtype=bfloat16", "measurement.contexts=[16, 32]", "measurement.decode_tokens=4")
    assignments = [word for one in settings for word in ("--set", one)]
    arms = ("--arms", ",".join(ARMS), "--seeds", 1)
    code, stdout, stderr = in_process("run", *small, *assignments, *arms, "--out", tmp_path, "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    assert {(row["phase"], row["dtype"]) for row in result["rows"] if row["phase"] != "quality"} == {
        ("train", "float32"), ("load", "bfloat16"), ("prefill", "bfloat16"), ("decode", "bfloat16")
    }  # fmt: skip
    for arm in ARMS:
        config = ModelConfig.from_dict(result["arms"][arm]["config"])
        found = {
            (row["metric"], row["context"]): row["value"] for row in result["rows"]
            if (row["arm"], row["seed"]) == (arm, 0) and row["phase"] in ("load", "decode")
        }  # fmt: skip
        weights = cost.weight_bytes(config, 2)
        assert found["resident_bytes_analytic", None] == weights
        assert weights < found["file_bytes", None] < weights + 10_000  # and its header, and the configuration
        for context in (16, 32):
            expected = cost.state_bytes(config, 1, context + 4, 2)
            assert found["state_bytes", context] == found["state_bytes_analytic", context] == expected
    report = (next(tmp_path.iterdir()) / "report.md").read_text(encoding="utf-8")
    assert "Precision of every arm: float32 (train), bfloat16 (prefill), bfloat16 (decode)." in report
