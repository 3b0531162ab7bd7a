"""What stands under a headline and in the table of comparisons is of the very comparison that they tell."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.report.numbers import number
from experiments.report.record import Record, read
from experiments.report.tables import comparisons, evidence, placing, settled


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


@pytest.mark.parametrize(("one", "standing"), [
    ({"resolved": True, "comparable": True}, ("resolved", "quality resolved")),
    ({"resolved": False, "comparable": True}, ("open", "quality not resolved")),
    ({"resolved": False, "comparable": False}, ("blocked", "quality not comparable")),
    ({"resolved": True}, ("resolved", "quality resolved")),
])  # fmt: skip
def test_a_finding_that_was_refused_is_not_open(one: dict, standing: tuple[str, str]) -> None:
    assert settled(one, "quality") == standing
    assert settled(one) == (standing[0], standing[1].removeprefix("quality "))
