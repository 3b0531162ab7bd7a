"""What stands under a headline and in the table of comparisons is of the very comparison that they tell."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.report.record import Record, read
from experiments.report.tables import comparisons, evidence


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
