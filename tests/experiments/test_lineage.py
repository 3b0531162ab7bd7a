"""What the lineage study says, from rows made by hand."""

from pathlib import Path

import pytest
from study_rows import held, per_seed, quality, speed

from experiments.report.lineage import HISTORY
from experiments.report.tables import resolution
from experiments.spec import Arm, Experiment, Measurement, load
from experiments.store import RunDirectory
from experiments.studies import lineage
from models.presets import PRESETS

NOWHERE = RunDirectory(Path("nowhere"))
ARMS = {name: Arm(model=f"{name}-tiny", learning_rate=1e-3) for name in ("lstm", "transformer", "mamba")}


def experiment(batch: int = 1, enabled: bool = True) -> Experiment:
    measured = Measurement(contexts=(64, 1024), batch=batch, enabled=enabled)
    return Experiment(name="x", title="x", study="lineage", arms=ARMS, measurement=measured)


def said(rows: list[dict], batch: int = 1) -> list[dict]:
    return lineage.findings(rows, experiment(batch, any(row["phase"] == "decode" for row in rows)), NOWHERE)


# each value of a seed is that of seed 0 and the same spread for every arm: differences are exact but for 0.001
LSTM, TRANSFORMER, MAMBA = (3.0, 3.1, 3.2), (2.5, 2.601, 2.7), (2.4, 2.2, 2.9)
QUALITY = quality("lstm", LSTM) + quality("transformer", TRANSFORMER) + quality("mamba", MAMBA)


def test_a_step_that_is_resolved_says_by_how_much() -> None:
    first, second, whole = said(QUALITY)
    assert (first["kind"], first["against"], first["arm"]) == ("step", "lstm", "transformer")
    assert first["bits_per_byte"] == pytest.approx(-(0.5 + 0.499 + 0.5) / 3)
    # half-width: 4.303 (t, 2 degrees of freedom) times 0.000577 / sqrt(3)
    assert (
        first["sentence"] == "lstm → transformer: transformer predicts better, by 0.500 bits per byte (0.498 to 0.501)."
    )
    assert first["resolved"]
    assert not second["resolved"]
    assert "transformer → mamba: the difference in bits per byte is not resolved (−0.100, " in second["sentence"]
    assert whole["sentence"].startswith("Of 2 steps 1 lowered bits per byte, 0 raised them and 1 is not resolved. ")
    assert "The lowest mean is that of mamba, 2.500 bits per byte" in whole["sentence"]
    assert whole["sentence"].endswith("the largest resolved gain came from lstm to transformer.")


def test_a_step_that_made_it_worse_says_so() -> None:
    worse = quality("lstm", TRANSFORMER) + quality("transformer", LSTM) + quality("mamba", LSTM)
    first, second, whole = said(worse)
    assert "lstm → transformer: lstm predicts better, by 0.500 bits" in first["sentence"]
    assert second["sentence"] == "transformer → mamba: their bits per byte are the same at every seed."
    assert (whole["lowered"], whole["raised"], whole["best"]) == (0, 1, "lstm")
    assert "0 lowered bits per byte, 1 raised them and 0 are not resolved; 1 changed nothing. " in whole["sentence"]
    assert "gain" not in whole["sentence"]


def test_an_arm_that_was_refused_is_not_the_best() -> None:
    """However low its bits per byte: a model that sees what it is to predict has the lowest."""
    rows = quality("lstm", LSTM) + quality("transformer", TRANSFORMER)
    rows += [row | {"comparable": False, "reason": "a gate"} for row in quality("mamba", (0.4, 0.4, 0.4))]
    *_, second, whole = said(rows)
    assert "their bits per byte do not compare (mamba: a gate)" in second["sentence"]
    assert "1 lowered bits per byte, 0 raised them and 0 are not resolved; 1 do not compare. " in whole["sentence"]
    assert "is that of transformer, 2.600 bits per byte (not counted: mamba);" in whole["sentence"]
    assert whole["best"] == "transformer"


def test_means_are_over_the_seeds_that_all_arms_have() -> None:
    """The last seed is an easy one, and of mamba the only one."""
    easy = [row for row in quality("mamba", (9.0, 9.0, 2.1)) if row["seed"] == 2]
    rows = quality("lstm", (3.0, 3.1, 2.0)) + quality("transformer", (2.5, 2.6, 2.2)) + easy
    whole = said(rows)[-1]
    assert whole["best"] == "lstm"
    assert (
        "The lowest mean is that of lstm, 2.000 bits per byte (over 1 seed of 3, which all of these have)"
        in whole["sentence"]
    )


