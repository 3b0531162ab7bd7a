"""What stands under a headline and in the table of comparisons is of the very comparison that they tell."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.numbers import number
from experiments.report.record import Record, read
from experiments.report.tables import comparisons, estimate, evidence, gates_table, placing, resolution


@pytest.fixture
def record(make_run: Callable[..., Path]) -> Record:
    """Of decode the longest context measured; its p and that after the correction lie apart."""
    made = read(make_run())
    at = next(one for one in made.verdicts if (one["phase"], one["metric"], one["context"]) == DECODE)
    return replace(made, result=made.result | {"verdicts": [at | {"p": 0.011, "p_holm": 0.044}]})


DECODE = ("decode", "tokens_per_s", 2048)


def test_the_p_under_a_headline_is_the_corrected_one(record: Record) -> None:
    assert evidence(record, record.verdicts[0]).endswith("; n = 3 paired seeds; p = 0.044 after Holm's correction")


def test_the_table_has_each_p_under_its_heading(record: Record) -> None:
    table = comparisons(record)
    ((_, (line,)),) = table.groups
    shown = {column.title: cell.text for column, cell in zip(table.columns, line, strict=True)}
    assert (shown["p"], shown["p after Holm"]) == ("0.011", "0.044")


def test_the_values_under_a_headline_are_of_its_context(record: Record) -> None:
    """A transformer decodes 14000 / (1 + 2048 / 900) / 20 = 213.7 tokens/s, times 1 + (sin 0 + sin 2 + sin 4) / 300 on
    average over the seeds; at 128 tokens 613."""
    text = evidence(record, record.verdicts[0])
    assert text.startswith("Decode throughput, context 2,048: transformer 213.8 [")


def test_the_values_under_a_headline_are_of_the_seeds_that_both_arms_have(make_run: Callable[..., Path]) -> None:
    """Mamba lacks seed 2, so the transformer's mean, which has it, is another in the table."""
    made = read(make_run(lost=("mamba/seed2/train",)))
    found = {row.seed: row.known for row in made.rows
             if (row.arm, row.metric) == ("transformer", "test_bits_per_byte") and row.seed is not None}  # fmt: skip
    paired = (found[0] + found[1]) / 2
    at = next(one for one in made.verdicts if one["metric"] == "test_bits_per_byte")
    assert number(paired, 3) != number(sum(found.values()) / 3, 3)
    assert evidence(made, at).startswith(f"Test bits per byte: transformer {number(paired, 3)} [")
    (notes,) = [note for note in placing(made).notes if "fewer seeds" in note]
    assert notes == "fewer seeds than other arms have, which moves its place"


NONE = {"estimate": 0.0, "ci_low": 0.0, "ci_high": 0.0}


@pytest.mark.parametrize(("one", "standing"), [
    ({"resolved": True, "comparable": True}, ("resolved", "quality resolved")),
    ({"resolved": False, "comparable": True}, ("open", "quality not resolved")),
    ({"resolved": False, "comparable": False}, ("blocked", "quality not comparable")),
    ({"resolved": True}, ("resolved", "quality resolved")),
    ({"resolved": False, "n": 2} | NONE, ("resolved", "quality the same at every seed")),
    ({"resolved": False, "n": 1} | NONE, ("open", "quality not resolved")),
    ({"resolved": False, "n": 2} | NONE | {"ci_high": 0.1}, ("open", "quality not resolved")),
    ({"resolved": False, "n": 2, "comparable": False} | NONE, ("blocked", "quality not comparable")),
])  # fmt: skip
def test_a_finding_that_was_refused_or_is_no_difference_is_not_open(one: dict, standing: tuple[str, str]) -> None:
    assert resolution(one, "quality") == standing
    assert resolution(one) == (standing[0], standing[1].removeprefix("quality "))


def test_the_values_of_a_context_are_of_its_seeds_alone(make_run: Callable[..., Path]) -> None:
    """The cell of one seed at the longest context is lost; at the others it is there."""
    made = read(make_run(lost=("mamba/seed2/decode-2048",)))
    at = {one["context"]: one for one in made.verdicts if (one["phase"], one["metric"]) == DECODE[:2]}
    found = [row.known for row in made.rows if (row.arm, row.phase, row.metric, row.context) ==
             ("transformer", *DECODE) and row.seed in (0, 1)]  # fmt: skip
    low, high = sorted(found)
    mean = float(evidence(made, at[2048]).split("transformer ")[1].split(" ")[0].replace(",", ""))
    assert low <= mean <= high


def test_an_interval_of_two_seeds_is_cut_off_at_nought_too(make_run: Callable[..., Path]) -> None:
    made = read(make_run(lost=("mamba/seed2/train",)))
    which = ("transformer", "train", "tokens_per_s")
    rows = [
        replace(row, value=1.0 + 99 * row.seed)
        if row.seed is not None and (row.arm, row.phase, row.metric) == which else row
        for row in made.rows
    ]  # fmt: skip
    one = next(one for one in made.verdicts if (one["phase"], one["metric"]) == ("train", "tokens_per_s"))
    assert "transformer 50 [0, " in evidence(replace(made, rows=rows), one)


def test_the_table_notes_the_seeds_that_a_comparison_leaves_out(record: Record) -> None:
    lacking = record.verdicts[0] | {"lacking": {"mamba": [2, 3]}}
    table = comparisons(replace(record, result=record.result | {"verdicts": [lacking]}))
    assert "leaves out seeds 2 and 3 of mamba, where there is no value" in table.notes


def test_a_bound_beside_1_is_not_printed_as_1(record: Record) -> None:
    one = record.verdicts[0] | {"kind": "ratio", "unit": "x", "estimate": 1.0121, "ci_low": 1.0004, "ci_high": 1.0242}
    assert estimate(one) == "1.012× [1.0004, 1.024]"


def test_a_check_shows_the_worst_of_its_seeds_and_that_one_failed(make_run: Callable[..., Path]) -> None:
    record = read(make_run())
    evaluations = {
        arm: {seed: {"gates": [{"name": "causality", "limit": 0.1, "value": value, "passed": value <= 0.1}]}
              for seed, value in enumerate(values)}
        for arm, values in {"transformer": (0.01, 0.02, 0.0), "mamba": (0.02, 0.3, 0.01)}.items()
    }  # fmt: skip
    table = gates_table(replace(record, evaluations=evaluations))
    ((_, (cells,)),) = table.groups
    assert [cell.text for cell in cells] == ["causality", "0.1", "0.02", "0.3", "3"]
    ((note, letter),) = table.notes.items()
    assert note == "failed: what it taints is marked as not comparable"
    assert [cell.marks for cell in cells] == ["", "", "", letter, ""]
