"""What the check of the kernels says, in words, from the rows of `experiments.kernels.check`. Needs no torch."""

from typing import Any


def told(row: dict[str, Any]) -> str:
    """What is wrong with one row, in a line."""
    return f"{row['form']}: {row['operation']}, {row['dtype']}, {row['shape']}: {row['problem']}"


def by_form(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Of each form that was checked, how it came out."""
    said = {}
    for form in dict.fromkeys(row["form"] for row in rows):
        of_it = [row for row in rows if row["form"] == form]
        wrong = [row for row in of_it if row["problem"]]
        cases = f"{len(of_it)} cases"
        if wrong:
            said[form] = f"{len(wrong)} of {cases} failed, first {told(wrong[0])}"
        else:
            said[form] = f"all {cases} agree with the float64 reference"
    return said
