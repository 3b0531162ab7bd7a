"""Verdicts about bytes: beside what shapes say, and by how exactly a device counts."""

import pytest
from study_rows import per_seed

from experiments.studies.comparison import PAGE, Question, compared


def asked(a: list[float], b: list[float], shapes: tuple[float, float] | None, device: str = "cpu") -> dict:
    rows = per_seed("a", "load", "resident_bytes", a) + per_seed("b", "load", "resident_bytes", b)
    for arm, size in zip("ab", shapes or (), strict=False):
        rows += per_seed(arm, "load", "resident_bytes_analytic", [size] * len(a))
    (verdict,) = compared(rows, [Question("a", "b", "load", "resident_bytes", "ratio")], device)
    return verdict


@pytest.mark.parametrize(("shapes", "told"), [
    ((4e6, 3.97e6), True), ((4e6, 4.03e6), False), ((4e6, 4e6), False), (None, False),
])  # fmt: skip
def test_a_difference_against_the_shapes_says_so(shapes: tuple[float, float] | None, told: bool):
    one = asked([4.016e6, 4.017e6, 4.018e6], [4.081e6, 4.082e6, 4.080e6], shapes)
    assert one["resolved"]
    assert one["by_shapes"] == (None if shapes is None else pytest.approx(shapes[1] / shapes[0]))
    assert one["sentence"].endswith("By shapes alone it is 0.993 times: what differs lies beside the weights.") == told


def test_what_a_gpu_counts_is_exact_and_what_a_process_holds_is_not():
    values = [80 * PAGE] * 3, [160 * PAGE] * 3
    card, host = asked(*values, None, "cuda"), asked(*values, None, "cpu")
    assert (card["exact"], card["p"], card["tested"], card["estimate"]) == (True, None, 0, 2)
    assert (host["exact"], host["tested"]) == (False, 1)
    assert host["p"] > 0
    assert host["ci_low"] < 2 < host["ci_high"]
    assert card["resolved"]
    assert "the same for every seed" in card["sentence"]
