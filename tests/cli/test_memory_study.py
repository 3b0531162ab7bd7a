"""The memory study from the command to its report, on small models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import InProcess, assigned, legend_names, value, with_a_stand_in

from experiments import capacity
from experiments.numbers import DASH, number
from experiments.report import content
from experiments.report import memory as memory_report
from experiments.report.document import Table
from experiments.report.record import read
from experiments.result import build_result
from experiments.spec import Arm, Data, Experiment
from experiments.store import RunDirectory, sealed, write_json
from experiments.studies import memory
from models import cost
from models.config import ModelConfig

ARMS, CONTEXTS = ("transformer", "mamba"), (8, 48)
SETTINGS = (
    "data.corpus=text", "data.vocabulary=300", "data.test_fraction=0.1", "data.validation_fraction=0.1",
    "arms.transformer.model=transformer-tiny", "arms.mamba.model=mamba-tiny", f"memory.contexts={list(CONTEXTS)}",
    "memory.batches=[1, 2]", "memory.train_contexts=[16]",
)  # fmt: skip


def settings(corpus: Path, *more: str) -> list[str]:
    return assigned((f"data.path={corpus}", *SETTINGS, *more))


@pytest.fixture(scope="module")
def run(in_process: InProcess, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory")
    arms = ["--arms", ",".join(ARMS), "--profile", "smoke", "--out", out, "--json"]
    code, stdout, stderr = in_process("run", "memory", *arms, *settings(corpus))
    assert code == 0, stderr
    (directory,) = out.iterdir()
    assert json.loads(stdout) == json.loads((directory / "result.json").read_text())
    return directory


@pytest.fixture(scope="module")
def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def test_every_cell_gave_its_rows(result: dict[str, Any]) -> None:
    assert (result["status"], result["failures"], result["verdicts"]) == ("complete", [], [])
    for arm in ARMS:
        for way in ("read", "mapped", "direct"):
            of_load = {row["metric"] for row in result["rows"] if (row["arm"], row["mode"]) == (arm, way)}
            assert of_load == {"file_bytes", "host_peak_bytes", "device_peak_bytes", "resident_bytes",
                               "resident_bytes_analytic", "load_ms"}  # fmt: skip
        for context in CONTEXTS:
            for batch in (1, 2):
                for phase in ("prefill", "decode"):
                    where = {"arm": arm, "phase": phase, "context": context, "batch": batch}
                    assert value(result, metric="peak_bytes", **where) > 0
                    assert value(result, metric="peak_bytes_analytic", **where) > 0


def test_bytes_that_are_exact(result: dict[str, Any]) -> None:
    for arm in ARMS:
        config = ModelConfig.from_dict(result["arms"][arm]["config"])
        for context in CONTEXTS:
            for batch in (1, 2):
                where = {"arm": arm, "phase": "decode", "context": context, "batch": batch}
                expected = cost.state_bytes(config, batch, context + 2, 4)
                assert value(result, metric="state_bytes", **where) == expected
                assert value(result, metric="state_bytes_analytic", **where) == expected
        train = {"arm": arm, "phase": "train", "context": 16}
        weights = 4 * result["arms"][arm]["parameters"]
        assert value(result, metric="weight_bytes", **train) == weights
        assert value(result, metric="gradient_bytes", **train) == weights
        assert value(result, metric="optimizer_bytes", **train) == pytest.approx(2 * weights, rel=1e-3)
        counted, predicted = (
            value(result, metric=m, **train) for m in ("activation_bytes", "activation_bytes_analytic")
        )
        assert counted == pytest.approx(predicted, rel=0.02)


def test_findings_follow_from_the_rows(result: dict[str, Any]) -> None:
    configs = {arm: ModelConfig.from_dict(one["config"]) for arm, one in result["arms"].items()}
    (crossing,) = [one for one in result["findings"] if one["kind"] == "cache-outweighs-state"]
    state = cost.state_bytes(configs["mamba"], 1, 1, 4)
    at = crossing["tokens"]
    assert cost.state_bytes(configs["transformer"], 1, at - 1, 4) <= state
    assert cost.state_bytes(configs["transformer"], 1, at, 4) > state
    assert f"from {at:,} tokens on" in crossing["sentence"]
    for arm in ARMS:
        (one,) = [f for f in result["findings"] if f["kind"] == "loading-against-inference" and f["arm"] == arm]
        for way, exceeds in one["inference_exceeds_load_at"].items():
            load = value(result, arm=arm, phase="load", metric="host_peak_bytes", mode=way)
            for context in CONTEXTS:
                peaks = [value(result, arm=arm, phase=phase, metric="peak_bytes", context=context, batch=1)
                         for phase in ("prefill", "decode")]  # fmt: skip
                assert (max(peaks) > load) == (context in exceeds), (arm, way, context)


def test_the_report_shows_it(run: Path, result: dict[str, Any], in_process: InProcess) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    for name in ("memory-waterfall", "memory-context", "memory-training"):
        assert (run / "figures" / f"{name}.svg").stat().st_size > 2000
    for one in result["findings"]:
        assert one["sentence"].split(";")[0][:60].replace("'", "&#39;") in page
    code, table, _ = in_process("report", run.name, "--out", run.parent)
    assert code == 0
    assert "Does loading cost more than inference?".upper() in table
    assert "on the card" not in table.lower()


def test_the_waterfall_is_in_megabytes(run: Path, result: dict[str, Any]) -> None:
    for arm in ARMS:
        stages = dict(memory_report.stages(read(run), arm))
        where = {"arm": arm, "phase": "prefill", "context": CONTEXTS[-1], "batch": 1}
        held = value(result, metric="peak_bytes", **where)
        assert stages[f"prefill, {CONTEXTS[-1]:,}"] == pytest.approx(held / 10**6)
        file = value(result, arm=arm, phase="load", metric="file_bytes", mode="mapped")
        assert stages["file on disk"] == pytest.approx(file / 10**6)


def test_models_that_were_only_initialised_are_not_taken_for_trained_ones(
    run: Path, in_process: InProcess, tmp_path: Path
) -> None:
    for command in (("generate", run, "a"), ("export", run, tmp_path / "hf", "--arm", "mamba")):
        code, stdout, stderr = in_process(*command)
        assert (code, stdout) == (2, "")
        random = f"lab: the memory study trains no model: those of {run.name} are random"
        assert stderr == f"{random}; name another run (lab runs lists them)\n"
    assert not (tmp_path / "hf").exists()
    code, stdout, _ = in_process("trace", run, "a")
    assert code == 0
    assert "Untrained: transformer, mamba" in stdout
    assert "reads the bytes" not in stdout  # it has the run's tokenizer
    code, stdout, _ = in_process("trace", run, "a", "--json")
    assert [one["untrained"] for one in json.loads(stdout)["models"]] == [True, True]


@pytest.mark.parametrize("failed", [True, False])
def test_what_failed_has_its_line_in_the_tables(run: Path, result: dict[str, Any], failed: bool) -> None:
    """Where an arm has all its cells, what it lacks it was not asked for."""
    record = read(run)
    kept = [row for row in record.rows if row.arm != "mamba" or row.phase not in ("decode", "train")]
    failures = [{"cell": "mamba/seed0/decode-24-b1", "message": "killed"}] if failed else []
    lost = replace(record, rows=kept, result=result | {"failures": failures})
    for section, phases in ((memory_report.inference, 2 * len(CONTEXTS) * 2), (memory_report.training, 1)):
        for one, whole in ((record, True), (lost, False)):
            (table,) = [block for block in section(one).blocks if isinstance(block, Table)]
            lines = [[cell.text for cell in cells] for _, body in table.groups for cells in body]
            mine = [line for line in lines if line[0] == "mamba"]
            empty = [line for line in mine if set(line[4:]) <= {DASH, ""}]
            gone = phases // 2 if phases > 1 else 1
            assert len(mine) == (phases if whole or failed else phases - gone)
            assert len(empty) == (0 if whole or not failed else gone)
            assert any("no result" in note for note in table.notes) == bool(empty)


def test_the_report_of_a_gpu_shows_what_the_process_holds(run: Path, result: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / run.name)
    held = {"reserved_peak_bytes": 620e6, "process_bytes": 1130e6}
    added = [
        row | {"metric": metric, "value": None if row["phase"] == "train" and metric == "process_bytes" else size,
               "reason": "not listed" if row["phase"] == "train" else None}
        for row in result["rows"] if row["metric"] in ("peak_bytes", "device_peak_bytes")
        for metric, size in held.items()
    ]  # fmt: skip
    write_json(copy / "result.json", sealed(result | {"rows": result["rows"] + added}))
    (section,) = [one for one in content.document(read(copy)).sections if one.id == "card"]
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    lines = [[cell.text for cell in cells] for _, body in table.groups for cells in body]
    assert len(lines) == len(ARMS) * (3 + 2 * len(CONTEXTS) * 2 + 1)
    (load,) = [line for line in lines if line[:2] == ["mamba", "load, direct"]]
    assert load == ["mamba", "load, direct", "", "", DASH, "620", "1,130"]
    (decode,) = [line for line in lines if line[:4] == ["mamba", "decode", "2", "48"]]
    peak = value(result, arm="mamba", phase="decode", metric="peak_bytes", context=48, batch=2)
    assert decode[4:] == [number(peak / 1e6), "620", "1,130"]
    (train,) = [line for line in lines if line[:2] == ["transformer", "train"]]
    assert train[5:] == ["620", DASH]


def test_a_cell_that_fails_is_recorded_and_its_neighbours_run(
    in_process: InProcess, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context whose cache no machine can hold, where nothing told so before."""
    monkeypatch.setattr(capacity, "check", lambda experiment: None)
    absurd = settings(corpus, "memory.contexts=[8, 1099511627776]", "memory.batches=[1]", "memory.train_contexts=[8]")
    code, _, stderr = in_process(
        "run", "memory", "--profile", "smoke", "--arms", "transformer,mamba", "--out", tmp_path, *absurd
    )
    assert code == 5
    assert "4 cells failed, first transformer/seed0/prefill-1099511627776-b1" in stderr
    (directory,) = tmp_path.iterdir()
    result = json.loads((directory / "result.json").read_text())
    assert result["status"] == "partial"
    assert {one["cell"].rsplit("/", 1)[1] for one in result["failures"]} == {
        "prefill-1099511627776-b1", "decode-1099511627776-b1",
    }  # fmt: skip
    assert all("emory" in one["message"] or "allocate" in one["message"] for one in result["failures"])
    assert value(result, arm="transformer", phase="prefill", metric="peak_bytes", context=8) > 0
    assert value(result, arm="transformer", phase="train", metric="peak_bytes") > 0
    assert "4 planned cells gave no result" in (directory / "report.md").read_text()
    monkeypatch.undo()
    code, _, stderr = in_process("resume", directory)  # they are tried again, and nothing else is refused for them
    assert code == 5
    assert "4 cells failed, first transformer/seed0/prefill-1099511627776-b1" in stderr


