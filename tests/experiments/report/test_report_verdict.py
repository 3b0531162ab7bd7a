"""Which verdicts a report tells one by one, and how it tells those of many arms against one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.report.document import Text, Verdict
from experiments.report.record import Record, read
from experiments.report.tables import evidence, standing
from experiments.report.verdict import HEADLINES, by_frequencies, limits, notices, on_validation, verdict


@pytest.fixture
def record(make_run: Callable[..., Path]) -> Record:
    return read(make_run(seeds=(0,), measured=False))


def one(b: str, at: float, low: float, high: float, better: str | None = None, **changed: Any) -> dict[str, Any]:
    return {
        "phase": "train", "metric": "tokens_per_s", "context": None, "batch": 1, "a": "base", "b": b, "kind": "ratio",
        "unit": "x", "estimate": at, "ci_low": low, "ci_high": high, "n": 3, "p": 0.01, "p_holm": 0.02,
        "resolved": better is not None, "better": better, "comparable": True, "reason": None, "more_seeds": None,
        "sentence": f"{b} against {changed.get('a', 'base')}.",
    } | changed  # fmt: skip


TRAINING = [
    one("fast", 1.5, 1.4, 1.6, "fast"), one("quick", 1.2, 1.1, 1.3, "quick"), one("slow", 0.5, 0.4, 0.6, "base"),
    one("near", 1.01, 0.9, 1.1, n=2), one("equal", 1.0, 1.0, 1.0),
    one("slight", 0.97, 0.96, 0.98, "base"),
    one("refused", 1.4, 1.3, 1.5, comparable=False, reason="no"),
]  # fmt: skip
QUALITY = [
    one(b, at, at - 0.01, at + 0.01, "base", phase="quality", metric="test_bits_per_byte", kind="difference",
        unit="bits/byte")
    for b, at in (("fast", 0.25), ("quick", 0.125), ("slow", 0.5))
]  # fmt: skip


def told(record: Record, verdicts: list[dict[str, Any]]) -> tuple[list[Verdict], list[str]]:
    blocks = verdict(replace(record, result=record.result | {"verdicts": verdicts})).blocks
    texts = [block.text for block in blocks if isinstance(block, Text) and "further comparison" in block.text]
    return [block for block in blocks if isinstance(block, Verdict)], texts


def test_many_arms_against_one_are_told_by_quantity(record: Record) -> None:
    (quality, training), rest = told(record, TRAINING + QUALITY)
    assert quality.sentence == "Test bits per byte: fast, quick and slow are worse than base."
    assert (quality.tone, quality.standing) == ("resolved", "3 of 3 resolved")
    assert quality.numbers == (
        "difference from base: fast +0.250 [+0.240, +0.260], quick +0.125 [+0.115, +0.135], "
        "slow +0.500 [+0.490, +0.510] bits/byte; n = 3 paired seeds"
    )
    assert training.sentence == (
        "Training throughput: fast and quick are better than base; slow is worse than base; slight is worse than base "
        "by less than 5%; equal is the same as base; not resolved for near; not comparable for refused."
    )
    assert (training.tone, training.standing) == ("resolved", "4 of 7 resolved")
    assert "slow 0.500× [0.400, 0.600], near 1.01× [0.90, 1.10]" in training.numbers
    assert "refused –; n = 2 to 3 paired seeds" in training.numbers  # what is refused shows no estimate
    assert not rest


def test_a_difference_is_the_same_at_0_and_slight_at_no_size(record: Record) -> None:
    """What makes a ratio slight, being near 1, is much of a difference in bits per byte."""
    quality = {"phase": "quality", "metric": "test_bits_per_byte", "kind": "difference", "unit": "bits/byte"}
    verdicts = [
        one("large", 0.98, 0.97, 0.99, "base", **quality), one("little", -0.01, -0.011, -0.009, "little", **quality),
        one("equal", 0.0, 0.0, 0.0, **quality), one("away", 1.0, 1.0, 1.0, **quality),
        one("single", 0.0, 0.0, 0.0, n=1, **quality), *TRAINING,
    ]  # fmt: skip
    (told_of_quality, _), _ = told(record, verdicts)
    assert told_of_quality.sentence == (
        "Test bits per byte: little is better than base; large is worse than base; equal is the same as base; "
        "not resolved for single, since one seed says nothing about the spread over seeds; "
        "not resolved, after correcting for several comparisons, for away."
    )


def test_refused_numbers_are_counted_once_for_all_seeds(make_run: Callable[..., Path]) -> None:
    """Of 3 seeds: 4 numbers of training, 5 of loading, at each of 3 lengths 4 of prefill and 6 of decode."""
    (notice,) = notices(read(make_run(incomparable="mamba")))
    told_of = [point.partition(":")[0] for point in notice.points]
    assert told_of == [f"mamba, {phase} ({lines} numbers)" for phase, lines in
                       (("train", 4), ("load", 5), ("prefill", 12), ("decode", 18))]  # fmt: skip


def test_limits_count_the_tokens_of_every_micro_batch(record: Record) -> None:
    spec = record.spec | {"training": {"steps": 120, "batch": 8, "accumulate": 4, "context": 256}}
    assert ", 983,040 training tokens at context 256" in limits(replace(record, spec=spec))


@pytest.mark.parametrize(("device", "read_in_pages", "page"), [
    ("cpu", True, None), ("cpu", True, 16384), ("cuda", False, None),
])  # fmt: skip
def test_limits_say_what_an_interval_of_memory_covers(
    record: Record, device: str, read_in_pages: bool, page: int | None
) -> None:
    """page: of the machine that ran it; older records, all of them of pages of 4 KiB, do not say."""
    environment = record.environment | {"device": device} | ({} if page is None else {"page_bytes": page})
    ratio = one("mamba", 1.05, 0.9, 1.2, a="transformer", phase="load", metric="resident_bytes", batch=None)
    record = replace(record, environment=environment, result=record.result | {"verdicts": [ratio]})
    said, beside = limits(record), evidence(record, ratio)
    assert (f"read to {page or 4096:,} bytes, which the ratio's interval covers; n = " in beside) == read_in_pages
    assert "an interval covers the spread over seeds only" in said
    assert (f"the {page or 4096:,} bytes to which a process's memory is read" in said) == read_in_pages


def test_what_is_equal_at_every_seed_is_told_alike_in_sentence_and_table() -> None:
    assert standing(one("equal", 1.0, 1.0, 1.0)) == ("open", "the same at every seed")
    assert standing(one("near", 1.01, 0.9, 1.1)) == ("open", "not resolved")
    assert standing(one("equal", 0.0, 0.0, 0.0, kind="difference")) == ("open", "the same at every seed")
    assert standing(one("away", 1.0, 1.0, 1.0, kind="difference"))[1] != "the same at every seed"


def test_how_a_quantity_stands_that_decides_nothing(record: Record) -> None:
    refused = [one(str(at), 2.0, 1.9, 2.1, comparable=False, reason="no") for at in range(HEADLINES + 1)]
    ((blocked,), _) = told(record, refused)
    assert (blocked.tone, blocked.standing) == ("blocked", "0 of 9 resolved")
    ((unresolved,), _) = told(record, [one("near", 1.01, 0.9, 1.1), *refused])
    assert unresolved.tone == "open"


def test_a_few_verdicts_are_told_one_by_one(record: Record) -> None:
    shown, rest = told(record, TRAINING)
    assert [block.sentence for block in shown] == [f"{verdict['b']} against base." for verdict in TRAINING]
    assert not rest


def test_pairs_that_share_no_arm_are_told_one_by_one_as_far_as_there_is_room(record: Record) -> None:
    chain = [one(str(at + 1), 1.5, 1.4, 1.6, str(at + 1), a=str(at)) for at in range(HEADLINES + 2)]
    shown, rest = told(record, chain)
    assert [block.sentence for block in shown] == [f"{at + 1} against {at}." for at in range(HEADLINES)]
    assert rest == ["2 further comparisons: see the table of paired comparisons."]


def test_many_arms_name_the_seeds_that_they_lack(record: Record) -> None:
    """Of one arm the first seed; of older records nothing is known."""
    first, *others = TRAINING
    (quality, training), _ = told(record, [first | {"lacking": {"fast": [0]}}, *others, *QUALITY])
    assert "left out" not in quality.numbers
    assert training.numbers.endswith("; left out for want of a value: seed 0 of fast")


def test_arms_of_several_sizes_are_told_at_the_top(record: Record) -> None:
    assert not notices(record)
    warning = "the arms are not of one size: mamba has 10.2 times transformer's active parameters"
    told = replace(record, result=record.result | {"warnings": ["something else", warning]})
    (one,) = notices(told)
    assert (one.tone, one.title) == ("warning", f"T{warning[1:]}.")


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_that_evaluated_no_test_text_says_so(make_run: Callable[..., Path], evaluated: bool) -> None:
    made = read(make_run(seeds=(0,)))
    rows = [row for row in made.rows if evaluated or row.metric != "test_bits_per_byte"]
    texts = [block.text for block in verdict(replace(made, rows=rows)).blocks if isinstance(block, Text)]
    assert any("Quality on the test text was not evaluated" in text for text in texts) != evaluated


@pytest.mark.parametrize(("known", "said"), [
    (1.0, "transformer and mamba predict"), (2.0095, "transformer predicts"), (3.412, ""), (None, ""),
])  # fmt: skip
def test_arms_that_learned_no_more_than_frequencies_are_named(record: Record, known: float | None, said: str) -> None:
    values = [record.row(arm, "quality", "test_bits_per_byte").known for arm in ("mamba", "transformer")]
    assert 1.0 < values[0] < 2.0095 < values[1] < 3.412
    made = replace(record, result=record.result | {"baselines": {"unigram_bits_per_byte": known}})
    found = [one.title for one in notices(made) if "frequencies" in one.title]  # on top, before any finding
    assert len(found) == bool(said)
    assert all(text.startswith(f"{said} the test text no better than the frequencies") for text in found)
    assert all(text.endswith("this run cannot say.") for text in found)


def test_an_arm_that_sees_what_it_predicts_learned_no_frequencies(record: Record) -> None:
    """Nor is it a second one that could have learned more."""
    values = [record.row(arm, "quality", "test_bits_per_byte").known for arm in ("mamba", "transformer")]
    result = record.result | {"baselines": {"unigram_bits_per_byte": min(values) - 0.1}}
    arms = {arm: dict(given) for arm, given in record.spec["arms"].items()}
    arms["mamba"]["objective"] = "unmasked"
    told = by_frequencies(replace(record, result=result, spec=record.spec | {"arms": arms}))
    assert told is not None
    assert told.startswith("transformer predicts the test text no better than")
    assert "learns more" not in told


def test_as_good_as_frequencies_is_no_better_than_they_are(record: Record) -> None:
    known = record.row("transformer", "quality", "test_bits_per_byte").known
    made = replace(record, result=record.result | {"baselines": {"unigram_bits_per_byte": known}})
    assert str(by_frequencies(made)).startswith("transformer predicts the test text no better than the frequencies")


def test_an_arm_alone_is_not_asked_which_of_the_arms_learns_more(record: Record) -> None:
    result = record.result | {
        "baselines": {"unigram_bits_per_byte": 1.0}, "verdicts": [],
        "failures": [{"cell": "transformer/seed0/train", "message": "loss inf"}],
    }  # fmt: skip
    rows = [row for row in record.rows if row.arm == "mamba"]
    made = replace(record, result=result, rows=rows)
    said = [block.text for block in verdict(made).blocks if isinstance(block, Text)]
    (told,) = [one.title for one in notices(made) if "frequencies" in one.title]
    assert told.endswith("of its tokens in the training text, 1.000 bits per byte.")
    assert "This run recorded no comparison. Cells of transformer failed." in said


def test_a_difference_in_quality_is_held_against_the_validation_text(make_run: Callable[..., Path]) -> None:
    """Of differences that the test text resolves: on the same side of 0 with the whole interval, or not."""
    made = read(make_run(arms=("a", "b", "c"), measured=False))
    values = {"a": (2.0, 2.1, 2.2), "b": (1.9, 2.02, 2.08), "c": (1.95, 2.1, 2.26)}
    rows = [
        replace(row, value=values[row.arm][row.seed])
        if row.metric == "validation_bits_per_byte" and row.seed is not None else row
        for row in made.rows
    ]  # fmt: skip

    def said(estimate: float, resolved: bool, a: str, b: str, seeds: int = 3) -> list[str]:
        verdicts = [
            one(b, estimate, estimate, estimate, b, a=a, phase="quality", metric="test_bits_per_byte",
                kind="difference", unit="bits/byte", resolved=resolved),
        ]  # fmt: skip
        some = [row for row in rows if row.seed is None or row.seed < seeds]
        return on_validation(replace(made, result=made.result | {"verdicts": verdicts}, rows=some))

    # -0.1, -0.08, -0.12: 4.303 (t, 2 degrees of freedom) times 0.02 / sqrt(3)
    b = "(same): b − a, −0.100 [−0.150, −0.050] bits per byte."
    assert said(-0.1, True, "a", "b") == [b.replace("(same)", "On quality the validation text says the same")]
    assert said(0.1, True, "a", "b") == [b.replace("(same)", "On quality the validation text does not say the same")]
    turned = "On quality the validation text says the same: a − b, +0.100 [+0.050, +0.150] bits per byte."
    assert said(0.1, True, "b", "a") == [turned]
    # -0.05, 0, 0.06
    assert said(-0.1, True, "a", "c") == [
        "On quality the validation text does not say the same: c − a, +0.003 [−0.133, +0.140] bits per byte.",
    ]
    assert said(-0.1, False, "a", "b") == []
    assert said(-0.1, True, "a", "b", seeds=1) == []
    texts = [block.text for block in verdict(made).blocks if isinstance(block, Text)]
    assert any(text.startswith("On quality the validation text says the same: b − a, ") for text in texts)
