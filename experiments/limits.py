"""What this process may use of its machine: cores and memory, less where a container gives it less.

Linux keeps a container's limits in control groups, a folder of small files each, and what limits a group limits those
below it. Version 2 has one tree of them, version 1 one for every kind of limit. Inside a container the root of the tree
may be the container's own group, whatever path the process is listed under.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS, LISTED = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Those that this process may be scheduled on, and no more than its container's share of processor time, rounded
    up. At least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(share) for share in _shares())]))


def total_memory() -> int:
    """Bytes, without swap."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def free_memory() -> int:
    """Bytes that can still be had, without swap: what only keeps copies of files counts as free."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _memory_limits())])


def _shares() -> Iterator[float]:
    """Processor time per time, of each group that limits it."""
    for folder in _folders(""):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdecimal():
            yield int(quota) / int(period)
    for folder in _folders("cpu"):
        quota, period = (_number(folder / f"cpu.cfs_{what}_us") for what in ("quota", "period"))
        if quota and period:
            yield quota / period


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Bytes allowed and bytes that cannot be given back, of each group that limits them."""
    versions: tuple[tuple[str, str, str, str], ...] = (
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    for controller, limit_file, usage_file, prefix in versions:
        for folder in _folders(controller):
            limit, usage = _number(folder / limit_file), _number(folder / usage_file)
            if limit is None or usage is None:
                continue
            lines = (line.partition(" ") for line in _read(folder / "memory.stat").splitlines())
            stat = {name: value for name, _, value in lines}
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield limit, max(0, usage - files)


def _folders(controller: str) -> Iterator[Path]:
    """This process's group and those above it, of a controller of version 1, or of version 2 where it has no name."""
    for line in _read(LISTED).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) if not controller else (controller in controllers.split(",")):
            root = GROUPS / controller
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder == root or root in folder.parents)


def _number(file: Path) -> int | None:
    text = _read(file)
    return int(text) if text.isdecimal() else None


def _read(file: Path) -> str:
    """Empty where there is none, as on other systems."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
