"""What a container leaves of its machine, as Linux writes it down."""

import os
from types import SimpleNamespace

import pytest
import torch

from experiments import cells, environment, limits

GB = 1_000_000_000


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """64 cores and 100 GB, 90 of them free; this process's control groups as listed, with these files by path."""

    def with_groups(listed: str, files: dict[str, str]) -> None:
        for path, text in files.items():
            (tmp_path / "groups" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / path).write_text(text)
        (tmp_path / "listed").write_text(listed)
        monkeypatch.setattr(limits, "GROUPS", tmp_path / "groups")
        monkeypatch.setattr(limits, "LISTED", tmp_path / "listed")
        memory = SimpleNamespace(total=100 * GB, available=90 * GB)
        monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)

    return with_groups


def found() -> tuple[int, float, float]:
    return limits.available_cores(), limits.total_memory() / GB, limits.free_memory() / GB


V1 = "12:cpuset:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n"
UNLIMITED_V1 = "9223372036854771712\n"  # what version 1 says where there is no limit


@pytest.mark.parametrize(("listed", "files", "expected"), [
    ("", {}, (64, 100, 90)),  # no control groups, as on other systems
    ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "7\n"}, (64, 100, 90)),
    # the root of the tree is the container's own group; 1.5 processors, 3 of 8 GB used, 1 of them for files
    ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": f"{8 * GB}\n", "memory.current": f"{3 * GB}\n",
                "memory.stat": f"anon 5\nactive_file {GB // 2}\ninactive_file {GB // 2}\n"}, (2, 8, 6)),
    # a group within one that has less
    ("0::/user/job\n", {"user/job/cpu.max": "400000 100000\n", "user/cpu.max": "300000 100000\n",
                        "user/job/memory.max": f"{50 * GB}\n", "user/job/memory.current": f"{GB}\n",
                        "user/memory.max": f"{20 * GB}\n", "user/memory.current": f"{18 * GB}\n"}, (3, 20, 2)),
    # the machine has less free than the container may have
    ("0::/\n", {"memory.max": f"{95 * GB}\n", "memory.current": f"{GB}\n"}, (64, 95, 90)),
    # lines of another kind
    ("what?\n0::/\n", {"memory.max": f"{8 * GB}\n", "memory.current": f"{3 * GB}\n",
                       "memory.stat": f"what\nmore of it\ninactive_file {GB}\n"}, (64, 8, 6)),
    # more is used than is allowed, for a moment
    ("0::/\n", {"memory.max": f"{2 * GB}\n", "memory.current": f"{3 * GB}\n"}, (64, 2, 0)),
    # version 1, listed under the path that the machine sees and mounted as the container sees it
    (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n",
          "memory/memory.limit_in_bytes": f"{4 * GB}\n", "memory/memory.usage_in_bytes": f"{2 * GB}\n",
          "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GB}\ntotal_active_file 0\n"}, (1, 4, 3)),
    (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n",
          "memory/docker/abc/memory.limit_in_bytes": UNLIMITED_V1,
          "memory/docker/abc/memory.usage_in_bytes": "5\n"}, (64, 100, 90)),
])  # fmt: skip
def test_what_a_container_leaves(machine, listed: str, files: dict[str, str], expected: tuple) -> None:
    machine(listed, files)
    assert found() == expected


def test_here_there_is_some_of_each() -> None:
    cores, total, free = found()
    assert 1 <= cores <= (os.cpu_count() or 1)
    assert 0 < free <= total


@pytest.mark.parametrize(("asked", "used"), [(0, 3), (2, 2)])
def test_a_run_uses_no_more_threads_than_a_container_has_processors(machine, monkeypatch, asked, used) -> None:
    machine("0::/\n", {"cpu.max": "300000 100000\n"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 48)
    assert environment.threads(asked) == used
    assert environment.describe("cpu", asked)["threads"] == used
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert environment.threads(0) == 2


def test_a_cell_is_given_them(machine, monkeypatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 48)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    cpu = SimpleNamespace(device="cpu", threads=0)
    machine("", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)), raising=False)
    cells.prepare_process(cpu)
    assert given == []  # torch's own number is left alone
    machine("0::/\n", {"cpu.max": "300000 100000\n"})
    cells.prepare_process(cpu)
    assert given == [3]