def test_an_arm_that_was_refused_at_one_seed_is_not_counted_at_any() -> None:
    """It would take its seed from the others too: of the last seed alone transformer's mean is 2.700."""
    refused = [row | {"comparable": row["seed"] == 2, "reason": "a gate"} for row in quality("mamba", (1.0, 1.0, 1.0))]
    whole = said(quality("lstm", LSTM) + quality("transformer", TRANSFORMER) + refused)[-1]
    assert whole["best"] == "transformer"
    assert "is that of transformer, 2.600 bits per byte (not counted: mamba)" in whole["sentence"]


def test_arms_that_each_lack_another_seed_have_no_lowest() -> None:
    rows = [
        row for at, (arm, values) in enumerate((("lstm", LSTM), ("transformer", TRANSFORMER), ("mamba", MAMBA)))
        for row in quality(arm, values) if row["seed"] != at
    ]  # fmt: skip
    whole = said(rows)[-1]
    assert whole["kind"] == "overall"
    assert whole["best"] is None
    assert whole["sentence"].endswith("No seed has a value of every arm, so no mean is named as the lowest.")


def test_without_a_seed_in_common_nothing_is_said_of_the_whole() -> None:
    first = [row for row in quality("lstm", LSTM) if row["seed"] == 0]
    last = [row for row in quality("mamba", MAMBA) if row["seed"] == 1]
    found = said(first + quality("transformer", TRANSFORMER) + last)
    assert [one["kind"] for one in found] == ["step", "step"]


def test_one_seed_resolves_nothing() -> None:
    first, _, whole = said([row for row in QUALITY if row["seed"] == 0])
    assert "not resolved (−0.500, one seed)" in first["sentence"]
    assert (whole["lowered"], whole["raised"]) == (0, 0)


def test_speed_and_bytes_of_the_longest_context_a_sequence() -> None:
    rows = QUALITY + [
        row for arm, rate, size in (("lstm", 1000.0, 512), ("transformer", 2500.0, 65536), ("mamba", 1250.0, 65536))
        for row in (
            *speed(arm, "train", (rate, rate, rate)),
            *speed(arm, "decode", (7.0, 7.0, 7.0), context=64, batch=4),
            *speed(arm, "decode", (rate / 5, rate / 5, rate / 5), context=1024, batch=4),
            *held(arm, (1, 1, 1), context=64, batch=4), *held(arm, (4 * size,) * 3, context=1024, batch=4),
        )
    ]  # fmt: skip
    first, second, _ = said(rows, batch=4)
    assert first["train_speed_ratio"] == pytest.approx(2.5)
    assert first["decode_speed_ratio"] == pytest.approx(2.5)
    told = "; transformer trains 2.50 times (2.50 to 2.50) as fast; it decodes after 1,024 tokens 2.50 times"
    assert told in first["sentence"]
    assert first["sentence"].endswith("it keeps 65.5 kB instead of 512 B as cache or state of a sequence.")
    assert second["sentence"].endswith("it keeps 65.5 kB as before as cache or state of a sequence.")
    assert "decodes after 1,024 tokens 0.500 times" in second["sentence"]


def test_a_step_says_which_speed_is_not_known_and_of_which_seeds_it_is() -> None:
    """Nothing of the transformer decodes; of mamba the last seed did not train."""
    rows = QUALITY + speed("lstm", "decode", (7.0, 7.0, 7.0), context=1024)
    rows += [row for arm in ("lstm", "transformer", "mamba") for row in speed(arm, "train", (1.0, 2.0, 4.0))]
    rows = [row for row in rows if (row["arm"], row["phase"], row["seed"]) != ("mamba", "train", 2)]
    first, second, _ = said(rows)
    assert first["sentence"].endswith("as fast; how fast it decodes is not known, for want of a result.")
    assert "mamba trains 1.00 times (1.00 to 1.00, not resolved; without seed 2 of mamba) as fast" in second["sentence"]
    one = [row for row in rows if row["phase"] != "train" or row["seed"] == 0]
    assert "as fast (one seed, not resolved; without seeds 1 and 2 of " in said(one)[1]["sentence"]


