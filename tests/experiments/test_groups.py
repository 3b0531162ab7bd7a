"""What a continued run does again: cells that take turns belong to one sitting."""

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import runner
from experiments.errors import CorpusError, RunFailedError
from experiments.spec import Arm, load
from experiments.store import Cell, RunDirectory, write_json
from experiments.studies import STUDIES
from models.errors import ConfigError

EXPERIMENT = load("speed", profile="smoke")
STUDY = STUDIES["speed"]
PLAN = STUDY.plan(EXPERIMENT)


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path)
    for cell in PLAN:
        directory.finish(cell, {"done": cell.name})
    return directory


def test_groups_cover_the_plan_in_order_and_decode_takes_turns_at_every_length():
    groups = list(runner._groups(PLAN, STUDY, EXPERIMENT))
    assert [cell for group in groups for cell in group] == PLAN
    assert len({STUDY.turns(group[0], EXPERIMENT) for group in groups if len(group) > 1}) == sum(
        len(g) > 1 for g in groups
    )
    (decode,) = [group for group in groups if group[0].kind == "decode"]
    assert {(c.arm, c.context) for c in decode} == {
        (arm, context) for arm in EXPERIMENT.arms for context in EXPERIMENT.speed.contexts
    }
    for group in groups:
        if group[0].kind == "build":
            assert len(group) == 1
        elif group[0].kind != "decode":
            assert [cell.arm for cell in group] == list(EXPERIMENT.arms)
            assert len({cell.context for cell in group}) == 1


def test_decode_of_an_arm_at_every_length_shares_a_process():
    (decode,) = [group for group in runner._groups(PLAN, STUDY, EXPERIMENT) if group[0].kind == "decode"]
    shared = runner._processes(decode, STUDY, EXPERIMENT)
    assert [{cell.arm for cell in cells} for cells in shared] == [{arm} for arm in EXPERIMENT.arms]
    assert all([cell.context for cell in cells] == list(EXPERIMENT.speed.contexts) for cells in shared)
    others = [cell for cell in PLAN if cell.kind != "decode"]
    assert runner._processes(others, STUDY, EXPERIMENT) == [[cell] for cell in others]


