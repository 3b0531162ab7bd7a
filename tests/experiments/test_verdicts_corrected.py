"""Verdicts of a comparison: what several questions at once may resolve, and which questions there are."""

import math

import pytest
from study_rows import per_seed, quality, speed

from experiments.studies import pairing, wording
from experiments.studies.pairing import Question, compared


def with_p(p: float) -> list[float]:
    """Differences from 1 at three seeds whose paired t test gives p: 1 - t / sqrt(2 + t²) at two degrees of freedom."""
    share = 1 - p
    t = math.sqrt(2 * share**2 / (1 - share**2))
    return [1 + 0.01 * (t / math.sqrt(3) + spread) for spread in (-1, 0, 1)]


@pytest.mark.parametrize(("raw", "corrected"), [
    ((0.03, 0.04, 0.5), (0.09, 0.09, 0.5)), ((0.01, 0.04, 0.5), (0.03, 0.08, 0.5)),
])  # fmt: skip
def test_what_is_resolved_is_so_after_holms_correction(raw: tuple[float, ...], corrected: tuple[float, ...]):
    """The least p times 3, the next times 2, none less than the one before."""
    rows = quality("base", [1.0, 1.0, 1.0]) + [
        one for arm, p in zip("abc", raw, strict=True) for one in quality(arm, with_p(p))
    ]
    verdicts = compared(rows, [Question("base", arm, "quality", "test_bits_per_byte", "difference") for arm in "abc"])
    assert [one["p"] for one in verdicts] == pytest.approx(raw)
    assert [one["p_holm"] for one in verdicts] == pytest.approx(corrected)
    assert [one["resolved"] for one in verdicts] == [p < 0.05 for p in corrected]
    assert [one["tested"] for one in verdicts] == [3, 3, 3]
    for one, p, after in zip(verdicts, raw, corrected, strict=True):
        said = one["sentence"]
        assert ("base is better here." in said) == (after < 0.05)
        assert ("not resolved" in said) == (after >= 0.05)
        assert ("not resolved after correcting for 3 comparisons; " in said) == (p < 0.05 <= after)


@pytest.mark.parametrize(("direction", "more", "less"), [
    ("lower", "base", "b"), ("higher", "b", "base"), ("none", None, None),
])  # fmt: skip
def test_more_of_it_is_better_or_worse_as_its_direction_says(direction: str, more: str | None, less: str | None):
    asked = [Question("base", "b", "train", "tokens_per_s", "ratio")]
    for values, better in (((200.0, 202.0, 204.0), more), ((50.0, 50.5, 51.0), less)):
        rows = speed("base", "train", (100.0, 100.0, 100.0)) + speed("b", "train", values)
        (one,) = compared([row | {"direction": direction} for row in rows], asked)
        assert (one["direction"], one["resolved"], one["better"]) == (direction, True, better)
        assert one["sentence"].endswith(f": {better} is better here." if better else " 3 paired seeds).")


def test_means_tell_of_the_seeds_of_the_run_that_no_arm_has() -> None:
    rows = quality("a", [1.0, 2.0]) + quality("b", [3.0, 4.0])
    asked = (rows, "ab", "quality", "test_bits_per_byte")
    assert pairing.paired_means(*asked).over == ""
    found = pairing.paired_means(*asked, seeds=(0, 1, 2))
    assert found.means == {"a": 1.5, "b": 3.5}
    assert found.over == " (over 2 seeds of 3, which all of these have)"


@pytest.mark.parametrize(("phase", "said"), [("train", "training"), ("decode", "decode")])
def test_text_per_second_is_told_of_its_phase(phase: str, said: str) -> None:
    rows = [one for arm, at in (("a", 1.0), ("b", 2.0))
            for one in per_seed(arm, phase, "bytes_per_s", [at, at + 0.1], direction="higher")]  # fmt: skip
    (one,) = compared(rows, [Question("a", "b", phase, "bytes_per_s", "ratio")])
    assert f" times a's bytes of text per second in {said} (95% interval " in one["sentence"]


@pytest.mark.parametrize(("p", "why"), [(0.02, " after correcting for 7 comparisons"), (0.2, "")])
def test_an_open_comparison_says_why_its_interval_may_leave_out_equality(p: float, why: str) -> None:
    one = {"estimate": 0.313, "ci_low": 0.218, "ci_high": 0.45, "n": 3, "p": p, "resolved": False, "tested": 7}
    one |= {"comparable": True, "better": None}
    assert wording.faster(one) == f"0.313 times (0.218 to 0.450, not resolved{why}) as fast"
    refused = one | {"comparable": False, "reason": "a gate", "lacking": {"mamba": [2]}}
    assert wording.faster(refused) == "0.313 times as fast (not comparable: a gate; without seed 2 of mamba)"
    said = f"the difference in bits per byte is not resolved{why} (+0.313, +0.218 to +0.450)"
    assert wording.predicts(one) == said