def test_what_a_stand_in_does_decides_nothing(run: Path, tmp_path: Path) -> None:
    """A slow form in the place of a kernel, of one arm."""
    findings = with_a_stand_in(shutil.copytree(run, tmp_path / run.name), "mamba", "no kernels here")["findings"]
    measured = {one["arm"]: one for one in findings if one["kind"] == "loading-against-inference"}
    assert measured["transformer"]["comparable"]
    assert "So " in measured["transformer"]["sentence"]
    assert not measured["mamba"]["comparable"]
    assert "no kernels here" in measured["mamba"]["sentence"]
    assert "So " not in measured["mamba"]["sentence"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["training.batch=3"], "the memory study does not read 'training'"),
        (["arms.mamba.learning_rate=0.1"], "the memory study does not read 'learning_rate' of arm 'mamba'"),
        (["memory.contexts=[64, 32]"], "must be positive, distinct and ascending (got [64, 32])"),
        (["memory.batches=[]"], "memory.batches"),
        (["memory.dtyp=float32"], "unknown key 'memory.dtyp': did you mean 'dtype'?"),
        (["cell_timeout_s=0"], "cell_timeout_s"),
        (["arms.mamba.model=gpt1"], "the model has 100 learned positions, memory.contexts and decode_tokens need"),
    ],
)
def test_mistakes(in_process: InProcess, tmp_path: Path, arguments: list[str], said: str) -> None:
    assignments = assigned(arguments)
    code, _, stderr = in_process("run", "memory", "--profile", "smoke", *assignments, "--out", tmp_path / "runs")
    assert code == 2
    assert said in stderr
    assert len(stderr.splitlines()) == 1


