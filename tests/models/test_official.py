"""The same numbers as the official code, mamba_ssm and causal_conv1d, without a GPU.

What is official here: all of their Python, the modules `Mamba2` and `Mamba3` included, and their Triton kernels, which
run in Triton's interpreter. Where a kernel is compiled CUDA (the selective scan, the short convolution) or needs CUDA's
toolchain (Mamba-3's decode step), the plain torch reference that the packages ship beside it takes its place.

B: batch   T: time   H: heads   P: head width   G: groups   N: state size   S: rotated pairs   R: rank
E: channels   W: taps of the convolution
"""

import ast
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import interpret

from models.block import Block
from models.config import ModelConfig
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2, Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.ops import causal_conv1d, kernels, mamba2_inner, selective_scan, ssd, trapezoid
from models.ops.kernels.tuning import run_smallest

pytestmark = pytest.mark.oracle
INSTALL = (
    "pip install einops triton 'transformers>=5'; MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
    "CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-deps --no-build-isolation "
    "mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0"
)
CPU = torch.device("cpu")
CHUNK = 16  # of the kernels; no length below is a multiple of it
TOLERANCE = {torch.float16: 2**-10, torch.float32: 5e-5, torch.float64: 1e-12}  # of the largest entry, or of 1


@pytest.fixture(scope="module")
def official():
    """Their modules, with a stand-in for each compiled extension, and our `cuda` form, which calls them."""
    for name in ("mamba_ssm", "causal_conv1d", "triton", "einops", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: {INSTALL}")
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels themselves are compared: pytest -m cuda")
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        from triton.runtime.autotuner import Autotuner

        patch.setattr(Autotuner, "run", run_smallest)
        patch.setattr(torch.cuda, "device", lambda index: nullcontext())
        patch.setitem(sys.modules, "selective_scan_cuda", selective_scan_extension())
        patch.setitem(sys.modules, "causal_conv1d_cuda", causal_conv1d_extension())
        cuda = kernels.load("cuda")
        patch.setattr(cuda, "SSD_CHUNK", CHUNK)
        modules = (
            "modules.ssd_minimal", "modules.mamba2", "modules.mamba3", "ops.selective_scan_interface",
            "ops.triton.ssd_combined",
        )  # fmt: skip
        found = {path.rpartition(".")[2]: importlib.import_module(f"mamba_ssm.{path}") for path in modules}
        yield SimpleNamespace(**found, cuda=cuda)


def selective_scan_extension() -> ModuleType:
    """Their own reference behind the interface of the compiled module, with what its C++ insists on."""

    def reference(*inputs: Any, **settings: Any) -> Any:
        return sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_ref(*inputs, **settings)

    def check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any) -> None:
        assert all(m is None or m.dtype == u.dtype for m in (delta, B, C, z))
        assert all(m is None or m.dtype == torch.float32 for m in (A, D, bias))
        assert all(m is None or m.stride(-1) == 1 or m.shape[-1] == 1 for m in (u, delta, B, C, D, z, bias))
        assert A.shape[1] <= 256

    def fwd(u, delta, A, B, C, D, z, bias, softplus):
        check(u, delta, A, B, C, D, z, bias)
        out, last = reference(u, delta, A, B, C, D, None, bias, softplus, return_last_state=True)
        x = torch.stack([torch.zeros_like(last), last], -1).flatten(-2)[:, :, None]  # (B, E, chunks, 2 N)
        return [out, x] if z is None else [out, x, out * F.silu(z)]

    def bwd(u, delta, A, B, C, D, z, bias, dout, x, out, dz, softplus, recompute):
        check(u, delta, A, B, C, D, z, bias)
        leaves = [None if m is None else m.detach().requires_grad_() for m in (u, delta, A, B, C, D, z, bias)]
        given = [m for m in leaves if m is not None]

        def differentiated() -> tuple[Tensor, ...]:
            return torch.autograd.grad(reference(*leaves, softplus), given, dout)

        with ThreadPoolExecutor(1) as other:  # a custom operator keeps autograd from its own thread
            grads = dict(zip(map(id, given), other.submit(differentiated).result(), strict=True))
        *first, dz, dbias = (None if m is None else grads[id(m)] for m in leaves)
        return [*first, dbias] if z is None else [*first, dbias, dz]

    module = ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = fwd, bwd  # type: ignore[attr-defined]
    return module


