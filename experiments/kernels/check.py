"""Whether each form of the heavy operations gives the right numbers here, forward and backward.

Every case runs a form on its device and the reference in float64 on the CPU, on inputs that both hold exactly. Lengths
are awkward on purpose: one token, fewer than the convolution has taps, odd, and past the chunks of the kernels.
"""

import hashlib
import json
import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from experiments.data.dataset import writing
from experiments.environment import describe
from experiments.kernels.verdict import told
from experiments.limits import available_cores
from experiments.measurement.process import CellFailedError, run_fresh
from experiments.store import now, read_json, write_json
from models.config import ModelConfig
from models.mixers import MIXERS
from models.ops.kernels import BACKENDS, load, unavailable
from models.ops.kernels.tuning import untimed
from models.ops.trapezoid import State

Tensors = dict[str, Tensor]

# Largest error of an output or a gradient over its largest entry, or over 1 where that is smaller. float32: far above
# what the forms show on a CPU (2e-6), far below what a wrong kernel gives. The others are sixteen roundings of the type
# (11 significant bits in tf32, 8 in bfloat16), since a gradient passes several products and sums that are each rounded
# to it: in bfloat16 torch's form shows 0.015 on a CPU, and causal-conv1d's tests allow 0.01 and an absolute 0.05.
TOLERANCES = {"float32": 1e-4, "tf32": 16 * 2.0**-11, "bfloat16": 16 * 2.0**-8}
STEPS = 3  # tokens that a decode step is tried on
A_FLOOR = 1e-4
EPS = 1e-5
NOTHING = 1e-9  # of float64 terms of about 1
LONG = 1000  # tokens; checked on a GPU only, whose scan has a chunk of 2048: the reference takes seconds


@dataclass(frozen=True)
class Operation:
    """One operation of `models.ops.kernels.load`.

    kernel: which of the compiled kernels it stands on, by the names that mixers use.
    shapes: sizes by what is awkward about them.
    draw(draw, *sizes): its inputs, float64; those in `state` only where it continues a sequence.
    call(form, inputs): its outputs, y among them; only y is differentiated, as in training.
    narrow: inputs that come in the run's number format; the rest are float32 in every run.
    forms: those that have it.
    """

    name: str
    kernel: str
    shapes: dict[str, tuple[int, ...]]
    draw: Callable[..., Tensors]
    call: Callable[[ModuleType, Tensors], Tensors]
    narrow: tuple[str, ...]
    state: tuple[str, ...]
    decodes: bool = False
    forms: tuple[str, ...] = BACKENDS

    @property
    def starts(self) -> tuple[bool, ...]:
        """The cases to try: whether each continues a sequence."""
        return (True,) if self.decodes else (False, True) if self.state else (False,)