def test_on_a_gpu_an_arm_has_one_process_for_every_length_of_a_phase():
    on_a_gpu = EXPERIMENT.model_copy(update={"device": "cuda"})
    groups = list(runner._groups(PLAN, STUDY, on_a_gpu))
    assert [cell for group in groups for cell in group] == PLAN
    built, measured = groups[: len(EXPERIMENT.arms)], groups[len(EXPERIMENT.arms) :]
    assert {cell.kind for (cell,) in built} == {"build"}
    assert [{cell.kind for cell in group} for group in measured] == [
        {"step"}, {"prefill"}, {"decode"}, {"forward"}, {"backward"}
    ]  # fmt: skip
    lengths = {"step": EXPERIMENT.speed.train_contexts, "prefill": EXPERIMENT.speed.contexts}
    for group in measured:
        for cells in runner._processes(group, STUDY, on_a_gpu):
            assert len({cell.arm for cell in cells}) == 1
            wanted = lengths.get(cells[0].kind, sorted({cell.context for cell in cells}))
            assert [cell.context for cell in cells] == list(wanted)
    _, (phase, shapes, mode, dtype) = STUDY.work_together(measured[0][:: len(EXPERIMENT.arms)], on_a_gpu)
    assert (phase, mode, dtype) == ("step", "eager", "float32")
    assert shapes == [(context, max(1, EXPERIMENT.speed.train_tokens // context)) for context in lengths["step"]]


def test_nothing_is_left_of_a_finished_run(finished: RunDirectory):
    assert runner._todo(finished, EXPERIMENT, retry=False) == []


def test_a_group_with_a_missing_cell_is_done_again(finished: RunDirectory):
    missing = next(cell for cell in PLAN if cell.kind == "decode" and cell.context == EXPERIMENT.speed.contexts[1])
    finished.forget(missing)
    group = [cell for cell in PLAN if cell.kind == "decode"]
    assert runner._todo(finished, EXPERIMENT, retry=False) == group
    assert [cell for cell in PLAN if finished.result(cell) is None] == group  # no result of the first sitting stays


def test_a_failed_cell_is_left_alone_unless_it_is_tried_again(finished: RunDirectory):
    failed = next(cell for cell in PLAN if cell.kind == "prefill")
    finished.forget(failed)
    finished.fail(failed, "out of memory", "")
    assert runner._todo(finished, EXPERIMENT, retry=False) == []
    turns = STUDY.turns(failed, EXPERIMENT)
    assert runner._todo(finished, EXPERIMENT, retry=True) == [
        cell for cell in PLAN if STUDY.turns(cell, EXPERIMENT) == turns
    ]


def test_the_latest_run_of_a_specification_is_gone_on_with_unless_all_of_it_has_ended(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(runner, "run_hash", lambda *of: "0123abcd")
    older, later = (RunDirectory(tmp_path / f"2026010{day}T000000Z-{EXPERIMENT.name}-0123abcd") for day in (1, 2))
    for run in (older, later):
        write_json(run.path / "environment.json", {})

    def found() -> Path | None:
        unfinished = runner._unfinished(EXPERIMENT, None, tmp_path)  # type: ignore[arg-type]
        return unfinished and unfinished.path

    assert found() == later.path
    first, *others = PLAN
    for cell in others:
        later.finish(cell, {"done": cell.name})
    assert found() == later.path
    later.fail(first, "out of memory", "")
    assert found() is None  # a new one is begun, and not the older one gone on with


def test_failed_cells_are_tried_again_where_a_run_is_resumed_by_name_alone(
    finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failed = next(cell for cell in PLAN if cell.kind == "prefill")
    finished.forget(failed)
    finished.fail(failed, "out of memory", "")
    tried: list[list[Cell]] = []
    for name in ("check", "_check_out", "prepare_all", "_check_lengths", "_check_same_run", "_make_good"):
        monkeypatch.setattr(runner, name, lambda *given: None)
    monkeypatch.setattr(runner, "_unfinished", lambda *given: finished)
    monkeypatch.setattr(runner, "_run_cells", lambda *given: tried.append(given[3]))
    monkeypatch.setattr(runner, "_finish", lambda *given: {"warnings": []})
    runner.run(EXPERIMENT, tmp_path, command="lab run")
    runner.run(EXPERIMENT, tmp_path, command="lab resume", into=finished)
    turns = STUDY.turns(failed, EXPERIMENT)
    assert tried == [[], [cell for cell in PLAN if STUDY.turns(cell, EXPERIMENT) == turns]]


def test_a_run_that_made_no_model_is_an_error_and_its_first_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = RunDirectory(tmp_path / "run")
    write_json(directory.path / "environment.json", {})
    for name in ("check", "_check_out", "prepare_all", "_check_lengths", "_check_same_run", "_make_good", "_run_cells"):
        monkeypatch.setattr(runner, name, lambda *given: None)
    result = {"warnings": [], "failures": [{"cell": PLAN[0].name, "message": "out of memory"}]}
    monkeypatch.setattr(runner, "_finish", lambda *given: result)
    with pytest.raises(RunFailedError, match=f"no model could be made, see {directory.path}: out of memory"):
        runner.run(EXPERIMENT, tmp_path, command="lab resume", into=directory)
    made = next(cell for cell in PLAN if cell.kind == STUDY.MAKES)
    directory.finish(made, {"done": made.name})
    assert runner.run(EXPERIMENT, tmp_path, command="lab resume", into=directory) is directory


def test_arms_of_a_comparison_take_turns_at_what_is_timed():
    study, experiment = STUDIES["comparison"], load("compare", profile="smoke")
    groups = list(runner._groups(study.plan(experiment), study, experiment))
    assert [cell for group in groups for cell in group] == study.plan(experiment)
    for group in groups:
        if group[0].kind == "load":
            assert len(group) == 1
        else:
            assert {cell.arm for cell in group} == set(experiment.arms)
            assert len({(cell.seed, cell.kind, cell.context) for cell in group}) == 1
        assert runner._processes(group, study, experiment) == [[cell] for cell in group]
    timed = len(experiment.seeds) * (1 + 2 * len(experiment.measurement.contexts))
    assert sum(len(group) > 1 for group in groups) == timed


@pytest.mark.parametrize("name", ["compare", "learning-rate", "lineage", "masking", "moe", "vocabulary"])
def test_no_cell_waits_for_others_on_a_gpu_or_where_no_speed_is_measured(name: str):
    for experiment in (
        load(name, profile="smoke").model_copy(update={"device": "cuda"}),
        load(name, profile="smoke", assignments=["measurement.enabled=false"]),
    ):
        study = STUDIES[experiment.study]
        groups = list(runner._groups(study.plan(experiment), study, experiment))
        assert groups == [[cell] for cell in study.plan(experiment)]


@pytest.mark.parametrize("measured", [True, False])
def test_what_is_trained_again_with_an_arm_that_is_missing(tmp_path: Path, measured: bool):
    """The arms that took turns with it, where speed is measured; itself alone elsewhere."""
    experiment = load("compare", profile="smoke", assignments=[f"measurement.enabled={str(measured).lower()}"])
    study, directory = STUDIES["comparison"], RunDirectory(tmp_path)
    first, second, *rest = study.plan(experiment)
    for cell in (second, *rest):
        directory.finish(cell, {})
    assert runner._todo(directory, experiment, retry=False) == ([first, second] if measured else [first])
    assert all(directory.result(cell) == {} for cell in rest)


def test_every_mode_has_every_phase_of_every_arm_and_graph_is_refused_where_a_step_needs_the_host(monkeypatch):
    modes = "eager", "graph"
    recorded = load("speed", profile="smoke", assignments=[f"speed.modes={list(modes)}".replace("'", '"')])
    planned = [cell for cell in STUDY.plan(recorded) if cell.kind in ("step", "prefill", "decode")]
    settings = recorded.speed
    assert [(c.mode, c.kind, c.context, c.arm) for c in planned] == [
        (mode, phase, context, arm)
        for mode in modes
        for phase, contexts in (
            ("step", settings.train_contexts), ("prefill", settings.contexts), ("decode", settings.contexts),
        )
        for context in contexts for arm in recorded.arms
    ]  # fmt: skip
    on_a_gpu = recorded.model_copy(update={"device": "cuda"})
    monkeypatch.setitem(sys.modules, "triton", None)  # cannot be imported
    with pytest.raises(ConfigError, match="'graph' is refused for every arm: it needs Triton"):
        runner._check_mode("graph", ["float32"], on_a_gpu)
    runner._check_mode("eager", ["float32"], on_a_gpu)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    runner._check_mode("graph", ["float32"], on_a_gpu)
    experts = on_a_gpu.model_copy(update={"arms": on_a_gpu.arms | {"moe": Arm(model="moe-1m")}})
    with pytest.raises(ConfigError, match="since of 'moe' outside bfloat16"):
        runner._check_mode("graph", ["bfloat16", "float32"], experts)
    runner._check_mode("graph", ["bfloat16"], experts)


def test_every_type_has_cells_and_turns_of_its_own():
    both = load("speed", profile="smoke", assignments=['speed.dtypes=["bfloat16", "float32"]'])
    planned = [cell for cell in STUDY.plan(both) if cell.kind != "build"]
    halved, others = ([cell for cell in planned if cell.dtype == dtype] for dtype in both.speed.dtypes)
    assert len(halved) + len(others) == len(planned) == len({cell.part + cell.group for cell in planned})
    assert others == [cell for cell in PLAN if cell.kind != "build"]
    assert {replace(cell, dtype="float32") for cell in halved} == set(others)
    assert not {STUDY.turns(cell, both) for cell in halved} & {STUDY.turns(cell, both) for cell in others}


def test_a_result_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    directory, cell = RunDirectory(tmp_path), Cell("mamba", 0, "train")
    said: list[runner.Event] = []
    runner._record(directory, cell, {"splits": {"test": {"token_perplexity": math.inf}}}, said.append, 1, 2)
    assert directory.result(cell) is None
    failure = directory.failure(cell)
    assert failure is not None
    assert failure["message"].startswith("its result holds a number that is not finite")
    assert [event.kind for event in said] == ["failure"]
    runner._record(directory, cell, {"splits": {}}, said.append, 2, 2)
    assert (directory.result(cell), directory.failure(cell)) == ({"splits": {}}, None)
    assert [event.kind for event in said] == ["failure", "finish"]


@pytest.mark.parametrize("short", ["train", "validation", "test", None])
def test_every_split_that_is_read_has_a_window(short: str | None):
    """The validation text too, of which the curve is, where only the test text is evaluated at the end."""
    experiment = load("compare", profile="smoke", assignments=['evaluation.splits=["test"]'])
    context = experiment.training.context
    splits = {
        name: SimpleNamespace(tokens=np.zeros(context + (name != short), dtype=np.uint16))
        for name in ("train", "validation", "test")
    }
    facts = {"tokens": {"train": 100}, "bytes": {"train": 200}}
    prepared: Any = SimpleNamespace(datasets={512: SimpleNamespace(facts=facts, splits=splits)})
    refused = nullcontext() if short is None else pytest.raises(CorpusError, match=f"the {short} split has {context}")
    with refused:
        runner._check_lengths(experiment, prepared)
