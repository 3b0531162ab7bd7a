"""Selection of a form for each heavy operation. The only place that imports numba, triton, mamba_ssm,
causal_conv1d.

A form is chosen once, when a model is built, by name or by `auto`:

    reference   the mathematics, a readable loop; any device
    torch       plain torch, chunked; any device
    numba       compiled for the CPU
    cuda        mamba_ssm and causal_conv1d; CUDA

A form asked for by name and not available raises `BackendUnavailableError` with the remedy. `auto` takes numba on
a CPU and cuda on a GPU; where the machine lacks that, it takes torch and says so in `Selection.fallback`, which
makes the arm's speed and memory not comparable in the record.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from models.errors import BackendUnavailableError, ConfigError, nearest
from models.ops.kernels.tuning import untimed

BACKENDS = ("reference", "torch", "numba", "cuda")
INSTALL_CUDA = "lab kernels install"


@dataclass(frozen=True)
class Selection:
    """What runs, what was asked for, and, where `auto` had to take second best, why."""

    name: str
    asked: str
    fallback: str | None = None


def select(
    asked: str, device: torch.device, forms: tuple[str, ...] = BACKENDS, operation: str = "selective_scan"
) -> Selection:
    """Choose among `forms` for `device`; `auto` takes torch, which is no fallback then, where the better form is not
    among them. operation: what a form has to be able to run. Raises ConfigError (no such form),
    BackendUnavailableError (not here)."""
    if asked not in (*forms, "auto"):
        raise ConfigError(f"unknown backend '{asked}': {nearest(asked, (*forms, 'auto'))}")
    best = "cuda" if device.type == "cuda" else "numba"
    name = asked if asked != "auto" else best if best in forms else "torch"
    missing = unavailable(name, device.type, operation)
    if missing is None:
        return Selection(name, asked)
    if asked == "auto":
        return Selection("torch", asked, fallback=f"{name}: {missing}")
    raise BackendUnavailableError(f"backend '{name}' is not available on {device.type}: {missing}")


@cache
def unavailable(name: str, device_type: str, operation: str = "selective_scan") -> str | None:
    """Why a form cannot run an operation on this kind of device (with the remedy), or None where it can."""
    if name in ("reference", "torch"):
        return None
    if name == "numba":
        if device_type != "cpu":
            return "numba runs on the CPU; choose 'auto', 'torch' or 'cuda'"
        return _import_problem("numba", "pip install numba")
    if device_type != "cuda":
        return "the mamba-ssm kernels need a CUDA GPU; choose 'auto', 'torch' or 'numba'"
    for module in ("causal_conv1d", "mamba_ssm"):
        problem = _import_problem(module, INSTALL_CUDA)
        if problem:
            return problem
    return _probe_cuda(operation)


def _import_problem(module: str, remedy: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken extension raises anything from ImportError to OSError
        return f"cannot import {module} ({type(error).__name__}: {error}); install with: {remedy}"
    return None


def _probe_cuda(operation: str) -> str | None:
    """Run the kernels once: an installed package says nothing about whether it works on this card."""
    try:
        kernels = load("cuda")
        with untimed("cuda"):
            _run_once(kernels, operation)
    except Exception as error:
        return f"the kernels are installed but fail on this GPU ({type(error).__name__}: {error})"
    return None


def _run_once(kernels: ModuleType, operation: str) -> None:
    x = torch.randn(1, 16, 64, device="cuda")
    ones = torch.ones(64, device="cuda")
    kernels.causal_conv1d(x, torch.randn(64, 4, device="cuda"), ones, None)
    if operation == "selective_scan":
        kernels.selective_scan(x, x, -torch.rand(64, 64, device="cuda"), x, x, ones, x, ones, None)
    elif operation != "causal_conv1d":
        head, one = x[:, :, None], ones[:1]  # one head of 64, one group of 64
        rate = head[..., 0]
        if operation == "ssd":
            kernels.ssd(head, rate, -one, head, head, one, one)
        else:
            rank = head[:, :, None]
            angle, bias = x[..., :16].contiguous(), ones.view(1, 1, 64)
            kernels.trapezoid(head, rate, rate, rate, angle, rank, rank, head, one, one, bias, bias, 1e-4)
    torch.cuda.synchronize()


def load(name: str) -> ModuleType:
    """The module that implements a form: `selective_scan`, `ssd`, `trapezoid`, `causal_conv1d`, `swiglu`, each with its
    `_step`, `rms_norm`, `gated_rms_norm`, `experts`, `rotary_qkv`, `projections`, `channel_projections`, `linear_step`
    and `linear_cross_entropy`, with the signatures of `models.ops`; all but cuda also `lstm`, reference and cuda
    `mamba2_inner`; cuda's `rms_norm_of_sum` is for what `suits_sum`. numba's also has, for a decode step,
    `mamba_step`, `mamba2_step`, `mamba3_step` and `attention_step`, a mixer between its projections, and whole residual
    branches (`mamba_branch`, ..., `swiglu_branch`, `experts_branch`), for what `suits_step`."""
    return importlib.import_module(f"models.ops.kernels.{name}_form")


def has_triton() -> bool:
    """Whether Triton can be imported, which `place_token` and `attention_of_splits` are written in."""
    return _import_problem("triton", "pip install triton") is None


def has_scan() -> bool:
    """Whether mamba_ssm's selective scan can be imported."""
    return _import_problem("mamba_ssm.ops.selective_scan_interface", INSTALL_CUDA) is None


def has_convolution() -> bool:
    """Whether causal_conv1d's compiled convolution can be imported."""
    return _import_problem("causal_conv1d.cpp_functions", INSTALL_CUDA) is None


# operators of torch's, so that `torch.compile` calls them as they are and keeps its graph whole
@torch.library.custom_op("lab::place_token", mutates_args=("keys", "values"), device_types="cuda")
def place_token(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, at: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """What precedes the attention of one query, for a GPU: models.ops.kernels.triton_decode."""
    return importlib.import_module("models.ops.kernels.triton_decode").place_token(qkv, cos, sin, at, keys, values)


@place_token.register_fake
def _(qkv, cos, sin, at, keys, values):
    B, K, _, P = keys.shape
    return qkv.new_empty(B, qkv.shape[1] - 2 * K, 1, P), torch.empty_like(at)


@torch.library.custom_op("lab::attention_of_splits", mutates_args=(), device_types="cuda")
def attention_of_splits(q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
    """Attention of one query for a GPU: models.ops.kernels.triton_decode."""
    return importlib.import_module("models.ops.kernels.triton_decode").attend(q, k, v, filled)


@attention_of_splits.register_fake
def _(q, k, v, filled):
    return q.new_empty(q.shape)


def load_beside(mixer_backend: str, device: torch.device) -> ModuleType:
    """The form of what surrounds a mixer: the best that the device has, except that a model whose mixer is asked for as
    `reference` is a reference throughout."""
    return load(select("reference" if mixer_backend == "reference" else "auto", device).name)