@dataclass(frozen=True)
class Outcome:
    """A case and its errors by output and by gradient; problem: why it does not count as right, or None."""

    operation: str
    kernel: str
    form: str
    device: str
    dtype: str
    shape: str
    tolerance: float
    outputs: dict[str, float]
    gradients: dict[str, float]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: an error that is no number is None."""
        finite = {
            kind: {name: error if math.isfinite(error) else None for name, error in getattr(self, kind).items()}
            for kind in ("outputs", "gradients")
        }
        return asdict(self) | finite


# ------------------------------------------------------------------------------------------------------- the operations


def _draw_scan(draw: Callable[..., Tensor], rows: int, T: int, E: int, N: int) -> Tensors:
    return {
        "u": draw(rows, T, E), "dt": draw(rows, T, E) - 2, "A": -draw(E, N).exp(), "B": draw(rows, T, N),
        "C": draw(rows, T, N), "D": draw(E), "z": draw(rows, T, E), "dt_bias": draw(E), "state": draw(rows, E, N),
    }  # fmt: skip


def _scan(form: ModuleType, given: Tensors) -> Tensors:
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
    y, last = form.selective_scan(*(given[name] for name in names), given.get("state"))
    return {"y": y, "last state": last}


def _scan_step(form: ModuleType, given: Tensors) -> Tensors:
    state, A, D, bias = (given["state"].clone(), given["A"], given["D"], given["dt_bias"])
    tokens = zip(*(given[name].unbind(1) for name in ("u", "dt", "B", "C", "z")), strict=True)
    ys = [form.selective_scan_step(u, dt, A, B, C, D, z, bias, state) for u, dt, B, C, z in tokens]
    return {"y": torch.stack(ys, 1), "last state": state}


def _draw_convolution(draw: Callable[..., Tensor], rows: int, T: int, E: int, W: int) -> Tensors:
    """x is wider than the convolution, which sees a part of it, as of the projection in a mixer."""
    return {"x": draw(rows, T, E + 8), "weight": draw(E, W), "bias": draw(E), "before": draw(rows, E, W)}


def _convolution(form: ModuleType, given: Tensors) -> Tensors:
    weight = given["weight"]
    x = given["x"][:, :, : weight.shape[0]]
    return {"y": form.causal_conv1d(x, weight, given["bias"], given.get("before"))}


def _convolution_step(form: ModuleType, given: Tensors) -> Tensors:
    weight, state = given["weight"], given["before"].clone()
    x = given["x"][:, :, : weight.shape[0]]
    ys = [form.causal_conv1d_step(x[:, t], weight, given["bias"], state) for t in range(x.shape[1])]
    return {"y": torch.stack(ys, 1), "last state": state}


def _draw_ssd(draw: Callable[..., Tensor], rows: int, T: int, H: int, P: int, G: int, N: int) -> Tensors:
    return {
        "x": draw(rows, T, H, P), "dt": draw(rows, T, H) - 2, "A": -draw(H).exp(), "B": draw(rows, T, G, N),
        "C": draw(rows, T, G, N), "D": draw(H), "dt_bias": draw(H), "state": draw(rows, H, P, N),
    }  # fmt: skip


def _ssd(form: ModuleType, given: Tensors) -> Tensors:
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    y, last = form.ssd(*(given[name] for name in names), given.get("state"))
    return {"y": y, "last state": last}


def _ssd_step(form: ModuleType, given: Tensors) -> Tensors:
    state, A, D, bias = (given["state"].clone(), given["A"], given["D"], given["dt_bias"])
    tokens = zip(*(given[name].unbind(1) for name in ("x", "dt", "B", "C")), strict=True)
    ys = [form.ssd_step(x, dt, A, B, C, D, bias, state) for x, dt, B, C in tokens]
    return {"y": torch.stack(ys, 1), "last state": state}


def _draw_inner(draw: Callable[..., Tensor], rows: int, T: int, H: int, P: int, G: int, N: int, D: int) -> Tensors:
    """The bias of the convolution by group, which is how their number is told."""
    E, C = H * P, H * P + 2 * G * N
    return {
        "projected": draw(rows, T, E + C + H), "conv weight": draw(C, 4), "conv bias": draw(G, C // G),
        "dt_bias": draw(H) - 2, "A": -draw(H).exp(), "D": draw(H), "norm weight": draw(E), "out weight": draw(D, E),
    }  # fmt: skip


def _inner(form: ModuleType, given: Tensors) -> Tensors:
    projected, weight, bias, *rest = given.values()
    return {"y": form.mamba2_inner(projected, weight, bias.flatten(), *rest, bias.shape[0], EPS)}


def _draw_norm(draw: Callable[..., Tensor], rows: int, T: int, G: int, E: int) -> Tensors:
    """The weight by group, which is how their number is told."""
    return {"x": draw(rows, T, G * E), "z": draw(rows, T, G * E), "weight": draw(G, E)}


def _norm(form: ModuleType, given: Tensors) -> Tensors:
    weight = given["weight"]
    return {"y": form.gated_rms_norm(given["x"], given["z"], weight.flatten(), EPS, weight.shape[0])}


def _draw_trapezoid(draw: Callable[..., Tensor], rows: int, T: int, H: int, P: int, G: int, N: int, S: int) -> Tensors:
    return {
        "x": draw(rows, T, H, P), "dt": draw(rows, T, H) - 2, "a": draw(rows, T, H), "trap": draw(rows, T, H),
        "angle": draw(rows, T, S), "B": draw(rows, T, 1, G, N), "C": draw(rows, T, 1, G, N), "z": draw(rows, T, H, P),
        "D": draw(H), "dt_bias": draw(H), "B_bias": draw(1, H, N), "C_bias": draw(1, H, N),
        "first angle": draw(rows, H, S), "state": draw(rows, H, P, N),
        "previous B": draw(rows, 1, H, N), "previous x": draw(rows, H, P),
    }  # fmt: skip


_TRAPEZOID_STATE = ("first angle", "state", "previous B", "previous x")


def _trapezoid(form: ModuleType, given: Tensors) -> Tensors:
    names = ("x", "dt", "a", "trap", "angle", "B", "C", "z", "D", "dt_bias", "B_bias", "C_bias")
    before = State(*(given[name] for name in _TRAPEZOID_STATE)) if "state" in given else None
    return _left(*form.trapezoid(*(given[name] for name in names), A_FLOOR, before))


def _left(y: Tensor, after: State) -> Tensors:
    """An angle is known up to whole turns."""
    return {"y": y, "cos of the angle": after.angle.cos(), "sin of the angle": after.angle.sin(),
            "last state": after.ssm, "last B": after.previous_B, "last x": after.previous_x}  # fmt: skip


def _trapezoid_step(form: ModuleType, given: Tensors) -> Tensors:
    state, ys = State(*(given[name].clone() for name in _TRAPEZOID_STATE)), []
    tokens = zip(*(given[name].unbind(1) for name in ("x", "dt", "a", "trap", "angle", "B", "C", "z")), strict=True)
    weights = [given[name] for name in ("D", "dt_bias", "B_bias", "C_bias")]
    for token in tokens:
        y, state = form.trapezoid_step(*token, *weights, A_FLOOR, state)
        ys.append(y)
    return _left(torch.stack(ys, 1), state)


# B, T and the sizes of each signature. Chunks are of 2048 tokens (selective scan), 64 (convolution, Mamba-3) and 256
# (SSD); channels in multiples of 8, N and P of 16, which the kernels ask for.
OPERATIONS = (
    Operation(
        "selective scan", "selective_scan",
        {"one token": (2, 1, 24, 16), "odd length": (2, 37, 24, 16), "past a chunk": (1, 2061, 8, 8)},
        _draw_scan, _scan, ("u", "dt", "B", "C", "z"), ("state",),
    ),
    Operation(
        "selective scan, decode", "selective_scan", {f"{STEPS} tokens": (2, STEPS, 24, 16)},
        _draw_scan, _scan_step, ("u", "dt", "B", "C", "z", "state"), ("state",), decodes=True,
    ),
    Operation(
        "convolution", "causal_conv1d",
        {"one token": (2, 1, 24, 4), "fewer tokens than taps": (2, 2, 24, 4), "odd length": (2, 37, 24, 4),
         "three taps": (1, 38, 8, 3), "past a chunk": (2, 133, 24, 4)},
        _draw_convolution, _convolution, ("x",), ("before",),
    ),
    Operation(
        "convolution, decode", "causal_conv1d", {f"{STEPS} tokens": (2, STEPS, 24, 4)},
        _draw_convolution, _convolution_step, ("x", "before"), ("before",), decodes=True,
    ),
    Operation(
        "ssd", "ssd",
        {"one token": (2, 1, 4, 16, 2, 16), "odd length": (2, 37, 4, 16, 2, 16),
         "past a chunk": (2, 300, 4, 16, 2, 16)},
        _draw_ssd, _ssd, ("x", "dt", "B", "C"), ("state",),
    ),
    Operation(
        "ssd, decode", "ssd", {f"{STEPS} tokens": (2, STEPS, 4, 16, 2, 16)},
        _draw_ssd, _ssd_step, ("x", "dt", "B", "C", "state"), ("state",), decodes=True,
    ),
    Operation(
        "gated norm", "ssd", {"one group": (2, 37, 1, 48), "two groups": (2, 1, 2, 24)},
        _draw_norm, _norm, ("x", "z"), (),
    ),
    Operation(
        "mamba-2 inner", "ssd",
        {"one token": (2, 1, 8, 16, 2, 16, 32), "odd length": (2, 37, 8, 16, 1, 16, 32),
         "past a chunk": (1, 260, 8, 16, 2, 16, 32)},
        _draw_inner, _inner, ("projected", "out weight"), (), forms=("reference", "cuda"),
    ),
    Operation(
        "trapezoid", "trapezoid",
        {"one token": (2, 1, 2, 16, 1, 16, 4), "odd length": (2, 37, 2, 16, 2, 16, 8),
         "past a chunk": (1, 73, 4, 16, 2, 32, 8)},
        _draw_trapezoid, _trapezoid, ("x", "dt", "a", "trap", "angle", "B", "C", "z", "previous B", "previous x"),
        _TRAPEZOID_STATE,
    ),
    Operation(
        "trapezoid, decode", "trapezoid", {f"{STEPS} tokens": (2, STEPS, 2, 16, 1, 16, 4)},
        _draw_trapezoid, _trapezoid_step, ("x", "dt", "a", "trap", "angle", "B", "C", "z", "previous B", "previous x"),
        _TRAPEZOID_STATE, decodes=True,
    ),
)  # fmt: skip


def tolerance(form: str, kernel: str, dtype: str) -> float:
    """What the form multiplies in decides: Triton's products of float32 are in tf32, and Mamba-3's kernels compute in
    bfloat16 whatever they are given."""
    if form == "cuda" and kernel == "trapezoid":
        dtype = "bfloat16"
    elif form == "cuda" and kernel == "ssd" and dtype == "float32":
        dtype = "tf32"
    return TOLERANCES[dtype]


# ------------------------------------------------------------------------------------------------------------ the check


def absent(device: str, kernels: Iterable[str] | None = None) -> dict[str, str]:
    """What of these kernels (None: of all) cannot run on a device, and why: a form, or one kernel of a form, "cuda,
    trapezoid"."""
    found = {}
    named = dict.fromkeys(one.kernel for one in OPERATIONS) if kernels is None else kernels
    for form in BACKENDS:
        reasons = {kernel: unavailable(form, device, kernel) for kernel in named}
        lacking = {kernel: reason for kernel, reason in reasons.items() if reason}
        if len(lacking) == len(reasons):
            found[form] = next(iter(lacking.values()))
        else:
            found |= {f"{form}, {kernel}": reason for kernel, reason in lacking.items()}
    return found


