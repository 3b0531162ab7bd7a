"""The phases, measured: load, prefill, decode, a training step. Each function is one cell, run in a fresh process, the
timed ones turn by turn (experiments.measurement.process).

Memory. Before its baseline, a cell does once what it is to measure, with a model that is then thrown away, so that
code, libraries and thread pools are in memory already and what is counted belongs to the model. (A smaller rehearsal
is not enough: longer inputs run other parts of the libraries, megabytes of them.) `peak_bytes` is the peak over the
baseline before the model was loaded: all that the process needs for that phase, weights included. `working_bytes`
is the peak over the baseline right before the phase: of prefill activations and state; of decode what its steps add
to the state, which stands there already. The peak is that of one call, under an allocator that hands back what is
freed; the calls that are timed come after it, under one that keeps it, whose peak would hold that too. On a GPU both
are torch's allocations; beside them stand `reserved_peak_bytes`, the most that torch's allocator had reserved, and
`process_bytes`, what the whole process holds on the card after that call. Those two are over no baseline.
"""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.data.batches import Batches, StreamHash
from experiments.measurement import operations
from experiments.measurement.loading import load
from experiments.measurement.memory import PeakMemory, keep_freed_memory, resident_bytes, return_freed_memory, settle
from experiments.measurement.timing import timed, timed_in_turns
from experiments.objectives import Objective
from experiments.spec import Measurement, Training
from experiments.training import Step, train
from models import checkpoint, cost
from models.language_model import LanguageModel
from models.ops.attention import forget_tables
from models.ops.kernels.tuning import untimed


def measure_load(folder: Path, settings: Measurement, device: torch.device, way: str = "mapped") -> dict[str, Any]:
    """From files to a model that is ready for its first token, every weight having been read."""
    return_freed_memory()
    _rehearse(lambda: load(folder, device, way), device)
    baseline, device_baseline = resident_bytes(), _allocated(device)
    with PeakMemory(device) as peak:
        model = load(folder, device, way)
    settle()
    resident = resident_bytes() - baseline if device.type == "cpu" else _allocated(device) - device_baseline
    element = model.dtype.itemsize
    del model
    keep_freed_memory()
    samples = timed(
        lambda: load(folder, device, way), repeats=settings.repeats, seconds=settings.seconds, device=device
    )
    return {
        "file_bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "host_peak_bytes": peak.host_bytes - baseline,
        "device_peak_bytes": None if peak.device_bytes is None else peak.device_bytes - device_baseline,
        "resident_bytes": resident,
        "resident_bytes_analytic": cost.weight_bytes(checkpoint.read_config(folder), element),
        "memory_method": peak.method,
        "samples": samples.to_dict(),
        "noisy": samples.noisy,
    } | peak.on_card


def measure_prefill(
    folder: Path, settings: Measurement, context: int, tokens: Tensor, device: torch.device, times: bool = True
) -> Generator[None, None, dict[str, Any]]:
    """Read a prompt of `context` tokens (B, context) into an empty state and name the next token. times: False, its
    memory alone."""
    return_freed_memory()
    _rehearse(lambda: operations.prefill(load(folder, device), tokens.to(device))(), device)
    before_load = _baseline(device)
    model = load(folder, device)
    read = operations.prefill(model, tokens.to(device))
    settle()
    before_phase = _baseline(device)
    peak = _peak(read, device)
    return _phase(model, peak, before_load, before_phase) | {
        "context": context, "batch": tokens.shape[0],
        **((yield from _times(read, settings, device)) if times else {}),
    }  # fmt: skip


def measure_decode(
    folder: Path, settings: Measurement, context: int, tokens: Tensor, device: torch.device, times: bool = True
) -> Generator[None, None, dict[str, Any]]:
    """Decode greedily, token by token, from a state that holds `context` tokens. times: False, its memory alone.

    A sample is `settings.decode_tokens` tokens. The steps of a recording allocate nothing: what lies between their
    operations is memory that the recording has set aside, which no count of allocations shows. So `working_bytes` is
    None of it, and `peak_bytes` lacks that much: of one token, some hundred kilobytes.
    """
    return_freed_memory()
    how = settings.decode_tokens, settings.decode_mode
    _rehearse(lambda: operations.decode(load(folder, device), tokens.to(device), *how)[0](), device)
    before_load = _baseline(device)
    model = load(folder, device)
    write, state = operations.decode(model, tokens.to(device), *how)
    settle()
    before_phase = _baseline(device)
    peak = _peak(write, device)
    found = _phase(model, peak, before_load, before_phase)
    if settings.decode_mode == "graph":
        found["working_bytes"] = None
    return found | {
        "context": context, "batch": tokens.shape[0], "mode": settings.decode_mode,
        "tokens_per_sample": settings.decode_tokens,
        "state_bytes": state.nbytes,
        "state_bytes_analytic": cost.state_bytes(
            model.config, tokens.shape[0], context + settings.decode_tokens, model.dtype.itemsize
        ),
        **((yield from _times(write, settings, device)) if times else {}),
    }  # fmt: skip


