"""How much memory a phase takes, of this process (host) and of its GPU (device)."""

import ctypes
import gc
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch

from experiments.measurement import card

SAMPLED = "sampled"  # how the name of a method begins that may miss a peak
SAMPLE_SECONDS = 0.001
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")


def resident_bytes() -> int:
    """Resident set of this process, exact where the kernel offers it (its cheap counter lags by some pages)."""
    try:
        for line in _ROLLUP.read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the counter is all there is
    return psutil.Process().memory_info().rss


def settle() -> None:
    """Give back what is free, so that a baseline does not contain it."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the allocator keep what this process frees, until `settle`, instead of handing it to the system and asking
    for it again: a training step that reuses its memory is spared tens of thousands of page faults. Every cell that is
    timed does so, whatever its arm. Whether it was possible (glibc)."""
    return _allocator(mapped_from=32 << 20, kept=1 << 30)


def return_freed_memory() -> bool:
    """The opposite, where nothing is timed: a freed block of 128 KiB or more goes to the system at once. What is kept
    has holes that the next block does not fit; how many, differs between processes that do the same work, and a peak
    would hold them. Whether it was possible (glibc)."""
    return _allocator(mapped_from=128 << 10, kept=128 << 10)


def _allocator(*, mapped_from: int, kept: int) -> bool:
    """Bytes: the least block with a mapping of its own, and the most that may lie free at the end of the heap."""
    options = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if options is None:
        return False
    return bool(options(M_MMAP_THRESHOLD, mapped_from) and options(M_TRIM_THRESHOLD, kept))


class PeakMemory:
    """Context manager: `host_bytes` is the highest resident set inside, `device_bytes` the highest allocation of
    torch on the GPU (None without one), `on_card` what was held there beside tensors (empty without one).

    The kernel's own high-water mark is reset and read where that is allowed (Linux), which misses nothing;
    elsewhere a thread samples every millisecond. `method` says which.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_bytes = 0
        self.device_bytes: int | None = None
        self.on_card: dict[str, Any] = {}
        self.method = ""
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.host_bytes = resident_bytes()  # the kernel's mark is of its cheap counter, which may lie below this
        try:
            _CLEAR_REFS.write_text("5")
            self.method = "kernel high-water mark"
        except OSError:
            self.method = f"{SAMPLED} every {SAMPLE_SECONDS * 1e3:g} ms"
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.device_bytes = torch.cuda.max_memory_allocated(self.device)
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()
        else:
            self.host_bytes = max(self.host_bytes, _high_water_mark())
        self.host_bytes = max(self.host_bytes, resident_bytes())
        if self.device.type == "cuda":
            # as the phase ends: the allocator keeps the blocks that it has reserved, and libraries their workspaces
            process = card.held(self.device)
            self.on_card = {
                "reserved_peak_bytes": torch.cuda.max_memory_reserved(self.device),
                "process_bytes": process.bytes, "process_method": process.method,
            }  # fmt: skip

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(SAMPLE_SECONDS):
            self.host_bytes = max(self.host_bytes, process.memory_info().rss)


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")