@dataclass(frozen=True)
class Share:
    """A part of the check: of one kernel, in one type, from nothing or continuing a sequence."""

    kernel: str
    dtype: str
    continued: bool


def shares(device: str, kernels: Iterable[str] | None = None) -> list[Share]:
    """All that there is to check on a device, of these kernels (None: of all); float32, and on a GPU bfloat16 too."""
    dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    found = [
        Share(one.kernel, dtype, continued)
        for one in OPERATIONS if kernels is None or one.kernel in kernels
        for continued in one.starts for dtype in dtypes
    ]  # fmt: skip
    return list(dict.fromkeys(found))


def check(
    device: str, forms: Sequence[str] = BACKENDS, on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    parts: Iterable[Share] | None = None,
) -> list[Outcome]:  # fmt: skip
    """Every case of `forms` in these parts of the check (None: in all), as far as `device` ("cpu" or "cuda") has them.
    Triton kernels run in one configuration, untimed."""
    outcomes = []
    wanted = shares(device) if parts is None else list(parts)
    for operation in OPERATIONS:
        here = [
            form for form in forms
            if form in operation.forms and unavailable(form, device, operation.kernel) is None
        ]  # fmt: skip
        for shape, sizes in operation.shapes.items():
            if sizes[1] > LONG and device != "cuda":
                continue
            for part in wanted:
                if part.kernel != operation.kernel or part.continued not in operation.starts:
                    continue
                named = f"{shape}, continued" if part.continued and not operation.decodes else shape
                inputs = _inputs(operation, sizes, part.continued, getattr(torch, part.dtype))
                expected = differentiate(operation, load("reference"), inputs)
                for form in here:
                    with untimed(device):
                        outcome = _compare(operation, form, device, part.dtype, named, inputs, expected)
                    outcomes.append(outcome)
                    on_outcome(outcome)
    return outcomes


