"""Which form runs, and what is said where it cannot."""

import subprocess
import sys
import textwrap

import pytest
import torch

from models.config import ModelConfig
from models.errors import BackendUnavailableError, ConfigError
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.mixers.attention import AttentionConfig
from models.mixers.lstm import LSTM, LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.ops import kernels
from models.presets import preset

CPU = torch.device("cpu")


def model(mixer) -> LanguageModel:
    return LanguageModel(ModelConfig(vocabulary=8, width=16, layers=2, mixer=mixer), seed=0)


def test_auto_on_a_cpu_is_numba():
    assert kernels.select("auto", CPU) == kernels.Selection("numba", "auto", fallback=None)
    assert model(MambaConfig()).backend.name == "numba"


@pytest.mark.parametrize("name", ["reference", "torch", "numba"])
def test_what_is_asked_for_is_what_runs(name):
    for mixer in (MambaConfig(backend=name), Mamba2Config(head_width=8, backend=name),
                  Mamba3Config(head_width=8, backend=name)):  # fmt: skip
        assert model(mixer).backend == kernels.Selection(name, name)
    assert kernels.load(name).__name__.endswith(f".{name}_form")


def test_what_is_best_without_a_compiled_form_is_no_fallback():
    assert LSTM.select(LSTMConfig(), 16, torch.device("cuda")) == kernels.Selection("torch", "auto")
    assert model(LSTMConfig(backend="reference")).backend == kernels.Selection("reference", "reference")


def test_a_model_of_several_kinds_says_all_that_runs():
    assert LanguageModel(preset("hybrid-tiny"), seed=None).backend == kernels.Selection("numba", "auto")
    mixed = preset("hybrid-tiny").with_overrides({"hybrid.blocks.T.mixer.backend": "sdpa"})
    assert LanguageModel(mixed, seed=None).backend == kernels.Selection("numba+sdpa", "auto+sdpa")


@pytest.mark.parametrize("kind", [MambaConfig, Mamba2Config])
def test_negative_eigenvalues_are_beyond_the_cuda_kernels(kind, monkeypatch):
    monkeypatch.setattr(kernels, "unavailable", lambda *of: None)
    gpu = torch.device("cuda")
    select = MIXERS[kind().kind].select
    assert select(kind(), 64, gpu) == kernels.Selection("cuda", "auto")
    chosen = select(kind(negative_eigenvalues=True), 64, gpu)
    assert (chosen.name, chosen.asked) == ("torch", "auto")
    assert "negative_eigenvalues" in chosen.fallback
    with pytest.raises(BackendUnavailableError, match=r"have no negative_eigenvalues; choose 'torch'") as caught:
        select(kind(negative_eigenvalues=True, backend="cuda"), 64, gpu)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("config", "width", "channels"), [
    (MambaConfig(), 30, 60), (MambaConfig(), 32, None), (MambaConfig(expand=1), 12, 12),
    (Mamba2Config(head_width=8, state=10), 32, 84), (Mamba2Config(head_width=4, state=2), 18, None),
    (Mamba2Config(head_width=8, state=10, groups=2), 32, None),
])  # fmt: skip
def test_the_cuda_convolution_has_multiples_of_eight_channels(config, width, channels, monkeypatch):
    """Of Mamba-2 x, B and C together."""
    monkeypatch.setattr(kernels, "unavailable", lambda *of: None)
    config.check(width)
    chosen = MIXERS[config.kind].select(config, width, torch.device("cuda"))
    said = f"the CUDA convolution has multiples of 8 channels, not {channels}"
    assert (chosen.name, chosen.fallback) == (("cuda", None) if channels is None else ("torch", said))