def causal_conv1d_extension() -> ModuleType:
    """The same for the convolution."""

    def theirs(name: str) -> Callable[..., Any]:
        return getattr(sys.modules["causal_conv1d.causal_conv1d_interface"], name)

    def check(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None = None) -> None:
        assert 2 <= weight.shape[1] <= 4
        assert bias.dtype == weight.dtype
        channels_last = x.stride(1) == 1 and x.stride(2) > 1
        assert channels_last or x.stride(2) == 1
        if channels_last:
            assert x.shape[1] % 8 == x.stride(2) % 8 == x.stride(0) % 8 == 0
            assert x.storage_offset() % 8 == 0  # it loads 8 at a time
        if initial is not None:
            assert channels_last
            assert initial.dtype == x.dtype
            assert initial.stride(1) == 1
            assert initial.shape == (*x.shape[:2], weight.shape[1] - 1)

    def activation(silu: bool) -> str | None:
        return "silu" if silu else None

    def wide(*given: Tensor | None) -> list[Tensor | None]:
        """It computes in float32 whatever it is given, weights of another type than the inputs among that."""
        return [None if m is None else m.float() for m in given]

    def fwd(x, weight, bias, seq_idx, initial, out, final, silu):
        check(x, weight, bias, initial)
        assert seq_idx is None
        assert final is None
        x, weight, bias, initial = wide(x, weight, bias, initial)
        out.copy_(theirs("causal_conv1d_ref")(x, weight, bias, initial, activation=activation(silu)))

    def bwd(x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu):
        # by hand: autograd is out of reach inside a custom operator
        check(x, weight, bias, initial)
        E, W = weight.shape
        x, weight, bias, dout, initial = wide(x, weight, bias, dout, initial)
        before = x.new_zeros(x.shape[0], E, W - 1) if initial is None else initial
        padded, taps = torch.cat([before, x], 2), weight[:, None]
        y = F.conv1d(padded, taps, bias, groups=E)
        gate = y.sigmoid()
        dy = dout * gate * (1 + y * (1 - gate)) if silu else dout
        d_before, d_x = nn.grad.conv1d_input(padded.shape, taps, dy, groups=E).split([W - 1, x.shape[2]], 2)
        dx.copy_(d_x)
        dweight.copy_(nn.grad.conv1d_weight(padded, taps.shape, dy, groups=E)[:, 0])
        dbias.copy_(dy.sum((0, 2)))
        if dinitial is not None:
            dinitial.copy_(d_before)

    def update(x, state, weight, bias, out, silu, seqlens, indices):
        check(x.contiguous(), weight, bias)
        assert state.dtype == x.dtype
        assert state.shape[2] >= weight.shape[1] - 1
        assert seqlens is indices is None
        out.copy_(theirs("causal_conv1d_update_ref")(x, state, weight, bias, activation(silu)))

    module = ModuleType("causal_conv1d_cuda")
    module.causal_conv1d_fwd, module.causal_conv1d_bwd, module.causal_conv1d_update = fwd, bwd, update  # type: ignore[attr-defined]
    return module


@pytest.fixture
def mamba3_kernels(official, monkeypatch):
    """Mamba-3's Triton kernels as the interpreter can run them, in two respects other than on a GPU: cos, sin and tanh
    instead of the assembly that approximates them, and float32 for bfloat16 (numpy has none: the interpreter holds its
    bits as integers and computes with those)."""
    import triton.language as tl

    class Wide(ModuleType):
        bfloat16 = torch.float32

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    exact = {
        "cos_approx": lambda x: tl.cos(x),
        "sin_approx": lambda x: tl.sin(x),
        "tanh_approx": lambda x: 2 * tl.sigmoid(2 * x) - 1,
        "sech2_approx": lambda x: 4 * tl.sigmoid(2 * x) * tl.sigmoid(-2 * x),
    }
    for name in ("angle_dt", "mamba3_siso_combined", "mamba3_siso_fwd", "mamba3_siso_bwd"):
        module = importlib.import_module(f"mamba_ssm.ops.triton.mamba3.{name}")
        monkeypatch.setattr(module, "torch", Wide("torch"))
        for function in exact.keys() & vars(module).keys():
            monkeypatch.setattr(module, function, exact[function])
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)  # which they assert


@pytest.fixture
def mamba3_decode(official, monkeypatch) -> Callable[..., Any]:
    """Their references of a decode step, also in place of the kernels of `Mamba3.step`; returns the recurrence.

    The MIMO kernels pair entry i with i + N / 2 where ours, and their SISO ones, pair neighbours. The reference has
    both, and is told to pair neighbours."""
    recurrence = their_function("ops/cute/mamba3/mamba3_step_fn.py", "selective_state_update_fused_ref_v2")

    def step(state, B_state, x_state, A, B, C, D, x, dt, trap, xproj, outproj, state_out, out, z, zproj, **tuning):
        y, after = recurrence(state, A, B, C, xproj, x, zproj, z, dt, B_state, x_state, trap, D, outproj)
        state.copy_(after)
        out.copy_(y)

    def rotate(*, inplace, rotate_pairwise, **inputs):
        return their_rotation()(**inputs)

    monkeypatch.setattr(official.mamba3, "mamba3_step_fn", step)
    monkeypatch.setattr(official.mamba3, "apply_rotary_qk_inference_fwd", rotate)
    monkeypatch.setattr(official.mamba3, "mamba3_mimo_combined", object())  # else `Mamba3` refuses to be MIMO
    return recurrence


def their_rotation() -> Callable[..., Any]:
    path = "mamba_ssm.ops.triton.mamba3.mamba3_mimo_rotary_step"
    return importlib.import_module(path).apply_rotary_qk_inference_reference


