"""The check of the kernels passes what is right, the calls of the CUDA form included, and no mistake gets past it."""

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import official_stubs
import pytest
import torch
from torch import Tensor

from experiments import doctor, runner
from experiments.kernels import check as checking
from experiments.kernels.check import OPERATIONS, absent, check, doubt, of_this_gpu, tolerance
from experiments.kernels.verdict import by_form
from experiments.measurement.process import CellFailedError
from experiments.numbers import DASH
from experiments.report import content
from experiments.spec import load
from experiments.training import autocast
from models.config import ModelConfig
from models.feedforward.moe import MoE, MoEConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers.attention import AttentionConfig
from models.mixers.mamba2 import Mamba2, Mamba2Config
from models.norm import RMSNorm
from models.ops import kernels
from models.presets import PRESETS

OVER_LIBRARIES = ("cuda_form", "cuda_operators")
KNOWN: dict[Any, Any] = {}
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture
def cuda(monkeypatch):
    """The CUDA form over stand-ins for its libraries, as if it could run on this machine."""
    for name, module in official_stubs.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in OVER_LIBRARIES:
        monkeypatch.delitem(sys.modules, f"{kernels.__name__}.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    monkeypatch.setattr(checking, "unavailable", lambda *of: None)
    yield kernels.load("cuda")
    for name in OVER_LIBRARIES:
        del sys.modules[f"{kernels.__name__}.{name}"]
        delattr(kernels, name)


@pytest.fixture(autouse=True)
def definitions_once(monkeypatch):
    """What the definitions give, loops over tokens in float64, is computed once for all tests."""
    own, reference = checking.differentiate, kernels.load("reference")

    def known(operation, form, inputs):
        if form is not reference or {x.dtype for x in inputs.values()} != {torch.float64}:
            return own(operation, form, inputs)
        key = operation.name, tuple((name, x.shape, x.sum().item()) for name, x in inputs.items())
        if key not in KNOWN:
            KNOWN[key] = own(operation, form, inputs)
        return KNOWN[key]

    monkeypatch.setattr(checking, "differentiate", known)


def worst(outcome) -> float:
    return max([*outcome.outputs.values(), *outcome.gradients.values()])


def wrong(outcomes) -> dict[str, str]:
    return {f"{o.operation}, {o.shape}": o.problem for o in outcomes if o.problem}


def test_the_cuda_form_calls_its_libraries_rightly(cuda):
    """With the arguments that their signatures have, the layouts and types that they insist on, and right numbers from
    outputs to gradients."""
    outcomes = check("cpu", ["cuda"])
    assert wrong(outcomes) == {}
    assert {outcome.operation for outcome in outcomes} == {operation.name for operation in OPERATIONS}
    assert max(map(worst, outcomes)) < 1e-5  # the stand-ins compute in float32


@pytest.mark.parametrize("added", [True, False])
def test_an_operator_is_compiled_whole_and_differentiated(cuda, monkeypatch, added):
    """What all of them are made with; each of them is compared where its library is (pytest -m oracle)."""
    made = cuda.cuda_operators
    monkeypatch.setattr(made, "kernels_without_data", nullcontext)

    @made.operator
    def power(x: Tensor, y: Tensor | None, exponent: int) -> tuple[Tensor, Tensor]:
        lower = x ** (exponent - 1)
        return lower * x if y is None else lower * x + y, lower

    @made.operator
    def power_backward(d: Tensor, x: Tensor, y: Tensor | None, lower: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
        return exponent * lower * d, d.new_empty(0) if y is None else d.clone()

    made.differentiate(power, power_backward, results=1, kept=(1,), numbers=1)
    x, y = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (0, 1))
    compiled = torch.compile(lambda x, y: power(x * 2, y, 3)[0], backend="aot_eager", fullgraph=True)
    found = []
    for of in (compiled, lambda x, y: (x * 2) ** 3 + (0 if y is None else y)):
        z = of(x, y if added else None)
        found.append([z, *torch.autograd.grad(z.sin().sum(), [x, y] if added else [x])])
    torch.testing.assert_close(*found)
    torch.compiler.reset()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_form_in_16_bits(cuda, operation):
    for shape, sizes in operation.shapes.items():
        for continued in operation.starts:
            if sizes[1] > checking.LONG:
                continue
            inputs = checking._inputs(operation, sizes, continued, torch.bfloat16)
            expected = checking.differentiate(operation, kernels.load("reference"), inputs)
            for form in {"cuda", "torch", "reference"} & set(operation.forms):
                outcome = checking._compare(operation, form, "cpu", "bfloat16", shape, inputs, expected)
                assert outcome.problem is None
                assert worst(outcome) < outcome.tolerance / 2  # or another card's rounding may pass it
                assert worst(outcome) > 1e-5 or operation.name == "convolution, decode"  # there is rounding to be seen


@pytest.mark.parametrize(("grouped", "heads", "whole"), [(True, 8, True), (False, 8, False), (True, 4, False)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_mamba2_behind_its_projection_is_one_operation_where_it_fits(
    cuda, monkeypatch, grouped: bool, heads: int, whole: bool, precision: str
) -> None:
    """The same numbers and gradients either way, and those of the definition. One operation where no state is wanted,
    the norm has the groups of the kernel, and the convolution can read what is projected where it lies."""
    settings = {"head_width": 8, "state": 8, "groups": 2, "grouped_norm": grouped}
    made, plain = (
        Mamba2(Mamba2Config(**settings, backend="reference"), 4 * heads, torch.device("cpu")) for _ in range(2)
    )  # fmt: skip
    with torch.no_grad():
        plain.reset_parameters(torch.Generator().manual_seed(0))
        for weight in (plain.norm_weight, plain.D):  # all alike, they would hide who scales what
            weight.copy_(torch.linspace(0.5, 2, len(weight)))
    made.load_state_dict(plain.state_dict())
    made.ops, made.backend = cuda, kernels.Selection("cuda", "cuda")
    asked: list[str] = []
    own = cuda.mamba2_inner
    monkeypatch.setattr(cuda, "mamba2_inner", lambda *of: asked.append("whole") or own(*of))
    x = torch.randn(2, 37, 4 * heads, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, mixer in (("cuda", made), ("reference", plain)):
        given = x.clone().requires_grad_()
        with autocast(precision if name == "cuda" else "float32", torch.device("cpu")):
            y, none = mixer(given)
        assert none is None
        (y.float() * torch.linspace(-1, 1, y[0].numel()).view(y[0].shape)).sum().backward()
        found[name] = {"y": y, "x": given.grad} | {key: p.grad for key, p in mixer.named_parameters()}
    assert asked == (["whole"] if whole else [])
    limit = 2e-5 if precision == "float32" else 0.04
    for key, expected in found["reference"].items():
        error = (found["cuda"][key] - expected).abs().max() / expected.abs().max()
        assert error < limit, (key, error)
    state = made.make_state(2, 37, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        y, left = made(x, state)
    assert left is not None
    assert asked == (["whole"] if whole else [])
    torch.testing.assert_close(y, found["reference"]["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [1, 2])
@torch.no_grad()
def test_a_single_token_of_a_projection_has_rows_that_a_descriptor_takes(cuda, T: int) -> None:
    """In 16 bits a row of that projection is no multiple of 16 bytes, and a slice of one row counts as contiguous: what
    the kernels do not copy has to come with strides of its own."""
    config = PRESETS["mamba3-tiny"].with_overrides({"layers": 1, "mixer.backend": "reference"})
    mixer = LanguageModel(config, seed=0, dtype=BF16).blocks[0].mixer
    assert mixer.in_proj.weight.shape[0] % 8 != 0
    x = torch.randn(1, T, config.width, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, _ = mixer(x)
    mixer.ops = cuda
    torch.testing.assert_close(mixer(x)[0], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(("types", "precision", "width", "asked"), [
    ((F32, BF16), "bfloat16", 8192, BF16), ((F32, F32), "bfloat16", 24, BF16), ((F32, F32), "float32", 24, F32),
    ((BF16, BF16), "float32", 24, BF16), ((BF16, F32), "float32", 24, F32), ((F64, F64), "float32", 24, None),
    ((F32, F64), "bfloat16", 24, None), ((F32, BF16), "bfloat16", 8193, None),
    ((F32,), "bfloat16", 24, BF16), ((BF16,), "float32", 24, BF16), ((F32,), "float32", 24, F32),
    ((F64,), "float32", 24, None),
])  # fmt: skip
def test_a_sum_has_its_norm_from_one_kernel_where_that_fits(cuda, monkeypatch, types, precision, width, asked):
    """In the type of the product that reads it; not compiled. So has a stream that has no branch."""
    g = torch.Generator().manual_seed(0)
    x, *branches = (torch.randn(3, width, generator=g, dtype=F64).to(dtype) for dtype in types)
    branch = branches[0] if branches else None
    assert cuda.suits_sum(x, branch) == (asked is not None)
    if asked is None:
        return
    wide, weight = x.double() + sum(m.double() for m in branches), torch.linspace(0.5, 2, width)
    with autocast(precision, torch.device("cpu")):
        total, normed = cuda.rms_norm_of_sum(x, branch, weight, 1e-5, True)
    assert (total.dtype, normed.dtype) == (torch.promote_types(types[0], types[-1]), asked)
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert (total - wide).abs().max() <= (2**-7 if total.dtype == BF16 else 1e-6)
    assert (normed - expected).abs().max() <= (2**-6 if BF16 in (asked, total.dtype) else 2e-6) * expected.max()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not cuda.suits_sum(x, branch)


@pytest.mark.parametrize(("feedforward", "post_norm", "written_over"), [
    (SwiGLUConfig(), False, [False, False, True, True, True]),
    (MoEConfig(experts=4, hidden=16), False, [False, True, True]), (None, False, [False, True, True]),
    (SwiGLUConfig(), True, []),
], ids=["swiglu", "experts", "mixers alone", "post norm"])  # fmt: skip
def test_a_sum_that_is_read_by_products_alone_is_normalised_as_it_is_made(
    cuda, monkeypatch, feedforward, post_norm, written_over
) -> None:
    """Two layers under autocast. A residual stream stays as wide as it is, and a router chooses by what is not rounded
    to 16 bits: its norm stays apart."""
    config = ModelConfig(
        vocabulary=11, width=24, layers=2, mixer=AttentionConfig(heads=2, backend="sdpa"), feedforward=feedforward,
        post_norm=post_norm, norm_eps=0.01,
    )  # fmt: skip
    model, seen, widths, own = LanguageModel(config, seed=0), [], [], cuda.norm_of_sum
    tokens = torch.arange(22).view(2, 11) % 7
    expected = model(tokens)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.ops = cuda
        if isinstance(module, MoE):
            monkeypatch.setattr(module, "_route", lambda x, own=module._route: widths.append(x.dtype) or own(x))
    monkeypatch.setattr(cuda, "norm_of_sum", lambda *of: seen.append(of[-2:]) or own(*of))
    with autocast("bfloat16", torch.device("cpu")):
        logits = model(tokens)
    assert seen == [(BF16, over) for over in written_over]  # not over what the embedding gave, in the first block
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    first = model.embed(tokens)
    with autocast("bfloat16", torch.device("cpu")):
        model.blocks[1].explain(first)
    assert widths == ([F32] * 3 if isinstance(feedforward, MoEConfig) else [])
    plain = LanguageModel(config, seed=0)
    gradients = [torch.autograd.grad(one(tokens).sin().sum(), list(one.parameters())) for one in (model, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected)
        kept = first.clone()
        passed = model.blocks[0](first)
        torch.testing.assert_close(first, kept)  # what has no branch is not the block's
        assert (passed.branch is None) == post_norm
        apart = plain.blocks[0](first)
        assert apart.branch is None
        torch.testing.assert_close(passed.stream, apart.x)


def test_every_form_of_this_machine_agrees():
    outcomes = check("cpu")
    assert {outcome.form for outcome in outcomes} == {"reference", "torch", "numba"}
    assert wrong(outcomes) == {}
    continued = [outcome for outcome in outcomes if outcome.shape.endswith("continued")]
    for name, states in (("selective scan", {"state"}), ("convolution", {"before"}), ("ssd", {"state"})):
        fresh, carried = (
            {gradient for o in group if o.operation == name for gradient in o.gradients}
            for group in ([o for o in outcomes if o not in continued], continued)
        )
        assert carried - fresh == states
    assert "need a CUDA GPU" in absent("cpu")["cuda"]


def test_a_kernel_that_cannot_run_here_is_absent_and_not_wrong(monkeypatch):
    def unavailable(form: str, device: str, kernel: str) -> str | None:
        return "no such thing" if form == "numba" or (form, kernel) == ("torch", "ssd") else None

    monkeypatch.setattr(checking, "unavailable", unavailable)
    assert absent("cpu") == {"numba": "no such thing", "torch, ssd": "no such thing"}
    outcomes = check("cpu", ["torch", "numba"])
    assert {(outcome.form, outcome.kernel) for outcome in outcomes} == {
        ("torch", "selective_scan"), ("torch", "causal_conv1d"), ("torch", "trapezoid")
    }  # fmt: skip
    assert wrong(outcomes) == {}


def test_what_a_kernel_raises_is_told_in_a_line(monkeypatch):
    def raises(*of: Any) -> Any:
        raise RuntimeError("CUDA error:\nan illegal memory access\n" + 1000 * "and so on ")

    monkeypatch.setattr(kernels.load("torch"), "ssd_step", raises)
    (problem,) = wrong(check("cpu", ["torch"])).values()
    assert problem.startswith("does not run (RuntimeError: CUDA error: an illegal memory access and so on ")
    assert len(problem) < 250


def half_of_a_gradient(function):
    """Right outputs, of whose gradient half is missing."""

    def call(*inputs: Any, **rest: Any) -> Any:
        result = function(*inputs, **rest)
        y, *others = result if isinstance(result, tuple) else (result,)
        y = (y + y.detach()) / 2
        return (y, *others) if others else y

    return call


def changing(change):
    def wrong(function):
        def call(*inputs: Any, **rest: Any) -> Any:
            y, *others = function(*inputs, **rest)
            return (change(y), *others)

        return call

    return wrong


def last_token(y: Tensor) -> Tensor:
    return torch.cat([y[:, :-1], y[:, -1:] * 1.05], 1)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (half_of_a_gradient, r"^the gradient of \w+ is off by 0\.5"),
        (changing(last_token), r"off by 0\.0\d+ of its largest entry, more than 0\.0001$"),
        (changing(lambda y: y * torch.nan), r"^y is off by inf"),
        (changing(lambda y: y[:, :-1]), r"^does not run \(ValueError: shape"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("operation", ["selective_scan", "ssd", "trapezoid"])
def test_a_wrong_kernel_is_caught(monkeypatch, operation, mistake, said):
    form = kernels.load("torch")
    monkeypatch.setattr(form, operation, mistake(getattr(form, operation)))
    outcomes = [outcome for outcome in check("cpu", ["torch", "reference"]) if outcome.problem]
    assert {(o.form, o.kernel) for o in outcomes} == {("torch", operation)}
    odd = next(o for o in outcomes if o.shape == "odd length")
    assert re.search(said, odd.problem), odd.problem
    assert "nan" not in str(odd.to_dict()).lower()
    many = len(outcomes)
    assert by_form([o.to_dict() for o in outcomes])["torch"].startswith(f"{many} of {many} cases failed")


def test_a_step_that_leaves_a_wrong_state_is_caught(monkeypatch):
    form = kernels.load("torch")
    step = form.causal_conv1d_step

    def forgets(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
        return step(x, weight, bias, state.clone())

    monkeypatch.setattr(form, "causal_conv1d_step", forgets)
    assert set(wrong(check("cpu", ["torch"]))) == {"convolution, decode, 3 tokens"}


def test_an_error_is_relative_to_what_was_summed():
    large, small, zero = torch.tensor([4.0, 1.0]), torch.tensor([0.1]), torch.tensor([0.0])
    beside = {"large": large, "small": small, "zero": zero}
    assert checking._error(large + 0.2, large, beside) == pytest.approx(0.05)
    assert checking._error(small + 0.2, small, beside) == pytest.approx(0.2)
    assert checking._error(zero + 0.2, zero, beside) == pytest.approx(0.05)
    assert checking._error(zero + 0.2, zero, {"zero": zero}) == pytest.approx(0.2)


def test_tolerances_follow_what_a_form_multiplies_in():
    assert tolerance("numba", "ssd", "float32") == tolerance("cuda", "selective_scan", "float32") == 1e-4
    assert tolerance("cuda", "ssd", "float32") == 16 * 2**-11
    assert tolerance("cuda", "trapezoid", "float32") == tolerance("cuda", "ssd", "bfloat16") == 16 * 2**-8


# ----------------------------------------------------------------------------------------------- what a run keeps of it


def row(form: str, kernel: str, problem: str | None = None) -> dict[str, Any]:
    return {
        "operation": kernel, "kernel": kernel, "form": form, "device": "cuda", "dtype": "float32",
        "shape": "one token", "tolerance": 1e-4, "outputs": {"y": 0.0}, "gradients": {}, "problem": problem,
    }  # fmt: skip


PASS = {"absent": {}, "rows": [row(form, kernel) for form in ("torch", "cuda")
                               for kernel in ("selective_scan", "causal_conv1d", "ssd", "trapezoid")]}  # fmt: skip
FAIL = {"absent": {}, "rows": [*PASS["rows"][:5], row("cuda", "causal_conv1d", "y is off by 2"), *PASS["rows"][6:]]}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose check gives what the test puts in `found`, and how often it was made."""
    card = {"gpu": "A card", "gpu_capability": "9.0", "cuda": "13.0", "python": "3.12.1", "source_sha256": "f00",
            "packages": {"torch": "2.11.0", "mamba-ssm": "2.3.2.post1"}}  # fmt: skip
    state = SimpleNamespace(card=card, found=PASS, made=0)

    def run_fresh(function, *part):
        if function is checking.absent_here:
            state.made += 1
            return {} if isinstance(state.found, Exception) else state.found["absent"]
        assert function is checking.checked_here
        if isinstance(state.found, Exception):
            raise state.found
        return state.found["rows"] if part == (checking.shares("cuda")[0],) else []

    monkeypatch.setattr(checking, "run_fresh", run_fresh)
    monkeypatch.setattr(checking, "describe", lambda device, threads: state.card)
    return state


def test_a_pass_is_kept_for_the_same_card_versions_and_code(gpu, tmp_path: Path):
    said: list[str] = []
    first = of_this_gpu(tmp_path, said.append)
    assert (first["problem"], first["rows"], len(said)) == (None, PASS["rows"], 1)
    assert of_this_gpu(tmp_path, said.append) == first
    assert (gpu.made, len(said)) == (1, 1)
    for change in ({"gpu": "Another"}, {"packages": {"torch": "2.11.0", "mamba-ssm": "2.4"}}, {"source_sha256": "b"}):
        gpu.card = gpu.card | change
        made = gpu.made
        of_this_gpu(tmp_path)
        assert gpu.made == made + 1, change


def test_a_run_checks_the_kernels_that_it_calls(gpu, monkeypatch, tmp_path: Path):
    asked = []

    def run_fresh(function, asked_for):
        asked.append(asked_for if isinstance(asked_for, list) else {asked_for.kernel})
        return {} if function is checking.absent_here else []

    monkeypatch.setattr(checking, "run_fresh", run_fresh)
    assert of_this_gpu(tmp_path, kernels=[])["rows"] == []
    assert asked == []
    of_this_gpu(tmp_path, kernels=["causal_conv1d", "selective_scan"])
    assert {kernel for one in asked for kernel in one} == {"causal_conv1d", "selective_scan"}
    assert len(asked) == 1 + 2 * 2 * 2  # what is absent; a kernel, a type, from nothing or continuing
    of_this_gpu(tmp_path, kernels=["ssd"])  # not those that were kept
    assert asked[-1] == {"ssd"}


def test_what_failed_is_checked_again_and_no_pass_outlives_it(gpu, tmp_path: Path):
    of_this_gpu(tmp_path)
    for found in (FAIL, CellFailedError("the process was killed by SIGSEGV")):
        gpu.found = found
        failed = of_this_gpu(tmp_path, again=True)
        assert failed["problem"] == (str(found) if isinstance(found, Exception) else None)
        gpu.found, made = PASS, gpu.made
        assert of_this_gpu(tmp_path)["rows"] == PASS["rows"]
        assert gpu.made == made + 1


def test_a_pass_of_all_kernels_serves_a_run_of_some_until_one_fails(gpu, tmp_path: Path):
    gpu.found = PASS | {"absent": {"numba": "no", "torch, ssd": "no", "torch, trapezoid": "no"}}
    whole = of_this_gpu(tmp_path, again=True)
    found = of_this_gpu(tmp_path, kernels=["ssd", "causal_conv1d"])
    assert gpu.made == 1
    assert found["checked"] == whole["checked"]
    assert found["absent"] == {"numba": "no", "torch, ssd": "no"}
    assert [(row["form"], row["kernel"]) for row in found["rows"]] == [
        (form, kernel) for form in ("torch", "cuda") for kernel in ("causal_conv1d", "ssd")
    ]
    gpu.card = gpu.card | {"gpu": "Another"}
    of_this_gpu(tmp_path, kernels=["trapezoid"])  # a pass of its own
    gpu.found = FAIL
    of_this_gpu(tmp_path, again=True)
    made = gpu.made
    of_this_gpu(tmp_path, kernels=["trapezoid"])
    assert gpu.made == made + 1


SCAN = ("selective_scan", "causal_conv1d")
CHECKED = {"checked": "2030-01-01", "problem": None}


@pytest.mark.parametrize(
    ("environment", "forms", "of", "reason"),
    [
        ({"device": "cpu"}, ["numba"], SCAN, None),
        ({"device": "cuda", "kernels": CHECKED | PASS}, ["cuda"], SCAN, None),
        ({"device": "cuda", "kernels": CHECKED | PASS}, ["reference"], SCAN, "were not checked on this GPU (reference"),
        ({"device": "cuda"}, ["sdpa"], SCAN, None),
        ({"device": "cuda"}, ["cuda", "sdpa"], SCAN, "were not checked on this GPU"),
        ({"device": "cuda", "kernels": CHECKED | PASS | {"problem": "it died"}}, ["torch"], SCAN, "(it died)"),
        ({"device": "cuda", "kernels": CHECKED | FAIL}, ["cuda"], SCAN, "failed their check on this GPU (cuda: causal"),
        ({"device": "cuda", "kernels": CHECKED | FAIL}, ["torch"], SCAN, None),
        ({"device": "cuda", "kernels": CHECKED | FAIL}, ["cuda"], ("trapezoid",), None),
    ],
)
def test_which_models_are_doubted(environment, forms, of, reason):
    found = doubt(environment, forms, of)
    assert found is None if reason is None else reason in found


def test_a_run_on_a_gpu_records_the_check(gpu, monkeypatch, tmp_path: Path):
    """Up to where it would measure: the compilation of the kernels, and the machine, are made up."""
    monkeypatch.setattr(runner, "run_fresh", lambda *of: {"mamba": {"name": "cuda", "fallback": None}})
    monkeypatch.setattr(runner, "describe", lambda device, threads: {"device": device})
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    one = SimpleNamespace(folder=tmp_path, tokenizer_path=tokenizer)
    smoke = load("compare", profile="smoke")
    dataset: Any = SimpleNamespace(first=one, datasets={smoke.data.vocabulary: one}, facts={"files": {}})
    for device, expected in (("cuda", PASS["rows"]), ("cpu", None)):
        experiment = smoke.model_copy(update={"device": device})
        events: list[runner.Event] = []
        found = runner._made_ready(experiment, dataset, events.append, tmp_path / "cache")
        run = runner._new_directory(experiment, dataset, tmp_path / device)
        runner._begin(run, experiment, dataset, "lab run", found)
        recorded = run.environment()["kernels"]
        assert (recorded and recorded["rows"]) == expected
        assert any("checking the kernels" in event.message for event in events) is (device == "cuda")


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        (None, {"Kernels": DASH}),
        (CHECKED | PASS, {"Kernels, form torch": "all 4 cases agree with the float64 reference (checked 2030-01-01)"}),
        (CHECKED | FAIL, {"Kernels, form cuda": "1 of 4 cases failed, first cuda: causal_conv1d, float32, one token: "
                                                "y is off by 2 (checked 2030-01-01)"}),
        (CHECKED | {"problem": "it died", "absent": {}, "rows": []}, {"Kernels": "not checked: it died"}),
    ],
)  # fmt: skip
def test_the_report_says_how_the_check_came_out(recorded, said):
    record: Any = SimpleNamespace(environment={"device": "cuda", "kernels": recorded})
    groups = content._environment_table(record).groups
    assert said.items() <= {what.text: value.text for _, lines in groups for what, value in lines}.items()


def test_the_doctor_tells_of_every_form_on_every_device(gpu, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "describe", lambda device, threads: {"device": device})
    monkeypatch.setattr(doctor, "check", lambda device: [])
    for found, cuda, torch_form in (
        (PASS, None, None),
        (
            FAIL,
            "do not use it: 1 of 4 cases failed, first cuda: causal_conv1d, float32, one token: y is off by 2",
            None,
        ),
        (PASS | {"absent": {"cuda": "not installed"}}, "not installed", None),
        (
            FAIL | {"absent": {"cuda, trapezoid": "cannot import tilelang"}},  # which is no reason to trust the others
            "do not use it: 1 of 4 cases failed, first cuda: causal_conv1d, float32, one token: y is off by 2",
            None,
        ),
        (CellFailedError("killed"), "killed", "killed"),
    ):
        gpu.found = found
        findings = doctor.examine()
        said = {(one["form"], one["device"]): one["problem"] for one in findings["forms"]}
        assert (said["cuda", "cuda"], said["torch", "cuda"]) == (cuda, torch_form)
        assert said["numba", "cpu"] is None
        assert findings["environment"] == {"device": "cuda"}
