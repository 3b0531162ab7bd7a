"""A model whose configuration counts its parameters or its state wrongly is refused before anything is trained: an own
mixer's counts are its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import cells
from experiments.spec import Arm, Experiment
from models import cost
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.presets import preset


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(preset("mamba-tiny"), seed=0)


def test_counts_that_are_right_pass(model: LanguageModel) -> None:
    cells._check_counts(model)
    encoder = preset("transformer-tiny").with_overrides({"mixer.causal": False})
    cells._check_counts(LanguageModel(encoder, seed=0))
    short = preset("gpt1-tiny").with_overrides({"positions": 9})
    cells._check_counts(LanguageModel(short, seed=0))


def test_parameters_that_are_not_the_models(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(model.config.blocks[0].mixer)
    right = kind.parameters
    monkeypatch.setattr(kind, "parameters", lambda self, width: right(self, width) - 7)
    there = sum(weight.numel() for weight in model.parameters())
    wrong = there - 7 * len(model.blocks)
    assert cost.parameters(model.config).total == wrong
    with pytest.raises(
        ConfigError, match=f"by its configuration it has {wrong:,} parameters, and the model has {there:,}"
    ):
        cells._check_counts(model)


def test_a_state_that_is_not_the_models(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(model.config.blocks[0].mixer)
    right = kind.state_bytes
    monkeypatch.setattr(kind, "state_bytes", lambda *args: 20 * right(*args))
    there = model.make_state(2, 17).nbytes
    with pytest.raises(ConfigError, match=f"2 x 17 tokens takes {20 * there:,} bytes, and the model's takes {there:,}"):
        cells._check_counts(model)


def test_what_fails_while_models_are_tried_is_told_of_its_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: LanguageModel) -> None:
        raise RuntimeError("no forward")

    arms = {"mine": Arm(model="mamba-tiny", learning_rate=1e-3)}
    experiment = Experiment(name="x", title="x", arms=arms)
    monkeypatch.setattr(cells, "_try", broken)
    monkeypatch.setattr(cells.Dataset, "load", lambda folder: SimpleNamespace(vocabulary=300))
    with pytest.raises(RuntimeError, match="no forward") as caught:
        cells.compile_kernels(lambda message: None, experiment, Path("nowhere"))
    assert caught.value.__notes__ == ["arm 'mine'"]