def their_function(path: str, name: str) -> Callable[..., Any]:
    """One function out of a file that cannot be imported without CUDA."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / path
    (node,) = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    names: dict[str, Any] = {"torch": torch, "F": F, "math": math, "Optional": Optional}
    exec(compile(ast.Module([node], []), str(file), "exec"), names)
    return names[name]


# ------------------------------------------------------------------------------------------------- how to compare


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    deviation = (actual - expected).abs().max().item()
    limit = TOLERANCE[expected.dtype] * max(1.0, expected.abs().max().item())
    assert deviation <= limit, f"{what}: {deviation:.3g} > {limit:.3g}"


def outcome(form: Callable[..., Any], inputs: dict[str, Any], weighted: int | None = None) -> dict[str, Tensor]:
    """What a form computes, and the gradients of its inputs under fixed random weights of its first outputs."""
    leaves = {
        name: value.clone().requires_grad_() if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    outputs = form(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((y * normal(*y.shape, seed=1000 + i, dtype=y.dtype)).sum() for i, y in enumerate(outputs[:weighted]))
    assert isinstance(loss, Tensor)
    loss.backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"d {name}": x.grad for name, x in leaves.items() if isinstance(x, Tensor) and x.grad is not None}


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for what in theirs:
        close(ours[what], theirs[what], what)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert ours.keys() == theirs.keys()
    for what, expected in theirs.items():
        torch.testing.assert_close(ours[what], expected, rtol=0, atol=0, msg=lambda text, what=what: f"{what}: {text}")


def steps_agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: dict[str, Any]) -> None:
    """Token by token from a given state: what each returns, and the state that each leaves."""
    initial = inputs.pop("initial_state")
    states = initial.clone(), initial.clone()
    for t in range(inputs["dt"].shape[1]):
        now = {n: v if v is None or n in ("A", "D", "dt_bias") else v[:, t] for n, v in inputs.items()}
        close(theirs(**now, state=states[1]), ours(**now, state=states[0]))
        close(states[1], states[0])


def scan_inputs(T: int, z: bool, initial: bool) -> dict[str, Any]:
    rows, E, N = 2, 24, 5
    sizes = {
        "u": (rows, T, E), "dt": (rows, T, E), "A": (E, N), "B": (rows, T, N), "C": (rows, T, N), "D": (E,),
        "z": (rows, T, E), "dt_bias": (E,), "initial_state": (rows, E, N),
    }  # fmt: skip
    inputs: dict[str, Any] = {name: normal(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    inputs["A"] = -inputs["A"].exp()
    return inputs | ({} if z else {"z": None}) | ({} if initial else {"initial_state": None})


def ssd_inputs(T: int, initial: bool, G: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rows, H, P, N = 2, 4, 16, 24
    sizes = {
        "x": (rows, T, H, P), "dt": (rows, T, H), "A": (H,), "B": (rows, T, G, N), "C": (rows, T, G, N), "D": (H,),
        "dt_bias": (H,), "initial_state": (rows, H, P, N),
    }  # fmt: skip
    inputs: dict[str, Any] = {name: normal(*size, seed=i, dtype=dtype) for i, (name, size) in enumerate(sizes.items())}
    inputs["A"] = -inputs["A"].exp()
    return inputs | ({} if initial else {"initial_state": None})


def mamba2_inputs(T: int, G: int) -> dict[str, Any]:
    rows, H, P, N, D = 2, 8, 16, 16, 24
    E, C = H * P, H * P + 2 * G * N
    sizes = {
        "projected": (rows, T, E + C + H), "conv_weight": (C, 4), "conv_bias": (C,), "dt_bias": (H,), "A": (H,),
        "D": (H,), "norm_weight": (E,), "out_weight": (D, E),
    }  # fmt: skip
    inputs: dict[str, Any] = {name: normal(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    return inputs | {"A": -inputs["A"].exp(), "groups": G, "eps": 1e-5}


def trapezoid_inputs(T: int, R: int = 1, dtype: torch.dtype = torch.float32, G: int = 2) -> dict[str, Any]:
    rows, H, P, N, S = 2, 4, 16, 16, 6
    sizes = {
        "x": (rows, T, H, P), "dt": (rows, T, H), "a": (rows, T, H), "trap": (rows, T, H), "angle": (rows, T, S),
        "B": (rows, T, R, G, N), "C": (rows, T, R, G, N), "z": (rows, T, H, P), "D": (H,), "dt_bias": (H,),
        "B_bias": (R, H, N), "C_bias": (R, H, N),
    }  # fmt: skip
    return {name: normal(*size, seed=i, dtype=dtype) for i, (name, size) in enumerate(sizes.items())}


def trapezoid_state(R: int = 1, dtype: torch.dtype = torch.float32) -> trapezoid.State:
    rows, H, P, N, S = 2, 4, 16, 16, 6
    sizes = (rows, H, S), (rows, H, P, N), (rows, R, H, N), (rows, H, P)
    return trapezoid.State(*(normal(*size, seed=50 + i, dtype=dtype) for i, size in enumerate(sizes)))


def first_state() -> dict[str, Tensor]:
    state = trapezoid_state()._asdict()
    return {"first_angle": state.pop("angle"), **state}


def with_states(form: Callable[..., Any]) -> Callable[..., Any]:
    """Of a form of the trapezoid, by the names of `first_state` or without any, its outputs in one list."""

    def call(first_angle=None, ssm=None, previous_B=None, previous_x=None, **given):
        state = None if ssm is None else trapezoid.State(first_angle, ssm, previous_B, previous_x)
        y, after = form(**given, A_floor=1e-4, initial=state)
        return [y, after.ssm, after.previous_B, after.previous_x, after.angle]

    return call


# -------------------------------------------------------------------------------------------------- the selective scan


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 37, 130, 16), (1, 16, 7, 3)], ids=str)
@pytest.mark.parametrize("form", ["reference", "torch", "numba"])
def test_scan_is_the_official_definition(official, form, shape, gate):
    rows, T, E, N = shape
    inputs = [
        normal(rows, T, E, seed=0), normal(rows, T, E, seed=1), -normal(E, N, seed=2).exp(), normal(rows, T, N, seed=3),
        normal(rows, T, N, seed=4), normal(E, seed=5), normal(rows, T, E, seed=6) if gate else None, normal(E, seed=7),
    ]  # fmt: skip
    named = dict(zip(("u", "dt", "A", "B", "C", "D", "z", "dt_bias"), inputs, strict=True))

    def theirs(u, dt, A, B, C, D, z, dt_bias):
        u, dt, B, C, z = (None if x is None else x.transpose(1, 2) for x in (u, dt, B, C, z))
        ref = official.selective_scan_interface.selective_scan_ref
        y, last = ref(u, dt, A, B, C, D, z, dt_bias, delta_softplus=True, return_last_state=True)
        return y.transpose(1, 2), last

    agree(outcome(kernels.load(form).selective_scan, named), outcome(theirs, named))


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_cuda_form_of_the_scan(official, gate, initial):
    """Without the gradient of the last state, which theirs leaves out."""
    inputs = scan_inputs(37, gate, initial)
    expected = outcome(selective_scan.reference, inputs, weighted=1)
    agree(outcome(official.cuda.selective_scan, inputs, weighted=1), expected)


@pytest.mark.parametrize("gate", [True, False])
@torch.no_grad()
def test_decode_kernel_is_the_scan_step(official, gate):
    steps_agree(selective_scan.step_reference, official.cuda.selective_scan_step, scan_inputs(4, gate, True))


# ------------------------------------------------------------------------------------------------ the short convolution


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize(("rows", "T"), [(2, 11), (1, 1), (1, 2), (2, 1)])
def test_cuda_form_of_the_convolution(official, rows, T, initial):
    """On a slice, as the mixers have it: of one token it keeps strides and offset in the whole, odd ones here."""
    E, W = 16, 4
    inputs = {"x": normal(rows, T, E + 3, seed=0), "weight": normal(E, W, seed=1), "bias": normal(E, seed=2)}
    inputs["before"] = normal(rows, E, W, seed=3) if initial else None
    ours, theirs = (
        outcome(lambda x, form=form, **rest: form(x[:, :, 3:], **rest), inputs)
        for form in (causal_conv1d.reference, official.cuda.causal_conv1d)
    )
    agree(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cuda_form_of_the_convolution_step(official, dtype):
    """With a state of the input's type, and of another."""
    weight, bias = normal(16, 4, seed=1), normal(16, seed=2)
    states = [normal(2, 16, 4, seed=3).to(dtype) for _ in range(2)]
    for t in range(3):
        x = normal(2, 16, seed=10 + t)
        y = causal_conv1d.step_reference(x, weight, bias, states[0])
        got = official.cuda.causal_conv1d_step(x, weight, bias, states[1])
        assert torch.equal(*states)
        # the kernel reads the newest input as it came, the reference as the state holds it
        assert (got - y).abs().max() < (TOLERANCE[dtype] if dtype == torch.float32 else 0.02)