@pytest.mark.parametrize("name", ["reference", "torch", "numba"])
def test_a_form_has_every_operation(name):
    form = kernels.load(name)
    operations = {
        "causal_conv1d", "causal_conv1d_step", "channel_projections", "experts", "gated_rms_norm",
        "linear_cross_entropy", "linear_step", "lstm", "projections", "residual_step", "rms_norm",
        "rotary_qkv", "selective_scan", "selective_scan_step", "ssd", "ssd_step", "suits_step", "suits_sum",
        "swiglu", "trapezoid", "trapezoid_step",
    }  # fmt: skip
    mixers = ("attention", "mamba", "mamba2", "mamba3")
    compiled = {f"{one}_{what}" for one in mixers for what in ("step", "branch")}
    compiled |= {"lstm_branch", "swiglu_branch", "experts_branch"}
    of_its_own = {"numba": compiled, "reference": {"mamba2_inner"}}
    assert set(form.__all__) == operations | of_its_own.get(name, set())
    assert all(callable(getattr(form, operation)) for operation in form.__all__)


@pytest.mark.parametrize(
    ("asked", "name"), [("auto", "numba"), ("numba", "numba"), ("sdpa", "sdpa"), ("reference", "reference")]
)
def test_attention_says_what_it_runs(asked, name):
    assert model(AttentionConfig(heads=2, backend=asked)).backend == kernels.Selection(name, asked)


def test_auto_without_numba_falls_back_aloud(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable", lambda name, *of: "no such library" if name == "numba" else None)
    chosen = kernels.select("auto", CPU)
    assert (chosen.name, chosen.asked) == ("torch", "auto")
    assert chosen.fallback == "numba: no such library"
    assert model(MambaConfig()).backend.fallback is not None
    attention = model(AttentionConfig(heads=2)).backend
    assert (attention.name, attention.fallback) == ("sdpa", "numba: no such library")
    with pytest.raises(BackendUnavailableError, match=r"'numba' is not available on cpu: no such library"):
        kernels.select("numba", CPU)


def test_cuda_on_a_cpu_names_the_alternatives():
    with pytest.raises(BackendUnavailableError, match=r"need a CUDA GPU; choose 'auto', 'torch' or 'numba'"):
        model(MambaConfig(backend="cuda"))
    with pytest.raises(BackendUnavailableError, match=r"numba runs on the CPU; choose 'auto', 'torch' or 'cuda'"):
        kernels.select("numba", torch.device("cuda"))


def test_a_broken_import_names_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises ImportError
    problem = kernels.unavailable.__wrapped__("numba", "cpu")
    assert "cannot import numba" in problem
    assert problem.endswith("install with: pip install numba")
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    assert kernels.unavailable.__wrapped__("cuda", "cuda").endswith(kernels.INSTALL_CUDA)


@pytest.mark.parametrize(
    ("mixer", "hint"),
    [
        (MambaConfig(backend="nubma"), "did you mean 'numba'"),
        (MambaConfig(backend="x"), "known: auto, cuda, numba, reference, torch"),
        (AttentionConfig(heads=2, backend="refrence"), "did you mean 'reference'"),
        (AttentionConfig(heads=2, backend="x"), "known: auto, numba, reference, sdpa"),
        (Mamba2Config(head_width=8, backend="sdpa"), "unknown backend 'sdpa'"),
        (Mamba3Config(head_width=8, backend="tourch"), "did you mean 'torch'"),
        (LSTMConfig(backend="cuda"), "unknown backend 'cuda'.*known: auto, numba, reference, torch"),
    ],
)
def test_an_unknown_form_is_a_user_error(mixer, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        model(mixer)
    assert "\n" not in str(caught.value)


def test_everything_but_the_kernels_works_without_their_libraries():
    program = """
        import sys
        for name in ("numba", "llvmlite", "mamba_ssm", "causal_conv1d", "triton"):
            sys.modules[name] = None
        import torch
        import models
        from models.config import ModelConfig
        from models.mixers.mamba import MambaConfig
        from models import checkpoint, cost, generation, hf, presets
        from models.language_model import LanguageModel
        text = torch.zeros(1, 3, dtype=torch.int64)
        LanguageModel(presets.preset("transformer-tiny"), seed=0)(text).sum().backward()
        for name in presets.PRESETS:
            if name.endswith("-tiny"):
                LanguageModel(presets.preset(name), seed=0)(text).sum().backward()
        mamba = LanguageModel(presets.preset("mamba-tiny"), seed=0)
        mamba(text).sum().backward()
        print(mamba.backend.name, mamba.backend.fallback)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch numba: cannot import numba")
    assert "pip install numba" in done.stdout
