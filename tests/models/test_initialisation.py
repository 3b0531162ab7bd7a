"""The first weights: fair, reproducible, and as the papers say."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.config import AttentionConfig, MambaConfig, ModelConfig, SwiGLUConfig
from models.language_model import LanguageModel
from models.presets import PRESETS

SMALL = [name for name in PRESETS if name.endswith(("-tiny", "-1m", "-4m", "-30m"))]
MAMBA = ModelConfig(vocabulary=64, width=64, layers=3, mixer=MambaConfig(state=5, dt_min=0.002, dt_max=0.05))
TRANSFORMER = ModelConfig(
    vocabulary=64, width=64, layers=3, mixer=AttentionConfig(heads=4), feedforward=SwiGLUConfig(), tie_embeddings=False
)
both = pytest.mark.parametrize("config", [MAMBA, TRANSFORMER], ids=["mamba", "transformer"])


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_first_loss_is_that_of_a_uniform_guess(name):
    config = PRESETS[name]
    model = LanguageModel(config, seed=0)
    inputs, targets = torch.randint(config.vocabulary, (2, 2, 96), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert loss == pytest.approx(math.log(config.vocabulary), rel=0.02)


@both
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


@both
def test_nothing_is_left_unset(config):
    for name, parameter in LanguageModel(config, seed=0).named_parameters():
        assert parameter.device.type == "cpu", name
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() > 0, name


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
def test_the_floor_of_dt():
    config = MAMBA.with_overrides({"mixer.dt_floor": 0.01})
    dt = F.softplus(LanguageModel(config, seed=0).blocks[0].mixer.dt_bias)
    assert dt.min() == pytest.approx(0.01, rel=1e-4)


@both
@torch.no_grad()
def test_linear_layers_are_uniform_and_residual_writers_scaled(config):
    model = LanguageModel(config, seed=0)
    branches = 3 if config is MAMBA else 6
    writers = ("out_proj.weight", "o_proj.weight", "down_proj.weight")
    checked = 0
    for name, weight in model.named_parameters():
        if not name.endswith("_proj.weight"):
            continue
        bound = 1 / math.sqrt(weight.shape[1])
        if name.endswith(writers):
            bound /= math.sqrt(branches)
            checked += 1
        assert weight.abs().max() <= bound * (1 + 1e-6), name
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
    assert checked == branches
    for weight in {model.embedding.weight, model.head.weight}:
        assert weight.std() == pytest.approx(1 / 8, rel=0.1)  # 1 / sqrt(64)


@both
def test_norms_start_at_one_and_the_last_at_a_quarter(config):
    norms = {name: p for name, p in LanguageModel(config, seed=0).named_parameters() if "norm" in name}
    assert len(norms) == (4 if config is MAMBA else 7)
    for name, weight in norms.items():
        assert torch.equal(weight, torch.full_like(weight, 0.25 if name == "norm.weight" else 1.0)), name


def test_what_drifts_in_16_bits_stays_in_float32():
    model = LanguageModel(MAMBA, seed=0, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        wide = name.endswith(("A_log", ".D", "dt_bias"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert torch.get_default_dtype() == torch.float32


@both
def test_every_parameter_is_in_one_group(config):
    model = LanguageModel(config, seed=0)
    decay, rest = model.parameter_groups(0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(parameter) for group in (decay, rest) for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    free = {names[id(parameter)] for parameter in rest["params"]}
    for name, parameter in model.named_parameters():
        exempt = name.endswith(("A_log", ".D", "dt_bias", "norm.weight", "conv_bias"))
        assert (name in free) == exempt, name
        assert exempt == (parameter.ndim < 2 or name.endswith("A_log"))