@torch.no_grad()
def test_a_compiled_step_traces_the_definitions_in_place_of_kernels(official):
    """Whole, without a break, and with the kernels' numbers."""
    form, E, N = official.cuda, 16, 4
    u, dt, z, weight = (normal(2, E, seed=seed) for seed in range(4))
    B, C = (normal(2, N, seed=seed) for seed in (5, 6))
    A, D, bias = -normal(E, N, seed=7).exp(), normal(E, seed=8), normal(E, seed=9)
    heads = [u.view(2, 4, 4), dt[:, :4], A[:4, 0], B[:, None], C[:, None], D[:4], bias[:4]]
    calls = {
        form.selective_scan_step: [u, dt, A, B, C, D, z, bias, normal(2, E, N, seed=10)],
        form.ssd_step: [*heads, normal(2, 4, 4, N, seed=11)],
        form.gated_rms_norm: [u, z, weight[0], 1e-5, 1],
    }
    for step, given in calls.items():
        traced = torch.compile(step, backend="eager", fullgraph=True)
        for _ in range(2):
            ours = [m.clone() if isinstance(m, Tensor) else m for m in given]
            assert (traced(*ours) - step(*given)).abs().max() < 5e-5
            torch.testing.assert_close(ours, given, atol=5e-5, rtol=0)  # the state, too
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------------- Mamba-2


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_ssd_is_the_minimal_listing(official, form, initial):
    inputs = ssd_inputs(4 * CHUNK, initial, dtype=torch.float64)

    def minimal(x, dt, A, B, C, D, dt_bias, initial_state):
        delta = F.softplus(dt + dt_bias)
        B, C = (ssd.for_heads(m, x.shape[2]) for m in (B, C))
        before = None if initial_state is None else initial_state[:, None]
        listing = official.ssd_minimal.ssd_minimal_discrete
        y, last = listing(x * delta[..., None], delta * A, B, C, CHUNK, before)
        return y + D[:, None] * x, last

    agree(outcome(getattr(ssd, form), inputs), outcome(minimal, inputs))


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_ssd_is_the_official_kernel(official, G, initial):
    """`mamba_chunk_scan_combined` by way of our `cuda` form: outputs, last state, and the gradients of every input."""
    inputs = ssd_inputs(2 * CHUNK + 5, initial, G)
    expected = outcome(official.cuda.ssd, inputs)
    for form in (ssd.reference, ssd.chunked):
        agree(outcome(form, inputs), expected)


