"""Runs that cannot fit into memory are refused before any work."""

from types import SimpleNamespace

import pytest
import torch

from experiments import capacity, spec
from experiments.capacity import Work
from experiments.errors import EnvironmentLacksError
from experiments.training import DTYPES
from models import cost, replay
from models.presets import preset

FAMILIES = ("transformer", "sliding", "mamba", "mamba2", "mamba3", "hybrid", "moe")


def replayed(config, work: Work) -> int:
    """At the length itself, where `least_bytes` goes on from shorter ones."""
    if work.kind == "train":
        peak = replay.training(config, work.batch, work.context, precision=work.dtype).peak
        return 3 * cost.weight_bytes(config, 4) + peak
    dtype = DTYPES[work.dtype]
    weights = cost.weight_bytes(config, dtype.itemsize)
    if work.kind == "prefill":
        return weights + replay.prefill(config, work.batch, work.context, dtype)
    with replay._without_data(config, "cpu"):
        model = replay._model(config, dtype, "cpu").eval().requires_grad_(False)
        prompt = torch.zeros(work.batch, work.context, dtype=torch.int64)
        model.hidden(prompt[:, :1])
        with replay.Allocations() as seen:
            state = model.make_state(work.batch, work.context)
            for piece in prompt.split(capacity.PIECE, 1):
                _, state = model.prefill(piece.contiguous(), state)
            return weights + seen.peak


@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
@pytest.mark.parametrize(
    ("family", "dtype"), [(family, "float32") for family in FAMILIES] + [("hybrid", "bfloat16"), ("moe", "bfloat16")]
)
def test_what_is_refused_could_not_fit(monkeypatch, family, kind, dtype):
    """What is told of a length from shorter ones is what its own shapes say, or less; and where no shape is asked, they
    say less than what was free."""
    monkeypatch.setattr(capacity, "ROWS", 4)
    monkeypatch.setattr(capacity, "CONTEXT", 512)
    monkeypatch.setattr(capacity, "PIECE", 1024)
    config = preset(f"{family}-tiny")
    for batch, context in ((4, 300), (4, 4096), (4, 6144), (48, 256)):
        work = Work(family, kind, batch, context, dtype)
        exact, least = replayed(config, work), capacity.least_bytes(config, work)
        lowest = 0.4 if kind == "decode" else 0.9  # a later piece's attention to those before it is not counted
        assert lowest * exact <= least <= 1.005 * exact, (batch, context)
        assert capacity.generous_bytes(config, work) > exact