def test_an_arm_that_does_not_decode_lacks_no_speed_of_it() -> None:
    arms = ARMS | {"mamba": Arm(model="transformer-tiny", learning_rate=1e-3, overrides={"mixer.causal": False},
                                objective="unmasked")}  # fmt: skip
    one = experiment().model_copy(update={"arms": arms})
    rows = QUALITY + speed("lstm", "decode", (7.0, 7.0, 7.0), context=1024)
    first, second, _ = lineage.findings(rows, one, NOWHERE)
    assert "how fast transformer decodes is not known" in first["sentence"]
    assert "decodes" not in second["sentence"]


def test_of_several_gains_the_largest_is_named() -> None:
    for small, large in ((2.9, 2.0), (2.1, 2.0)):
        rows = quality("lstm", (3.0, 3.1, 3.2)) + quality("transformer", (small, small + 0.101, small + 0.2))
        whole = said(rows + quality("mamba", (large, large + 0.1, large + 0.2)))[-1]
        assert whole["lowered"] == 2
        last = "transformer to mamba" if small == 2.9 else "lstm to transformer"
        assert whole["sentence"].endswith(f"; the largest resolved gain came from {last}.")


def test_arms_with_the_same_lowest_mean_are_all_named() -> None:
    *_, second, whole = said(quality("lstm", LSTM) + quality("transformer", MAMBA) + quality("mamba", MAMBA))
    assert "The lowest mean is that of transformer and mamba, 2.500 bits per byte" in whole["sentence"]
    assert resolution(second, "quality") == ("resolved", "quality the same at every seed")


def test_a_number_that_may_not_be_compared_decides_nothing() -> None:
    failed = [
        row | {"comparable": False, "reason": "a gate failed"} if row["arm"] == "mamba" else row for row in QUALITY
    ]
    _, second, _ = said(failed)
    assert "their bits per byte do not compare (mamba: a gate failed)" in second["sentence"]
    assert not second["resolved"]


def test_neighbours_and_the_ends_are_compared_with_one_correction_a_question() -> None:
    verdicts = lineage.verdicts(QUALITY + speed("lstm", "train", (1, 2, 3)) + speed("mamba", "train", (2, 3, 5)),
                                experiment())  # fmt: skip
    pairs = [(one["a"], one["b"]) for one in verdicts if one["phase"] == "quality"]
    assert pairs == [("lstm", "transformer"), ("transformer", "mamba"), ("lstm", "mamba")]
    assert {one["tested"] for one in verdicts if one["phase"] == "quality"} == {3}
    assert [one["tested"] for one in verdicts if one["phase"] == "train"] == [1]
    two = Experiment(name="x", title="x", study="lineage", arms=dict(list(ARMS.items())[:2]))
    assert lineage.steps(two) == [("lstm", "transformer")]
    assert [one["kind"] for one in lineage.findings(QUALITY, two, NOWHERE)] == ["step"]


def test_questions_about_one_phase_are_corrected_each_by_itself() -> None:
    rows = [one for arm, rate in zip(ARMS, (1.0, 2.0, 3.0), strict=True) for one in [
        *speed(arm, "decode", (rate, rate + 0.1, rate + 0.3), context=1024, batch=1),
        *per_seed(arm, "decode", "peak_bytes", (rate * 1e6, rate * 2e6, rate * 4e6), context=1024, batch=1),
    ]]  # fmt: skip
    told = [(one["metric"], one["tested"]) for one in lineage.verdicts(rows, experiment())]
    assert sorted(told) == [("peak_bytes", 3)] * 3 + [("tokens_per_s", 3)] * 3


@pytest.mark.parametrize("profile", ["smoke", "cpu", "cuda"])
def test_the_catalog_has_eight_arms_in_order_and_the_report_knows_them(profile: str) -> None:
    arms = load("lineage", profile=profile).arms
    assert list(arms) == ["lstm", "gpt1", "transformer", "sliding", "mamba", "mamba2", "mamba3", "hybrid"]
    assert list(HISTORY) == list(arms)
    sizes = {arm.model.partition("-")[2] for arm in arms.values()}
    assert len(sizes) == 1
    assert all(arm.model in PRESETS and arm.model.partition("-")[0] == name for name, arm in arms.items())
