"""Where arms take turns: nothing of a cell's work depends on how it is cut, and a turn that comes back is warm."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import cells
from experiments.data.dataset import Dataset, prepare
from experiments.evaluation import evaluate, mean_loss
from experiments.measurement import timing
from experiments.measurement.process import all_turns
from experiments.measurement.timing import timed_in_turns
from experiments.objectives import Objective
from experiments.spec import Arm, Data, Evaluation, Experiment, Training
from models import checkpoint
from models.generation import Sampling, generate

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


def _trained(experiment: Experiment, dataset: Path, folder: Path, seed: int = 0) -> tuple[int, dict, list[dict]]:
    """How often the turn ended, the result, and the log, both without times and memory."""
    ended = 0

    def end() -> None:
        nonlocal ended
        ended += 1

    (arm,) = experiment.arms
    work = cells.train_cell(lambda message: None, experiment, arm, experiment.arms[arm], seed, dataset, folder)
    result = all_turns(work, between=end)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in line.items() if key != "step_ms"} for line in log]
    return ended, {key: value for key, value in result.items() if key != "train"}, timeless


@pytest.fixture
def data(tmp_path: Path) -> Data:
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {i}, and {i * i} besides" for i in range(300)))
    return Data(corpus="text", path=str(tmp_path / "text.txt"), vocabulary=280, validation_fraction=0.2)


@pytest.fixture
def dataset(data: Data, tmp_path: Path) -> Path:
    return prepare(data, tmp_path / "cache").folder


@pytest.fixture
def experiment(data: Data) -> Experiment:
    return Experiment(
        name="x", title="x", seeds=(0,), arms={"mamba": Arm(model="mamba-tiny", learning_rate=1e-3)}, data=data,
        training=Training(context=16, batch=2, steps=6, warmup_steps=2, validate_every=3),
        evaluation=Evaluation(samples=1, sample_tokens=4),
    )  # fmt: skip


def test_a_seed_has_its_own_weights_and_randomness(
    experiment: Experiment, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curve begins with the validation loss of the model that this seed initialises, and no other's."""
    asked: list[tuple] = []

    def objective(*args: Any) -> Objective:
        asked.append(args)
        return Objective(*args)

    monkeypatch.setattr(cells, "Objective", objective)
    validation = Dataset.load(dataset).splits["validation"]
    config = cells.model_config(experiment.arms["mamba"], 280)
    started = []
    for seed in (0, 1):
        _, _, log = _trained(experiment, dataset, tmp_path / str(seed), seed)
        model = cells.first_model(experiment.arms["mamba"], config, seed, CPU)
        causal = Objective("causal", 280)
        expected = mean_loss(model, validation, causal, context=16, sequences=16, precision="float32")
        assert log[0] == {"step": 0, "validation_loss": expected}
        started.append(expected)
    assert started[0] != started[1]
    assert [one for one in asked if len(one) > 2] == [("causal", 280, 0), ("causal", 280, 1)]


def test_samples_go_on_from_validation_text_and_the_first_loss_is_of_test_text(
    experiment: Experiment, dataset: Path, tmp_path: Path
) -> None:
    _, trained, _ = _trained(experiment, dataset, tmp_path / "cell", seed=1)
    data, (sample,) = Dataset.load(dataset), trained["samples"]
    prompt = torch.from_numpy(data.splits["validation"].tokens[: cells.PROMPT].astype("int64"))
    assert len(prompt) == cells.PROMPT
    assert sample["prompt"] == data.tokenizer.decode(prompt.tolist())
    model = checkpoint.load(tmp_path / "cell" / "checkpoint")
    drawn = generate(model, prompt[None], 4, Sampling(temperature=sample["temperature"]), seed=1)
    assert sample["text"] == data.tokenizer.decode([int(token) for token in drawn])
    first = cells.first_model(experiment.arms["mamba"], model.config, 1, CPU)
    quality = {
        (of, split): evaluate(one, data.splits[split], batch=16, context=16, precision="float32").bits_per_byte
        for of, one in (("first", first), ("trained", model)) for split in ("validation", "test")
    }  # fmt: skip
    assert len(set(quality.values())) == 4
    assert trained["initial"] == {"expected_loss": math.log(280), "test_bits_per_byte": quality["first", "test"]}
    assert [trained["splits"][split]["bits_per_byte"] for split in ("validation", "test")] == [
        quality["trained", "validation"], quality["trained", "test"]
    ]  # fmt: skip


def test_a_step_has_the_tokens_of_all_its_micro_batches_and_the_first_steps_are_not_timed(
    experiment: Experiment, dataset: Path, tmp_path: Path
) -> None:
    training = Training(context=16, batch=2, accumulate=3, steps=cells.WARM_UP_STEPS + 2, warmup_steps=2)
    one = experiment.model_copy(update={"training": training, "evaluation": Evaluation(samples=0)})
    arm, folder = one.arms["mamba"], tmp_path / "cell"
    train = all_turns(cells.train_cell(lambda message: None, one, "mamba", arm, 0, dataset, folder))["train"]
    assert (train["tokens_per_step"], train["tokens"]) == (3 * 2 * 16, training.steps * 3 * 2 * 16)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert train["step_ms"] == [line["step_ms"] for line in log if "step_ms" in line][-2:]


def test_a_trained_and_a_built_model_pass_every_gate(experiment: Experiment, dataset: Path, tmp_path: Path) -> None:
    names = ["fast form = reference", "initial loss near ln(vocabulary)", "causality", "forward = prefill + steps",
             "gradients in float32 = reference"]  # fmt: skip
    _, trained, _ = _trained(experiment, dataset, tmp_path / "trained")
    folder = tmp_path / "built"
    built = cells.build_cell(lambda message: None, experiment, experiment.arms["mamba"], 0, "float32", dataset, folder)
    for result in (trained, built):
        assert [gate["name"] for gate in result["gates"]] == names
        assert all(gate["passed"] for gate in result["gates"])


def test_turns_change_nothing_of_a_training(
    experiment: Experiment, dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cells, "TURN_MS", math.inf)
    whole = _trained(experiment, dataset, tmp_path / "whole")
    monkeypatch.setattr(cells, "TURN_MS", 0.0)
    cut = _trained(experiment, dataset, tmp_path / "cut")
    assert (whole[0], cut[0]) == (1, 6)  # after making ready; and after every step but the last, with which it ends
    assert len(cut[2]) == 6 + 3  # steps, and the validation loss before, half way and after
    assert cut[1:] == whole[1:]
