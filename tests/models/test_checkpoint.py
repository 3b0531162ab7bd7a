"""Models on disk: bit for bit, and every damage a one-line message."""

import json

import pytest
import torch
from safetensors import safe_open

from models import checkpoint, hf
from models.config import ModelConfig
from models.errors import ConfigError
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers.attention import AttentionConfig
from models.mixers.mamba import MambaConfig

CONFIGS = {
    "mamba": ModelConfig(vocabulary=29, width=16, layers=2, mixer=MambaConfig(state=4)),
    "transformer": ModelConfig(
        vocabulary=29, width=16, layers=2, mixer=AttentionConfig(heads=2, kv_heads=1), feedforward=SwiGLUConfig(),
        tie_embeddings=False,
    ),
}  # fmt: skip


def test_others_may_read_the_weights_as_any_new_file(tmp_path):
    model = LanguageModel(CONFIGS["transformer"], seed=0)
    checkpoint.save(model, tmp_path / "ours")
    hf.export(model, tmp_path / "theirs")
    (tmp_path / "plain").touch()
    for folder in ("ours", "theirs"):
        assert (tmp_path / folder / checkpoint.WEIGHTS).stat().st_mode == (tmp_path / "plain").stat().st_mode
        assert not list((tmp_path / folder).glob("*.part"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_comes_back_bit_for_bit(tmp_path, name, dtype):
    model = LanguageModel(CONFIGS[name], seed=1, dtype=dtype)
    checkpoint.save(model, tmp_path / "deep" / "folder")
    loaded = checkpoint.load(tmp_path / "deep" / "folder")
    assert loaded.config == model.config
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype, key
        assert after[key].requires_grad, key
        assert torch.equal(before[key], after[key]), key
    assert (loaded.head.weight is loaded.embedding.weight) == CONFIGS[name].tie_embeddings
    if dtype is torch.float32:
        text = torch.arange(14).view(2, 7)
        assert torch.equal(model(text), loaded(text))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_in_the_folder(tmp_path, name):
    checkpoint.save(LanguageModel(CONFIGS[name], seed=1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("head.weight" in file.keys()) == (not CONFIGS[name].tie_embeddings)  # noqa: SIM118
    content = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") < len(content)
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # safetensors' header, no pickle
    assert b"torch" not in content


def refused(folder, match: str | None = None) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(LanguageModel(CONFIGS["mamba"], seed=1), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    refused(saved, "no checkpoint")


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "no checkpoint")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights(saved, share):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: int(len(content) * share)])
    refused(saved, "damaged")


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\x00", b"[]", b"3", b"null", b'"text"', b"{}"])
def test_garbage_instead_of_a_configuration(saved, content):
    (saved / "config.json").write_bytes(content)
    refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 32},
        {"layers": 3},
        {"vocabulary": 30},
        {"tie_embeddings": False},
        {"width": -1},
        {"width": "x"},
        {"wdith": 1},
    ],
    ids=str,
)
def test_another_shape(saved, change):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    refused(saved)


def test_the_first_misfit_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"vocabulary": 30}))
    refused(saved, r"1 tensors? do(es)? not fit the configuration, first 'embedding.weight': .*\(30, 16\).*\(29, 16\)")
