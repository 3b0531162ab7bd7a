"""Where arms take turns: nothing of a cell's work depends on how it is cut, and a turn that comes back is warm."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import cells
from experiments.data.dataset import prepare
from experiments.measurement import timing
from experiments.measurement.process import all_turns
from experiments.measurement.timing import timed_in_turns
from experiments.spec import Arm, Data, Evaluation, Experiment, Training

CPU = torch.device("cpu")


@pytest.mark.parametrize(("long_ms", "warm_up"), [(math.inf, 1), (0.0, 0)])
def test_each_turn_has_its_samples(monkeypatch: pytest.MonkeyPatch, long_ms: float, warm_up: int) -> None:
    """Of a long operation no call is spent on warming up again."""
    monkeypatch.setattr(timing, "LONG_MS", long_ms)
    order: list[str] = []
    work = timed_in_turns(
        lambda: order.append("call"), repeats=3, seconds=0, device=CPU, before=lambda: order.append("before")
    )
    found = all_turns(work, between=lambda: order.append("turn"))
    assert order == ["call"] * 2 + ["turn", "before", *["call"] * (warm_up + 1)] * 3
    assert found["turns"] == [1, 1, 1]
    assert len(found["samples"]["ms"]) == 3


def test_turns_go_on_until_there_are_seconds_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def operation() -> None:
        nonlocal now
        now += 0.004

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = all_turns(timed_in_turns(operation, repeats=2, seconds=0.4, device=CPU))
    # a fortieth of 0.4 s is 10 ms: three calls of 4 ms, and 12 ms a turn reach 400 ms in the 34th
    assert found["turns"] == [3] * 34
    assert found["samples"]["ms"] == pytest.approx([4.0] * 102)


def _trained(experiment: Experiment, dataset: Path, folder: Path) -> tuple[int, dict, list[dict]]:
    """How often the turn ended, the result, and the log, both without times and memory."""
    ended = 0

    def end() -> None:
        nonlocal ended
        ended += 1

    (arm,) = experiment.arms
    work = cells.train_cell(lambda message: None, experiment, arm, experiment.arms[arm], 0, dataset, folder)
    result = all_turns(work, between=end)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in line.items() if key != "step_ms"} for line in log]
    return ended, {key: value for key, value in result.items() if key != "train"}, timeless


def test_turns_change_nothing_of_a_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {i}, and {i * i} besides" for i in range(300)))
    data = Data(corpus="text", path=str(tmp_path / "text.txt"), vocabulary=280, validation_fraction=0.2)
    dataset = prepare(data, tmp_path / "cache").folder
    experiment = Experiment(
        name="x", title="x", seeds=(0,), arms={"mamba": Arm(model="mamba-tiny", learning_rate=1e-3)}, data=data,
        training=Training(context=16, batch=2, steps=6, warmup_steps=2, validate_every=3),
        evaluation=Evaluation(samples=1, sample_tokens=4),
    )  # fmt: skip
    monkeypatch.setattr(cells, "TURN_MS", math.inf)
    whole = _trained(experiment, dataset, tmp_path / "whole")
    monkeypatch.setattr(cells, "TURN_MS", 0.0)
    cut = _trained(experiment, dataset, tmp_path / "cut")
    assert (whole[0], cut[0]) == (1, 6)  # after making ready; and after every step but the last, with which it ends
    assert len(cut[2]) == 6 + 3  # steps, and the validation loss before, half way and after
    assert cut[1:] == whole[1:]
