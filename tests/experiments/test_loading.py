"""The ways to load a model: the same parameters, and the memory that each is known for."""

from pathlib import Path

import pytest
import torch

from experiments.measurement.loading import WAYS, load
from experiments.measurement.phases import measure_load
from experiments.measurement.process import run_fresh
from experiments.spec import Measurement
from models import checkpoint
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.presets import preset

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny", "mamba2-tiny", "gpt1"])
def test_every_way_gives_the_same_model(tmp_path: Path, name: str, dtype: torch.dtype):
    model = LanguageModel(preset(name), seed=3, dtype=dtype)
    checkpoint.save(model, tmp_path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.eval()(tokens)
    for way in WAYS:
        loaded = load(tmp_path, CPU, way)
        found = dict(loaded.named_parameters())
        for key, parameter in model.named_parameters():
            assert found[key].dtype == parameter.dtype, (way, key)
            assert torch.equal(found[key], parameter), (way, key)
        assert loaded.head.weight.data_ptr() == loaded.embedding.weight.data_ptr() or not model.config.tie_embeddings
        with torch.no_grad():
            assert torch.equal(loaded(tokens), expected), way


def test_a_file_that_ends_too_early_is_no_model(tmp_path: Path):
    checkpoint.save(LanguageModel(preset("mamba-tiny"), seed=0), tmp_path)
    weights = tmp_path / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"^damaged weights: model\.safetensors: "):
        load(tmp_path, CPU, "direct")


def _measured(send, folder: Path, way: str):
    return measure_load(folder, Measurement(repeats=1, seconds=0), CPU, way)


def test_memory_of_the_ways(tmp_path: Path):
    model = LanguageModel(preset("mamba-4m"), seed=0)
    checkpoint.save(model, tmp_path)
    weights = sum(p.nbytes for p in model.parameters())
    found = {way: run_fresh(_measured, tmp_path, way) for way in WAYS}
    assert 1.8 * weights < found["read"]["host_peak_bytes"] < 2.6 * weights
    for way in ("mapped", "direct"):
        assert weights < found[way]["host_peak_bytes"] < 1.15 * weights
    for way in WAYS:
        assert weights < found[way]["resident_bytes"] < 1.1 * weights
        assert found[way]["resident_bytes_analytic"] == weights
