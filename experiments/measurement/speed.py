"""The speed of one phase: a training step, prefill, decode, or a mixer's operation by itself, in one execution mode,
with the machine's ceilings measured in the same process, turn by turn."""

from collections.abc import Callable, Generator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.measurement import operations
from experiments.measurement.ceilings import CeilingsMeter
from experiments.measurement.operations import Operation
from experiments.measurement.timing import timed, timed_in_turns
from experiments.spec import Speed
from experiments.training import DTYPES
from models.compiled import compile_blocks
from models.language_model import LanguageModel
from models.recorded import Recording

RECORDED = ("graph", "compiled-graph")


class Subject:
    """A model in one execution mode and type, with the meter of this process: what cells that share one share. dtype:
    of weights and state, and of the products that the meter times; of training, what autocast multiplies in."""

    def __init__(self, model: LanguageModel, settings: Speed, mode: str, dtype: str) -> None:
        self.settings, self.device, self.mode, self.dtype = settings, model.device, mode, dtype
        self.model = model.cast(DTYPES[dtype])
        self.compiled, self.recorded = False, mode in RECORDED
        self.pool = torch.cuda.graph_pool_handle() if self.recorded and self.device.type == "cuda" else None
        self.meter = CeilingsMeter(self.device, DTYPES[dtype])

    def prepare(self, phase: str) -> None:
        """Compile what the phase repeats, where the mode says so, once."""
        if self.mode.startswith("compiled") and not self.compiled:
            compile_blocks(self.model, "step" if phase == "decode" else "forward")
            self.compiled = True

    def repeated(self, operation: Operation) -> Operation:
        """Recorded, where the mode says so; the cells of a process do so one after the other, and leave nothing."""
        return Recording(operation, self.device, pool=self.pool) if self.recorded else operation


def measure_speed(subject: Subject, phase: str, tokens: Tensor) -> Generator[None, None, dict[str, Any]]:
    """phase: step, prefill, decode, forward or backward. tokens (B, T + 1).

    The first turn makes ready: the first call, in which kernels are loaded and a compiler may work, is timed by itself
    and is in no sample. The turns after it measure the ceilings, then the operation.
    """
    settings, device = subject.settings, subject.device
    subject.prepare(phase)
    operation, per_call = OPERATIONS[phase](subject, tokens.to(device))
    (first_ms,) = timed(operation, repeats=1, seconds=0, device=device, warm_up=0).ms
    ceilings: list[dict[str, Any]] = []
    times = yield from timed_in_turns(
        operation, repeats=settings.repeats, seconds=settings.seconds, device=device,
        before=lambda: ceilings.append(asdict(subject.meter.measure())),
    )  # fmt: skip
    return times | {
        "tokens_per_sample": per_call, "first_call_ms": first_ms, "ceilings": ceilings,
        "backend": subject.model.backend.name,
    }  # fmt: skip


def _step(subject: Subject, tokens: Tensor) -> tuple[Operation, int]:
    model = subject.model.float().train()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    update, optimizer = operations.training_step(model, inputs, targets, subject.dtype, to_record=subject.recorded)

    def step() -> None:
        update()
        optimizer.zero_grad()

    return subject.repeated(step), inputs.numel()


def _prefill(subject: Subject, tokens: Tensor) -> tuple[Operation, int]:
    prompt = tokens[:, :-1].contiguous()
    return subject.repeated(operations.prefill(subject.model, prompt)), prompt.numel()


def _decode(subject: Subject, tokens: Tensor) -> tuple[Operation, int]:
    prompt, count = tokens[:, :-1].contiguous(), subject.settings.decode_tokens
    operation, _ = operations.decode(subject.model, prompt, count, subject.mode)
    return operation, prompt.shape[0] * count


def _forward(subject: Subject, tokens: Tensor) -> tuple[Operation, int]:
    operate, inputs = _operator(subject.model, tokens)

    @torch.no_grad()
    def forward() -> None:
        operate(*inputs)

    return forward, tokens[:, :-1].numel()


def _backward(subject: Subject, tokens: Tensor) -> tuple[Operation, int]:
    operate, inputs = _operator(subject.model, tokens)
    inputs = [one.requires_grad_() if one.is_floating_point() else one for one in inputs]

    def both() -> None:
        y = operate(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    return both, tokens[:, :-1].numel()


def _operator(model: LanguageModel, tokens: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Of the first block whose mixer has one, on random inputs of the shapes that the mixer gives it."""
    mixer = next(block.mixer for block in model.blocks if block.mixer.config.kind in OPERATORS)
    (B, T), drawn = tokens[:, :-1].shape, torch.Generator(model.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(B, *shape, generator=drawn, device=model.device).to(model.dtype)

    return OPERATORS[mixer.config.kind](mixer, T, random)


def _attention(mixer: Any, T: int, random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    H, K, P = mixer.heads, mixer.kv_heads, mixer.head_width
    attend = partial(mixer.attend, causal=mixer.config.causal, window=mixer.config.window)
    return attend, [random(H, T, P), random(K, T, P), random(K, T, P)]


def _selective_scan(mixer: Any, T: int, random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    A, D, bias = mixer.A.detach(), mixer.D.detach(), mixer.dt_bias.detach()

    def scan(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        return mixer.ops.selective_scan(u, dt, A, B, C, D, z, bias, None, mixer.config.negative_eigenvalues)[0]

    with torch.no_grad():  # laid out as the mixer does it: a form that reads another layout would copy first
        width, (R, *_) = mixer.in_proj.in_features, mixer.split_sizes
        u, z = mixer.ops.channel_projections(random(T, width), mixer.in_proj.weight, mixer.gate_sizes)
        u = mixer.ops.causal_conv1d(u, mixer.conv_weight, mixer.conv_bias, None)
        (dt,) = mixer.ops.channel_projections(random(T, R), mixer.dt_proj.weight, mixer.gate_sizes[:1])
    _, B, C = random(T, sum(mixer.split_sizes)).split(mixer.split_sizes, -1)
    return scan, [u, dt, B, C, z]


def _ssd(mixer: Any, T: int, random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    config, A, D, bias = mixer.config, mixer.A.detach(), mixer.D.detach(), mixer.dt_bias.detach()

    def ssd(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return mixer.ops.ssd(x, dt, A, B, C, D, bias, None, config.negative_eigenvalues)[0]

    H, P, G, N = len(D), config.head_width, config.groups, config.state
    x, B, C = random(T, H * P + 2 * G * N).split([H * P, G * N, G * N], -1)  # as they leave the convolution
    return ssd, [x.unflatten(-1, (H, P)), random(T, H), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))]


# the operation that mixes the sequence, by the mixer's kind, where it stands by itself
OPERATORS = {"attention": _attention, "mamba": _selective_scan, "mamba2": _ssd}
OPERATIONS = {"step": _step, "prefill": _prefill, "decode": _decode, "forward": _forward, "backward": _backward}
