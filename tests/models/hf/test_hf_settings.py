"""Their config.json in our words and back; what one side cannot do is refused in one line."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from their_models import DRAWN, PLAIN, transformers

from models import hf
from models.config import BlockConfig, HybridConfig, ModelConfig
from models.errors import ConfigError
from models.feedforward.mlp import MLPConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.mixers.attention import AttentionConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.presets import PRESETS

LLAMA, PHI3, MAMBA, MAMBA2 = PLAIN
TYPES = {LLAMA: "llama", PHI3: "phi3", MAMBA: "mamba", MAMBA2: "mamba2"}


def theirs(architecture: str, **changes) -> dict:
    values = {"architectures": [architecture], "model_type": TYPES[architecture]} | PLAIN[architecture] | changes
    return {key: value for key, value in values.items() if value != "absent"}


def refused(call, *said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("architecture", PLAIN)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_there_and_back(architecture, data):
    """What transformers would make of our settings is what it made of its own, in all that it computes with."""
    cls = getattr(transformers, architecture).config_class
    given_ = cls(**data.draw(DRAWN[architecture]))
    written = json.loads(json.dumps(given_.to_dict())) | {"architectures": [architecture]}
    config = hf.from_settings(written)
    back = json.loads(json.dumps(hf.to_settings(config, architecture)))
    assert hf.from_settings(back) == config
    again = cls(**back).to_dict()
    free = {"residual_in_fp32", "chunk_size", "max_position_embeddings", "architectures", "dtype", "rope_theta"}
    for key, value in given_.to_dict().items():
        if key == "head_dim" and architecture == PHI3:
            continue
        if key == "pad_token_id" and config.tie_embeddings:
            continue
        assert key in free or again[key] == value, key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer-tiny", LLAMA),
        ("sliding-tiny", PHI3),
        ("phi3-mini", PHI3),
        ("mamba-tiny", MAMBA),
        ("mamba2-tiny", MAMBA2),
    ],
)
def test_presets_come_back(name, expected):
    config = PRESETS[name]
    assert hf.counterpart(config) == expected
    assert hf.from_settings(hf.to_settings(config)) == config


def test_phi3_mini_is_phi3_mini():
    """The published config.json, in what it says of the shape, is our preset with its window."""
    published = {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1, "embd_pdrop": 0.0,
        "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32064,
    }  # fmt: skip
    assert hf.from_settings(published | {"sliding_window": None}) == PRESETS["phi3-mini"]
    config = PRESETS["phi3-mini"]
    assert hf.from_settings(published) == replace(config, mixer=replace(config.mixer, window=2047))


@pytest.mark.parametrize("architecture", PLAIN)
def test_what_is_left_out_is_as_transformers_has_it(architecture):
    needed = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    needed |= {"num_heads", "head_dim", "n_groups"} if architecture == MAMBA2 else set()
    few = {key: value for key, value in theirs(architecture).items() if key in needed}
    few["model_type"] = TYPES[architecture]
    cls = getattr(transformers, architecture).config_class
    whole = cls(**few).to_dict() | {"architectures": None}
    pad = {} if architecture in (LLAMA, PHI3) else {"pad_token_id": None}
    if architecture == PHI3:
        pad = {"pad_token_id": 3}
        whole |= pad  # its default is beyond this vocabulary
    assert hf.from_settings(few | pad) == hf.from_settings(whole)


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"rope_theta": 500.0}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": None}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 7.0}, 500.0),
        ({"rope_parameters": {"rope_theta": 500}}, 500.0),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 500.0}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, 10000.0),
        ({}, 10000.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", [LLAMA, PHI3])
def test_rotary_base_old_and_new(architecture, settings, base):
    mixer = hf.from_settings(theirs(architecture, **settings)).mixer
    assert isinstance(mixer, AttentionConfig)
    assert mixer.rotary_base == base
    cls = getattr(transformers, architecture).config_class
    assert cls(**json.loads(json.dumps(theirs(architecture, **settings)))).rope_parameters["rope_theta"] == base


def test_padding_tokens():
    def index(architecture, **changes):
        return hf.from_settings(theirs(architecture, vocab_size=32064, **changes)).padding_index

    assert index(LLAMA, pad_token_id=7) == index(PHI3, pad_token_id=7) == 7
    assert index(LLAMA, pad_token_id=-1) == 32063  # as torch's embedding counts
    assert index(LLAMA, pad_token_id="absent") is None
    assert index(PHI3, pad_token_id="absent") == 32000
    assert index(PHI3, pad_token_id=None) is None
    assert index(LLAMA, pad_token_id=7, tie_word_embeddings=True) is None


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0, {"__float__": "Infinity"}], None, "absent"], ids=str)
def test_no_limit_of_step_sizes(limit):
    assert hf.from_settings(theirs(MAMBA2, time_step_limit=limit)).mixer.kind == "mamba2"


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_are_normed_by_themselves(groups):
    mixer = hf.from_settings(theirs(MAMBA2, n_groups=groups)).mixer
    assert isinstance(mixer, Mamba2Config)
    assert mixer.grouped_norm


IN = [
    (LLAMA, {"architectures": ["LamaForCausalLM"]}, "'LamaForCausalLM': did you mean 'LlamaForCausalLM'?"),
    (LLAMA, {"architectures": ["LlamaModel"]}, "did you mean 'LlamaForCausalLM'?"),
    (LLAMA, {"architectures": ["T5"]}, "known: LlamaForCausalLM, Mamba2ForCausalLM"),
    (LLAMA, {"architectures": []}, "architectures = [] must name one"),
    (LLAMA, {"architectures": "LlamaForCausalLM"}, "must name one"),
    (LLAMA, {"architectures": None, "model_type": "lama"}, "unknown model_type 'lama': did you mean 'llama'?"),
    (LLAMA, {"architectures": "absent", "model_type": "absent"}, "neither architectures nor model_type"),
    (LLAMA, {"model_type": "mistral"}, "model_type = 'mistral' is not supported: only 'llama'"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    (LLAMA, {"vocab_size": "absent"}, "needs 'vocab_size', which is missing"),
    (LLAMA, {"hidden_size": "absent"}, "needs 'hidden_size', which is missing"),
    (LLAMA, {"intermediate_size": None}, "needs 'intermediate_size', which is missing"),
    (LLAMA, {"vocab_size": 0}, "vocab_size = 0 is not supported: it must be a whole number, at least 1"),
    (LLAMA, {"vocab_size": True}, "vocab_size = True"),
    (LLAMA, {"hidden_size": "big"}, "hidden_size = 'big'"),
    (LLAMA, {"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5"),
    (LLAMA, {"hidden_size": 18}, "hidden_size = 18 is not supported: it must be a multiple of num_attention_heads = 4"),
    (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads = 3 is not supported: it must divide"),
    (LLAMA, {"head_dim": 5}, "head_dim = 5 is not supported: rotary positions need an even one"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported: only 'silu'"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias = True is not supported: only False"),
    (LLAMA, {"attention_bias": "yes"}, "attention_bias = 'yes' is not supported: it must be true or false"),
    (LLAMA, {"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported: only 0.0"),
    (LLAMA, {"sliding_window": 8}, "sliding_window = 8 is not supported: only None; with a window"),
    (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps = 0 is not supported: it must be a number above 0"),
    (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
    (LLAMA, {"pad_token_id": 40}, "pad_token_id = 40 is not supported: it must be below vocab_size = 40"),
    (LLAMA, {"pad_token_id": -41}, "pad_token_id = -41"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type = 'llama3'"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type = 'linear'"),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn' is not supported: only"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor = 0.5 is not"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention"),
    (LLAMA, {"rope_parameters": "default"}, "rope_parameters = 'default' is not supported: it must be a table"),
    (LLAMA, {"rope_theta": 1.0}, "rope_theta = 1.0 is not supported: it must be a number above 1"),
    (LLAMA, {"rope_parameters": {"rope_theta": "big"}}, "rope_parameters.rope_theta = 'big'"),
    (PHI3, {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "'longrope'"),
    (PHI3, {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75"),
    (PHI3, {"attention_bias": True}, "attention_bias = True"),
    (PHI3, {"sliding_window": 0}, "sliding_window = 0"),
    (PHI3, {"resid_pdrop": 0.1}, "embd_pdrop = 0.0 is not supported: only resid_pdrop = 0.1"),
    (PHI3, {"resid_pdrop": 1.0, "embd_pdrop": 1.0}, "resid_pdrop = 1.0"),
    (MAMBA, {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    (MAMBA, {"use_bias": True}, "use_bias = True is not supported: only False"),
    (MAMBA, {"use_conv_bias": False}, "use_conv_bias = False is not supported: only True"),
    (MAMBA, {"intermediate_size": 25}, "intermediate_size = 25 is not supported: only 24, expand x hidden_size"),
    (MAMBA, {"expand": 1.5}, "expand = 1.5"),
    (MAMBA, {"time_step_rank": "full"}, "time_step_rank = 'full'"),
    (MAMBA, {"time_step_min": 0.5}, "time_step_min = 0.5 is not supported: it must be at most time_step_max = 0.1"),
    (MAMBA, {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon = -1e-05"),
    (MAMBA, {"rms_norm": False}, "rms_norm = False is not supported: only True: the norms must be RMSNorm"),
    (MAMBA2, {"time_step_limit": [0.0, 0.1]}, "time_step_limit = [0.0, 0.1] is not supported: only (0, infinity)"),
    (MAMBA2, {"time_step_limit": 3}, "time_step_limit = 3"),
    (MAMBA2, {"num_heads": 3}, "num_heads = 3 is not supported: num_heads x head_dim must be expand x hidden_size"),
    (MAMBA2, {"n_groups": 3}, "n_groups = 3 is not supported: it must divide num_heads = 4"),
    (MAMBA2, {"use_bias": True}, "use_bias = True"),
    (MAMBA2, {"use_conv_bias": False}, "use_conv_bias = False"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changes", "said"), IN, ids=lambda value: str(value)[:60])
def test_refused_on_the_way_in(architecture, changes, said):
    hf.from_settings(theirs(architecture))
    refused(lambda: hf.from_settings(theirs(architecture, **changes)), said)


def model(mixer, **changes) -> ModelConfig:
    usual = {"feedforward": SwiGLUConfig(hidden=8)} if isinstance(mixer, AttentionConfig) else {}
    return ModelConfig(**({"vocabulary": 20, "width": 8, "layers": 2, "mixer": mixer} | usual | changes))


ATTENTION = AttentionConfig(heads=2)
SSD = Mamba2Config(head_width=4, groups=2)
HYBRID = HybridConfig(pattern="MA", blocks={
    "M": BlockConfig(mixer=MambaConfig()), "A": BlockConfig(mixer=ATTENTION, feedforward=SwiGLUConfig()),
})  # fmt: skip
OUT = [
    (model(None, hybrid=HYBRID), "hybrid.pattern = 'MA'"),
    (PRESETS["mamba3-tiny"], "mixer 'mamba3': known: attention, mamba, mamba2"),
    (PRESETS["lstm-tiny"], "mixer 'lstm'"),
    (PRESETS["moe-tiny"], "feedforward = 'moe' is not supported: only 'swiglu'"),
    (PRESETS["gpt1"], "'layernorm'"),
    (model(ATTENTION, feedforward=None), "feedforward = None"),
    (model(ATTENTION, feedforward=MLPConfig()), "feedforward = 'mlp'"),
    (model(ATTENTION, norm="layernorm"), "norm = 'layernorm' is not supported: only 'rmsnorm'"),
    (model(ATTENTION, post_norm=True), "post_norm = True"),
    (model(ATTENTION, positions=9), "positions = 9"),
    (model(ATTENTION, head_bias=True, tie_embeddings=False), "head_bias = True"),
    (model(replace(ATTENTION, rotary=False)), "mixer.rotary = False"),
    (model(replace(ATTENTION, causal=False)), "mixer.causal = False"),
    (model(replace(ATTENTION, conv_width=4)), "mixer.conv_width = 4"),
    (model(replace(ATTENTION, bias=True, window=4)), "mixer.bias = True"),
    (model(replace(ATTENTION, bias=True), dropout=0.1), "dropout = 0.1"),
    (model(AttentionConfig(heads=3, head_width=4)), "multiple of mixer.heads"),
    (model(MambaConfig(), feedforward=SwiGLUConfig()), "feedforward = 'swiglu'"),
    (model(MambaConfig(negative_eigenvalues=True)), "mixer.negative_eigenvalues = True"),
    (model(MambaConfig(), dropout=0.1), "dropout = 0.1"),
    (model(MambaConfig(), padding_index=3, tie_embeddings=False), "padding_index = 3"),
    (model(replace(SSD, negative_eigenvalues=True)), "mixer.negative_eigenvalues = True"),
    (model(replace(SSD, grouped_norm=False)), "mixer.grouped_norm = False"),
    (model(SSD, norm_eps=1e-3), "mixer.norm_eps = 1e-05 is not supported: only norm_eps = 0.001"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "said"), OUT, ids=lambda value: str(value)[:60] if isinstance(value, str) else "")
def test_refused_on_the_way_out(config, said):
    refused(lambda: hf.to_settings(config), said)


def test_where_nothing_stands_in_the_way():
    untied = {"padding_index": 3, "tie_embeddings": False}
    whole = replace(SSD, groups=1, grouped_norm=False)
    for config in (model(ATTENTION), model(MambaConfig()), model(SSD), model(whole)):
        assert hf.to_settings(config)
    assert hf.counterpart(model(replace(ATTENTION, bias=True), **untied)) == LLAMA
    assert hf.counterpart(model(ATTENTION, **untied)) == PHI3
    assert hf.from_settings(hf.to_settings(model(ATTENTION, dropout=0.1))).dropout == 0.1
    assert hf.to_settings(model(ATTENTION, **untied), LLAMA)["architectures"] == [LLAMA]


def test_another_architecture_than_the_counterpart():
    refused(lambda: hf.to_settings(model(replace(ATTENTION, window=4)), LLAMA), "mixer.window = 4")
    refused(lambda: hf.to_settings(model(ATTENTION), MAMBA), "mixer = 'attention' is not supported: only 'mamba'")
    refused(lambda: hf.to_settings(model(ATTENTION), "LlamaForCasualLM"), "did you mean 'LlamaForCausalLM'?")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_value_ends_in_anything_but_one_line(data):
    junk = st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=3) | st.lists(st.integers())
    junk |= st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "type", "x"]), junk, max_size=2)
    architecture = data.draw(st.sampled_from(list(PLAIN)))
    more = ("rope_parameters", "rope_scaling", "time_step_limit", "time_step_rank", "resid_pdrop")
    keys = [*theirs(architecture), *more]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), junk, min_size=1, max_size=3))
    said = None
    try:
        assert isinstance(hf.from_settings(theirs(architecture, **changes)), ModelConfig)
    except ConfigError as error:
        said = str(error)
    assert said is None or (said and "\n" not in said)