def test_a_comparison_does_not_read_memory(in_process: InProcess, tmp_path: Path) -> None:
    code, _, stderr = in_process("run", "compare", "--set", "memory.batches=[1]", "--out", tmp_path / "runs")
    assert code == 2
    assert "the comparison study does not read 'memory'" in stderr


@pytest.mark.parametrize(
    ("exceeding", "said"),
    [
        ([], "more than inference at every measured length"),
        ([8, 64, 1024], "less than inference at every measured length"),
        ([64, 1024], "more than inference up to 8 tokens and less from 64 on"),
        ([8, 1024], "less than inference at 8, 1,024 tokens and more at the other lengths"),
    ],
)
def test_loading_against_inference_in_words(exceeding: list[int], said: str) -> None:
    assert memory._against(exceeding, [], [8, 64, 1024]) == said


@pytest.mark.parametrize(
    ("exceeding", "undecided", "said"),
    [
        ([64], [1024], "more than inference at 8, less at 64 (open at 1,024)"),
        ([], [8], "more than inference at 64, 1,024 (open at 8)"),
        ([64], [8, 1024], "less than inference at 64 (open at 8, 1,024)"),
        ([], [8, 64, 1024], "more than inference or less, which is open at every measured length"),
    ],
)
def test_loading_against_inference_where_something_is_open(
    exceeding: list[int], undecided: list[int], said: str
) -> None:
    assert memory._against(exceeding, undecided, [8, 64, 1024]) == said