def official_mamba2_inner(official) -> Callable[..., Tensor]:
    """`mamba_split_conv1d_scan_combined` under the names of ours."""

    def inner(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, groups, eps):
        return official.ssd_combined.mamba_split_conv1d_scan_combined(
            projected, conv_weight, conv_bias, dt_bias, A, D, CHUNK, rmsnorm_weight=norm_weight, rmsnorm_eps=eps,
            outproj_weight=out_weight, headdim=norm_weight.shape[0] // D.shape[0], ngroups=groups,
            norm_before_gate=False,
        )  # fmt: skip

    return inner


@pytest.mark.parametrize(("T", "G"), [(2 * CHUNK + 5, 2), (2 * CHUNK + 5, 1), (1, 2)])
def test_mamba2_behind_its_projection_is_the_official_operation(official, T, G):
    """Outputs, and the gradients of every input: of our definition to rounding, of our `cuda` form, which calls the
    same kernels, to the last bit, but for what more programs sum."""
    inputs = mamba2_inputs(T, G)
    theirs = outcome(official_mamba2_inner(official), inputs)
    agree(outcome(mamba2_inner.reference, inputs), theirs)
    same_but_for_the_norm(outcome(official.cuda.mamba2_inner, inputs), theirs)


def same_but_for_the_norm(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    weights = [found.pop("d norm_weight") for found in (ours, theirs)]
    close(*weights)
    same(ours, theirs)


@pytest.mark.parametrize("deterministic", ["0", "1"])
def test_mamba2_in_16_bits_is_the_official_operation_to_the_last_bit(official, monkeypatch, deterministic):
    """In the types of mixed precision."""
    monkeypatch.setenv("MAMBA_DETERMINISTIC", deterministic)
    inputs = mamba2_inputs(2 * CHUNK + 5, 2)
    half = "projected", "conv_weight", "conv_bias", "out_weight"
    inputs |= {name: (inputs[name] / 4).half() for name in half}
    ours, theirs = (outcome(form, inputs) for form in (official.cuda.mamba2_inner, official_mamba2_inner(official)))
    assert all(found.isfinite().all() for found in theirs.values())
    same_but_for_the_norm(ours, theirs)


@pytest.mark.parametrize("T", [1, 19])
@torch.no_grad()
def test_ssd_is_the_official_kernel_with_the_chunk_that_it_is_used_with(official, monkeypatch, T):
    monkeypatch.setattr(official.cuda, "SSD_CHUNK", 256)
    inputs = ssd_inputs(T, True)
    for ours, theirs in zip(ssd.reference(**inputs), official.cuda.ssd(**inputs), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("G", [1, 2, 4])
@torch.no_grad()
def test_decode_kernel_is_the_ssd_step(official, G):
    steps_agree(ssd.step_reference, official.cuda.ssd_step, ssd_inputs(4, True, G))


# ------------------------------------------------------------------------------------------------------------- Mamba-3


def official_steps(recurrence, inputs: dict[str, Tensor], maps: list[Tensor], state: trapezoid.State) -> Any:
    """Their references of a decode step, from one token to the next. maps: of x, z and y, each (R, H, P)."""
    rotate = their_rotation()
    angle, ssm, previous_B, previous_x = state
    dt = F.softplus(inputs["dt"] + inputs["dt_bias"])
    A = (-F.softplus(inputs["a"])).clamp_max(-1e-4)
    H = dt.shape[2]
    B_heads, C_heads = (inputs[m].repeat_interleave(H // inputs[m].shape[3], 3) + inputs[f"{m}_bias"] for m in "BC")
    ys = []
    for t in range(dt.shape[1]):
        angles = inputs["angle"][:, t, None].expand_as(angle)
        C, B, angle = rotate(C_heads[:, t], B_heads[:, t], angle, angles, dt[:, t], rotate_pairwise=True)
        x, trap = inputs["x"][:, t], inputs["trap"][:, t].sigmoid()
        y, ssm = recurrence(
            ssm, A[:, t], B, C, maps[0], x, maps[1], inputs["z"][:, t], dt[:, t], previous_B, previous_x, trap,
            inputs["D"], maps[2], compute_dtype=ssm.dtype,
        )  # fmt: skip
        previous_B, previous_x = B, x
        ys.append(y)
    return torch.stack(ys, 1), trapezoid.State(angle, ssm, previous_B, previous_x)


def same_state(ours: trapezoid.State, theirs: trapezoid.State) -> None:
    for turned in (torch.cos, torch.sin):  # theirs counts whole turns in this reference, ours does not
        close(turned(ours.angle), turned(theirs.angle), "angle")
    for name in ("ssm", "previous_B", "previous_x"):
        close(getattr(ours, name), getattr(theirs, name), name)


@pytest.mark.parametrize("form", ["reference", "chunked", "step"])
@torch.no_grad()
def test_trapezoid_is_the_official_step(mamba3_decode, form):
    T, wide = ssd.CHUNK + 9, torch.float64
    inputs, state = trapezoid_inputs(T, dtype=wide), trapezoid_state(dtype=wide)
    ones = [torch.ones(1, 4, 16, dtype=wide)] * 3
    expected, after = official_steps(mamba3_decode, inputs, ones, state)
    if form == "step":
        ys, whole = [], ("D", "dt_bias", "B_bias", "C_bias")
        for t in range(T):
            y, state = trapezoid.step(
                **{n: v if n in whole else v[:, t] for n, v in inputs.items()}, A_floor=1e-4, state=state
            )
            ys.append(y)
        y = torch.stack(ys, 1)
    else:
        y, state = getattr(trapezoid, form)(**inputs, A_floor=1e-4, initial=state)
    close(y, expected)
    same_state(state, after)


@torch.no_grad()
def test_trapezoid_of_rank_two_is_the_official_step(mamba3_decode):
    """Each rank has its own x and output, which the mixer maps and gates: here by their maps."""
    T, R, wide = 9, 2, torch.float64
    inputs, state = trapezoid_inputs(T, R, wide), trapezoid_state(R, wide)
    map_x, map_z, map_y = maps = [normal(R, 4, 16, seed=70 + i, dtype=wide) for i in range(3)]
    expected, after = official_steps(mamba3_decode, inputs, maps, state)
    by_rank = inputs | {"x": inputs["x"][:, :, None] * map_x, "z": inputs["z"][:, :, None] * map_z}
    before = state._replace(previous_x=state.previous_x[:, None] * map_x)
    y, state = trapezoid.reference(**by_rank, A_floor=1e-4, initial=before)
    close((y * map_y).sum(2), expected)
    same_state(state, after._replace(previous_x=after.previous_x[:, None] * map_x))


@pytest.mark.parametrize(("initial", "G"), [(True, 2), (False, 1), (False, 4)])
def test_trapezoid_is_the_official_kernel(official, mamba3_kernels, initial, G):
    """`mamba3_siso_combined` by way of our `cuda` form: outputs, last state, and the gradients of every input."""
    inputs = trapezoid_inputs(ssd.CHUNK + 9, G=G) | (first_state() if initial else {})
    expected = outcome(with_states(official.cuda.trapezoid), inputs)
    for form in (trapezoid.reference, trapezoid.chunked):
        agree(outcome(with_states(form), inputs), expected)


@pytest.mark.parametrize("training", [False, True])
def test_trapezoid_asks_for_what_a_backward_pass_reads_only_where_there_is_one(official, monkeypatch, training):
    """Their kernel writes every chunk's state where an input is to have a gradient, which a parameter always says."""
    inputs, asked = trapezoid_inputs(4), []
    for name in ("D", "dt_bias", "B_bias", "C_bias"):
        inputs[name].requires_grad_()

    def combined(*given, **named):
        asked.extend(one for one in (*given, *named.values()) if isinstance(one, Tensor) and one.requires_grad)
        return given[2], *trapezoid_state()

    module = importlib.import_module("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")
    monkeypatch.setattr(module, "mamba3_siso_combined", combined)
    with torch.set_grad_enabled(training):
        official.cuda.trapezoid(**inputs, A_floor=1e-4)
    assert bool(asked) == training


# ----------------------------------------------------------------------------------------------------- whole mixers

WIDTH = 32
NAMES2 = {
    "conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "norm_weight": "norm.weight",
    **{name: name for name in ("in_proj.weight", "dt_bias", "A_log", "D", "out_proj.weight")},
}  # fmt: skip
NAMES3 = {
    "B_norm_weight": "B_norm.weight", "C_norm_weight": "C_norm.weight",
    **{name: name for name in ("in_proj.weight", "dt_bias", "D", "B_bias", "C_bias", "out_proj.weight")},
}  # fmt: skip
NAMES_MIMO = NAMES3 | {"map_x": "mimo_x", "map_z": "mimo_z", "map_y": "mimo_o"}


FORMS = ("reference", "torch", "numba", "cuda")


def mixer(official, config: Any, form: str) -> nn.Module:
    """Ours in a form, with weights that are the same for each, every one of them perturbed."""
    # the cuda form would not be selected on a CPU
    config = replace(config, backend="reference" if form == "cuda" else form)
    ours = MIXERS[config.kind](config, WIDTH, CPU)
    if form == "cuda":
        ours.ops = official.cuda
    with torch.no_grad():
        ours.reset_parameters(torch.Generator().manual_seed(0))
        for i, parameter in enumerate(ours.parameters()):
            parameter.add_(0.1 * normal(*parameter.shape, seed=100 + i))
    return ours


def their_mixer(official, ours: nn.Module, kind: Any, names: dict[str, str], **settings: Any) -> nn.Module:
    """Theirs, with the weights of ours."""
    config = ours.config
    theirs = kind(
        WIDTH, d_state=config.state, expand=config.expand, headdim=config.head_width, ngroups=config.groups,
        chunk_size=CHUNK, layer_idx=0, **settings,
    )  # fmt: skip
    assert {*names} == {name for name, _ in ours.named_parameters()}
    assert {*names.values()} == {name for name, _ in theirs.named_parameters()}
    with torch.no_grad():
        for mine, yours in names.items():
            target = theirs.get_parameter(yours)
            target.copy_(ours.get_parameter(mine).view_as(target))
    return theirs


def trained(mixer: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of the parameters, flat."""
    x = normal(1, CHUNK + 5, WIDTH, seed=1).requires_grad_()
    y = mixer(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * normal(*y.shape, seed=2)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, **{name: mixer.get_parameter(name).grad for name in names}}
    return {name: value.flatten() for name, value in found.items()}


@pytest.mark.parametrize(("groups", "fused"), [(1, True), (2, True), (2, False)])
def test_mamba2_is_the_official_module(official, groups, fused):
    """fused: by `mamba_split_conv1d_scan_combined`, with the gated norm over each group; else part by part."""
    config = Mamba2Config(state=16, head_width=8, groups=groups)
    ours = {form: mixer(official, config, form) for form in FORMS}
    theirs = their_mixer(official, ours["reference"], official.mamba2.Mamba2, NAMES2, use_mem_eff_path=fused)
    expected = dict(zip(("y", "x", *NAMES2), trained(theirs, NAMES2.values()).values(), strict=True))
    for form in FORMS:
        agree(trained(ours[form], NAMES2), expected)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_mamba2_decodes_as_the_official_module(official, form):
    ours = mixer(official, Mamba2Config(state=16, head_width=8, groups=2), form)
    theirs = their_mixer(official, ours, official.mamba2.Mamba2, NAMES2)
    T, prompt = CHUNK + 5, CHUNK + 2
    x = normal(2, T, WIDTH, seed=1)
    memory = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    expected = theirs(x[:, :prompt], inference_params=memory)
    y, state = ours(x[:, :prompt], ours.make_state(2, T, torch.float32, CPU))
    conv, ssm = memory.key_value_memory_dict[0]
    close(y, expected)
    for t in range(prompt, T):
        close(state.conv, conv)
        close(state.ssm, ssm)
        y, state = ours.step(x[:, t], state)
        expected, conv, ssm = theirs.step(x[:, t : t + 1], conv, ssm)
        close(y, expected[:, 0])


@pytest.mark.parametrize(("groups", "rotated"), [(1, 0.5), (2, 1.0)])
def test_mamba3_is_the_official_module(official, mamba3_kernels, groups, rotated):
    config = Mamba3Config(state=16, head_width=16, groups=groups, rotated_fraction=rotated)
    ours = {form: mixer(official, config, form) for form in FORMS}
    theirs = their_mixer(official, ours["reference"], official.mamba3.Mamba3, NAMES3, rope_fraction=rotated)
    expected = dict(zip(("y", "x", *NAMES3), trained(theirs, NAMES3.values()).values(), strict=True))
    for form in FORMS:
        agree(trained(ours[form], NAMES3), expected)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_mamba3_decodes_as_the_official_module(official, mamba3_kernels, mamba3_decode, form):
    """Their prefill is the kernel, their steps are the reference. (One group: `Mamba3.step` has no more.)"""
    ours = mixer(official, Mamba3Config(state=16, head_width=16), form)
    theirs = their_mixer(official, ours, official.mamba3.Mamba3, NAMES3)
    T, prompt = CHUNK + 5, CHUNK + 2
    x = normal(2, T, WIDTH, seed=1)
    memory = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    expected = theirs(x[:, :prompt], inference_params=memory)
    y, state = ours(x[:, :prompt], ours.make_state(2, T, torch.float32, CPU))
    close(y, expected)
    held = memory.key_value_memory_dict[0]
    for t in range(prompt, T):
        same_state(trapezoid.State(*state.buffers.values()), trapezoid.State(*held))
        y, state = ours.step(x[:, t], state)
        expected, *held = theirs.step(x[:, t], *held)
        close(y, expected)


@torch.no_grad()
def test_mamba3_of_rank_two_decodes_as_the_official_module(official, mamba3_decode):
    """From an empty state: their MIMO prefill needs CUDA."""
    ours = mixer(official, Mamba3Config(state=16, head_width=16, rank=2), "reference")
    theirs = their_mixer(official, ours, official.mamba3.Mamba3, NAMES_MIMO, is_mimo=True, mimo_rank=2)
    T = 12
    x = normal(2, T, WIDTH, seed=1)
    held = theirs.allocate_inference_cache(2, T)
    state = ours.make_state(2, T, torch.float32, CPU)
    whole = ours(x)[0]
    for t in range(T):
        y, state = ours.step(x[:, t], state)
        expected, *held = theirs.step(x[:, t], *held)
        close(y, expected)
        close(whole[:, t], expected)


@pytest.mark.parametrize("operation", ["selective_scan", "ssd", "trapezoid"])
def test_the_probe_of_the_cuda_kernels_calls_them_rightly(official, mamba3_kernels, monkeypatch, operation):
    def here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *size, device: make(*size)

    stand_in = SimpleNamespace(
        randn=here(torch.randn), rand=here(torch.rand), ones=here(torch.ones),
        cuda=SimpleNamespace(synchronize=lambda: None),
    )  # fmt: skip
    monkeypatch.setattr(kernels, "torch", stand_in)
    assert kernels._probe_cuda(operation) is None


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_official_model_takes_our_weights(official, name):
    """What the benchmark beside it rests on: whole models, stacked, give the same logits."""
    from benchmarks.official import counterpart

    mixer = MambaConfig(state=8, backend="torch") if name == "mamba" else Mamba2Config(
        head_width=8, state=16, groups=2, backend="torch")  # fmt: skip
    ours = LanguageModel(ModelConfig(vocabulary=40, width=16, layers=3, mixer=mixer), seed=2)
    theirs = counterpart(ours)
    tokens = torch.randint(0, 40, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(theirs(tokens).logits, ours(tokens))


# ------------------------------------------------------------------------------------- compiled: kernels as operators

CONVOLUTION = {"x": normal(2, 11, 16, seed=0), "weight": normal(16, 4, seed=1), "bias": normal(16, seed=2)}
SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "convolution": ("causal_conv1d", CONVOLUTION),
    "convolution of one token": ("causal_conv1d", CONVOLUTION | {"x": normal(2, 1, 16, seed=0)}),
    "convolution continued": ("causal_conv1d", CONVOLUTION | {"before": normal(2, 16, 4, seed=3)}),
    "scan": ("selective_scan", scan_inputs(37, True, False)),
    "scan without a gate": ("selective_scan", scan_inputs(37, False, False)),
    "scan continued": ("selective_scan", scan_inputs(37, True, True)),
    "ssd": ("ssd", ssd_inputs(2 * CHUNK + 5, False)),
    "ssd continued": ("ssd", ssd_inputs(2 * CHUNK + 5, True)),
    "mamba2_inner": ("mamba2_inner", mamba2_inputs(2 * CHUNK + 5, 2)),
    "trapezoid": ("trapezoid", trapezoid_inputs(ssd.CHUNK + 9)),
    "trapezoid continued": ("trapezoid", trapezoid_inputs(ssd.CHUNK + 9) | first_state()),
}
WIDE = {  # what autocast leaves in float32: parameters that no product reads, and what is carried
    "weight", "bias", "A", "D", "dt_bias", "initial_state", "conv_weight", "conv_bias", "norm_weight", "out_weight",
    "a", "dt of trapezoid", "B_bias", "C_bias",
}  # fmt: skip


def mixed(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """In the types of mixed precision."""
    return {
        key: value.half() if isinstance(value, Tensor) and not {key, f"{key} of {name}"} & WIDE else value
        for key, value in inputs.items()
    }


SEQUENCES |= {f"{case}, mixed": (name, mixed(name, inputs)) for case, (name, inputs) in SEQUENCES.items()}
COMPILED = SEQUENCES | {
    "gated norm": ("gated_rms_norm", {
        "y": normal(2, 11, 16, seed=0), "z": normal(2, 11, 16, seed=1), "weight": normal(16, seed=2), "eps": 1e-5,
        "groups": 2,
    }),
}  # fmt: skip


@pytest.fixture
def operators(official, mamba3_kernels, monkeypatch):
    """In whose calls without data the interpreter launches nothing either."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    module = importlib.import_module("models.ops.kernels.cuda_operators")
    without_data = module.kernels_without_data

    @contextmanager
    def without_interpreter():
        with without_data(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)
            yield

    monkeypatch.setattr(module, "kernels_without_data", without_interpreter)
    monkeypatch.setattr(module, "MAMBA3_DTYPE", torch.float32)
    yield module
    torch.compiler.reset()


def of_a_sequence(official, name: str) -> Callable[..., Any]:
    form = getattr(official.cuda, name)
    return with_states(form) if name == "trapezoid" else form


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_a_kernel_is_called_whole_forward_and_backward(official, operators, case):
    name, inputs = COMPILED[case]
    form = of_a_sequence(official, name)
    compiled = torch.compile(form, backend="aot_eager", fullgraph=True, dynamic=False)
    weighted = 1 if name == "selective_scan" else None
    agree(outcome(compiled, inputs, weighted), outcome(form, inputs, weighted))


class Calls(TorchDispatchMode):
    """Context manager: the calls of our operators inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "lab":
            self.seen.append((function, arguments))
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("case", SEQUENCES)
def test_operators_say_without_data_what_they_return(official, operators, monkeypatch, case):
    """Shapes, types and strides of a forward and a backward pass."""
    name, inputs = SEQUENCES[case]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Calls() as calls:
        outcome(of_a_sequence(official, name), inputs, 1)
    assert [str(function).endswith("backward.default") for function, _ in calls.seen] == [False, True]
    for function, arguments in calls.seen:
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("case", "padded"), [("mamba2_inner", "projected"), ("convolution", "x"), ("trapezoid", "x")])
def test_operators_read_what_the_compiler_pads(official, operators, monkeypatch, case, padded):
    """The rows of a product, to whole cache lines."""
    name, inputs = SEQUENCES[case]
    form = of_a_sequence(official, name)

    def given_padded(**inputs):
        return form(**inputs | {padded: F.pad(inputs[padded], (0, 24))[..., :-24]})

    expected = outcome(form, inputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    agree(outcome(given_padded, inputs), expected)


@pytest.mark.parametrize("config", [
    MambaConfig(state=16), Mamba2Config(state=16, head_width=8, groups=2),
    Mamba2Config(state=16, head_width=8, groups=2, grouped_norm=False), Mamba3Config(state=16, head_width=16),
], ids=["mamba", "mamba2", "mamba2 in parts", "mamba3"])  # fmt: skip
def test_a_compiled_block_is_one_graph(official, operators, monkeypatch, config):
    """Trained, and reading a prompt in two parts, with the numbers of what is not compiled."""
    model = ModelConfig(vocabulary=8, width=WIDTH, layers=1, mixer=config)
    monkeypatch.setattr(Mamba2, "is_one_operation", property(lambda self: self.norm_groups == self.config.groups))
    found = []
    for compiled in (False, True):
        block = Block(model, model.kinds[0], CPU)
        block.mixer_norm.ops = official.cuda
        block.mixer_norm.reset_parameters(0.7)
        block.mixer = mixer(official, config, "cuda")
        forward = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else block
        results = trained(lambda x, forward=forward: forward(x).stream, ())
        found.append({f"training {key}": value for key, value in results.items()})
        found[-1] |= {f"d {name}": parameter.grad for name, parameter in block.named_parameters()}
        x, state = normal(1, 2 * CHUNK, WIDTH, seed=3), block.mixer.make_state(1, 2 * CHUNK, torch.float32, CPU)
        with torch.no_grad():
            for part in x.split(CHUNK, 1):
                passed = forward(part, None, state)
                state = passed.state
                found[-1][f"prefill to {state.length}"] = passed.stream
        found[-1] |= {f"state {name}": buffer for name, buffer in state.buffers.items()}
    agree(*found)
