"""The masking study's plan, and its sentences however the numbers come out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from experiments.errors import SpecError
from experiments.rows import SEES, row
from experiments.spec import Arm, Experiment, Training, load
from experiments.store import Cell, RunDirectory
from experiments.studies import comparison, masking

NO_MASK = {"mixer.causal": False}
CONTEXT = 64


def experiment(seeds: int = 3) -> Experiment:
    return Experiment(
        name="masking", title="", study="masking", seeds=tuple(range(seeds)), training=Training(context=CONTEXT),
        arms={
            "encoder": Arm(model="transformer-tiny", learning_rate=1e-3, objective="masked", overrides=NO_MASK),
            "causal": Arm(model="transformer-tiny", learning_rate=1e-3),
            "unmasked": Arm(model="transformer-tiny", learning_rate=1e-3, objective="unmasked", overrides=NO_MASK),
        },
    )  # fmt: skip


def made(arm: str, metric: str, values: list[float], mode: str | None = None, context: int | None = None) -> list[dict]:
    return [
        row(Cell(arm, seed, "any"), "quality", metric, value, "x", "none", mode=mode, context=context)
        for seed, value in enumerate(values)
    ]


def found(rows: list[dict], folder: Path, seeds: int = 3) -> list[dict[str, Any]]:
    return masking.findings(rows, experiment(seeds), RunDirectory(folder))


def only(rows: list[dict], folder: Path, seeds: int = 3) -> dict[str, Any]:
    (one,) = found(rows, folder, seeds)
    return one


def test_a_comparison_of_fewer_seeds_than_the_run_has_says_so(tmp_path: Path) -> None:
    rows = made("unmasked", "final_training_loss", [0.1, 0.2]) + made("causal", "final_training_loss", [2.0, 2.1, 2.2])
    assert only(rows, tmp_path)["sentence"].endswith(" That is of 2 of the run's 3 seeds; the others lack it.")
    assert "lack" not in only(rows, tmp_path, seeds=2)["sentence"]


def test_plan() -> None:
    planned = masking.plan(experiment(2))
    kinds: dict[str, set[str]] = {}
    for cell in planned:
        kinds.setdefault(cell.kind, set()).add(cell.arm)
    assert kinds["train"] == kinds["load"] == {"causal", "unmasked", "encoder"}
    assert kinds["judge"] == {"causal", "unmasked"}  # an encoder writes nothing
    assert kinds["blanks"] == {"causal", "encoder"}
    assert kinds["decode"] == {"causal"}
    assert len(set(planned)) == len(planned)
    # whoever judges has been trained before
    order = [cell.kind for cell in planned]
    assert max(at for at, kind in enumerate(order) if kind == "train") < order.index("judge")


def test_guesses_are_of_what_was_asked_and_a_pseudo_perplexity_is_of_every_token(tmp_path: Path) -> None:
    result = {"guessed": 3, "asked": 30, "pseudo_log_likelihood": -64.0, "tokens": 32}
    found = masking.rows(Cell("encoder", 0, "blanks"), result, experiment(), RunDirectory(tmp_path))
    assert {one["metric"]: (one["value"], one["n"]) for one in found} == {
        "blanks_guessed": (0.1, 30), "pseudo_nats_per_token": (2.0, 32),
        "pseudo_perplexity": (pytest.approx(math.exp(2)), 32),
    }  # fmt: skip


def test_of_causal_arms_the_judge_alone_fills_in_blanks() -> None:
    one = experiment(1)
    two = one.model_copy(update={"arms": one.arms | {"another": one.arms["causal"]}})
    assert [cell.arm for cell in masking.plan(two) if cell.kind == "blanks"] == ["encoder", "causal"]


@pytest.mark.parametrize(
    ("mine", "causal", "outcome", "said"),
    [
        ([0.1, 0.2, 0.3], [3.0, 3.3, 3.0], "far below",
         "unmasked's training loss is 0.200 nats/token, causal's 3.10: less than half of it at every seed"),
        ([2.0, 0.1, 0.1], [3.0, 3.0, 3.0], "below",
         "below it at every seed, if not by half at each. So looks an arm that begins to read the next token off"),
        ([2.0, 3.5, 2.0], [3.0, 3.0, 3.0], "not below", "below it at 2 of 3 seeds. This run shows no collapse."),
        ([4.0, 4.5, 3.0], [3.0, 3.0, 3.0], "not below", "below it at no seed. This run shows no collapse."),
    ],
)  # fmt: skip
def test_the_training_loss(tmp_path: Path, mine: list[float], causal: list[float], outcome: str, said: str) -> None:
    metric = "final_training_loss"
    one = only(made("unmasked", metric, mine) + made("causal", metric, causal), tmp_path)
    assert (one["kind"], one["outcome"], one["n"]) == ("training-loss", outcome, 3)
    assert said in one["sentence"]
    assert one["difference"] == pytest.approx(sum(mine) / 3 - sum(causal) / 3)
    assert one["p_holm"] == pytest.approx(stats.ttest_rel(mine, causal).pvalue)
    assert one["resolved"] == (one["p_holm"] < 0.05)


def test_the_last_place(tmp_path: Path) -> None:
    """The loss elsewhere in the window, where the answer is read off, does not count."""
    metric = "test_loss_at_position"
    elsewhere = made("unmasked", metric, [0.0, 0.0], context=32) + made("causal", metric, [3.0, 3.0], context=32)
    for mine, outcome, said in (
        ([5.0, 5.5], "worse", "is 5.25 nats/token, causal's 3.10: where it has to predict, unmasked is worse at every"),
        (
            [5.0, 3.0],
            "not worse",
            "unmasked is worse at 1 of 2 seeds, so this run does not show that it predicts worse",
        ),
    ):
        both = made("unmasked", metric, mine, context=CONTEXT) + made("causal", metric, [3.0, 3.2], context=CONTEXT)
        one = only(elsewhere + both, tmp_path, 2)
        assert (one["kind"], one["outcome"]) == ("last-place", outcome)
        assert said in one["sentence"]


@pytest.mark.parametrize("way", ["greedy", "sampled"])
@pytest.mark.parametrize(
    ("mine", "own", "true", "outcome", "said"),
    [
        ([6.0, 5.0], [2.0, 2.0], [3.0, 4.0], "worse than both",
         "costs more than causal's at every seed, a token being 33.1 times less likely on (geometric) average, and "
         "more than the true text at every seed."),
        ([6.0, 5.0], [2.0, 2.0], [7.0, 8.0], "worse than the judge's", "and more than the true text at no seed."),
        ([6.0, 5.0], [2.0, 2.0], [3.0, 8.0], "worse than the judge's", "and more than the true text at 1 of 2 seeds."),
        ([1.0, 5.0], [2.0, 2.0], [3.0, 3.0], "not worse",
         "costs more than causal's at 1 of 2 seeds, so this run does not show that it writes worse."),
    ],
)  # fmt: skip
def test_what_is_written(
    tmp_path: Path, way: str, mine: list[float], own: list[float], true: list[float], outcome: str, said: str
) -> None:
    metric = "judged_nats_per_token"
    rows = made("unmasked", metric, mine, mode=way) + made("causal", metric, own, mode=way)
    assert found(rows, tmp_path, 2) == []  # without a yardstick nothing is said
    one = only(rows + made("causal", metric, true, mode="true"), tmp_path, 2)
    assert (one["kind"], one["way"], one["outcome"]) == ("written", way, outcome)
    assert said in one["sentence"]
    assert f"({way})" in one["sentence"]


@pytest.mark.parametrize(
    ("mine", "left", "outcome", "said"),
    [
        ([0.5, 0.6], [0.2, 0.5], "more", "guesses 55.0% from both sides; causal guesses 35.0% of the same tokens from"),
        ([0.5, 0.6], [0.2, 0.5], "more", "more at every seed, although encoder learns from 15% of the tokens of a"),
        ([0.1, 0.2], [0.3, 0.5], "not more", "more at no seed. It reads both sides, but encoder learns from 15%"),
        ([0.5, 0.2], [0.3, 0.4], "mixed", "encoder guesses more at 1 of 2 seeds."),
    ],
)  # fmt: skip
def test_blanks(tmp_path: Path, mine: list[float], left: list[float], outcome: str, said: str) -> None:
    one = only(made("encoder", "blanks_guessed", mine) + made("causal", "blanks_guessed", left), tmp_path, 2)
    assert (one["kind"], one["outcome"]) == ("blanks", outcome)
    assert said in one["sentence"]


def test_equal_counts_at_two_seeds_are_no_exact_difference(tmp_path: Path) -> None:
    rows = made("encoder", "blanks_guessed", [2 / 8, 3 / 8]) + made("causal", "blanks_guessed", [3 / 8, 4 / 8])
    one = only([row | {"n": 8} for row in rows], tmp_path, 2)
    assert one["p_holm"] == pytest.approx(0.5)  # t = 1: the difference is what a count's resolution may make
    assert not one["resolved"]


def test_an_arm_that_failed_a_gate_decides_nothing(tmp_path: Path) -> None:
    metric = "final_training_loss"
    rows = made("unmasked", metric, [0.1, 0.2, 0.3]) + made("causal", metric, [3.0, 3.3, 3.0])
    for row_ in rows[:3]:  # of the objective, which is no reason
        row_ |= {"comparable": False, "reason": SEES}
    one = only(rows, tmp_path)
    assert one["comparable"]
    assert one["resolved"]
    beside = made("unmasked", "judged_nats_per_token", [3.0], mode="true")
    beside[0] |= {"comparable": False, "reason": "failed before timing: causality"}
    one = only(rows + beside, tmp_path)
    assert (one["comparable"], one["resolved"]) == (False, False)
    assert one["sentence"].endswith("Nothing follows from that: unmasked: failed before timing: causality.")


def test_a_perplexity_that_no_number_holds_is_told_by_its_logarithm(tmp_path: Path) -> None:
    one = only(made("encoder", "pseudo_nats_per_token", [800.0, 810.0]), tmp_path, 2)
    assert one["pseudo_perplexity"] is None
    assert one["sentence"].startswith("encoder's pseudo-perplexity is above e^800 (mean over 2 seeds)")


def test_a_pseudo_perplexity_says_what_it_is_not(tmp_path: Path) -> None:
    one = only(made("encoder", "pseudo_nats_per_token", [1.0, 3.0]), tmp_path, 2)
    assert one["pseudo_perplexity"] == pytest.approx((2.71828 + 20.0855) / 2, rel=1e-4)
    assert one["sentence"].startswith("encoder's pseudo-perplexity is 11.4 (mean over 2 seeds). It is no perpl")


def test_only_seeds_that_both_arms_have(tmp_path: Path) -> None:
    rows = made("unmasked", "final_training_loss", [0.1, 9.0, 9.0]) + made("causal", "final_training_loss", [3.0])
    one = only(rows, tmp_path)
    assert (one["n"], one["loss"], one["ci_low"], one["p_holm"], one["resolved"]) == (1, 0.1, None, None, False)
    assert "less than half of it at the one seed" in one["sentence"]


def test_several_comparisons_are_corrected_for(tmp_path: Path) -> None:
    one_p = stats.ttest_rel([0.1, 0.2, 0.3], [3.0, 3.3, 3.2]).pvalue
    rows = made("unmasked", "final_training_loss", [0.1, 0.2, 0.3])
    rows += made("causal", "final_training_loss", [3.0, 3.3, 3.2])
    rows += made("encoder", "blanks_guessed", [0.5, 0.4, 0.3]) + made("causal", "blanks_guessed", [0.3, 0.4, 0.5])
    first, second = found(rows, tmp_path)
    assert first["p_holm"] == pytest.approx(2 * one_p)
    assert second["p_holm"] == pytest.approx(1.0)
    assert (first["resolved"], second["resolved"]) == (True, False)


def test_the_loss_at_the_end_is_of_the_last_tenth(tmp_path: Path) -> None:
    run, cell = RunDirectory(tmp_path), Cell("causal", 0, "train")
    lines = [{"step": 0, "validation_loss": 9.0}, *({"step": at + 1, "loss": float(at)} for at in range(30))]
    run.folder(cell).mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder(cell) / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert masking._final_loss(run, cell) == (28.0, 3)


def test_bits_per_byte_of_a_model_that_sees_its_answer_never_compare() -> None:
    result = {
        "backend": {"name": "x"}, "initial": {"test_bits_per_byte": 4.5},
        "splits": {"test": {"bits_per_byte": 0.01, "token_perplexity": 1.0, "tokens": 9, "windows": 2,
                            "loss_at_position": [0.1, 0.2]}},
    }  # fmt: skip
    for objective, comparable in (("causal", True), ("unmasked", False)):
        rows = list(comparison._quality_rows(Cell("a", 0, "train"), result, objective))
        assert {one["metric"] for one in rows} > {"test_bits_per_byte", "test_loss_at_position"}
        (last,) = [one for one in rows if (one["metric"], one["context"]) == ("test_loss_at_position", 2)]
        assert (last["comparable"], last["reason"]) == (True, None)  # nobody sees what follows a window
        rows.remove(last)
        assert {(one["comparable"], one["reason"]) for one in rows} == {
            (comparable, None if comparable else "the model saw the token that it was to predict")
        }


def test_mistakes() -> None:
    with pytest.raises(SpecError, match="needs an arm with objective = causal"):
        load("masking", profile="smoke", arms=["unmasked", "encoder"])
    with pytest.raises(SpecError, match="the comparison study does not read 'masking'"):
        load("compare", profile="smoke", assignments=["masking.prompts=3"])
    with pytest.raises(SpecError, match="the masking study does not read 'learning_rates'"):
        load("masking", profile="smoke", assignments=["learning_rates=[0.1]"])
    with pytest.raises(SpecError, match=r"masking\.windows"):
        load("masking", profile="smoke", assignments=["masking.windows=0"])


def test_what_was_refused_takes_no_part_in_the_correction(tmp_path: Path) -> None:
    """Of the two comparisons only that of the encoder's blanks may be made: its p is its own."""
    rows = made("encoder", "blanks_guessed", [0.5, 0.61, 0.7]) + made("causal", "blanks_guessed", [0.2, 0.2, 0.3])
    alone = only(rows, tmp_path)
    rows += made("unmasked", "final_training_loss", [0.1, 0.2, 0.3]) + made(
        "causal", "final_training_loss", [3, 3.3, 3]
    )
    beside = made("unmasked", "judged_nats_per_token", [3.0], mode="true")
    beside[0] |= {"comparable": False, "reason": "failed before timing: causality"}
    loss, blanks = found(rows + beside, tmp_path)
    assert (loss["comparable"], loss["p_holm"]) == (False, None)
    assert (blanks["kind"], blanks["p_holm"]) == ("blanks", alone["p_holm"])
    assert blanks["p_holm"] is not None


def test_values_that_are_not_there_pair_with_nothing(tmp_path: Path) -> None:
    rows = made("encoder", "blanks_guessed", [0.5, 0.61, None]) + made("causal", "blanks_guessed", [0.2, 0.2, 0.3])
    assert only(rows, tmp_path)["n"] == 2
