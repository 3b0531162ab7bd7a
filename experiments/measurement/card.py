"""What this process holds on its GPU as the driver counts it (NVML): CUDA's context, the workspaces of libraries, and
all that torch's allocator has reserved, in use or not. Tensors alone are `memory.PeakMemory.device_bytes`.

The driver lists processes by the ids of the host. Inside a container with ids of its own this process may be listed
under another id or not at all. Where it must be the only process of the card, the growth of the card's used memory
since before it used CUDA stands for it; otherwise there is no figure, and `Held.method` says why.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LISTED = "NVML, this process"
GROWTH = "NVML, growth of the card's used memory since before this process used CUDA"

_before: dict[str, tuple[int, int]] = {}  # card's UUID -> bytes used and processes listed before this process used CUDA


@dataclass(frozen=True)
class Held:
    """bytes: None where nobody can tell. method: where they come from, or why there are none."""

    bytes: int | None
    method: str


class NoAnswerError(Exception):
    """NVML cannot be asked, or does not answer; the message says why."""


def remember_cards() -> None:
    """Take down how full each card is. To be called before this process uses CUDA; later it does nothing."""
    if torch.cuda.is_initialized():
        return
    try:
        with _nvml() as nvml:
            for index in range(nvml.nvmlDeviceGetCount()):
                card = nvml.nvmlDeviceGetHandleByIndex(index)
                processes = nvml.nvmlDeviceGetComputeRunningProcesses(card)
                _before[nvml.nvmlDeviceGetUUID(card)] = (nvml.nvmlDeviceGetMemoryInfo(card).used, len(processes))
    except NoAnswerError:
        pass  # `held` asks again and keeps the reason


def held(device: torch.device) -> Held:
    """What this process holds on `device`, a GPU that it uses, at this moment."""
    uuid = _uuid(device)
    try:
        with _nvml() as nvml:
            card = nvml.nvmlDeviceGetHandleByUUID(uuid)
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(card)
            used = nvml.nvmlDeviceGetMemoryInfo(card).used
    except NoAnswerError as error:
        return Held(None, str(error))
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    if None in own:
        return Held(None, "NVML lists this process without its memory")
    if own:
        found = Held(sum(own), LISTED)
    elif uuid not in _before:
        return Held(None, "NVML does not list this process, and how full the card was before is not known")
    else:
        used_before, others = _before[uuid]
        if others or len(processes) != 1:
            return Held(None, f"NVML does not list this process by its id, and may count others: {others} processes "
                              f"on the card before it used CUDA, {len(processes)} now")  # fmt: skip
        found = Held(used - used_before, GROWTH)
    reserved = torch.cuda.memory_reserved(device)
    if found.bytes is not None and found.bytes < reserved:  # of another process with our id on the host, for one
        return Held(None, f"{found.method}: {found.bytes:,} bytes, less than the {reserved:,} that torch has reserved")
    return found


def driver() -> str | None:
    """Its version, where NVML says it."""
    try:
        with _nvml() as nvml:
            return nvml.nvmlSystemGetDriverVersion()
    except NoAnswerError:
        return None


def _uuid(device: torch.device) -> str:
    """As NVML spells it. Independent of CUDA_VISIBLE_DEVICES, which renumbers devices."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


@contextmanager
def _nvml() -> Iterator[Any]:
    """The module `pynvml`, initialised. Raises NoAnswerError, also for what it raises inside."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports] # of the extra `cuda`
    except ImportError:
        raise NoAnswerError("the package nvidia-ml-py is not installed (pip install nvidia-ml-py)") from None
    try:
        pynvml.nvmlInit()
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
        raise NoAnswerError(f"NVML: {error}") from None
