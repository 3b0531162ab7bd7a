"""The peak of training that a comparison records is that of a step."""

from pathlib import Path

import pytest

from experiments import cells
from experiments.data.dataset import prepare
from experiments.measurement.process import run_fresh
from experiments.spec import Arm, Data, Evaluation, Experiment, Training
from models import cost, replay
from models.presets import preset


@pytest.mark.parametrize("arm", ["transformer", "mamba"])
def test_the_peak_of_training_follows_from_the_shapes(arm: str, tmp_path: Path) -> None:
    """However much validation reads at once: here 16 times a batch."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {i}, and {i * i} besides" for i in range(4000)))
    data = Data(corpus="text", path=str(tmp_path / "text.txt"), vocabulary=512, validation_fraction=0.2)
    settings = Training(context=256, batch=4, steps=2, warmup_steps=0)
    experiment = Experiment(
        name="x", title="x", seeds=(0,), arms={arm: Arm(model=f"{arm}-1m", learning_rate=1e-3)}, data=data,
        training=settings, evaluation=Evaluation(splits=("validation",), curve_sequences=64, samples=0), threads=1,
    )  # fmt: skip
    dataset = prepare(data, tmp_path / "cache").folder
    work = (experiment, arm, experiment.arms[arm], 0, dataset, tmp_path / "run")
    found = run_fresh(cells.train_cell, *work)["train"]["peak_bytes"]
    config = cells.model_config(experiment.arms[arm], data.vocabulary)
    predicted = 3 * cost.weight_bytes(config, 4) + replay.training(config, settings.batch, settings.context).peak
    assert found == pytest.approx(predicted, rel=0.1)


def test_a_measurement_is_kept_where_its_prediction_fails() -> None:
    config = preset("mamba-tiny")
    assert cells._predicted(config, lambda: {"peak": 3}) == {"predicted": {"peak": 3}}
    failed = cells._predicted(config, lambda: {"peak": 1 // 0})
    assert failed["predicted"] is None
    assert failed["unpredicted"] == "the replay failed: ZeroDivisionError: integer division or modulo by zero"
    unknown = cells._predicted(preset("lstm-tiny"), lambda: {"peak": 3})
    assert unknown == {"predicted": None, "unpredicted": replay.unpredictable(preset("lstm-tiny"))}
