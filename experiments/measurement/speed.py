"""The speed of one phase: a training step, prefill, decode, or a mixer's operation by itself, in one execution mode,
with the machine's ceilings measured in the same process right before and after."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.measurement.ceilings import CeilingsMeter
from experiments.measurement.loading import load
from experiments.measurement.timing import timed
from experiments.spec import Speed
from experiments.training import autocast, token_loss
from models.language_model import LanguageModel

Operation = Callable[[], object]


def measure_speed(
    folder: Path, settings: Speed, phase: str, mode: str, tokens: Tensor, device: torch.device
) -> dict[str, Any]:
    """phase: step, prefill, decode, forward or backward. tokens (B, T + 1). The first call, in which kernels are loaded
    and a compiler may work, is timed by itself and is in no sample."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    meter = CeilingsMeter(device, dtype)
    model = load(folder, device, "direct")
    if mode == "compiled":
        model.hidden = torch.compile(model.hidden)  # all of a step but the loss, of prefill but the head
        model.step = torch.compile(model.step)
    operation, per_call = OPERATIONS[phase](model, settings, tokens.to(device))
    start = time.perf_counter()
    operation()
    first_ms = (time.perf_counter() - start) * 1e3
    meter.measure()
    samples = timed(operation, repeats=settings.repeats, seconds=settings.seconds, device=device)
    meter.measure()
    return {
        "samples": samples.to_dict(), "noisy": samples.noisy, "tokens_per_sample": per_call, "first_call_ms": first_ms,
        "ceilings": asdict(meter.result), "backend": model.backend.name,
    }  # fmt: skip


def _step(model: LanguageModel, settings: Speed, tokens: Tensor) -> tuple[Operation, int]:
    """Forward, loss, backward, clipping, AdamW: what `experiments.training.train` does between two batches."""
    model = model.float().train()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-4, fused=True)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with autocast(settings.dtype, model.device):
            loss, balance = token_loss(model, inputs, targets)
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, inputs.numel()


def _prefill(model: LanguageModel, settings: Speed, tokens: Tensor) -> tuple[Operation, int]:
    """Read a prompt into an empty state and name the next token."""
    prompt = tokens[:, :-1].contiguous()

    @torch.inference_mode()
    def prefill() -> Tensor:
        logits, _ = model.prefill(prompt, model.make_state(prompt.shape[0], prompt.shape[1]))
        return logits.argmax(1)

    return prefill, prompt.numel()


def _decode(model: LanguageModel, settings: Speed, tokens: Tensor) -> tuple[Operation, int]:
    """Write `decode_tokens` tokens, greedily; every sample starts from the same state, which holds the prompt."""
    prompt = tokens[:, :-1].contiguous()
    with torch.inference_mode():
        state = model.make_state(prompt.shape[0], prompt.shape[1] + settings.decode_tokens)
        for piece in prompt.split(PIECE, 1):
            logits, state = model.prefill(piece.contiguous(), state)
        first = logits.argmax(1)

    @torch.inference_mode()
    def decode() -> Tensor:
        token, now = first, state
        for _ in range(settings.decode_tokens):
            logits, now = model.step(token, now)
            token = logits.argmax(1)
        return token

    return decode, prompt.shape[0] * settings.decode_tokens


PIECE = 2048  # of a prompt that is read to be decoded from


def _forward(model: LanguageModel, settings: Speed, tokens: Tensor) -> tuple[Operation, int]:
    operate, inputs = _operator(model, tokens)

    @torch.no_grad()
    def forward() -> None:
        operate(*inputs)

    return forward, tokens[:, :-1].numel()


def _backward(model: LanguageModel, settings: Speed, tokens: Tensor) -> tuple[Operation, int]:
    operate, inputs = _operator(model, tokens)
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
    (E, N), A, D, bias = mixer.A_log.shape, mixer.A.detach(), mixer.D.detach(), mixer.dt_bias.detach()

    def scan(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        return mixer.ops.selective_scan(u, dt, A, B, C, D, z, bias, None, mixer.config.negative_eigenvalues)[0]

    return scan, [random(T, E), random(T, E), random(T, N), random(T, N), random(T, E)]


def _ssd(mixer: Any, T: int, random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    config, A, D, bias = mixer.config, mixer.A.detach(), mixer.D.detach(), mixer.dt_bias.detach()

    def ssd(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return mixer.ops.ssd(x, dt, A, B, C, D, bias, None, config.negative_eigenvalues)[0]

    H, GN = len(D), (config.groups, config.state)
    return ssd, [random(T, H, config.head_width), random(T, H), random(T, *GN), random(T, *GN)]


# the operation that mixes the sequence, by the mixer's kind, where it stands by itself
OPERATORS = {"attention": _attention, "mamba": _selective_scan, "mamba2": _ssd}
OPERATIONS = {"step": _step, "prefill": _prefill, "decode": _decode, "forward": _forward, "backward": _backward}
