"""The speed study's numbers from results made by hand: its rows, its plan, and what its findings rest on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_rows import speed as speed_rows

from experiments import cells
from experiments.spec import Arm, Experiment, Speed
from experiments.store import Cell, RunDirectory, write_json
from experiments.studies import speed
from models import cost
from models.presets import preset

ATTENTION = preset("transformer-tiny")
PREFILL_OF_32 = cost.forward_flops_per_token(ATTENTION, 32, predicted=1 / 32)  # logits of the last token alone
TRAINING_OF_32 = cost.training_flops_per_token(ATTENTION, 32)
DECODE_AFTER_32 = cost.decode_bytes(ATTENTION, 4, 32, 2) / 4  # the weights are read once for four sequences


def experiment(**settings: Any) -> Experiment:
    arms = {"attention": Arm(model="transformer-tiny"), "scan": Arm(model="mamba-tiny")}
    return Experiment(name="x", title="x", study="speed", seeds=(0,), arms=arms, speed=Speed(**settings))


def timed(tokens: int, ms: tuple[float, ...], ceilings: tuple[float, ...] = ()) -> dict[str, Any]:
    """A call a turn. Of bytes the machine moves as many a second as it does multiplications, tenfold."""
    rates = [{"flops_per_s": one, "bytes_per_s": 10 * one} for one in ceilings]
    return {"backend": "reference", "turns": [1] * len(ms), "samples": {"ms": list(ms)}, "first_call_ms": 7.0,
            "tokens_per_sample": tokens, "ceilings": rates}  # fmt: skip


def rows(kind: str, tokens: int, folder: Path) -> dict[str, float]:
    """Of turns of 10, 20 and 40 ms, at 4 sequences of 32 tokens in bfloat16, by the names of what they count."""
    cell, run = Cell("attention", 0, kind, 32, 4, "eager", "bfloat16"), RunDirectory(folder)
    write_json(run.folder(cell) / "checkpoint" / "config.json", ATTENTION.to_dict())
    found = speed.rows(cell, timed(tokens, (10.0, 20.0, 40.0), (4e9, 1e9, 1e9)), experiment(), run)
    return {row["metric"]: row["value"] for row in found}


def test_a_decoded_token_takes_its_share_of_the_time_and_a_sequence_its_share_of_the_bytes(tmp_path: Path) -> None:
    """Five tokens of each of four sequences in 20 ms; the ceilings change from turn to turn, and each turn's speed is
    over its own: 2000/4, 1000/1 and 500/1."""
    found = rows("decode", 20, tmp_path)
    assert found["ms_per_token"] == pytest.approx(20 / 5)
    assert found["tokens_per_s"] == pytest.approx(1000)
    assert found["bytes_per_s"] == pytest.approx(1000 * DECODE_AFTER_32)
    assert found["bandwidth_utilisation"] == pytest.approx(500 * DECODE_AFTER_32 / 1e10)
    assert found["roofline_tokens_per_s"] == pytest.approx(1e10 / DECODE_AFTER_32)
    assert (found["ceiling_flops_per_s"], found["ceiling_bytes_per_s"]) == pytest.approx((1e9, 1e10))
    assert "flops_per_s" not in found


@pytest.mark.parametrize(("kind", "latency", "flops"), [
    ("prefill", "time_to_first_token_ms", PREFILL_OF_32), ("step", "step_ms", TRAINING_OF_32),
])  # fmt: skip
def test_arithmetic_per_second_is_that_of_a_token_times_tokens(
    kind: str, latency: str, flops: float, tmp_path: Path
) -> None:
    found = rows(kind, 4 * 32, tmp_path)
    assert found[latency] == pytest.approx(20)
    assert found["tokens_per_s"] == pytest.approx(6400)
    assert found["flops_per_s"] == pytest.approx(6400 * flops)
    assert found["flops_utilisation"] == pytest.approx(3200 * flops / 1e9)  # 12800/4, 6400/1 and 3200/1
    assert "bytes_per_s" not in found
    assert "roofline_tokens_per_s" not in found


def test_a_training_step_has_as_many_tokens_at_every_length_that_they_fill() -> None:
    planned = speed.plan(experiment(train_contexts=(16, 60, 4096), train_tokens=256))
    shapes = [(cell.context, cell.batch) for cell in planned if (cell.kind, cell.arm) == ("step", "scan")]
    assert shapes == [(16, 16), (60, 4), (4096, 1)]


def test_the_longest_sequences_are_those_of_training_and_of_the_last_token_decoded() -> None:
    one = experiment(contexts=(8, 64), decode_tokens=3, train_contexts=(16, 60))
    assert speed.lengths(one, causal=True) == {"speed.train_contexts": 60, "speed.contexts and decode_tokens": 67}
    assert speed.lengths(one, causal=False) == {"speed.train_contexts": 60}


def found(one: Experiment, kind: str, ms: dict[tuple[str, int], float], rows: list[dict], folder: Path) -> list[dict]:
    """Findings where one of the kind's cells took so long for a token, by arm and length."""
    run = RunDirectory(folder)
    for cell in speed.plan(one):
        if cell.kind == kind:
            run.finish(cell, timed(1, (ms[cell.arm, cell.context or 0],) * 6))
    return speed.findings(rows, one, run)


