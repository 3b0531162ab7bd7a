"""The first weights: fair, reproducible, and as the papers say."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
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
from models.presets import PRESETS

SMALL = [*(name for name in PRESETS if name.endswith(("-tiny", "-1m", "-4m", "-30m"))), "gpt1"]


def model(mixer, feedforward=None, **settings) -> ModelConfig:
    return ModelConfig(vocabulary=64, width=64, layers=3, mixer=mixer, feedforward=feedforward, **settings)


DT = {"dt_min": 0.002, "dt_max": 0.05}
MAMBA = model(MambaConfig(state=5, **DT))
MAMBA2 = model(Mamba2Config(state=5, head_width=2, groups=2, A_min=2.0, A_max=9.0, **DT))
MAMBA3 = model(Mamba3Config(state=6, head_width=2, groups=2, **DT), MLPConfig())
RANKED = model(Mamba3Config(state=6, head_width=4, rank=4, **DT))
LSTM = model(LSTMConfig(hidden=48), MoEConfig(experts=4, hidden=40))
TRANSFORMER = model(AttentionConfig(heads=4), SwiGLUConfig(), tie_embeddings=False)
ENCODER = model(
    AttentionConfig(heads=4, bias=True, conv_width=3, causal=True), MLPConfig(), norm="layernorm", post_norm=True,
    positions=50, tie_embeddings=False, head_bias=True, padding_index=9,
)  # fmt: skip
MODELS = {
    "mamba": MAMBA, "mamba2": MAMBA2, "mamba3": MAMBA3, "ranked": RANKED, "lstm": LSTM, "transformer": TRANSFORMER,
    "encoder": ENCODER,
}  # fmt: skip
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def test_every_part_has_a_model():
    blocks = [block for config in MODELS.values() for block in config.kinds]
    assert {block.mixer.kind for block in blocks} == set(MIXERS)
    assert {block.feedforward.kind for block in blocks if block.feedforward} == set(FEEDFORWARDS)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_first_loss_is_that_of_a_uniform_guess(name):
    config = PRESETS[name]
    model = LanguageModel(config, seed=0)
    inputs, targets = torch.randint(config.vocabulary, (2, 2, 96), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert loss == pytest.approx(math.log(config.vocabulary), rel=0.02)


@each_model
def test_a_seed_is_all_that_matters(config):
    first = LanguageModel(config, seed=5).state_dict()
    before = torch.random.get_rng_state()
    torch.randn(17)
    moved = torch.random.get_rng_state()
    again = LanguageModel(config, seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), moved)  # and it draws nothing itself
    assert not torch.equal(before, moved)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = LanguageModel(config, seed=6).state_dict()
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


ZERO = ("qkv_proj.bias", "o_proj.bias", "up_proj.bias", "down_proj.bias", "norm.bias", "head.bias")


@each_model
def test_nothing_is_left_unset(config):
    for name, parameter in LanguageModel(config, seed=0).named_parameters():
        assert parameter.device.type == "cpu", name
        assert parameter.isfinite().all(), name
        assert (parameter.abs().max() > 0) != name.endswith(ZERO), name


@torch.no_grad()
def test_the_own_parameters_of_mamba():
    for block in LanguageModel(MAMBA, seed=0).blocks:
        mixer = block.mixer
        torch.testing.assert_close(mixer.A, -torch.arange(1.0, 6.0).expand(128, 5))
        dt = F.softplus(mixer.dt_bias)
        assert dt.min() >= 0.002 * (1 - 1e-4)
        assert dt.max() <= 0.05 * (1 + 1e-4)
        assert dt.log().std() == pytest.approx(math.log(25) / math.sqrt(12), rel=0.2)  # log-uniform, not a constant
        assert torch.equal(mixer.D, torch.ones(128))
        assert mixer.conv_weight.abs().max() <= 0.5  # 1 / sqrt(4 taps)
        assert mixer.conv_weight.abs().max() > 0.45


@torch.no_grad()
@pytest.mark.parametrize("config", [MAMBA2, MAMBA3, RANKED], ids=["mamba2", "mamba3", "ranked"])
def test_step_sizes_are_log_uniform(config):
    for block in LanguageModel(config, seed=0).blocks:
        dt = F.softplus(block.mixer.dt_bias)
        assert dt.min() >= 0.002 * (1 - 1e-4)
        assert dt.max() <= 0.05 * (1 + 1e-4)
        assert dt.log().std() == pytest.approx(math.log(25) / math.sqrt(12), rel=0.3)
        assert torch.equal(block.mixer.D, torch.ones_like(dt))


@torch.no_grad()
def test_the_own_parameters_of_mamba2():
    rates = torch.cat([block.mixer.A for block in LanguageModel(MAMBA2, seed=0).blocks])
    assert -9 <= rates.min() < -8.5
    assert -2.5 < rates.max() <= -2
    assert rates.mean() == pytest.approx(-5.5, abs=0.6)  # uniform, neither log-uniform nor 1 to heads
    for block in LanguageModel(PRESETS["mamba2-1m"], seed=0).blocks:
        assert -16 <= block.mixer.A.min() <= block.mixer.A.max() <= -1
        dt = F.softplus(block.mixer.dt_bias)
        assert 0.001 * (1 - 1e-4) <= dt.min() <= dt.max() <= 0.1 * (1 + 1e-4)
        assert torch.equal(block.mixer.norm_weight, torch.ones_like(block.mixer.norm_weight))
        assert 0.45 < block.mixer.conv_weight.abs().max() <= 0.5  # 1 / sqrt(4 taps)


@torch.no_grad()
def test_the_own_parameters_of_mamba3():
    for config in (MAMBA3, RANKED, PRESETS["mamba3-1m"]):
        for block in LanguageModel(config, seed=0).blocks:
            mixer = block.mixer
            for ones in (mixer.B_bias, mixer.C_bias, mixer.B_norm_weight, mixer.C_norm_weight):
                assert torch.equal(ones, torch.ones_like(ones))
            if config is RANKED:
                for weight, value in ((mixer.map_x, 0.25), (mixer.map_z, 1.0), (mixer.map_y, 0.25)):
                    assert torch.equal(weight, torch.full_like(weight, value))


@torch.no_grad()
def test_the_own_parameters_of_the_lstm():
    for block in LanguageModel(LSTM, seed=0).blocks:
        gates = block.mixer.bias.view(4, 48)
        assert gates.tolist() == [[0.0] * 48, [1.0] * 48, [0.0] * 48, [0.0] * 48]  # the forget gate alone is open
        for weight, fan_in in ((block.mixer.input_weight, 64), (block.mixer.hidden_weight, 48)):
            assert weight.abs().max() <= fan_in**-0.5
            assert weight.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
        experts = block.feedforward
        for weight, bound in ((experts.gate_up, 64**-0.5), (experts.down, (6 * 40) ** -0.5)):
            assert weight.abs().max() <= bound
            for one in weight:
                assert one.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("config", [MAMBA, MAMBA2, MAMBA3], ids=["mamba", "mamba2", "mamba3"])
def test_the_floor_of_dt(config):
    dt = F.softplus(LanguageModel(config.with_overrides({"mixer.dt_floor": 0.01}), seed=0).blocks[0].mixer.dt_bias)
    assert dt.min() == pytest.approx(0.01, rel=1e-4)


@each_model
@torch.no_grad()
def test_linear_layers_are_uniform_and_residual_writers_scaled(config):
    model = LanguageModel(config, seed=0)
    branches = 3 if config.feedforward is None else 6
    writers = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "feedforward.down")
    checked = 0
    for name, weight in model.named_parameters():
        if not name.endswith(("_proj.weight", "feedforward.down", "feedforward.gate_up", "router.weight")):
            continue
        bound = 1 / math.sqrt(weight.shape[-1])
        if name.endswith(writers):
            bound /= math.sqrt(branches)
            checked += 1
        assert weight.abs().max() <= bound * (1 + 1e-6), name
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
    assert checked == branches
    for weight in {model.embedding.weight, model.head.weight, *([model.positions.weight] if model.positions else [])}:
        assert weight.std() == pytest.approx(1 / 8, rel=0.1)  # 1 / sqrt(64)


NORM = ("mixer_norm.weight", "feedforward_norm.weight", "norm_weight")


@each_model
def test_norms_start_at_one_and_the_last_at_a_quarter(config):
    norms = {
        name: p for name, p in LanguageModel(config, seed=0).named_parameters() if name.endswith((*NORM, "norm.weight"))
    }
    own = {"mamba2": 1, "mamba3": 2}.get(config.mixer.kind, 0)
    assert len(norms) == 3 * (own + (1 if config.feedforward is None else 2)) + (0 if config.post_norm else 1)
    last = "blocks.2.feedforward_norm.weight" if config.post_norm else "norm.weight"
    for name, weight in norms.items():
        assert torch.equal(weight, torch.full_like(weight, 0.25 if name == last else 1.0)), name


WIDE = ("A_log", ".D", "dt_bias", "B_bias", "C_bias")


@each_model
def test_what_drifts_in_16_bits_stays_in_float32(config):
    model = LanguageModel(config, seed=0, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(WIDE) else torch.bfloat16), name
    assert torch.get_default_dtype() == torch.float32


@each_model
def test_every_parameter_is_in_one_group(config):
    model = LanguageModel(config, seed=0)
    decay, rest = model.parameter_groups(0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(parameter) for group in (decay, rest) for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    free = {names[id(parameter)] for parameter in rest["params"]}
    for name, parameter in model.named_parameters():
        exempt = name.endswith((*WIDE, *NORM, "norm.weight", "bias"))
        assert (name in free) == exempt, name
        # matrices decay, and so do stacks of them; what stands per head does not
        assert exempt == (parameter.ndim < 2 or name.endswith(("A_log", "B_bias", "C_bias"))), name
