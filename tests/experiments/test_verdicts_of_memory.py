"""Verdicts about bytes: beside what shapes say, and by how exactly a device counts."""

import pytest
from study_rows import per_seed

from experiments.rows import PAGE
from experiments.studies.pairing import Question, compared


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


def test_what_is_open_is_not_explained():
    """By shapes the other one is the smaller, but which is larger is not resolved."""
    one = asked([4.016e6, 4.217e6], [4.081e6, 4.222e6], (4e6, 3.97e6))
    assert not one["resolved"]
    assert one["estimate"] > 1 > one["by_shapes"]
    assert "By shapes alone" not in one["sentence"]


def test_what_a_gpu_counts_is_exact_and_what_a_process_holds_is_not():
    values = [80 * PAGE] * 3, [160 * PAGE] * 3
    card, host = asked(*values, None, "cuda"), asked(*values, None, "cpu")
    assert (card["exact"], card["p"], card["tested"], card["estimate"]) == (True, None, 0, 2)
    assert (host["exact"], host["tested"]) == (False, 1)
    assert host["p"] > 0
    assert host["ci_low"] < 2 < host["ci_high"]
    assert card["resolved"]
    assert "the same for every seed" in card["sentence"]


@pytest.mark.parametrize(("measured", "told"), [(164.0, True), (165.0, False), (8450.0, False)])
def test_one_seed_tells_of_a_state_what_shapes_say_of_every_seed(measured: float, told: bool):
    """Not where it is of another size than they say, nor where there is no difference."""
    rows = per_seed("a", "decode", "state_bytes", [8450.0]) + per_seed("b", "decode", "state_bytes", [measured])
    for arm, size in (("a", 8450.0), ("b", 164.0 if measured < 8450 else 8450.0)):
        rows += per_seed(arm, "decode", "state_bytes_analytic", [size])
    (one,) = compared(rows, [Question("a", "b", "decode", "state_bytes", "ratio")])
    assert (one["exact"], one["resolved"], one["better"]) == (told, told, "b" if told else None)
    assert one["n"] == 1
    assert one["ci_low"] == one["ci_high"] == (one["estimate"] if told else None)
    assert ("the same for every seed): b is better" in one["sentence"]) == told
    assert ("one seed says nothing" in one["sentence"]) != told
