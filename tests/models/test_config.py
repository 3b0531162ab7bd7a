"""Configurations: strict, invertible, and without a setting that does nothing."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from models.config import BlockConfig, HybridConfig, ModelConfig
from models.errors import ConfigError
from models.feedforward import FEEDFORWARDS
from models.feedforward.mlp import MLPConfig
from models.feedforward.moe import MoEConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.mixers.attention import AttentionConfig
from models.mixers.lstm import LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.presets import PRESETS, preset


def model(mixer=None, feedforward=None, **settings) -> ModelConfig:
    given = {"vocabulary": 32, "width": 32, "layers": 2, **settings}
    return ModelConfig(mixer=mixer, feedforward=feedforward, **given)


TRANSFORMER = model(AttentionConfig(heads=4), SwiGLUConfig(hidden=48))
MAMBA = model(MambaConfig())
HYBRID = model(
    layers=4,
    hybrid=HybridConfig(
        pattern="MMA",
        blocks={
            "M": BlockConfig(mixer=MambaConfig(state=4)),
            "A": BlockConfig(mixer=AttentionConfig(heads=4), feedforward=SwiGLUConfig(hidden=48)),
        },
    ),
)
# where a setting is changed: a model that has it, and the way to it
BASES = {
    ModelConfig: (TRANSFORMER, ""),
    HybridConfig: (HYBRID, "hybrid."),
    BlockConfig: (HYBRID, "hybrid.blocks.A."),
    AttentionConfig: (TRANSFORMER, "mixer."),
    MambaConfig: (MAMBA, "mixer."),
    Mamba2Config: (model(Mamba2Config(state=6, head_width=16, groups=2)), "mixer."),
    Mamba3Config: (model(Mamba3Config(state=8, head_width=16)), "mixer."),
    LSTMConfig: (model(LSTMConfig()), "mixer."),
    SwiGLUConfig: (TRANSFORMER, "feedforward."),
    MLPConfig: (model(AttentionConfig(heads=4), MLPConfig(hidden=40)), "feedforward."),
    MoEConfig: (model(AttentionConfig(heads=4), MoEConfig(experts=4, top_k=2, hidden=24)), "feedforward."),
}
STEP_SIZES = {"dt_min": 0.05, "dt_max": 0.9, "dt_floor": 0.5}
# field: a value unlike the default; `kind` names the class and has no second value
OTHER = {
    ModelConfig: {"vocabulary": 33, "width": 40, "layers": 3, "mixer": AttentionConfig(heads=2), "feedforward": None,
                  "hybrid": replace(HYBRID.hybrid, pattern="MA"), "norm": "layernorm", "norm_eps": 0.1,
                  "post_norm": True, "positions": 12,
                  "dropout": 0.5, "tie_embeddings": False, "head_bias": True, "padding_index": 5},
    HybridConfig: {"pattern": "AMM", "blocks": {**HYBRID.hybrid.blocks, "A": BlockConfig(mixer=LSTMConfig())}},
    BlockConfig: {"mixer": AttentionConfig(heads=2), "feedforward": None},
    AttentionConfig: {"heads": 2, "kv_heads": 2, "head_width": 6, "rotary": False, "rotary_base": 3.0, "window": 5,
                      "causal": False, "bias": True, "conv_width": 3, "backend": "reference"},
    MambaConfig: {"expand": 3, "state": 7, "conv_width": 3, "dt_rank": 5, **STEP_SIZES, "negative_eigenvalues": True,
                  "backend": "torch"},
    Mamba2Config: {"expand": 3, "state": 7, "head_width": 8, "groups": 4, "conv_width": 3, "A_min": 8.0, "A_max": 2.0,
                   **STEP_SIZES, "norm_eps": 0.1, "grouped_norm": False, "negative_eigenvalues": True,
                   "backend": "torch"},
    Mamba3Config: {"expand": 3, "state": 10, "head_width": 8, "groups": 2, "rank": 2, "rotated_fraction": 1.0,
                   "A_floor": 5.0, **STEP_SIZES, "norm_eps": 0.1, "backend": "torch"},
    LSTMConfig: {"hidden": 24, "backend": "reference"},
    SwiGLUConfig: {"hidden": 96},
    MLPConfig: {"hidden": 64, "activation": "relu", "bias": False},
    MoEConfig: {"experts": 5, "top_k": 3, "hidden": 32, "balance": 0.5},
}  # fmt: skip
# what else has to change with it for the model to be possible at all
ALONG = {
    (ModelConfig, "hybrid"): {"mixer": None, "feedforward": None},
    (ModelConfig, "head_bias"): {"tie_embeddings": False},
    (ModelConfig, "padding_index"): {"tie_embeddings": False},
}


def fingerprint(config: ModelConfig) -> list:
    """All that a configuration can show in: shapes, weights, logits, what runs, in training."""
    made = LanguageModel(config, seed=0)
    torch.manual_seed(0)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        hidden = made.hidden(tokens)
        logits = made.head(hidden.x)
    return [
        {name: (tuple(p.shape), p.double().sum().item()) for name, p in made.named_parameters()},
        tuple(logits.shape), logits.double().sum().item(), made.backend,
        [(used.load.tolist(), used.balance.item()) for used in hidden.routing],
    ]  # fmt: skip


CHANGES = [(cls, field.name) for cls in OTHER for field in fields(cls) if field.name != "kind"]


def test_every_class_of_settings_is_here():
    parts = [part.Config for part in (*MIXERS.values(), *FEEDFORWARDS.values())]
    assert set(OTHER) == set(BASES) == {ModelConfig, HybridConfig, BlockConfig, *parts}


@pytest.mark.parametrize(("cls", "name"), CHANGES, ids=[f"{cls.__name__}.{name}" for cls, name in CHANGES])
def test_no_setting_is_ignored(cls, name):
    assert name in OTHER[cls], "a new setting: give it a value here and see that it changes something"
    base, way = BASES[cls]
    along = ALONG.get((cls, name), {})
    if "mixer" not in along:
        base = replace(base, **along)
    if cls is ModelConfig:
        changed = replace(base, **along, **{name: OTHER[cls][name]})
    elif cls is HybridConfig:
        changed = replace(base, hybrid=replace(base.hybrid, **{name: OTHER[cls][name]}))
    else:
        changed = base.with_overrides({way + name: OTHER[cls][name]})
    assert changed != base
    assert fingerprint(changed) != fingerprint(base)
    assert fingerprint(base) == fingerprint(base)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name):
    config = PRESETS[name]
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert preset(name) is config


def attention(**settings):
    return {"mixer": {"kind": "attention", "heads": 4, **settings}}


def mixer(kind, **settings):
    return {"mixer": {"kind": kind, **settings}}


def feedforward(kind, **settings):
    return {"feedforward": {"kind": kind, **settings}}


def hybrid(pattern="MA", *, beside=None, **blocks):
    blocks = blocks or {letter: {"mixer": {"kind": "mamba"}} for letter in "MA"}
    return {"mixer": None, "hybrid": {"pattern": pattern, "blocks": blocks}, **(beside or {})}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocabulray": 3}, "unknown model setting 'vocabulray': did you mean 'vocabulary'?"),
        (mixer("mamba", sate=3), "unknown mixer setting 'sate': did you mean 'state'?"),
        (mixer("manba"), "unknown mixer 'manba': did you mean 'mamba'?"),
        (mixer(["mamba"]), "unknown mixer '['mamba']': did you mean 'mamba'?"),
        ({"mixer": {"state": 3}}, "mixer must be a table with a 'kind' (attention, mamba, mamba2, mamba3, lstm)"),
        ({"mixer": None}, "mixer must be a table"),
        (mixer("attention"), "heads"),
        (feedforward("swiglu", hiden=3), "unknown feedforward setting 'hiden': did you mean 'hidden'"),
        (feedforward("swigloo"), "unknown feedforward 'swigloo': did you mean 'swiglu'?"),
        ({"feedforward": 3}, "feedforward must be a table with a 'kind' (swiglu, mlp, moe), got 3"),
        ({"width": 0}, "model.width must be a positive whole number, got 0"),
        ({"layers": True}, "model.layers must be a positive whole number, got True"),
        ({"vocabulary": 3.5}, "model.vocabulary must be a positive whole number, got 3.5"),
        ({"norm": "rmsnrom"}, "model.norm = 'rmsnrom' is not known: did you mean 'rmsnorm'?"),
        ({"norm": 3}, "model.norm = 3 is not known: known: rmsnorm, layernorm"),
        ({"norm_eps": 0}, "model.norm_eps must be above 0"),
        ({"norm_eps": "small"}, "model.norm_eps must be a number, got 'small'"),
        ({"norm_eps": float("nan")}, "model.norm_eps must be a number, got nan"),
        ({"post_norm": 1}, "model.post_norm must be true or false, got 1"),
        ({"positions": 0}, "model.positions must be a positive whole number, got 0"),
        ({"dropout": 1.0}, "model.dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "model.dropout must be at least 0 and below 1, got -0.1"),
        ({"dropout": True}, "model.dropout must be a number, got True"),
        ({"tie_embeddings": "yes"}, "model.tie_embeddings must be true or false, got 'yes'"),
        ({"head_bias": True}, "model.head_bias needs a head of its own: set tie_embeddings = false"),
        ({"padding_index": 3}, "model.padding_index needs a head of its own: set tie_embeddings = false"),
        ({"padding_index": 32, "tie_embeddings": False}, "model.padding_index = 32 is not in a vocabulary of 32"),
        ({"padding_index": -1, "tie_embeddings": False}, "model.padding_index = -1 is not in a vocabulary of 32"),
        ({"padding_index": 1.5, "tie_embeddings": False}, "model.padding_index = 1.5 is not in a vocabulary of 32"),
        ({"padding_index": "[PAD]", "tie_embeddings": False}, "model.padding_index = [PAD] is not in a vocabulary of"),
        (attention(heads=5), "model.width = 32 is not a multiple of attention.heads = 5"),
        (attention(heads=32), "rotary positions need an even head width, got 1"),
        (attention(head_width=3), "rotary positions need an even head width, got 3"),
        (attention(kv_heads=3), "attention.heads = 4 is not a multiple of attention.kv_heads = 3"),
        (attention(rotary_base=1), "attention.rotary_base must be above 1, got 1"),
        (attention(window=0), "attention.window must be a positive whole number, got 0"),
        (attention(conv_width=0), "attention.conv_width must be a positive whole number, got 0"),
        (attention(head_width=0), "attention.head_width must be a positive whole number, got 0"),
        (attention(causal="no"), "attention.causal must be true or false, got 'no'"),
        (attention(causal=False, window=4), "attention.causal = false sees both ways; window and conv_width look back"),
        (attention(causal=False, conv_width=4), "attention.causal = false sees both ways; window and conv_width"),
        (mixer("mamba", dt_min=0.2), "mamba needs 0 < dt_min <= dt_max, got 0.2, 0.1"),
        (mixer("mamba", dt_floor=0), "mamba.dt_floor must be above 0"),
        (mixer("mamba", dt_rank=0), "mamba.dt_rank must be a positive whole number, got 0"),
        (mixer("mamba", negative_eigenvalues=1), "mamba.negative_eigenvalues must be true or false, got 1"),
        (mixer("mamba2", head_width=20), "the expanded width = 64 is not a multiple of mamba2.head_width = 20"),
        (mixer("mamba2", head_width=16, groups=3), "the number of heads = 4 is not a multiple of mamba2.groups = 3"),
        (mixer("mamba2", A_min=17), "mamba2 needs 0 < A_min <= A_max, got 17, 16.0"),
        (mixer("mamba2", A_min="one"), "mamba2.A_min must be a number, got 'one'"),
        (mixer("mamba2", norm_eps=0), "mamba2.norm_eps must be above 0, got 0"),
        (mixer("mamba2", grouped_norm="no"), "mamba2.grouped_norm must be true or false, got 'no'"),
        (mixer("mamba2", dt_max=0.0001), "mamba2 needs 0 < dt_min <= dt_max, got 0.001, 0.0001"),
        (mixer("mamba3", rotated_fraction=0.7), "mamba3.rotated_fraction = 0.7 is not known: known: 0.5, 1.0"),
        (mixer("mamba3", state=3), "mamba3.state = 3 leaves no pair to rotate; at least 4"),
        (mixer("mamba3", state=1, rotated_fraction=1.0), "mamba3.state = 1 leaves no pair to rotate; at least 2"),
        (mixer("mamba3", head_width=20), "the expanded width = 64 is not a multiple of mamba3.head_width = 20"),
        (mixer("mamba3", head_width=16, groups=3), "the number of heads = 4 is not a multiple of mamba3.groups = 3"),
        (mixer("mamba3", rank=0), "mamba3.rank must be a positive whole number, got 0"),
        (mixer("mamba3", A_floor=0), "mamba3 needs A_floor and norm_eps above 0, got 0, 1e-05"),
        (mixer("lstm", hidden=0), "lstm.hidden must be a positive whole number, got 0"),
        (feedforward("swiglu", hidden=0), "swiglu.hidden must be a positive whole number, got 0"),
        (feedforward("mlp", activation="rleu"), "mlp.activation = 'rleu' is not known: did you mean 'relu'?"),
        (feedforward("mlp", bias=0), "mlp.bias must be true or false, got 0"),
        (feedforward("moe"), "hidden"),
        (feedforward("moe", hidden=8, experts=2, top_k=3), "moe.top_k = 3 is more than moe.experts = 2"),
        (feedforward("moe", hidden=8, top_k=0), "moe.top_k must be a positive whole number, got 0"),
        (feedforward("moe", hidden=8, balance=-1), "moe.balance must be 0 or above, got -1"),
        (hybrid(beside=mixer("mamba")), "a model has either a mixer or a hybrid"),
        (hybrid(beside=feedforward("swiglu")), "the feed-forward layers of a hybrid stand in its blocks"),
        (hybrid("MXA"), "unknown letter 'X' in hybrid.pattern 'MXA': known: A, M"),
        (hybrid(""), "hybrid.pattern must name blocks by their letters, got ''"),
        (hybrid(3), "hybrid.pattern must name blocks by their letters, got 3"),
        (hybrid("M", MM={"mixer": {"kind": "mamba"}}), "hybrid.blocks are named by one letter each, got 'MM'"),
        (hybrid("M", M={}), "hybrid.blocks.M: missing 1 required keyword-only argument: 'mixer'"),
        (hybrid("M", M=3), "hybrid.blocks.M must be a table, got 3"),
        (hybrid("M", M={"mixer": {"kind": "manba"}}), "unknown mixer 'manba'"),
        (hybrid("M", M={"mixre": {"kind": "mamba"}}), "unknown hybrid.blocks.M setting 'mixre': did you mean 'mixer'?"),
        (hybrid("M", M={"mixer": {"kind": "attention", "heads": 5}}), "not a multiple of attention.heads = 5"),
        ({"mixer": None, "hybrid": "MMA"}, "hybrid must be a table with a pattern and blocks, got 'MMA'"),
        ({"mixer": None, "hybrid": {"pattern": "M"}}, "hybrid must be a table with a pattern and blocks"),
        (hybrid("MMM", M={"mixer": {"kind": "mamba"}}), "layers = 2 is less than one round of hybrid.pattern 'MMM'"),
    ],
    ids=lambda value: value[:48].replace(" ", "-") if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(MAMBA.to_dict() | values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neither_a_mixer_nor_a_hybrid():
    with pytest.raises(ConfigError, match="a model has either a mixer or a hybrid"):
        ModelConfig(vocabulary=8, width=8, layers=1)


def test_what_a_table_is_cannot_be_overridden():
    with pytest.raises(ConfigError, match=r"'mixer.kind' is what the table is"):
        MAMBA.with_overrides({"mixer.kind": "lstm"})


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
        ({"mixer": 3}, "'mixer' is a table; set one of its keys: mixer.kind, mixer.expand, mixer.state"),
        ({"hybrid.pattern": "M"}, "this model has no hybrid, so 'hybrid.pattern' means nothing"),
        ({"hybrid": "M"}, "this model has no hybrid, so 'hybrid' means nothing"),
        ({"padding_index": "[PAD]"}, "model.padding_index"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        MAMBA.with_overrides(overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mixer.state": 8}, "this model has no mixer, so 'mixer.state' means nothing"),
        ({"hybrid.blocks.X.mixer.state": 8}, "unknown model setting 'hybrid.blocks.X.mixer.state': known: A, M"),
        (
            {"hybrid.blocks.M.mixer.sate": 8},
            "unknown model setting 'hybrid.blocks.M.mixer.sate': did you mean 'state'?",
        ),
        (
            {"hybrid.blocks.M.feedforward.hidden": 8},
            "this model has no feedforward, so 'hybrid.blocks.M.feedforward.hidd",
        ),
        (
            {"hybrid.blocks.M.mixer": 8},
            "'hybrid.blocks.M.mixer' is a table; set one of its keys: hybrid.blocks.M.mixer.",
        ),
        ({"hybrid.blocks.M": 8}, "'hybrid.blocks.M' is a table; set one of its keys: hybrid.blocks.M.mixer, "),
        ({"hybrid.blocks": 8}, "'hybrid.blocks' is a table; set one of its keys: hybrid.blocks.M, hybrid.blocks.A"),
        ({"hybrid": 8}, "'hybrid' is a table; set one of its keys: hybrid.pattern, hybrid.blocks"),
        ({"hybrid.patern": "M"}, "unknown model setting 'hybrid.patern': did you mean 'pattern'?"),
        ({"hybrid.pattern": "MX"}, "unknown letter 'X' in hybrid.pattern 'MX': known: A, M"),
        ({"hybrid.blocks.A.mixer.heads": 5}, "model.width = 32 is not a multiple of attention.heads = 5"),
    ],
)
def test_overrides_of_a_hybrid_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        HYBRID.with_overrides(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_dotted_and_nested_are_the_same():
    expected = replace(MAMBA, layers=5, mixer=replace(MAMBA.mixer, state=32))
    assert MAMBA.with_overrides({"mixer.state": 32, "layers": 5}) == expected
    assert MAMBA.with_overrides({"mixer": {"state": 32}, "layers": 5}) == expected
    assert MAMBA.with_overrides({}) == MAMBA


def test_overrides_that_need_each_other_are_made_together():
    phi = PRESETS["phi3-mini"]
    for order in (["vocabulary", "padding_index"], ["padding_index", "vocabulary"]):
        changed = phi.with_overrides({key: {"vocabulary": 300, "padding_index": 299}[key] for key in order})
        assert changed == replace(phi, vocabulary=300, padding_index=299)
    with pytest.raises(ConfigError, match="padding_index = 32000 is not in a vocabulary of 300"):
        phi.with_overrides({"vocabulary": 300})
    with pytest.raises(ConfigError, match="padding_index needs a head of its own"):
        phi.with_overrides({"tie_embeddings": True})
    assert phi.with_overrides({"tie_embeddings": True, "padding_index": None}).tie_embeddings


@pytest.mark.parametrize("keys", [("feedforward", "feedforward.hidden"), ("feedforward.hidden", "feedforward")])
def test_a_setting_and_what_replaces_it_are_not_both_taken(keys):
    values = {"feedforward": None, "feedforward.hidden": 8}
    with pytest.raises(ConfigError, match="another setting"):
        TRANSFORMER.with_overrides({key: values[key] for key in keys})


def test_overrides_reach_into_the_blocks_of_a_hybrid():
    changed = HYBRID.with_overrides({"hybrid.blocks.M.mixer.state": 9, "hybrid.blocks.A.feedforward.hidden": 64})
    assert changed == HYBRID.with_overrides(
        {"hybrid": {"blocks": {"M": {"mixer": {"state": 9}}, "A": {"feedforward": {"hidden": 64}}}}}
    )
    assert [block.mixer.kind for block in changed.blocks] == ["mamba", "mamba", "attention", "mamba"]
    assert [block.mixer.state for block in changed.blocks if block.mixer.kind == "mamba"] == [9, 9, 9]
    assert changed.blocks[2].feedforward.hidden == 64
    assert HYBRID.hybrid.blocks["M"].mixer.state == 4  # the original is as it was
    assert HYBRID.with_overrides({"hybrid.pattern": "AM"}).blocks[0].mixer.kind == "attention"
    assert fingerprint(changed) != fingerprint(HYBRID)


def test_the_pattern_of_a_hybrid_is_repeated():
    kinds = {"M": "mamba", "A": "attention"}
    for layers, expected in ((3, "MMA"), (4, "MMAM"), (8, "MMAMMAMM")):
        config = replace(HYBRID, layers=layers)
        assert [block.mixer.kind for block in config.blocks] == [kinds[letter] for letter in expected]
        assert [block.mixer.kind for block in config.kinds] == ["mamba", "attention"]
        assert len(LanguageModel(config, seed=None).blocks) == layers


def test_one_that_looks_ahead_makes_the_model_one_that_does():
    assert HYBRID.causal
    assert not HYBRID.with_overrides({"hybrid.blocks.A.mixer.causal": False}).causal
    seeing = HYBRID.with_overrides({"hybrid.blocks.A.mixer.causal": False})
    assert seeing.with_overrides({"hybrid.pattern": "M"}).causal  # there it does not occur
    with pytest.raises(ConfigError, match="does nothing: the pattern 'M' has no 'A'"):
        replace(HYBRID, hybrid=replace(HYBRID.hybrid, pattern="M")).with_overrides(
            {"hybrid.blocks.A.mixer.causal": False}
        )
    assert TRANSFORMER.causal
    assert not TRANSFORMER.with_overrides({"mixer.causal": False}).causal


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-tiny") or "-" not in name])
def test_a_backend_for_every_mixer(name):
    config = PRESETS[name].with_backend("reference")
    assert {block.mixer.backend for block in config.blocks} == {"reference"}
    assert config != PRESETS[name]
    assert LanguageModel(config, seed=None).backend.name == "reference"
    assert config.with_backend("auto") == PRESETS[name]


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        MAMBA.width = 3  # type: ignore[misc]


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mamba-tiny'"):
        preset("mamba-tinny")


def test_of_many_presets_a_few_are_named():
    with pytest.raises(ConfigError) as refused:
        preset("q")
    assert str(refused.value).startswith(f"unknown model 'q': known: {sorted(PRESETS)[0]}, ")
    assert str(refused.value).endswith(f", {sorted(PRESETS)[11]} and {len(PRESETS) - 12} more (lab models lists them)")


def test_derived_sizes():
    assert MambaConfig().sizes(32) == (64, 16, 2)
    assert MambaConfig().sizes(33)[2] == 3  # rounded up
    assert SwiGLUConfig().size(768) == 2048
    assert SwiGLUConfig().size(8) == 64
    assert MLPConfig().size(24) == 96
    assert AttentionConfig(heads=6, kv_heads=2).sizes(96) == (6, 2, 16)
    assert AttentionConfig(heads=6, head_width=5).sizes(96) == (6, 6, 5)
    assert Mamba2Config(state=16, head_width=32, groups=2).sizes(96) == (192, 6, 192 + 2 * 2 * 16)
    assert Mamba3Config(state=16, head_width=32, groups=2, rank=3).sizes(96) == (192, 6, 3 * 2 * 16)
    assert [Mamba3Config(state=9, rotated_fraction=f).pairs for f in (0.5, 1.0)] == [2, 4]
