"""The memory study from results made by hand: what shapes predict, and what its findings compare."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from study_rows import per_seed

from experiments import cells
from experiments.measurement.loading import WAYS
from experiments.spec import Arm, Experiment, Memory
from experiments.store import Cell, RunDirectory, write_json
from experiments.studies import memory
from models import cost
from models.presets import preset

ATTENTION = preset("transformer-tiny")
WEIGHTS = cost.parameters(ATTENTION).total
WIDTH, HEAD, ENTRIES = 64, 32, 512
NOWHERE = RunDirectory(Path("nowhere"))


def experiment(device: str = "cpu", **settings: Any) -> Experiment:
    arms = {"attention": Arm(model="transformer-tiny"), "scan": Arm(model="mamba-tiny")}
    return Experiment.model_validate({
        "name": "x", "title": "x", "study": "memory", "device": device, "arms": arms, "memory": Memory(**settings),
        "data": {"vocabulary": ENTRIES},
    })  # fmt: skip


def rows(kind: str, folder: Path, **result: Any) -> dict[str, dict]:
    """Of 3 sequences of 20 tokens, measured in bfloat16, with 8 more of decode."""
    cell, run = Cell("attention", 0, kind, 20, 3), RunDirectory(folder)
    write_json(run.folder(cell) / "checkpoint" / "config.json", ATTENTION.to_dict())
    one = experiment(dtype="bfloat16", decode_tokens=8)
    return {row["metric"]: row for row in memory.rows(cell, {"backend": "reference"} | result, one, run)}


def test_a_training_step_holds_three_times_the_weights_in_float32_and_what_the_replay_counts(tmp_path: Path) -> None:
    """Weights, and the optimizer's two numbers of each; gradients are in the replay. In whatever type it computes."""
    parts = ("peak_bytes", "weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
    measured = {part: 100 + at for at, part in enumerate(parts)}
    found = rows("step", tmp_path, predicted={"peak": 50_000, "activations": 40_000}, **measured)
    assert {metric: row["value"] for metric, row in found.items()} == measured | {
        "activation_bytes_analytic": 40_000,
        "peak_bytes_analytic": 3 * 4 * WEIGHTS + 4 * 20 * HEAD + 50_000,
    }
    assert {row["phase"] for row in found.values()} == {"train"}
    unknown = rows("step", tmp_path, predicted=None, unpredicted="why not", **measured)
    assert [unknown[f"{one}_bytes_analytic"]["value"] for one in ("peak", "activation")] == [None, None]
    assert unknown["peak_bytes_analytic"]["reason"] == "why not"


def test_prefill_holds_the_weights_rotary_tables_of_its_tokens_and_what_the_replay_counts(tmp_path: Path) -> None:
    found = rows("prefill", tmp_path, peak_bytes=1, working_bytes=2, predicted={"peak": 50_000})
    assert {metric: row["value"] for metric, row in found.items()} == {
        "peak_bytes": 1, "working_bytes": 2, "peak_bytes_analytic": 2 * WEIGHTS + 4 * 20 * HEAD + 50_000,
    }  # fmt: skip


def test_decode_holds_the_weights_rotary_tables_the_cache_to_its_last_token_and_logits(tmp_path: Path) -> None:
    found = rows("decode", tmp_path, peak_bytes=1, working_bytes=2, state_bytes=3)
    cache = 3 * 2 * (20 + 8) * WIDTH * 2  # sequences x (keys, values) x tokens x width x bytes
    assert {metric: row["value"] for metric, row in found.items()} == {
        "peak_bytes": 1, "working_bytes": 2, "state_bytes": 3, "state_bytes_analytic": cache,
        "peak_bytes_analytic": 2 * WEIGHTS + 4 * (20 + 8) * HEAD + cache + 3 * ENTRIES * 2,
    }  # fmt: skip


def test_a_cache_outweighs_the_weights_the_sooner_the_more_sequences_there_are() -> None:
    found = memory.findings([], experiment(batches=(1, 4), dtype="bfloat16"), NOWHERE)
    told = {one["batch"]: one["tokens"] for one in found if one["kind"] == "cache-outweighs-weights"}
    assert told == {batch: 2 * WEIGHTS // (batch * 2 * WIDTH * 2) + 1 for batch in (1, 4)}


def test_a_cache_cannot_outweigh_what_takes_more_tokens_than_a_model_has_positions(monkeypatch) -> None:
    """A token takes 2 x 64 numbers of 2 bytes: 100 of them more than the scan's state, and less than the weights."""
    short = ATTENTION.with_overrides({"positions": 100})
    scan = preset("mamba-tiny")
    held = cost.state_bytes(scan, 1, 1, 2)
    assert held < 100 * 2 * WIDTH * 2 < 2 * WEIGHTS
    monkeypatch.setattr(cells, "model_configs", lambda experiment: {"attention": short, "scan": scan})
    state, weights = memory.findings([], experiment(dtype="bfloat16"), NOWHERE)
    assert state["tokens"] == held // (2 * WIDTH * 2) + 1
    assert f"from {state['tokens']:,} tokens on, whatever the batch." in state["sentence"]
    assert weights["tokens"] is None
    assert "attention's cache never outweighs its own weights" in weights["sentence"]
    assert weights["sentence"].endswith(" within its 100 positions.")


def test_what_outweighs_something_from_the_first_token_on_does_so_at_every_length(monkeypatch) -> None:
    """A hybrid's recurrent state alone is more than an LSTM's."""
    configs = {"hybrid": preset("hybrid-tiny"), "lstm": preset("lstm-tiny")}
    monkeypatch.setattr(cells, "model_configs", lambda experiment: configs)
    one = memory.findings([], experiment(dtype="bfloat16"), NOWHERE)[0]
    assert (one["arm"], one["against"], one["tokens"]) == ("hybrid", "lstm", 1)
    assert one["sentence"].endswith(" at every length, whatever the batch.")


def test_an_arm_that_sees_what_follows_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ATTENTION.with_overrides({"mixer.causal": False})
    configs = {"attention": ATTENTION, "encoder": encoder, "scan": preset("mamba-tiny")}
    monkeypatch.setattr(cells, "model_configs", lambda experiment: configs)
    found = memory.findings([], experiment(), NOWHERE)
    assert [(one["kind"], one["arm"], one.get("against")) for one in found] == [
        ("cache-outweighs-state", "attention", "scan"), ("cache-outweighs-weights", "attention", None),
    ]  # fmt: skip


def over_seeds(
    *wanted: tuple[str, str, float], context: int = 128, ways: Iterable[str] = WAYS, **rest: Any
) -> list[dict]:
    """Of attention at so many tokens, or of these ways to load, one value a phase and metric."""
    where = {"context": context, "batch": 1}
    return [
        row | {"seed": None}
        for phase, metric, value in wanted
        for place in ([{"mode": way} for way in ways] if phase == "load" else [where])
        for row in per_seed("attention", phase, metric, [value], **place, **rest)
    ]  # fmt: skip


INFERENCE = over_seeds(("prefill", "peak_bytes", 5e6), ("decode", "peak_bytes", 2e6))


@pytest.mark.parametrize(("device", "metric", "exceeding"), [
    ("cpu", "host_peak_bytes", []), ("cuda", "device_peak_bytes", [128]),
])  # fmt: skip
def test_loading_is_weighed_against_inference_in_the_memory_of_the_device(
    device: str, metric: str, exceeding: list[int]
) -> None:
    """10 MB of the host's, 1 MB of the GPU's; what may not be compared is so only in the one that is read."""
    loads = {"host_peak_bytes": 10e6, "device_peak_bytes": 1e6}
    for refused in (None, *loads):
        rows = INFERENCE + [
            row for name, size in loads.items()
            for row in over_seeds(("load", name, size), comparable=name != refused, reason="a gate failed")
        ]  # fmt: skip
        (one,) = (one for one in memory.findings(rows, experiment(device, contexts=(128,)), NOWHERE)
                  if one["kind"] == "loading-against-inference")  # fmt: skip
        assert one["inference_exceeds_load_at"] == dict.fromkeys(WAYS, exceeding)
        assert one["comparable"] == (refused != metric)
        assert one["sentence"].endswith("They do not compare: a gate failed.") == (refused == metric)
        assert (one["lost"], one["undecided"]) == ({}, {})


def test_loading_is_weighed_against_inference_of_the_smallest_batch() -> None:
    """At which 5 MB are not more than the 5 MB of loading; at batch 4 20 MB would be."""
    rows = over_seeds(("load", "host_peak_bytes", 5e6)) + INFERENCE
    rows += [row | {"batch": 4, "value": 20e6} for row in INFERENCE]
    (one,) = (one for one in memory.findings(rows, experiment(contexts=(128,), batches=(1, 4)), NOWHERE)
              if one["kind"] == "loading-against-inference")  # fmt: skip
    assert (one["batch"], one["inference_exceeds_load_at"]) == (1, {way: [] for way in WAYS})
    assert one["sentence"].startswith("attention, batch 1: ")
    assert "; prefill 5.00 MB at 128 tokens; decode 2.00 MB at 128 tokens. " in one["sentence"]


@pytest.mark.parametrize(("exceeding", "said"), [
    ([], "more than inference at every measured length"),
    ([64, 128, 256], "less than inference at every measured length"),
    ([128, 256], "more than inference up to 64 tokens and less from 128 on"),
    ([128], "less than inference at 128 tokens and more at the other lengths"),
    ([64, 128], "less than inference at 64, 128 tokens and more at the other lengths"),
])  # fmt: skip
def test_lengths_that_are_not_in_one_piece_are_named(exceeding: list[int], said: str) -> None:
    assert memory._against(exceeding, [], (64, 128, 256)) == said


@pytest.mark.parametrize(
    ("lost", "ending", "undecided"),
    [
        ((), "read or mapped or direct loading costs more than inference up to 64 tokens and less from 128 on.", []),
        # the other phase alone takes more than loading, or does not, and then the one that is missing might
        (("decode", 128), "up to 64 tokens and less from 128 on. Without a result: decode at 128 tokens.", []),
        (("prefill", 128), "costs more than inference at 64 (open at 128). Without a result: prefill at 128 "
                           "tokens.", [128]),
        (("prefill", 64), "costs less than inference at 128 (open at 64). Without a result: prefill at 64 "
                          "tokens.", [64]),
        (("decode", None), "prefill 1.00 MB at 64 to 5.00 MB at 128 tokens. So read or mapped or direct loading costs "
                           "less than inference at 128 (open at 64). Without a result: decode at 64, 128 "
                           "tokens.", [64]),
        (("load", None), "So mapped or direct loading costs more than inference up to 64 tokens and less from 128 on. "
                         "Without a result: loading (read).", []),
    ],
)  # fmt: skip
def test_what_has_no_result_decides_nothing(lost: tuple, ending: str, undecided: list[int]) -> None:
    """Loading takes 3 MB; prefill 1 and 5, decode 1 and 2. A cell that failed does not turn the answer around."""
    held = {("prefill", 64): 1e6, ("prefill", 128): 5e6, ("decode", 64): 1e6, ("decode", 128): 2e6}
    rows = over_seeds(("load", "host_peak_bytes", 3e6), ways=tuple(WAYS)[1:] if lost == ("load", None) else WAYS)
    for (phase, at), size in held.items():
        if lost not in ((phase, at), (phase, None)):
            rows += over_seeds((phase, "peak_bytes", size), context=at)
    (one,) = (one for one in memory.findings(rows, experiment(contexts=(64, 128)), NOWHERE)
              if one["kind"] == "loading-against-inference")  # fmt: skip
    assert one["sentence"].endswith(ending)
    assert one["undecided"] == (dict.fromkeys(one["inference_exceeds_load_at"], undecided) if undecided else {})
    assert bool(one["lost"]) == bool(lost)


def test_the_longest_sequences_are_those_of_training_and_of_the_last_token_decoded() -> None:
    one = experiment(contexts=(8, 64), decode_tokens=3, train_contexts=(16, 60))
    assert memory.lengths(one, causal=True) == {"memory.train_contexts": 60, "memory.contexts and decode_tokens": 67}
    assert memory.lengths(one, causal=False) == {"memory.train_contexts": 60}


def test_what_is_open_is_open_for_a_way_of_loading() -> None:
    """Reading takes 1 MB, which decode alone exceeds; mapping takes 9 MB, which prefill might."""
    rows = over_seeds(("load", "host_peak_bytes", 1e6), ways=("read",))
    rows += over_seeds(("load", "host_peak_bytes", 9e6), ways=("mapped", "direct"))
    for at in (64, 128):
        rows += over_seeds(("decode", "peak_bytes", 2e6), context=at)
    rows += over_seeds(("prefill", "peak_bytes", 12e6), context=128)
    (one,) = (one for one in memory.findings(rows, experiment(contexts=(64, 128)), NOWHERE)
              if one["kind"] == "loading-against-inference")  # fmt: skip
    assert one["sentence"].endswith(
        "So read loading costs less than inference at every measured length; mapped or direct loading costs less than "
        "inference at 128 (open at 64). Without a result: prefill at 64 tokens."
    )
    assert one["undecided"] == {"mapped": [64], "direct": [64]}


def test_predictions_are_neither_better_nor_worse(tmp_path: Path) -> None:
    found = rows("prefill", tmp_path, peak_bytes=1, working_bytes=2, predicted={"peak": 50_000})
    assert (found["peak_bytes"]["direction"], found["peak_bytes_analytic"]["direction"]) == ("lower", "none")