@pytest.mark.parametrize("window", [8, 4000])
def test_a_cache_outgrows_a_window_where_the_window_ends(window: int) -> None:
    """Up to there both keep as much; however long the window is, it does not grow without end."""
    arms = {
        "full": Arm(model="transformer-tiny"),
        "window": Arm(model="sliding-tiny", overrides={"mixer": {"window": window}}),
    }
    experiment = Experiment(name="x", title="x", study="memory", arms=arms, seeds=(0,), data=Data(vocabulary=300))
    found = memory.findings([], experiment, RunDirectory(Path("nowhere")))
    states = {(one["arm"], one["against"]): one["tokens"] for one in found if one["kind"] == "cache-outweighs-state"}
    assert states == {("full", "window"): window + 1}
    assert {one["arm"] for one in found if one["kind"] == "cache-outweighs-weights"} == {"full"}


def test_a_legend_names_no_arm_without_a_line(run: Path) -> None:
    assert legend_names(run, "memory-context") == ["transformer", "mamba"]
    assert legend_names(run, "memory-context", without="mamba") == ["transformer"]


def test_memory_that_was_sampled_is_warned_of(run: Path, tmp_path: Path) -> None:
    """Which misses peaks, where a system keeps no mark of them."""
    copy = shutil.copytree(run, tmp_path / run.name)
    directory = RunDirectory(copy)
    cell = next(cell for cell in memory.plan(directory.experiment()) if cell.kind == "prefill")
    told = directory.result(cell)
    assert told is not None
    assert told["memory_method"] == "kernel high-water mark"
    facts = directory.environment()["data"]
    assert "sampled" not in " ".join(build_result(directory, directory.experiment(), facts)["warnings"])
    directory.finish(cell, told | {"memory_method": "sampled every 1 ms"})
    warnings = build_result(directory, directory.experiment(), facts)["warnings"]
    (one,) = [warning for warning in warnings if "sampled" in warning]
    assert one.startswith("memory of processes was sampled every 1 ms, since this system keeps no high-water mark")