def test_an_operation_is_compared_by_itself_however_many_a_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model's time each of two, or of three, takes its part: the three scans' speed is 3/4 of the two attentions'
    at 64 tokens and 5/4 at 256, so 1 half way."""
    one = experiment(operator_contexts=(64, 256))
    configs = {"attention": ATTENTION.with_overrides({"layers": 2}),
               "scan": preset("mamba-tiny").with_overrides({"layers": 3})}  # fmt: skip
    monkeypatch.setattr(cells, "model_configs", lambda experiment: configs)
    ms = {("attention", at): 1 / 2 for at in (64, 256)} | {("scan", 64): 4 / 9, ("scan", 256): 4 / 15}
    (crossing,) = found(one, "forward", ms, [], tmp_path)
    assert crossing["operations"] == {"attention": 2, "scan": 3}
    assert crossing["tokens"] == pytest.approx(160)


def test_of_a_model_that_does_several_operations_one_alone_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {"attention": ATTENTION, "scan": preset("hybrid-tiny")}
    monkeypatch.setattr(cells, "model_configs", lambda experiment: configs)
    ms = {(arm, at): 1.0 for arm in configs for at in (64, 256)}
    assert found(experiment(operator_contexts=(64, 256)), "forward", ms, [], tmp_path) == []


def test_a_crossing_names_the_lengths_that_an_arm_has_no_result_at(tmp_path: Path) -> None:
    """The transformer has none at 256: nothing says that it is faster there."""
    one = experiment(contexts=(64, 128, 256), modes=("eager",))
    run = RunDirectory(tmp_path)
    for cell in speed.plan(one):
        if cell.kind == "decode" and (cell.arm, cell.context) != ("attention", 256):
            run.finish(cell, timed(1, ({"attention": 1.0, "scan": 2.0}[cell.arm],) * 6))
    crossing, of_attention, of_scan = speed.findings([], one, run)
    assert (of_attention["kind"], of_attention["to"], of_attention["lost"]) == ("growth", 128, {"attention": [256]})
    assert of_attention["sentence"].endswith(" Not counted, for want of a result: attention at 256 tokens.")
    assert (of_scan["kind"], of_scan["to"], of_scan["lost"]) == ("growth", 256, {})
    for cell in speed.plan(one):
        if (cell.kind, cell.arm, cell.context) == ("decode", "scan", 128):
            run.result_file(cell).unlink()  # between the two that its growth is of
    of_scan = speed.findings([], one, run)[-1]
    assert (of_scan["from"], of_scan["to"], of_scan["lost"]) == (64, 256, {})
    assert (crossing["tokens"], crossing["lost"]) == (None, {"attention": [256]})
    assert crossing["sentence"].startswith("At none of the lengths from 64 to 128 tokens does scan decode faster")
    assert crossing["sentence"].endswith(" Not counted, for want of a result: attention at 256 tokens.")


def test_without_two_lengths_in_common_the_question_is_told_as_open(tmp_path: Path) -> None:
    one = experiment(contexts=(64, 128), modes=("eager",))
    run = RunDirectory(tmp_path)
    for cell in speed.plan(one):
        if cell.kind == "decode" and (cell.arm, cell.context) != ("attention", 128):
            run.finish(cell, timed(1, (1.0,) * 6))
    crossing = next(found for found in speed.findings([], one, run) if found["kind"] == "crossover")
    assert not crossing["comparable"]
    assert "there are no two lengths at which both gave a result" in crossing["sentence"]


def test_what_may_not_be_compared_taints_its_own_phase_mode_and_type(tmp_path: Path) -> None:
    one = experiment(contexts=(64, 256), modes=("eager", "compiled"), dtypes=("float32", "bfloat16"))
    ms = {(arm, at): 1.0 for arm in one.arms for at in (64, 256)}
    refused = {"comparable": False, "reason": "a gate failed"}
    rows = speed_rows("scan", "decode", [1.0], mode="compiled", dtype="float32", **refused)
    rows += speed_rows("scan", "prefill", [1.0], mode="eager", dtype="bfloat16", **refused)
    rows += [row for mode in one.speed.modes for dtype in one.speed.dtypes
             for row in speed_rows("attention", "decode", [1.0], mode=mode, dtype=dtype)]  # fmt: skip
    told = found(one, "decode", ms, rows, tmp_path)
    assert len(told) == 4 * (1 + 2)  # a crossing, and of each arm how its decode grows
    tainted = [(a["kind"], a["arm"], a["mode"], a["dtype"]) for a in told if not a["comparable"]]
    assert tainted == [("crossover", "scan", "compiled", "float32"), ("growth", "scan", "compiled", "float32")]


def test_growth_is_in_doubt_by_its_two_lengths_alone(tmp_path: Path) -> None:
    """Noise between them decides nothing of it."""
    one, found = experiment(contexts=(64, 128, 256), modes=("eager",)), {}
    for noisy in (64, 128, 256):
        run = RunDirectory(tmp_path / str(noisy))
        for cell in speed.plan(one):
            if cell.kind == "decode":
                run.finish(cell, timed(1, (1.0,) * 6) | {"noisy": cell.context == noisy, "host_bound": False})
        found[noisy] = speed.findings([], one, run)[-1]["noisy"]
    assert found == {64: True, 128: False, 256: True}


def test_a_crossing_is_in_doubt_by_the_lengths_on_both_sides_of_it_alone(tmp_path: Path) -> None:
    """The scan overtakes between 64 and 128 tokens."""
    one, doubts = experiment(contexts=(64, 128, 256), modes=("eager",)), {}
    for noisy in (64, 128, 256):
        run = RunDirectory(tmp_path / str(noisy))
        for cell in speed.plan(one):
            if cell.kind == "decode":
                ms = 2.0 if (cell.arm, cell.context) == ("scan", 64) else 0.5 if cell.arm == "scan" else 1.0
                run.finish(cell, timed(1, (ms,) * 6) | {"noisy": cell.context == noisy, "host_bound": False})
        crossing = speed.findings([], one, run)[0]
        assert crossing["kind"] == "crossover"
        assert 64 < crossing["tokens"] < 128
        doubts[noisy] = crossing["noisy"]
    assert doubts == {64: True, 128: True, 256: False}


def test_an_interval_holds_95_percent_of_resampled_medians() -> None:
    """The median of n draws is at most the k-th of n values where more than half of the draws are: of 17 values with
    probability 0.008 for k = 4, 0.036 for k = 5 and 0.104 for k = 6, so the interval ends five from each end."""
    ratios = np.random.default_rng(0).permutation(np.arange(2.0, 19.0))  # 2 to 18
    grown = speed.growth({64: ratios, 256: np.ones(17)})
    assert (grown["ratio"], grown["ci_low"], grown["ci_high"]) == pytest.approx((10, 6, 14))
    # half as fast at 0, r times at 100: from 50 / (r - 1/2) tokens on
    crossing = speed.crossover({0: (np.full(17, 2.0), np.ones(17)), 100: (np.ones(17), ratios)})
    assert (crossing["tokens"], crossing["ci_low"], crossing["ci_high"]) == pytest.approx(
        (50 / 9.5, 50 / 13.5, 50 / 5.5)
    )
    assert speed.RESAMPLES == 2000  # as docs/method.md says


def test_one_turn_that_was_disturbed_moves_no_estimate() -> None:
    disturbed = np.array([2.0, 2.0, 1e-9])
    assert speed.crossover({8: (np.ones(3), disturbed), 16: (np.ones(3), disturbed)})["tokens"] == 0
    grown = speed.growth({8: disturbed, 12: np.full(3, 2.0), 16: np.ones(3)})
    assert grown["ratio"] == pytest.approx(2)


def test_as_fast_is_not_faster() -> None:
    equal, faster = (np.ones(3), np.ones(3)), (np.ones(3), np.full(3, 2.0))
    assert speed.crossover({8: equal, 16: equal})["tokens"] is None
    tie = speed.crossover({8: faster, 16: equal})
    assert tie == {"tokens": 16, "ci_low": 16, "ci_high": 16, "until": True, "ahead": [8]}
    assert speed.crossover({8: equal, 16: faster})["tokens"] == 8  # from there on, and not at it
