"""Same weights, same numbers as the public implementations."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import AttentionConfig, MambaConfig, ModelConfig, SwiGLUConfig
from models.hf import from_llama, from_mamba, to_llama, to_mamba
from models.language_model import LanguageModel
from models.ops import selective_scan as ops
from models.ops.kernels import load

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
LENGTHS = [1, 3, 37]  # below and above the width of the convolution


def shaken(config: ModelConfig) -> LanguageModel:
    """Initial weights with every one perturbed, so that norms, D and biases are not all equal."""
    model = LanguageModel(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_parity(ours: LanguageModel, theirs: nn.Module, translate, length: int) -> None:
    vocabulary = ours.config.vocabulary
    generator = torch.Generator().manual_seed(length)
    inputs, targets = torch.randint(vocabulary, (2, 2, length), generator=generator)
    logits = ours(inputs)
    their_logits: Tensor = theirs(input_ids=inputs, use_cache=False).logits
    assert (logits - their_logits).abs().max() < 1e-4
    for out in (logits, their_logits):
        F.cross_entropy(out.reshape(-1, vocabulary), targets.reshape(-1)).backward()
    expected = translate({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        deviation = (parameter.grad - expected[name]).abs().max()
        assert deviation <= 1e-3 * expected[name].abs().max() + 1e-9, name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", LLAMAS)
def test_transformer_is_llama(name, length):
    ours = shaken(LLAMAS[name])
    assert_parity(ours, hugging_face.llama(ours, positions=64), from_llama, length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MAMBAS)
def test_mamba_is_mamba(name, length):
    ours = shaken(MAMBAS[name])
    assert_parity(ours, hugging_face.mamba(ours, mambapy=False), from_mamba, length)


@pytest.mark.parametrize("name", [*LLAMAS, *(f"mamba-{name}" for name in MAMBAS)])
def test_names_translate_back_and_forth(name):
    is_llama = name in LLAMAS
    config = LLAMAS[name] if is_llama else MAMBAS[name.removeprefix("mamba-")]
    to, back = (to_llama, from_llama) if is_llama else (to_mamba, from_mamba)
    ours = shaken(config)
    theirs = hugging_face.llama(ours, 64) if is_llama else hugging_face.mamba(ours, mambapy=False)
    given = theirs.state_dict()
    again = to(back(given, config), config)
    assert given.keys() == again.keys()
    assert all(torch.equal(given[key], again[key]) for key in given)
    mine = {key: value for key, value in ours.state_dict().items() if key != "head.weight" or not config.tie_embeddings}
    restored = back(to(mine, config), config)
    assert mine.keys() == restored.keys()
    assert all(torch.equal(mine[key], restored[key]) for key in mine)


def _selective_scan_ref(monkeypatch):
    """The official definition, from mamba-ssm's Python files; its compiled extensions are stood in for."""
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip(
            "mamba_ssm is not installed: MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
            "pip install --no-deps --no-build-isolation mamba-ssm==2.3.2.post1"
        )
    root = importlib.util.find_spec("mamba_ssm").submodule_search_locations
    stand_in = ModuleType("mamba_ssm")  # its own __init__ imports every model, and with them triton
    stand_in.__path__ = list(root)
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mamba_ssm", stand_in)
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    layer_norm = ModuleType("mamba_ssm.ops.triton.layer_norm")
    layer_norm._layer_norm_fwd = None  # type: ignore[attr-defined]  # imported by the file, used by none of what we call
    monkeypatch.setitem(sys.modules, layer_norm.__name__, layer_norm)
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    finally:
        for name in [name for name in sys.modules if name.startswith("mamba_ssm.")]:
            if name != layer_norm.__name__:
                monkeypatch.delitem(sys.modules, name)
    return module.selective_scan_ref


@pytest.mark.oracle
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 37, 130, 16), (1, 16, 7, 3)], ids=str)
@pytest.mark.parametrize("form", ["reference", "torch", "numba"])
def test_scan_is_the_official_one(monkeypatch, form, shape, gate):
    official = _selective_scan_ref(monkeypatch)
    rows, T, E, N = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    inputs = [
        normal(rows, T, E), normal(rows, T, E), -normal(E, N).exp(), normal(rows, T, N), normal(rows, T, N),
        normal(E), normal(rows, T, E) if gate else None, normal(E),
    ]  # fmt: skip
    weights = normal(rows, T, E), normal(rows, E, N)
    results = []
    for which in (form, "official"):
        u, dt, A, B, C, D, z, dt_bias = leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
        if which == "official":
            u, dt, B, C, z = (None if x is None else x.transpose(1, 2) for x in (u, dt, B, C, z))
            y, last = official(u, dt, A, B, C, D, z, dt_bias, delta_softplus=True, return_last_state=True)
            y = y.transpose(1, 2)
        else:
            y, last = (ops.reference if which == "reference" else load(which).selective_scan)(*leaves)
        (y * weights[0]).sum().add((last * weights[1]).sum()).backward()
        results.append([y.detach(), last.detach(), *(x.grad for x in leaves if x is not None)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() < 2e-5 * expected.abs().max().clamp_min(1)
