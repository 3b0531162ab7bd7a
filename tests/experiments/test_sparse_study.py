"""What the study of sliding windows says, from losses and rows made by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_rows import held, quality, speed

from experiments.cells import model_config
from experiments.spec import Arm, Data, Experiment, Measurement, load
from experiments.store import Cell, RunDirectory
from experiments.studies import sparse
from models.language_model import LanguageModel

T, V = 64, 300


def arm(window: int, layers: int = 1) -> Arm:
    overrides = {"mixer": {"window": window}, "layers": layers}
    return Arm(model="sliding-tiny", learning_rate=1e-3, overrides=overrides)


FULL = Arm(model="transformer-tiny", learning_rate=1e-3)
QUALITY = quality("full", (3.0, 3.1, 3.2)) + quality("narrow", (3.0, 3.1, 3.2)) + quality("wide", (3.0, 3.1, 3.2))


def experiment(batch: int = 1, contexts: tuple[int, ...] = (32, 128, 512), **arms: Arm) -> Experiment:
    return Experiment(name="x", title="x", study="sparse", arms={"full": FULL} | arms, seeds=(0, 1, 2),
                      data=Data(vocabulary=V), measurement=Measurement(contexts=contexts, batch=batch))  # fmt: skip


def finish(run: RunDirectory, name: str, added: np.ndarray, spread: tuple[float, ...] = (0.0, 0.001, -0.001)) -> None:
    """Losses of three seeds: a falling curve of the seed, and what this arm adds to it, give or take `spread`."""
    for seed, more in enumerate(spread):
        losses = 5 - 0.5 * np.log2(np.arange(1, T + 1)) + 0.1 * seed + added + more
        run.finish(Cell(name, seed, "train"), {"splits": {"test": {"loss_at_position": losses.tolist()}}})


def kind(found: list[dict], name: str) -> list[dict]:
    return [one for one in found if one["kind"] == name]


def after(overall: dict) -> str:
    """What is said of the loss once the window is full, without what is said of its growth."""
    said, growth, _ = overall["sentence"].partition(" Against full, from the positions before to those after.")
    assert growth
    return said


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    finish(run, "full", np.zeros(T), (0, 0, 0))
    return run


def test_a_window_that_loses_after_it_is_full(run: RunDirectory) -> None:
    finish(run, "narrow", np.where(np.arange(1, T + 1) > 8, 0.3, 0.0))
    finish(run, "wide", np.zeros(T))
    found = sparse.findings(QUALITY, experiment(narrow=arm(8, layers=2), wide=arm(32)), run)
    narrow, wide = kind(found, "quality")
    assert [narrow[zone]["first"] for zone in ("before", "after", "beyond")] == [1, 9, 16]
    assert [narrow[zone]["last"] for zone in ("before", "after", "beyond")] == [8, T, T]
    assert narrow["reach"] == 15  # 7 further back in each of two layers
    assert narrow["before"]["estimate"] == pytest.approx(0, abs=1e-9)
    assert narrow["after"]["estimate"] == pytest.approx(0.3)
    assert narrow["after"]["resolved"]
    assert not narrow["before"]["resolved"]
    assert 8 < narrow["parting"] <= 10
    assert (
        "after them the loss differs by +0.300 nats/token (+0.298 to +0.302), from about position 9 on at every"
        in (narrow["sentence"])
    )
    assert "beyond the 15 tokens that its 2 layers reach together" in narrow["sentence"]
    assert wide["beyond"] is None  # one layer reaches no further than its window
    assert wide["parting"] is None
    assert "not resolved" in wide["sentence"]
    (whole,) = kind(found, "overall")
    assert (whole["worse"], whole["better"]) == (["narrow"], [])
    assert after(whole).endswith("full. narrow: worse than full; wide: not resolved against full.")


@pytest.mark.parametrize("read", ["test", "validation"])
def test_the_losses_are_of_the_test_text_where_it_was_read(run: RunDirectory, read: str) -> None:
    added = {"validation": 0.5, "test": 0.1}
    splits = ("validation", "test") if read == "test" else ("validation",)
    for name, times in (("full", 0), ("narrow", 1)):
        for seed in range(3):
            losses = {split: {"loss_at_position": [5 + times * added[split]] * T} for split in splits}
            run.finish(Cell(name, seed, "train"), {"splits": losses})
    (one,) = kind(sparse.findings(QUALITY, experiment(narrow=arm(8)), run), "quality")
    assert one["before"]["estimate"] == pytest.approx(added[read])
    assert one["after"]["estimate"] == pytest.approx(added[read])


def test_what_a_full_window_adds_is_known_where_the_difference_is_not(run: RunDirectory) -> None:
    """Each seed makes an arm better or worse at every position: that hides the loss, and not its growth."""
    full = np.arange(1, T + 1) > 8
    by_seed, grows = (0.5, -0.4, 0.2), (0.30, 0.31, 0.32)
    for seed, (shift, more) in enumerate(zip(by_seed, grows, strict=True)):
        for name, added in (("full", 0 * full), ("narrow", shift + more * full), ("wide", shift - more * full)):
            losses = 5 - 0.5 * np.log2(np.arange(1, T + 1)) + added
            run.finish(Cell(name, seed, "train"), {"splits": {"test": {"loss_at_position": losses.tolist()}}})
    found = sparse.findings(QUALITY, experiment(narrow=arm(8), wide=arm(8)), run)
    narrow, wide = kind(found, "quality")
    for one, sign in ((narrow, 1), (wide, -1)):
        assert not one["after"]["resolved"]
        assert one["growth"]["resolved"]
        assert one["growth"]["estimate"] == pytest.approx(sign * 0.31)
        spread = (one["growth"]["ci_high"] - one["growth"]["ci_low"]) / 2
        assert spread == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
        assert (one["growth"]["first"], one["growth"]["last"]) == (9, T)
        assert one["growth"]["tested"] == 6  # before, after and growth of two windows
    told = "; from the former to the latter it {} 0.310 nats/token (+0.285 to +0.335) against full."
    assert narrow["sentence"].endswith(told.format("loses"))
    assert wide["sentence"].endswith(told.format("gains"))
    (whole,) = kind(found, "overall")
    assert (whole["loses_ground"], whole["gains_ground"], whole["worse"]) == (["narrow"], ["wide"], [])
    assert whole["sentence"].endswith(" to those after. narrow: loses ground; wide: gains ground.")


def test_a_lead_that_shrinks_is_ground_lost(run: RunDirectory) -> None:
    """Better than full attention before and after: that it is so by less is a loss, and by more a gain."""
    full = np.arange(1, T + 1) > 8
    finish(run, "narrow", np.where(full, -0.1, -0.3))
    finish(run, "wide", np.where(full, -0.3, -0.1))
    found = sparse.findings(QUALITY, experiment(narrow=arm(8), wide=arm(8)), run)
    assert ["loses 0.200" in one["sentence"] for one in kind(found, "quality")] == [True, False]
    assert ["gains 0.200" in one["sentence"] for one in kind(found, "quality")] == [False, True]
    (whole,) = kind(found, "overall")
    assert (whole["better"], whole["loses_ground"], whole["gains_ground"]) == (["narrow", "wide"], ["narrow"], ["wide"])


def test_a_window_that_was_refused_is_not_called_open() -> None:
    ends = {"n": 3, "ci_low": -1.0, "ci_high": 1.0}
    open_, blocked = ({"comparable": one, "resolved": False, "estimate": 0.1} | ends for one in (True, False))
    same = open_ | {"estimate": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    windows = {"narrow": blocked, "wide": open_}
    assert sparse._overall("full", windows, windows, ["tiny"])["sentence"].endswith(
        "full. wide: not resolved against full; narrow: not comparable with full; tiny: no result. "
        "Against full, from the positions before to those after. wide: not resolved."
    )
    equal = sparse._overall("full", {"narrow": same, "wide": open_}, {"narrow": same, "wide": open_}, [])
    assert equal["sentence"].endswith(
        "full. narrow: the same as full; wide: not resolved against full. "
        "Against full, from the positions before to those after. narrow: no change; wide: not resolved."
    )
    alone = sparse._overall("full", {"narrow": blocked}, {"narrow": blocked}, [])
    assert alone["sentence"].endswith("narrow: not comparable with full.")


def test_a_window_names_the_seeds_that_it_is_without(run: RunDirectory) -> None:
    """Of narrow there is no seed 1, of tiny none at all."""
    finish(run, "narrow", np.zeros(T))
    finish(run, "wide", np.zeros(T))
    (run.folder(Cell("narrow", 1, sparse.MAKES)) / "evaluation.json").unlink()
    found = sparse.findings(QUALITY, experiment(narrow=arm(8), wide=arm(32), tiny=arm(4)), run)
    narrow, wide = kind(found, "quality")
    assert narrow["after"]["n"] == 2
    assert narrow["sentence"].endswith(" It leaves out seed 1 of narrow, where there is no value.")
    assert "leaves out" not in wide["sentence"]
    assert after(kind(found, "overall")[0]).endswith("; tiny: no result.")


def test_a_lost_window_is_told_beside_a_single_other(run: RunDirectory) -> None:
    finish(run, "narrow", np.zeros(T))
    alone = experiment(narrow=arm(8)), experiment(narrow=arm(8), tiny=arm(4)), experiment(tiny=arm(4))
    overall = [kind(sparse.findings(QUALITY, one, run), "overall") for one in alone]
    assert [len(found) for found in overall] == [0, 1, 0]
    assert after(overall[1][0]).endswith("narrow: not resolved against full; tiny: no result.")


def test_the_same_losses_are_no_open_difference() -> None:
    one = {"comparable": True, "n": 2, "estimate": 0.0, "ci_low": 0.0, "ci_high": 0.0, "resolved": False, "p": None}
    assert sparse._difference(one) == "the losses are the same at every seed"
    assert sparse._growth(one, "full").endswith("it neither loses nor gains against full, at any seed")
    alone = one | {"n": 1, "estimate": -0.31, "ci_low": None, "ci_high": None}
    assert sparse._growth(alone, "full").endswith("it gains 0.310 nats/token (one seed, not resolved) against full")
    unclear = one | {"estimate": -0.01, "ci_low": -0.04, "ci_high": 0.02, "p": 0.4}
    assert "it gains 0.010 nats/token (−0.020 to +0.040, not resolved)" in sparse._growth(unclear, "full")
    assert "one seed, not resolved" in sparse._difference(one | {"n": 1})


def test_the_zones_hold_their_positions(run: RunDirectory) -> None:
    finish(run, "narrow", 0.01 * np.arange(1, T + 1), (0, 0, 0))
    (one,) = kind(sparse.findings(QUALITY, experiment(narrow=arm(8, layers=2)), run), "quality")
    assert one["before"]["estimate"] == pytest.approx(0.01 * (1 + 8) / 2)
    assert one["after"]["estimate"] == pytest.approx(0.01 * (9 + T) / 2)
    assert one["beyond"]["estimate"] == pytest.approx(0.01 * (16 + T) / 2)


def test_a_window_that_gains_says_so(run: RunDirectory) -> None:
    finish(run, "narrow", np.full(T, -0.2))
    finish(run, "wide", np.full(T, -0.2))
    found = sparse.findings(QUALITY, experiment(narrow=arm(8), wide=arm(32)), run)
    assert kind(found, "overall")[0]["better"] == ["narrow", "wide"]
    assert all(one["parting"] is None and "at every" not in one["sentence"] for one in kind(found, "quality"))


def test_a_window_that_loses_but_for_the_last_positions(run: RunDirectory) -> None:
    finish(run, "narrow", np.where((np.arange(1, T + 1) > 8) & (np.arange(1, T + 1) < 48), 0.3, 0.0))
    (one,) = kind(sparse.findings(QUALITY, experiment(narrow=arm(8)), run), "quality")
    assert one["after"]["resolved"]
    assert ", though not at every one from some position on" in one["sentence"]


def test_chance_at_the_last_position_is_no_parting(run: RunDirectory) -> None:
    finish(run, "narrow", np.where(np.arange(1, T + 1) == T, 0.3, 0.0), (0.0, 0.1, -0.1))
    (one,) = kind(sparse.findings(QUALITY, experiment(narrow=arm(8)), run), "quality")
    assert one["parting"] is None
    assert "at every" not in one["sentence"]


def test_a_window_as_long_as_the_text_is_never_full(run: RunDirectory) -> None:
    finish(run, "wide", np.zeros(T))
    (one,) = kind(sparse.findings(QUALITY, experiment(wide=arm(T)), run), "quality")
    assert one["after"] is None
    assert one["growth"] is None
    assert "over the first 64 positions" in one["sentence"]
    assert "the window is never full at the length of these texts" in one["sentence"]


def test_one_seed_and_a_failed_gate_decide_nothing(run: RunDirectory, tmp_path: Path) -> None:
    finish(run, "narrow", np.full(T, 0.3))
    failed = [row | {"comparable": False, "reason": "a gate failed"} for row in QUALITY if row["arm"] == "narrow"]
    (one,) = kind(sparse.findings(failed, experiment(narrow=arm(8)), run), "quality")
    assert "the losses do not compare (a gate failed)" in one["sentence"]
    assert "from the former" not in one["sentence"]
    alone = RunDirectory(tmp_path / "alone")
    finish(alone, "full", np.zeros(T), (0,))
    finish(alone, "narrow", np.full(T, 0.3), (0,))
    (one,) = kind(sparse.findings(QUALITY, experiment(narrow=arm(8)), alone), "quality")
    assert "+0.300 nats/token (one seed, not resolved)" in one["sentence"]
    assert "at every" not in one["sentence"]
    assert not one["after"]["resolved"]


@pytest.mark.parametrize(
    ("low", "expected"),
    [([-1, 1, 1], 2.0), ([1, -1, 1], 4.0), ([1, 1, -1], None), ([1, 1, 1], 1.0), ([None, None, None], None)],
)
def test_the_parting_is_for_good(low: list[float | None], expected: float | None) -> None:
    assert sparse.parting({"ci_low": low, "positions": [1.0, 2.0, 4.0]}) == expected


def test_what_the_cache_saves(run: RunDirectory) -> None:
    rows: list[dict[str, Any]] = []
    for context in (32, 128, 512):
        rows += held("full", (2 * 100 * context,) * 3, context=context, batch=2)
        rows += held("narrow", (2 * 100 * min(context, 100),) * 3, context=context, batch=2)
        for name, rate in (("full", 1000.0), ("narrow", 1500.0)):
            rows += speed(name, "decode", (rate if context == 512 else 1.0,) * 3, context=context, batch=2)
    (one,) = kind(sparse.findings(rows, experiment(batch=2, narrow=arm(8)), run), "cost")
    assert (one["cache_bytes"], one["full_cache_bytes"], one["constant_from"]) == (10_000, 51_200, 128)
    assert "10.0 kB of cache a sequence, as much as after 128, where full keeps 51.2 kB" in one["sentence"]
    assert "narrow decodes after it 1.50 times" in one["sentence"]
    assert one["decode_speed_ratio"] == pytest.approx(1.5)
    growing = [
        row | {"value": row["value"] + row["context"]} if row["metric"] == "state_bytes" else row for row in rows
    ]
    written = experiment().measurement.decode_tokens  # for which there is room
    still, no = "and still grows there", "and grows no further"
    for narrow, said in ((arm(512 + written + 1), still), (arm(512 + written), no), (arm(500), no)):
        (one,) = kind(sparse.findings(growing, experiment(batch=2, narrow=narrow), run), "cost")
        assert one["constant_from"] is None
        assert said in one["sentence"]


@pytest.mark.parametrize(("conv_width", "reached"), [(None, 9), (3, 17)])
def test_reach_against_the_model(conv_width: int | None, reached: int) -> None:
    """The earliest token whose change is felt at the last position."""
    narrow = arm(3, layers=4)
    if conv_width is not None:
        narrow.overrides["mixer"]["conv_width"] = conv_width
    config = model_config(narrow, V)
    model = LanguageModel(config, seed=0).double().eval()
    tokens = torch.randint(V, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)[0, -1]
        felt = []
        for at in range(20):
            other = tokens.clone()
            other[0, at] = (other[0, at] + 1) % V
            felt.append(bool((model(other)[0, -1] - logits).abs().max() > 0))
    assert 20 - felt.index(True) == sparse.reach(config) == reached
    assert sparse.reach(model_config(FULL, V)) is None


def test_the_baseline_is_the_first_arm_without_a_window(run: RunDirectory) -> None:
    setting = Experiment(name="x", title="x", study="sparse", arms={"narrow": arm(8), "full": FULL, "wide": arm(32)})
    pairs = {(one["a"], one["b"]) for one in sparse.verdicts(QUALITY, setting)}
    assert pairs == {("full", "narrow"), ("full", "wide")}
    only = Experiment(name="x", title="x", study="sparse", arms={"narrow": arm(8), "wide": arm(32)})
    assert sparse.findings(QUALITY, only, run) == []
    assert {(one["a"], one["b"]) for one in sparse.verdicts(QUALITY, only)} == {("narrow", "wide")}


@pytest.mark.parametrize("profile", ["smoke", "cpu", "cuda"])
def test_the_catalog_trains_beyond_its_windows(profile: str) -> None:
    setting = load("sparse", profile=profile)
    for name, one in setting.arms.items():
        found = sparse.windows(model_config(one, setting.data.vocabulary))
        assert (found is None) == (name == "full")
        assert found is None or set(found) == {int(name.removeprefix("window-"))}
        assert found is None or max(found) < setting.training.context
    assert sparse.baseline(setting) == "full"


def test_no_difference_of_losses_is_rounded_away() -> None:
    one = {"comparable": True, "n": 3, "estimate": 0.0912, "ci_low": 0.0003, "ci_high": 0.18, "resolved": True}
    assert sparse._difference(one) == "the loss differs by +0.091 nats/token (+0.0003 to +0.180)"
