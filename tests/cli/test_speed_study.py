"""The speed study from the command to its report, on small models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import InProcess, assigned, legend_names, value, with_a_stand_in

from experiments.numbers import DASH
from experiments.report import content
from experiments.report import speed as speed_report
from experiments.report.document import Table, Verdict
from experiments.report.record import read
from experiments.result import build_result
from experiments.store import Cell, RunDirectory, sealed, write_json
from experiments.studies.speed import plan
from models import cost
from models.config import ModelConfig

ARMS, CONTEXTS = ("transformer", "mamba"), (8, 32)
BYTES = {"float32": 4, "bfloat16": 2}
SETTINGS = (
    "data.corpus=text", "data.vocabulary=300", "data.test_fraction=0.1", "data.validation_fraction=0.1",
    f"speed.contexts={list(CONTEXTS)}", "speed.train_contexts=[8, 16]", "speed.train_tokens=16",
    "speed.operator_contexts=[8, 16]", "speed.seconds=0", "speed.repeats=7", f"speed.dtypes={json.dumps(list(BYTES))}",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(in_process: InProcess, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speed")
    assignments = assigned((f"data.path={corpus}", *SETTINGS))
    given = ("--arms", ",".join(ARMS), "--profile", "smoke", "--out", out, *assignments)
    code, _, stderr = in_process("run", "speed", *given)
    assert code == 0, stderr
    (directory,) = out.iterdir()
    return directory


@pytest.fixture(scope="module")
def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("arm", ARMS)
def test_rates_times_and_shares_agree(run: Path, result: dict[str, Any], arm: str, dtype: str) -> None:
    config, files = ModelConfig.from_dict(result["arms"][arm]["config"]), run / "cells" / arm / "seed0" / "measure"
    train = {"arm": arm, "dtype": dtype, "phase": "train", "context": 8, "batch": 2}
    rate = value(result, metric="tokens_per_s", **train)
    assert rate == pytest.approx(16 / value(result, metric="step_ms", **train) * 1e3)
    done = value(result, metric="flops_per_s", **train)
    assert done == pytest.approx(rate * cost.training_flops_per_token(config, 8))
    cell = json.loads((files / f"step-8-b2-eager-{dtype}.json").read_text())
    assert cell["turns"] == [1] * 7
    flops = 16 * cost.training_flops_per_token(config, 8)
    ceilings = [one["flops_per_s"] for one in cell["ceilings"]]
    assert value(result, metric="ceiling_flops_per_s", **train) == pytest.approx(sorted(ceilings)[3])
    shares = [flops / ms * 1e3 / one for ms, one in zip(cell["samples"]["ms"], ceilings, strict=True)]
    assert value(result, metric="flops_utilisation", **train) == pytest.approx(sorted(shares)[3])
    for context in CONTEXTS:
        decode = {"arm": arm, "dtype": dtype, "phase": "decode", "context": context, "batch": 1}
        rate = value(result, metric="tokens_per_s", **decode)
        assert rate == pytest.approx(1e3 / value(result, metric="ms_per_token", **decode))
        size, ceiling = (
            cost.decode_bytes(config, 1, context, BYTES[dtype]), value(result, metric="ceiling_bytes_per_s", **decode)
        )  # fmt: skip
        assert value(result, metric="bytes_per_s", **decode) == pytest.approx(rate * size)
        assert value(result, metric="roofline_tokens_per_s", **decode) == pytest.approx(ceiling / size)
        prefill = {"arm": arm, "dtype": dtype, "phase": "prefill", "context": context, "batch": 1}
        told = value(result, metric="time_to_first_token_ms", **prefill)
        assert value(result, metric="tokens_per_s", **prefill) == pytest.approx(1e3 * context / told)
    for context in (8, 16):
        operator = {"arm": arm, "dtype": dtype, "phase": "operator", "context": context}
        assert value(result, metric="forward_tokens_per_s", **operator) > 0
    samples = json.loads((files / f"decode-8-b1-eager-{dtype}.json").read_text())["samples"]["ms"]
    assert len(samples) == 7
    row = value(result, arm=arm, dtype=dtype, phase="decode", metric="ms_per_token", context=8)
    assert row == pytest.approx(sorted(samples)[3] / 4)  # the median, 4 tokens a sample


def test_the_run_is_complete(result: dict[str, Any]) -> None:
    assert (result["status"], result["failures"]) == ("complete", [])
    assert {row["dtype"] for row in result["rows"]} == set(BYTES)


def test_findings_and_pictures(run: Path, result: dict[str, Any]) -> None:
    *others, drift = result["findings"]
    found = [(one["kind"], one["phase"], one["arm"], one["dtype"]) for one in others]
    expected = [("crossover", phase, "mamba") for phase in ("step", "prefill", "decode", "forward")]
    expected += [("growth", "decode", arm) for arm in ARMS]
    assert sorted(found) == sorted((*one, dtype) for one in expected for dtype in BYTES)
    for one in others:
        if one["kind"] == "growth":
            folder = run / "cells" / one["arm"] / "seed0" / "measure"
            turns = [json.loads((folder / f"decode-{at}-b1-eager-{one['dtype']}.json").read_text()) for at in CONTEXTS]
            ratios = [b / a for a, b in zip(*(turn["samples"]["ms"] for turn in turns), strict=True)]
            assert (one["from"], one["to"], one["ratio"]) == (8, 32, pytest.approx(sorted(ratios)[3]))
            assert min(ratios) * 0.999 < one["ci_low"] < one["ratio"] < one["ci_high"] < max(ratios) * 1.001
        if one["phase"] == "forward":
            layers = {arm: result["arms"][arm]["config"]["layers"] for arm in ARMS}
            assert one["operations"] == layers
            assert f"(its {layers['mamba']} operations alone against {layers['transformer']})" in one["sentence"]
    for metric in ("flops_per_s", "bytes_per_s"):
        for dtype in BYTES:  # a product of 16 bits is no slower or faster machine
            ceilings = [r["value"] for r in result["rows"]
                        if (r["metric"], r["dtype"], r["seed"]) == (f"ceiling_{metric}", dtype, 0)]  # fmt: skip
            assert drift["ratios"][metric][dtype] == pytest.approx(max(ceilings) / min(ceilings))
            assert f"in {dtype} from" in drift["sentence"]
    page = (run / "report.html").read_text(encoding="utf-8")
    for one in result["findings"]:
        assert one["sentence"].split(" (")[0].replace("'", "&#39;") in page
    for name in ("speed-training", "speed-inference", "speed-decode", "speed-operators"):
        assert (run / "figures" / f"{name}.svg").stat().st_size > 2000


@pytest.mark.parametrize("failed", [True, False])
def test_what_failed_has_its_line_in_the_tables(run: Path, result: dict[str, Any], failed: bool) -> None:
    record = read(run)
    longest = max(row.context for row in record.rows if row.phase == "decode")
    kept = [row for row in record.rows if (row.arm, row.phase, row.context) != ("mamba", "decode", longest)]
    failures = [{"cell": f"mamba/seed0/decode-{longest}", "message": "killed"}] if failed else []
    lost = replace(record, rows=kept, result=result | {"failures": failures})
    for one, empty in ((record, 0), (lost, len(BYTES) if failed else 0)):
        table = [block for block in speed_report.inference(one).blocks if isinstance(block, Table)][-1]
        lines = [[cell.text for cell in cells] for _, body in table.groups for cells in body]
        gone = [line for line in lines if line[5] == DASH]
        assert len(gone) == empty
        assert all(line[0] == "mamba" and set(line[5:]) == {DASH} for line in gone)
        assert {line[2] for line in gone} == (set(BYTES) if empty else set())


def test_what_a_stand_in_does_decides_nothing(run: Path, tmp_path: Path) -> None:
    """A slow form in the place of a kernel, of one arm."""
    copy = shutil.copytree(run, tmp_path / run.name)
    *others, _ = with_a_stand_in(copy, "mamba", "no kernels here")["findings"]
    verdict = content.document(read(copy)).sections[0]
    shown = {block.sentence: block.tone for block in verdict.blocks if isinstance(block, Verdict)}
    refused = {one["arm"] for one in others if not one["comparable"]}
    assert refused == {"mamba"}
    for one in others:
        told = one["sentence"]
        assert one["comparable"] == (one["arm"] == "transformer")
        assert (shown[told] == "blocked") == (not one["comparable"])
        if not one["comparable"]:
            assert "no kernels here" in told
            assert "times" not in told
            assert "tokens on" not in told


@pytest.mark.parametrize(("doubt", "warning", "said"), [
    ("host_bound", "it then is, in", "the GPU waited for its host."),
    ("noisy", "1.5 times the median) in", "the timing was noisy."),
])  # fmt: skip
def test_a_length_that_rests_on_a_doubtful_timing_says_so(
    run: Path, tmp_path: Path, doubt: str, warning: str, said: str
) -> None:
    copy = shutil.copytree(run, tmp_path / run.name)
    directory = RunDirectory(copy)
    doubtful = [Cell("mamba", 0, kind, 32, 1, "eager", "float32") for kind in ("prefill", "decode")]
    for cell in plan(directory.experiment()):
        told = directory.result(cell)
        if told is not None and cell.kind != "build":
            assert told["host_bound"] is False
            directory.finish(cell, told | {"noisy": False} | {doubt: cell in doubtful})
    result = build_result(directory, directory.experiment(), directory.environment()["data"])
    write_json(copy / "result.json", result)
    timed = len(list(copy.rglob("*-eager-*.json")))
    assert f"{warning} 2 of {timed} timed cells: {doubtful[0].name}" in " ".join(result["warnings"])
    verdict = content.document(read(copy)).sections[0]
    shown = [block for block in verdict.blocks if isinstance(block, Verdict)]
    concerned = {(one["kind"], one["phase"]) for one in result["findings"] if one.get(doubt)}
    assert concerned == {("crossover", "prefill"), ("crossover", "decode"), ("growth", "decode")}
    for one in result["findings"]:
        (block,) = [block for block in shown if block.sentence == one["sentence"]]
        assert one["sentence"].endswith(said) == bool(one.get(doubt))
        if not one.get(doubt):
            assert said not in one["sentence"]
            assert "nois" not in block.standing
        elif doubt == "host_bound":
            assert (one["arm"], one["dtype"], block.tone) == ("mamba", "float32", "open")
        else:
            assert block.standing == "measured by noisy timings" or block.tone == "open"
    if doubt == "host_bound":  # behind the others, ahead of how far the machine moved
        assert [said in block.sentence for block in shown] == [False] * (len(shown) - 4) + [True] * 3 + [False]


@pytest.mark.parametrize("mode", ["eager", "graph", "compiled-graph"])
def test_a_report_says_what_a_recording_is(run: Path, tmp_path: Path, mode: str) -> None:
    copy = shutil.copytree(run, tmp_path / run.name)
    result = json.loads((copy / "result.json").read_text(encoding="utf-8"))
    for row in result["rows"]:
        if row["phase"] == "train":
            row["mode"] = mode
    write_json(copy / "result.json", sealed(result))
    _, training, inference, *_ = content.document(read(copy)).sections
    assert ("without its host" in training.intro) == ("does not get from other batches" in training.intro)
    assert ("without its host" in training.intro) == (mode != "eager")
    assert "from a recording" not in inference.intro  # nothing of it was recorded


@pytest.mark.parametrize(("low", "tone"), [(0.9, "open"), (1.1, "resolved")])
def test_a_growth_whose_interval_holds_1_is_open(run: Path, tmp_path: Path, low: float, tone: str) -> None:
    copy = shutil.copytree(run, tmp_path / run.name)
    result = json.loads((copy / "result.json").read_text(encoding="utf-8"))
    (one,) = [one for one in result["findings"]
              if one["kind"] == "growth" and (one["arm"], one["dtype"]) == ("mamba", "float32")]  # fmt: skip
    one |= {"ci_low": low, "ci_high": 1.2}
    write_json(copy / "result.json", sealed(result))
    verdict = content.document(read(copy)).sections[0]
    assert {b.tone for b in verdict.blocks if isinstance(b, Verdict) and b.sentence == one["sentence"]} == {tone}


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("seeds=[0, 1]", "the speed study takes one seed"),
        ('speed.modes=["eager", "eager"]', "each may appear once"),
        ('speed.modes=["fast"]', "speed.modes"),
        ('speed.dtypes=["float32", "float32"]', "each may appear once"),
        ('speed.dtypes=["float16"]', "speed.dtypes"),
        ("speed.dtype=bfloat16", "unknown key 'speed.dtype': did you mean 'dtypes'?"),
        ("speed.contexts=[]", "speed.contexts"),
        ("speed.repeats=5", "speed.repeats"),
        ("measurement.repeats=3", "the speed study does not read 'measurement'"),
        ("speed.repeat=3", "unknown key 'speed.repeat': did you mean 'repeats'?"),
    ],
)
def test_mistakes(in_process: InProcess, tmp_path: Path, assignment: str, said: str) -> None:
    code, _, stderr = in_process("run", "speed", "--profile", "smoke", "--set", assignment, "--out", tmp_path / "runs")
    assert code == 2
    assert said in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(("there", "code"), [(False, 3), (True, 2)])
@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ('speed.modes=["graph"]', "mode 'graph' is refused for every arm on a CPU: CUDA graphs need a GPU"),
        ('speed.modes=["eager", "compiled"]', "mode 'compiled' is refused for every arm on a CPU"),
    ],
)
def test_modes_of_a_gpu_on_a_cpu(
    in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assignment: str, said: str, there: bool,
    code: int,
) -> None:  # fmt: skip
    """A mistake where there is a GPU, and else what the machine lacks."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    given = ("--profile", "smoke", "--device", "cpu", "--set", assignment, "--out", tmp_path / "runs")
    left_with, _, stderr = in_process("run", "speed", *given)
    assert (left_with, len(stderr.splitlines())) == (code, 1)
    assert said in stderr
    assert ("torch sees no GPU here" in stderr) is not there


def test_a_legend_names_no_arm_without_a_line(run: Path) -> None:
    assert legend_names(run, "speed-decode") == ["transformer", "mamba"]
    assert legend_names(run, "speed-decode", without="mamba") == ["transformer"]