def test_what_was_refused_takes_no_part_in_the_correction() -> None:
    """With it the other's p would be 0.06."""
    refused = [row | {"comparable": False, "reason": "a gate"} for row in quality("a", with_p(0.04))]
    rows = quality("base", [1.0, 1.0, 1.0]) + refused + quality("b", with_p(0.03))
    one, other = compared(rows, [Question("base", b, "quality", "test_bits_per_byte", "difference") for b in "ab"])
    assert (one["p"], one["p_holm"], one["resolved"], one["tested"]) == (None, None, False, 1)
    assert one["estimate"] == pytest.approx(other["estimate"], rel=0.3)
    assert (other["p_holm"], other["resolved"], other["tested"]) == (pytest.approx(0.03), True, 1)
    assert one["sentence"].startswith("base and a do not compare in test bits per byte (a: a gate). For the record: a ")


@pytest.mark.parametrize("kind", ["difference", "ratio"])
def test_a_comparison_names_the_seeds_that_it_leaves_out(kind: str) -> None:
    """Seed 1 of b has a row without a value, seed 3 of a none at all; 0 and 2 are compared."""
    rows = quality("a", [2.0, 2.0, 2.0]) + quality("b", [1.0, 9.0, 1.5, 1.0])
    rows[4] |= {"value": None, "reason": "too large for a number"}
    (one,) = compared(rows, [Question("a", "b", "quality", "test_bits_per_byte", kind)])
    estimate = {"difference": -0.75, "ratio": math.sqrt(0.5 * 0.75)}[kind]
    assert (one["n"], one["estimate"]) == (2, pytest.approx(estimate))
    assert one["lacking"] == {"a": [3], "b": [1]}
    assert one["sentence"].endswith(" It leaves out seed 3 of a and seed 1 of b, where there is no value.")


def test_a_comparison_of_every_seed_leaves_out_none() -> None:
    (one,) = compared(
        quality("a", [2.0, 2.0]) + quality("b", [1.0, 1.5]) + quality("c", [1.0]),
        [Question("a", "b", "quality", "test_bits_per_byte", "difference")],
    )
    assert one["lacking"] == {}
    assert "leaves out" not in one["sentence"]


def test_no_ratio_is_made_of_a_value_that_is_0() -> None:
    rows = quality("a", [2.0, 0.0]) + quality("b", [1.0, 1.0])
    (one,) = compared(rows, [Question("a", "b", "quality", "test_bits_per_byte", "ratio")])
    assert (one["n"], one["lacking"]) == (1, {"a": [1]})


def test_no_sentence_rounds_a_difference_away() -> None:
    one = {"comparable": True, "n": 3, "resolved": True, "better": "b", "p": 0.001, "tested": 1}
    near = one | {"estimate": -0.0911, "ci_low": -0.1619, "ci_high": -0.0003}
    assert wording.predicts(near) == "b predicts better, by 0.091 bits per byte (0.0003 to 0.162)"
    open_ = near | {"resolved": False, "ci_high": 0.0003, "p": 0.2}
    assert "(−0.091, −0.162 to +0.0003)" in wording.predicts(open_)
    ratio = one | {"estimate": 0.9995, "ci_low": 0.99903, "ci_high": 0.99996}
    assert wording.faster(ratio) == "0.9995 times (0.999 to 0.99996) as fast"
    rows = quality("a", [2.0, 2.0, 2.0]) + quality("b", [2.00001, 2.000011, 2.00001])
    difference, times = (
        compared(rows, [Question("a", "b", "quality", "test_bits_per_byte", kind)])[0]["sentence"]
        for kind in ("difference", "ratio")
    )
    assert "by +0.00001 (95% interval +0.00001 to +0.00001, 3 paired seeds): a is better here." in difference
    assert "b has 1.00001 times a's test bits per byte (95% interval 1.000004 to 1.00001, 3 paired seeds)" in times


def test_seeds_of_the_run_that_no_arm_has_are_left_out_too() -> None:
    rows = quality("a", [2.0, 2.0]) + quality("b", [1.0, 1.5])
    (one,) = compared(rows, [Question("a", "b", "quality", "test_bits_per_byte", "difference")], seeds=(0, 1, 2, 3))
    assert one["lacking"] == {"a": [2, 3], "b": [2, 3]}
    assert one["sentence"].endswith(
        " It leaves out seeds 2 and 3 of a and seeds 2 and 3 of b, where there is no value."
    )
    told = pairing.paired_means(rows, "ab", "quality", "test_bits_per_byte", (0, 1, 2))
    assert told.over == " (over 2 seeds of 3, which all of these have)"


def test_a_value_that_is_no_number_compares_with_nothing() -> None:
    rows = quality("a", [2.0, 2.0, 2.0]) + quality("b", [1.0, math.nan, 1.5]) + quality("c", [1.0, 1.0, 1.0001])
    asked = [Question("a", arm, "quality", "test_bits_per_byte", "difference") for arm in "bc"]
    one, other = compared(rows, asked)
    assert (one["n"], one["lacking"]) == (2, {"b": [1]})
    assert other["resolved"]
