"""Configurations: strict, invertible, and without a setting that does nothing."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from models.config import AttentionConfig, MambaConfig, ModelConfig, SwiGLUConfig
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.presets import PRESETS, preset

TRANSFORMER = ModelConfig(
    vocabulary=32, width=32, layers=2, mixer=AttentionConfig(heads=4), feedforward=SwiGLUConfig(hidden=48)
)
MAMBA = ModelConfig(vocabulary=32, width=32, layers=2, mixer=MambaConfig())
# field: a value unlike the default; `kind` names the class and has no second value
OTHER = {
    ModelConfig: {"vocabulary": 33, "width": 40, "layers": 3, "mixer": AttentionConfig(heads=2), "feedforward": None,
                  "norm_eps": 0.1, "tie_embeddings": False},
    AttentionConfig: {"heads": 2, "kv_heads": 2, "rotary_base": 3.0, "backend": "reference"},
    MambaConfig: {"expand": 3, "state": 7, "conv_width": 3, "dt_rank": 5, "dt_min": 0.05, "dt_max": 0.9,
                  "dt_floor": 0.5, "backend": "torch"},
    SwiGLUConfig: {"hidden": 96},
}  # fmt: skip


def fingerprint(config: ModelConfig) -> list:
    """All that a configuration can show in: shapes, weights, logits, what runs."""
    model = LanguageModel(config, seed=0)
    with torch.no_grad():
        logits = model(torch.arange(24).view(2, 12))
    return [
        {name: (tuple(p.shape), p.double().sum().item()) for name, p in model.named_parameters()},
        tuple(logits.shape), logits.double().sum().item(), model.backend,
    ]  # fmt: skip


CHANGES = [(cls, field.name) for cls in OTHER for field in fields(cls) if field.name != "kind"]


@pytest.mark.parametrize(("cls", "name"), CHANGES, ids=[f"{cls.__name__}.{name}" for cls, name in CHANGES])
def test_no_setting_is_ignored(cls, name):
    assert name in OTHER[cls], "a new setting: give it a value here and see that it changes something"
    base = MAMBA if cls is MambaConfig else TRANSFORMER
    part = {ModelConfig: "", SwiGLUConfig: "feedforward."}.get(cls, "mixer.")
    changed = base.with_overrides({part + name: OTHER[cls][name]})
    assert changed != base
    assert fingerprint(changed) != fingerprint(base)
    assert fingerprint(base) == fingerprint(base)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name):
    config = PRESETS[name]
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert preset(name) is config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocabulray": 3}, "unknown model setting 'vocabulray': did you mean 'vocabulary'?"),
        ({"mixer": {"kind": "mamba", "sate": 3}}, "unknown mixer setting 'sate': did you mean 'state'?"),
        ({"mixer": {"kind": "manba"}}, "unknown mixer 'manba': did you mean 'mamba'?"),
        ({"mixer": {"state": 3}}, "mixer must be a table with a 'kind' (attention, mamba)"),
        ({"mixer": None}, "mixer must be a table"),
        ({"mixer": {"kind": "attention"}}, "heads"),
        ({"feedforward": {"kind": "swiglu", "hiden": 3}}, "unknown feedforward setting 'hiden': did you mean 'hidden'"),
        ({"feedforward": {"kind": "swigloo"}}, "unknown feedforward 'swigloo': did you mean 'swiglu'?"),
        ({"width": 0}, "model.width must be a positive whole number, got 0"),
        ({"layers": True}, "model.layers must be a positive whole number, got True"),
        ({"vocabulary": 3.5}, "model.vocabulary must be a positive whole number, got 3.5"),
        ({"norm_eps": 0}, "model.norm_eps must be above 0"),
        ({"mixer": {"kind": "attention", "heads": 5}}, "not a multiple of heads = 5"),
        ({"mixer": {"kind": "attention", "heads": 32}}, "even head width, got 1"),
        ({"mixer": {"kind": "attention", "heads": 4, "kv_heads": 3}}, "not a multiple of kv_heads = 3"),
        ({"mixer": {"kind": "attention", "heads": 4, "rotary_base": 1}}, "rotary_base must be above 1"),
        ({"mixer": {"kind": "mamba", "dt_min": 0.2}}, "0 < dt_min <= dt_max"),
        ({"mixer": {"kind": "mamba", "dt_floor": 0}}, "dt_floor must be above 0"),
        ({"mixer": {"kind": "mamba", "dt_rank": 0}}, "mamba.dt_rank must be a positive whole number, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(MAMBA.to_dict() | values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_setting_is_named():
    values = MAMBA.to_dict()
    del values["width"]
    with pytest.raises(ConfigError, match="width"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mixer.sate": 3}, "unknown model setting 'mixer.sate': did you mean 'state'?"),
        ({"mixer": {"stat": 3}}, "unknown model setting 'mixer.stat': did you mean 'state'?"),
        ({"widht": 3}, "unknown model setting 'widht': did you mean 'width'?"),
        ({"feedforward.hidden": 3}, "this model has no feedforward, so 'feedforward.hidden' means nothing"),
        ({"width.x": 3}, "unknown model setting 'width.x': 'width' is one value, not a table"),
        ({"mixer.state": -3}, "mamba.state must be a positive whole number, got -3"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        MAMBA.with_overrides(overrides)
    assert message in str(caught.value)


def test_overrides_dotted_and_nested_are_the_same():
    expected = replace(MAMBA, layers=5, mixer=replace(MAMBA.mixer, state=32))
    assert MAMBA.with_overrides({"mixer.state": 32, "layers": 5}) == expected
    assert MAMBA.with_overrides({"mixer": {"state": 32}, "layers": 5}) == expected
    assert MAMBA.with_overrides({}) == MAMBA


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        MAMBA.width = 3  # type: ignore[misc]


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mamba-tiny'"):
        preset("mamba-tinny")


def test_derived_sizes():
    assert MAMBA.dt_rank == 2
    assert replace(MAMBA, width=33).dt_rank == 3  # rounded up
    assert MAMBA.feedforward_hidden is None
    assert TRANSFORMER.with_overrides({"feedforward.hidden": None, "width": 768}).feedforward_hidden == 2048