@pytest.mark.parametrize(("name", "assignments", "largest"), [
    ("compare", ["training.batch=64", "measurement.contexts=[64, 4096]", "measurement.batch=2"],
     {Work("mamba", "train", 64, 256, "float32"), Work("mamba", "prefill", 2, 4096, "float32"),
      Work("mamba", "decode", 2, 4096, "float32")}),
    ("memory", ["memory.batches=[1, 8]", "memory.contexts=[64, 512]", "memory.train_batch=3", "memory.dtype=bfloat16"],
     {Work("mamba", "train", 3, 1024, "bfloat16"), Work("mamba", "prefill", 8, 512, "bfloat16"),
      Work("mamba", "decode", 8, 512, "bfloat16")}),
    ("speed", ["speed.train_contexts=[128, 8192]", "speed.contexts=[64, 512]", "speed.batches=[4]"],
     {Work("mamba", "train", 1, 8192, "float32"), Work("mamba", "prefill", 4, 512, "float32"),
      Work("mamba", "decode", 4, 512, "float32")}),
    ("moe", ["measurement.contexts=[256, 65536]", "experts.batches=[1, 128]"],  # the batches at the shortest context
     {Work("moe", "train", 2, 256, "float32"), Work("moe", "prefill", 1, 65536, "float32"),
      Work("moe", "decode", 1, 65536, "float32"), Work("moe", "decode", 128, 256, "float32")}),
    ("vocabulary", [], set()),
])  # fmt: skip
def test_the_largest_work_of_an_arm(name, assignments, largest):
    experiment = spec.load(name, profile="cpu", assignments=assignments, device="cpu")
    found = [work for work in capacity.largest(experiment) if work.arm == ("moe" if name == "moe" else "mamba")]
    assert set(found) == largest
    assert len(found) == len(largest)


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes of memory, and of swap, are free."""

    def to(size: float, swap: int = 0) -> None:
        monkeypatch.setattr(capacity, "free_memory", lambda: int(size))
        monkeypatch.setattr(capacity.psutil, "swap_memory", lambda: SimpleNamespace(free=swap))

    return to


def test_a_run_that_does_not_fit_is_refused(free):
    assignments = ["memory.contexts=[4000000]", "memory.train_contexts=[64]"]
    experiment = spec.load("memory", profile="smoke", assignments=assignments, arms=["transformer"])
    config = capacity.cells.model_configs(experiment)["transformer"]
    needed = capacity.least_bytes(config, Work("transformer", "prefill", 1, 4_000_000, "float32"))
    weights, kept = cost.weight_bytes(config, 4), cost.state_bytes(config, 1, 4_000_000, 4)
    assert weights + kept < needed < weights + 4 * kept
    free(needed / capacity.MARGIN + 1)
    capacity.check(experiment)
    free(needed / capacity.MARGIN - 1)
    with pytest.raises(EnvironmentLacksError, match=r"reading a prompt of 1 x 4,000,000 tokens takes 'transformer'"):
        capacity.check(experiment)
    free(needed / capacity.MARGIN - 1, swap=2)
    capacity.check(experiment)


def test_a_prompt_that_is_read_in_pieces_takes_less_at_once(free):
    """The batches of the study of experts are decoded only, after a prompt that could not be read whole."""
    assignments = ["measurement.contexts=[8192]", "experts.batches=[64]"]
    experiment = spec.load("moe", profile="smoke", assignments=assignments, arms=["moe"])
    config = capacity.cells.model_configs(experiment)["moe"]
    whole, pieces = (capacity.least_bytes(config, Work("moe", kind, 64, 8192, "float32")) for kind in capacity.OF
                     if kind != "train")  # fmt: skip
    assert pieces < 0.5 * whole
    free(whole)
    capacity.check(experiment)
    free(pieces / capacity.MARGIN - 1)
    with pytest.raises(EnvironmentLacksError, match=r"decoding after 64 x 8,192 tokens takes 'moe'"):
        capacity.check(experiment)


def test_shapes_are_not_asked_where_all_fits(free, monkeypatch):
    monkeypatch.setattr(capacity, "least_bytes", None)
    free(100 << 30)
    capacity.check(spec.load("compare", profile="cpu", device="cpu"))


@pytest.mark.parametrize("assignment", [
    "arms.transformer.overrides.mixer.backend=torch", "arms.transformer.overrides.mixer.backend=reference",
    "data.vocabulary=70000",
])  # fmt: skip
def test_what_takes_minutes_to_replay_is_not_asked(free, assignment):
    free(1)
    one = {"profile": "smoke", "device": "cpu", "arms": ("transformer",)}
    with pytest.raises(EnvironmentLacksError):
        capacity.check(spec.load("compare", **one))
    capacity.check(spec.load("compare", assignments=[assignment], **one))


def test_a_gpu_says_so_itself(free):
    free(1)
    experiment = spec.load("compare", profile="smoke", device="cpu")
    with pytest.raises(EnvironmentLacksError):
        capacity.check(experiment)
    capacity.check(experiment.model_copy(update={"device": "cuda"}))


def test_no_shape_tells_what_an_lstm_takes(free):
    free(1)
    experiment = spec.load("compare", profile="smoke", assignments=["arms.mamba.model=lstm-tiny"], device="cpu",
                           arms=("mamba",))  # fmt: skip
    capacity.check(experiment)