def _inputs(operation: Operation, sizes: tuple[int, ...], continued: bool, dtype: torch.dtype) -> Tensors:
    """float64, with values that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    drawn = operation.draw(draw, *sizes)
    return {name: x.to(dtype).double() for name, x in drawn.items() if continued or name not in operation.state}


def differentiate(operation: Operation, form: ModuleType, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """Outputs, and the gradients of all inputs for fixed random weights on y, in float64 on the CPU. A decode step has
    no gradient."""
    if operation.decodes:
        with torch.no_grad():
            return _wide(operation.call(form, inputs)), {}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = operation.call(form, leaves)
    y = outputs["y"]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights.bfloat16().to(y)  # of few bits, so that every type weighs alike
    gradients = torch.autograd.grad((y * weights).sum(), list(leaves.values()), materialize_grads=True)
    return _wide(outputs), _wide(dict(zip(leaves, gradients, strict=True)))


def _wide(tensors: Tensors) -> Tensors:
    return {name: x.detach().cpu().double() for name, x in tensors.items()}


def _compare(
    operation: Operation, form: str, device: str, dtype: str, shape: str, inputs: Tensors,
    expected: tuple[Tensors, Tensors],
) -> Outcome:  # fmt: skip
    limit = tolerance(form, operation.kernel, dtype)
    outputs, gradients = {}, {}
    narrow = getattr(torch, dtype)
    try:
        given = {
            name: x.to(device, narrow if name in operation.narrow else torch.float32) for name, x in inputs.items()
        }
        found = differentiate(operation, load(form), given)
        outputs, gradients = (
            {name: _error(theirs[name], ours[name], ours) for name in ours}
            for theirs, ours in zip(found, expected, strict=True)
        )
        problem = _disagreement(outputs, gradients, limit)
    except Exception as error:  # a kernel raises anything, of any length
        problem = f"does not run ({type(error).__name__}: {textwrap.shorten(str(error), 200)})"
    return Outcome(operation.name, operation.kernel, form, device, dtype, shape, limit, outputs, gradients, problem)


def _error(theirs: Tensor, ours: Tensor, beside: Tensors) -> float:
    """The largest difference over the largest entry of ours, or over 1 where that is smaller. Where ours is nothing but
    terms that cancel (the first angle of Mamba-3 turns B and C alike), what cancels is as large as its neighbours:
    over the largest entry of all that stands beside it."""
    if theirs.shape != ours.shape:
        raise ValueError(f"shape {tuple(theirs.shape)} where the reference has {tuple(ours.shape)}")
    scale = ours.abs().max()
    if scale < NOTHING:
        scale = torch.stack([x.abs().max() for x in beside.values()]).max()
    error = ((theirs - ours).abs().max() / scale.clamp_min(1)).item()
    return error if math.isfinite(error) else math.inf


def _disagreement(outputs: dict[str, float], gradients: dict[str, float], limit: float) -> str | None:
    named = outputs | {f"the gradient of {name}": error for name, error in gradients.items()}
    wrong = {name: error for name, error in named.items() if error > limit}
    if not wrong:
        return None
    name = max(wrong, key=lambda name: wrong[name])
    return f"{name} is off by {wrong[name]:.2g} of its largest entry, more than {limit:.2g}"


# ----------------------------------------------------------------------------------------------- what a run keeps of it


def checked_here(send: Callable[[Any], None], part: Share) -> list[dict[str, Any]]:
    """A part of the check of the GPU, in a process of its own: what a kernel leaves behind cannot reach a run."""
    return [outcome.to_dict() for outcome in check("cuda", parts=[part])]


def absent_here(send: Callable[[Any], None], kernels: list[str]) -> dict[str, str]:
    return absent("cuda", kernels)


def of_this_gpu(
    cache: Path, progress: Callable[[str], None] = lambda message: None, again: bool = False,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None, kernels: Iterable[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The check of this GPU, for a run's environment: `checked` (UTC), `problem` (why it could not be made, or None),
    `absent` (what is not there, and why), `rows` (`Outcome.to_dict`).

    One that found no problem is kept in `cache` for the same card, versions and code, and taken from there, also by
    runs that call fewer kernels than it checked; one that did is made again each time, and none that was kept outlives
    it. again: make it in any case. kernels: those that the run calls; None: all.
    """
    parts = shares("cuda", None if kernels is None else list(kernels))
    found: dict[str, Any] = {"checked": now(), "problem": None, "absent": {}, "rows": []}
    if not parts:
        return found
    folder, here = cache / "kernel-checks", _key()
    file, of_all = (folder / f"{here}-{_digest([asdict(part) for part in of])}.json" for of in (parts, shares("cuda")))
    if not again:
        for kept in (file, of_all):
            if kept.is_file():
                return _of(read_json(kept), {part.kernel for part in parts})
    progress("checking the kernels on this GPU against the float64 reference; a pass is kept for later runs")
    # most of the time goes into compiling Triton kernels, a core for each part
    with ThreadPoolExecutor(max_workers=max(2, available_cores())) as pool:
        lacking = pool.submit(run_fresh, absent_here, list(dict.fromkeys(part.kernel for part in parts)))
        try:
            for rows in pool.map(lambda part: run_fresh(checked_here, part), parts):
                found["rows"] += rows
                for row in rows:
                    on_row(row)
            found["absent"] = lacking.result()
        except CellFailedError as error:
            found["problem"] = str(error)
    if found["problem"] or any(row["problem"] for row in found["rows"]):
        for kept in folder.glob(f"{here}-*.json"):
            kept.unlink(missing_ok=True)
    else:
        with writing(cache):
            write_json(file, found)
    return found