def _peak(operation: operations.Operation, device: torch.device) -> PeakMemory:
    """Of one call, in which Triton tries nothing out."""
    with untimed(device), PeakMemory(device) as peak:
        operation()
    return peak


def _times(
    operation: operations.Operation, settings: Measurement, device: torch.device
) -> Generator[None, None, dict[str, Any]]:
    keep_freed_memory()
    return timed_in_turns(operation, repeats=settings.repeats, seconds=settings.seconds, device=device)


def measure_step(folder: Path, tokens: Tensor, device: torch.device, precision: str) -> dict[str, Any]:
    """The memory of one optimizer step on `tokens` (B, T + 1), the second one, so that the optimizer has its state.

    Weights, gradients and optimizer state are counted from their tensors, activations from what autograd keeps; the
    peak is measured.
    """
    return_freed_memory()

    def ready() -> tuple[LanguageModel, operations.Operation, torch.optim.Optimizer]:
        model = load(folder, device, "direct").float().train()
        inputs, targets = (m.contiguous().to(device) for m in (tokens[:, :-1], tokens[:, 1:]))
        return model, *operations.training_step(model, inputs, targets, precision)

    _rehearse(lambda: ready()[1](), device)
    before_load = _baseline(device)
    model, step, optimizer = ready()
    kept = _Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.see, lambda tensor: tensor):
        step()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.zero_grad()
    settle()
    with PeakMemory(device) as peak:
        step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "context": tokens.shape[1] - 1, "batch": tokens.shape[0],
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "gradient_bytes": gradients,
        "optimizer_bytes": sum(value.nbytes for value in states if isinstance(value, Tensor)),
        "activation_bytes": kept.bytes,
        "backend": model.backend.name,
    } | _over(peak, before_load)  # fmt: skip


def measure_training(
    make: Callable[[], LanguageModel], batches: Batches, settings: Training, objective: Objective, device: torch.device
) -> dict[str, Any]:
    """The peak of a step as `experiments.training.train` takes it, at a rate of 0: the second of a model that is thrown
    away, so that the optimizer has its state, over this process before that model was made. A step of another one has
    brought code, libraries and thread pools into memory. Validation, which may read more than a batch, is not in it.
    """
    return_freed_memory()
    two = settings.model_copy(update={"steps": 2, "warmup_steps": 0})

    def after_one() -> Iterator[Step]:
        steps = train(make(), batches, two, 0.0, StreamHash(), objective)
        next(steps)
        return steps

    _rehearse(after_one, device)
    before = _baseline(device)
    with untimed(device):
        steps = after_one()
        settle()
        with PeakMemory(device) as peak:
            next(steps)
    keep_freed_memory()
    return _over(peak, before)


class _Kept:
    """Counts the storages that autograd keeps for the backward pass, each once, without those of parameters."""

    def __init__(self, model: LanguageModel) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0

    def see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _phase(model: LanguageModel, peak: PeakMemory, before_load: int, before_phase: int) -> dict[str, Any]:
    found = _over(peak, before_load)
    working = found["peak_bytes"] + before_load - before_phase
    return found | {"working_bytes": working, "backend": model.backend.name}


def _over(peak: PeakMemory, before: int) -> dict[str, Any]:
    """before: of the process on a CPU, of torch's allocations on a GPU, when nothing of the model was there."""
    top = peak.host_bytes if peak.device_bytes is None else peak.device_bytes
    method = peak.method if peak.device_bytes is None else "torch.cuda allocator"
    return {"peak_bytes": top - before, "memory_method": method} | peak.on_card


def _rehearse(phase: Callable[[], object], device: torch.device) -> None:
    """Do it once, and give back all that it took."""
    with untimed(device):
        phase()
    forget_tables()  # which count as the model's
    settle()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _baseline(device: torch.device) -> int:
    return resident_bytes() if device.type == "cpu" else _allocated(device)
