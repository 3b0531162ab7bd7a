"""Same weights, same numbers as the public implementations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import hf
from models.config import ModelConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers.attention import AttentionConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'transformers>=5'")
from benchmarks import hugging_face

LLAMAS = {
    "plain": ModelConfig(
        vocabulary=97, width=48, layers=2, mixer=AttentionConfig(heads=4), feedforward=SwiGLUConfig(hidden=80)
    ),
    "grouped-untied": ModelConfig(
        vocabulary=61, width=60, layers=3, mixer=AttentionConfig(heads=6, kv_heads=2),
        feedforward=SwiGLUConfig(), tie_embeddings=False, norm_eps=1e-3,
    ),
    "one-key-head": ModelConfig(
        vocabulary=130, width=32, layers=1, mixer=AttentionConfig(heads=2, kv_heads=1, backend="reference"),
        feedforward=SwiGLUConfig(hidden=33),
    ),
}  # fmt: skip
MAMBAS = {
    "plain": ModelConfig(vocabulary=97, width=40, layers=3, mixer=MambaConfig(backend="numba")),
    "untied": ModelConfig(
        vocabulary=61, width=24, layers=2, tie_embeddings=False, norm_eps=1e-3,
        mixer=MambaConfig(state=5, expand=3, conv_width=3, dt_rank=7, backend="torch"),
    ),
    "reference": ModelConfig(vocabulary=33, width=16, layers=1, mixer=MambaConfig(conv_width=5, backend="reference")),
}  # fmt: skip
PHI3S = {
    "window": ModelConfig(
        vocabulary=97, width=48, layers=2, mixer=AttentionConfig(heads=4, kv_heads=2, window=5),
        feedforward=SwiGLUConfig(hidden=80), tie_embeddings=False,
    ),
    "padding": ModelConfig(
        vocabulary=61, width=24, layers=2, mixer=AttentionConfig(heads=2, window=64, backend="reference"),
        feedforward=SwiGLUConfig(hidden=33), padding_index=7, tie_embeddings=False,
    ),
}  # fmt: skip
MAMBA2S = {
    "plain": ModelConfig(
        vocabulary=97, width=32, layers=3, mixer=Mamba2Config(state=16, head_width=8, backend="numba")
    ),
    "groups-untied": ModelConfig(
        vocabulary=61, width=24, layers=2, tie_embeddings=False, norm_eps=1e-3,
        mixer=Mamba2Config(state=5, head_width=6, groups=4, conv_width=3, norm_eps=1e-3, backend="torch"),
    ),
    "reference": ModelConfig(
        vocabulary=33, width=16, layers=1, mixer=Mamba2Config(state=8, head_width=8, groups=2, backend="reference")
    ),
}  # fmt: skip
MODELS = {
    f"{family}-{name}": config
    for family, configs in {"llama": LLAMAS, "phi3": PHI3S, "mamba": MAMBAS, "mamba2": MAMBA2S}.items()
    for name, config in configs.items()
}
LENGTHS = [1, 3, 37, 100]  # below and above the width of the convolution, a window, a chunk of 64


def shaken(config: ModelConfig) -> LanguageModel:
    """Initial weights with every one perturbed, so that norms, D and biases are not all equal."""
    model = LanguageModel(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_parity(ours: LanguageModel, theirs: nn.Module, length: int) -> None:
    vocabulary = ours.config.vocabulary
    generator = torch.Generator().manual_seed(length)
    inputs, targets = torch.randint(vocabulary, (2, 2, length), generator=generator)
    logits = ours(inputs)
    their_logits: Tensor = theirs(input_ids=inputs, use_cache=False).logits
    assert (logits - their_logits).abs().max() < 1e-4
    for out in (logits, their_logits):
        F.cross_entropy(out.reshape(-1, vocabulary), targets.reshape(-1)).backward()
    expected = hf.from_tensors({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        deviation = (parameter.grad - expected[name]).abs().max()
        assert deviation <= 1e-3 * expected[name].abs().max() + 1e-8, name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_function_in_every_form(name, length):
    ours = shaken(MODELS[name])
    assert_parity(ours, hugging_face.counterpart(ours), length)


@pytest.mark.parametrize("name", MODELS)
def test_names_translate_back_and_forth(name):
    config = MODELS[name]
    ours = shaken(config)
    given = hugging_face.counterpart(ours).state_dict()
    if config.tie_embeddings:
        del given["lm_head.weight"]
    again = hf.to_tensors(hf.from_tensors(given, config), config)
    assert given.keys() == again.keys()
    assert all(torch.equal(given[key], again[key]) for key in given)
    mine = dict(ours.named_parameters())
    restored = hf.from_tensors(hf.to_tensors(mine, config), config)
    assert mine.keys() == restored.keys()
    assert all(torch.equal(mine[key], restored[key]) for key in mine)
