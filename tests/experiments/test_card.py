"""What NVML is asked and how its answers are read, over a stand-in with the signatures of nvidia-ml-py 13.615.71."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from experiments import cells
from experiments.measurement import card, phases
from experiments.measurement.memory import PeakMemory
from experiments.measurement.process import all_turns
from experiments.rows import on_card
from experiments.spec import Measurement, load
from experiments.store import Cell
from models import checkpoint
from models.language_model import LanguageModel
from models.presets import preset

GPU = torch.device("cuda")
OURS, OTHER = "GPU-11111111-2222-3333-4444-555555555555", "GPU-99999999-2222-3333-4444-555555555555"
MB = 1 << 20


@dataclass
class Card:
    """As the driver sees it: bytes in use, and (pid, bytes) of each process."""

    uuid: str
    used: int = 0
    processes: list[tuple[int, int | None]] = field(default_factory=list)


class Driver(ModuleType):
    """In place of the module `pynvml`."""

    class NVMLError(Exception):
        pass

    class NVMLLibraryMismatchError(Exception):
        pass

    def __init__(self, *cards: Card) -> None:
        super().__init__("pynvml")
        self.cards, self.open, self.error = list(cards), 0, ""

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self._asked())

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self._asked()[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        for one in self._asked():
            if one.uuid == uuid:
                return one
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetUUID(self, handle: Card) -> str:
        return handle.uuid

    def nvmlDeviceGetMemoryInfo(self, handle: Card, version: int | None = None) -> SimpleNamespace:
        self._asked()
        return SimpleNamespace(total=80 << 30, free=(80 << 30) - handle.used, used=handle.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Card) -> list[SimpleNamespace]:
        self._asked()
        return [SimpleNamespace(pid=pid, usedGpuMemory=size, gpuInstanceId=None, computeInstanceId=None)
                for pid, size in handle.processes]  # fmt: skip

    def _asked(self) -> list[Card]:
        assert self.open == 1, "NVML is asked between nvmlInit and nvmlShutdown"
        if self.error:
            raise self.NVMLError(self.error)
        return self.cards


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Two cards, of which torch sees the second as its device 0, and has reserved 300 MB there."""
    made = Driver(Card(OTHER, 7 * MB), Card(OURS, 10 * MB))
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(card, "_before", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300 * MB)
    properties = SimpleNamespace(uuid=OURS.removeprefix("GPU-"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 250 * MB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 320 * MB)
    return made


def used(driver: Driver, *processes: tuple[int, int | None]) -> card.Held:
    """`held`, after these processes came to the card and nothing else."""
    driver.cards[1].processes += processes
    driver.cards[1].used += sum(size or 0 for _, size in processes)
    found = card.held(GPU)
    assert driver.open == 0
    return found


@pytest.mark.parametrize("prefix", ["", "GPU-"])
def test_the_process_is_found_by_its_id_on_the_card_of_that_uuid(driver: Driver, prefix: str, monkeypatch):
    uuid = SimpleNamespace(uuid=prefix + OURS.removeprefix("GPU-"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: uuid)
    driver.cards[0].processes = [(os.getpid(), 999 * MB)]  # the same process on another card
    assert used(driver, (4, 2 * MB), (os.getpid(), 700 * MB)) == card.Held(700 * MB, card.LISTED)


def test_under_another_id_the_growth_of_the_card_counts_where_the_process_must_be_alone(driver: Driver):
    card.remember_cards()
    assert driver.open == 0
    assert used(driver, (os.getpid() + 1, 700 * MB)) == card.Held(700 * MB, card.GROWTH)


def test_the_growth_counts_only_from_before_cuda_was_used(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    card.remember_cards()
    found = used(driver, (os.getpid() + 1, 700 * MB))
    assert found.bytes is None
    assert "how full the card was before is not known" in found.method


@pytest.mark.parametrize(("before", "since"), [(1, 1), (0, 2), (1, 0), (0, 0)])
def test_where_it_may_not_be_alone_there_is_no_figure(driver: Driver, before: int, since: int):
    pid = os.getpid() + 1
    driver.cards[1].processes = [(pid + k, 50 * MB) for k in range(before)]
    card.remember_cards()
    found = used(driver, *[(pid + 10 + k, 700 * MB) for k in range(since)])
    assert found.bytes is None
    assert f"{before} processes on the card before it used CUDA, {before + since} now" in found.method


@pytest.mark.parametrize("offset", [0, 1])
def test_less_than_torch_has_reserved_cannot_be_this_process(driver: Driver, offset: int):
    card.remember_cards()
    found = used(driver, (os.getpid() + offset, 200 * MB))
    assert found.bytes is None
    assert f"less than the {300 * MB:,} that torch has reserved" in found.method


def test_without_a_figure_the_reason_is_kept(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    assert card.held(GPU).method == "NVML does not list this process, and how full the card was before is not known"
    assert used(driver, (os.getpid(), None)) == card.Held(None, "NVML lists this process without its memory")
    driver.cards.pop()
    assert card.held(GPU) == card.Held(None, "NVML: Not Found")
    driver.error = "Driver Not Loaded"
    card.remember_cards()
    assert card.held(GPU) == card.Held(None, "NVML: Driver Not Loaded")
    assert driver.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    card.remember_cards()
    assert "nvidia-ml-py is not installed" in card.held(GPU).method


def test_a_measured_phase_reports_reserved_and_process_and_the_rows_carry_them(driver: Driver):
    driver.cards[1].processes = [(os.getpid(), 700 * MB)]
    with PeakMemory(GPU) as peak:
        pass
    assert peak.device_bytes == 250 * MB
    cell = Cell("mamba", 0, "decode", 8, 2)
    told = {row["metric"]: row for row in on_card(cell, "decode", peak.on_card, backend="cuda")}
    assert {metric: row["value"] for metric, row in told.items()} == {
        "reserved_peak_bytes": 320 * MB, "process_bytes": 700 * MB,
    }  # fmt: skip
    for row in told.values():
        assert (row["context"], row["batch"], row["unit"], row["backend"]) == (8, 2, "bytes", "cuda")
        assert row["reason"] is None


def test_a_missing_figure_is_a_row_with_its_reason_and_a_cpu_has_no_rows(driver: Driver):
    with PeakMemory(GPU) as peak:
        pass
    _, process = on_card(Cell("mamba", 0, "load"), "load", peak.on_card)
    assert process["value"] is None
    assert process["reason"].startswith("NVML does not list this process")
    with PeakMemory(torch.device("cpu")) as peak:
        pass
    assert peak.on_card == {}
    assert list(on_card(Cell("mamba", 0, "load"), "load", peak.on_card)) == []


class Peak(PeakMemory):
    """Of a phase on the CPU, as if it had been on a GPU."""

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.on_card = {"reserved_peak_bytes": 320 * MB, "process_bytes": 700 * MB, "process_method": card.LISTED}


def test_every_measured_phase_has_it_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cpu, once, tokens = (
        torch.device("cpu"),
        Measurement(repeats=1, seconds=0, decode_tokens=1),
        torch.zeros(1, 9).long(),
    )
    checkpoint.save(LanguageModel(preset("mamba-tiny"), seed=0), tmp_path)
    phases_of = {
        "load": lambda: phases.measure_load(tmp_path, once, cpu),
        "prefill": lambda: all_turns(phases.measure_prefill(tmp_path, once, 9, tokens, cpu, times=False)),
        "decode": lambda: all_turns(phases.measure_decode(tmp_path, once, 9, tokens, cpu, times=False)),
        "step": lambda: phases.measure_step(tmp_path, tokens, cpu, "float32"),
    }
    for measure in phases_of.values():
        assert "process_bytes" not in measure()
    monkeypatch.setattr(phases, "PeakMemory", Peak)
    for name, measure in phases_of.items():
        found = measure()
        assert (found["reserved_peak_bytes"], found["process_bytes"]) == (320 * MB, 700 * MB), name
        assert found["process_method"] == card.LISTED


def test_a_process_remembers_the_cards_before_it_uses_one(driver: Driver):
    experiment = load("compare", profile="smoke", device="cuda")
    assert cells.prepare_process(experiment) == GPU
    assert card._before == {OTHER: (7 * MB, 0), OURS: (10 * MB, 0)}
    card._before.clear()
    cells.prepare_process(load("compare", profile="smoke"))
    assert card._before == {}
