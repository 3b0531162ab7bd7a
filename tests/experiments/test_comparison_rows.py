"""The comparison from results made by hand: its rows of training, which questions have a verdict, how long it reads."""

import math
from pathlib import Path

import numpy as np
import pytest
from study_rows import held, per_seed, quality

from experiments.rows import mean_of, turn_ms
from experiments.spec import Arm, Evaluation, Experiment, Measurement, Training
from experiments.store import Cell, RunDirectory, write_json
from experiments.studies import comparison
from models import cost
from models.presets import preset

ATTENTION = preset("transformer-tiny")
ARMS = {
    "causal": Arm(model="transformer-tiny", learning_rate=1e-3),
    "encoder": Arm(model="transformer-tiny", learning_rate=1e-3, objective="masked",
                   overrides={"mixer.causal": False}),
}  # fmt: skip


def experiment(device: str = "cpu", rates: tuple[float, ...] = ()) -> Experiment:
    splits = ("validation",) if rates else ("validation", "test")
    return Experiment.model_validate({
        "name": "x", "title": "x", "device": device, "arms": ARMS, "learning_rates": rates,
        "training": Training(context=48, batch=3, accumulate=4),
        "evaluation": Evaluation(sample_tokens=5, splits=splits),
        "measurement": Measurement(contexts=(32, 128), decode_tokens=7),
    })  # fmt: skip


@pytest.mark.parametrize(("arm", "predicted"), [("causal", 1.0), ("encoder", 0.15)])
def test_arithmetic_of_training_is_of_its_length_and_of_the_tokens_that_are_predicted(
    arm: str, predicted: float, tmp_path: Path
) -> None:
    """BERT predicts 15% of them (arXiv 1810.04805); the batch is that of a step, however it is cut."""
    config = ATTENTION.with_overrides(ARMS[arm].overrides)
    cell, run = Cell(arm, 0, "train"), RunDirectory(tmp_path)
    write_json(run.folder(cell) / "checkpoint" / "config.json", config.to_dict())
    train = {"step_ms": [10.0, 20.0, 90.0], "tokens_per_step": 3 * 4 * 48, "peak_bytes": 5}
    result = {"backend": {"name": "reference"}, "splits": {}, "train": train}
    rows = {row["metric"]: row for row in comparison.rows(cell, result, experiment(), run)}
    assert rows["flops_per_token"]["value"] == cost.training_flops_per_token(config, 48, predicted)
    assert rows["tokens_per_s"]["value"] == pytest.approx(3 * 4 * 48 / 0.020)
    assert {(row["context"], row["batch"]) for row in rows.values()} == {(48, 12)}


def test_equal_bytes_are_exact_on_a_gpu_and_read_in_pages_of_4096_on_a_cpu() -> None:
    """Of 80 and 160 pages the logarithms are known to 1/80 and 1/160; p is 1 - t / sqrt(2 + t²) at three seeds."""
    rows = per_seed("causal", "load", "resident_bytes", [80 * 4096.0] * 3)
    rows += per_seed("encoder", "load", "resident_bytes", [160 * 4096.0] * 3)
    (card,), (host,) = comparison.verdicts(rows, experiment("cuda")), comparison.verdicts(rows, experiment("cpu"))
    assert (card["exact"], card["p"]) == (True, None)
    t = math.log(2) * math.sqrt(3) / math.hypot(1 / 80, 1 / 160)
    assert (host["exact"], host["p"]) == (False, pytest.approx(1 - t / math.sqrt(2 + t**2)))


def test_a_sweep_has_no_verdicts() -> None:
    rows = quality("causal", [1.0, 1.1, 1.2]) + quality("encoder", [2.0, 2.2, 2.1])
    assert len(comparison.verdicts(rows, experiment())) == 1
    assert comparison.verdicts(rows, experiment(rates=(1e-3, 2e-3))) == []


@pytest.mark.parametrize(("arm", "at"), [("causal", 0), ("encoder", 2)])
def test_there_is_no_ratio_to_nothing(arm: str, at: int) -> None:
    values = {name: [512.0, 512.0, 512.0] for name in ARMS}
    rows = [row for name in ARMS for row in held(name, values[name], context=128, batch=1)]
    assert [one["estimate"] for one in comparison.verdicts(rows, experiment())] == [1]
    values[arm][at] = 0.0
    rows = [row for name in ARMS for row in held(name, values[name], context=128, batch=1)]
    (one,) = comparison.verdicts(rows, experiment())
    assert (one["estimate"], one["n"], one["lacking"]) == (1, 2, {arm: [at]})
    values[arm] = [0.0, 0.0, 0.0]
    rows = [row for name in ARMS for row in held(name, values[name], context=128, batch=1)]
    assert comparison.verdicts(rows, experiment()) == []


def test_a_resolved_difference_near_1_is_not_called_slight() -> None:
    """A ratio of 0.98 is; 0.98 bits per byte more are much."""
    rows = quality("causal", [1.0, 1.0, 1.0]) + quality("encoder", [1.979, 1.98, 1.981])
    rows += per_seed("causal", "load", "resident_bytes", [1e6, 1e6, 1e6])
    rows += per_seed("encoder", "load", "resident_bytes", [0.9799e6, 0.98e6, 0.9801e6])
    difference, ratio = comparison.verdicts(rows, experiment("cuda"))
    assert difference["sentence"].endswith("causal is better here.")
    assert ratio["sentence"].endswith("encoder is better here, by less than 5%.")


def test_the_longest_sequences_are_those_of_training_of_the_last_token_decoded_and_of_samples() -> None:
    assert comparison.lengths(experiment(), causal=True) == {
        "training.context": 48, "measurement.contexts and decode_tokens": 128 + 7,
        "evaluation.sample_tokens after a prompt of 32": 32 + 5,
    }  # fmt: skip
    assert comparison.lengths(experiment(), causal=False) == {"training.context": 48}


def test_of_a_turn_the_call_in_the_middle_counts() -> None:
    found = turn_ms({"turns": [3, 1, 3], "samples": {"ms": [1.0, 90.0, 2.0, 5.0, 4.0, 3.0, 0.1]}})
    assert np.array_equal(found, [2.0, 5.0, 3.0])


def test_the_busiest_expert_has_no_less_than_an_even_share() -> None:
    """Over seeds, however far they lie apart."""
    found = mean_of([1.1, 1.9], "train", "x")
    assert found.low == 1
    assert found.high is not None
    assert found.high > 5
