"""Text that models wrote, as a report shows it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.printable import without_gaps


@pytest.mark.parametrize(("text", "shown"), [
    ("a\n\n\nb", "a\n\n\nb"),
    ("a\n\n\n\nb", "a\n⋯ 3 empty lines ⋯\nb"),
    ("a\n \n\t\n  \n\n  b\n", "a\n⋯ 4 empty lines ⋯\n  b\n"),
    ("\n" * 30, "\n⋯ 29 empty lines ⋯\n"),
    ("a" + "\n" * 4 + "b" + "\n" * 5 + "c", "a\n⋯ 3 empty lines ⋯\nb\n⋯ 4 empty lines ⋯\nc"),
])  # fmt: skip
def test_long_runs_of_empty_lines_are_counted(text: str, shown: str):
    assert without_gaps(text) == shown


@given(st.text(alphabet="a \t\n", max_size=60))
def test_nothing_but_empty_lines_is_left_out(text: str):
    filled = [line for line in text.split("\n") if line.strip()]
    shown = without_gaps(text)
    assert [line for line in shown.split("\n") if line.strip() and "⋯" not in line] == filled
    assert "\n\n\n\n" not in shown