def _of(found: dict[str, Any], kernels: Collection[str]) -> dict[str, Any]:
    """What a check says of some of its kernels."""
    lacking = {
        name: reason for name, reason in found["absent"].items()
        if ", " not in name or name.partition(", ")[2] in kernels
    }  # fmt: skip
    return found | {"absent": lacking, "rows": [row for row in found["rows"] if row["kernel"] in kernels]}


def _key() -> str:
    """Of all that decides what the kernels give."""
    here = describe("cuda", 0)
    decides = ("gpu", "gpu_capability", "cuda", "packages", "python", "source_sha256")
    return _digest({name: here[name] for name in decides})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def kernels_of(config: ModelConfig) -> list[str]:
    """The kernels that a model stands on where it runs the `cuda` form; what torch itself brings is not among them."""
    mixers = [block.mixer for block in config.kinds]
    found = dict.fromkeys(MIXERS[mixer.kind].operation for mixer in mixers if "cuda" in MIXERS[mixer.kind].forms)
    if any(getattr(mixer, "conv_width", None) for mixer in mixers):
        found["causal_conv1d"] = None
    return list(found)


def doubt(environment: dict[str, Any], forms: Iterable[str], kernels: Iterable[str]) -> str | None:
    """Why the numbers of a model in these forms, which stands on these kernels, may not be believed, or None. Without a
    GPU never: what runs on a CPU is tested where it is written, and against the reference before every timing."""
    checked = [form for form in forms if form in BACKENDS]  # attention's have their own library
    if environment["device"] != "cuda" or not checked:
        return None
    record = environment.get("kernels")
    if record is None or record["problem"]:
        return "its kernels were not checked on this GPU" + (f" ({record['problem']})" if record else "")
    for form in checked:
        for kernel in kernels:
            rows = [row for row in record["rows"] if (row["form"], row["kernel"]) == (form, kernel)]
            if not rows:
                return f"its kernels were not checked on this GPU ({form}: {kernel})"
            wrong = [row for row in rows if row["problem"]]
            if wrong:
                return f"its kernels failed their check on this GPU ({told(wrong[0])})"
    return None
