"""Figures of the studies: what is drawn is what was found, in the units that the axes name."""

from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest

from experiments.report import study_figures
from experiments.report.drawing import RC, Layout
from experiments.report.sparse import CUT


def record(findings: list[dict], *arms: str) -> Any:
    return SimpleNamespace(
        findings=findings, arms=list(arms), rows=[], batch=1, contexts=lambda phase, metric: [],
        arms_with=lambda wanted: set(),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["wide", "narrow"])
def test_loads_are_over_an_even_share_and_bytes_in_their_unit(layout: Layout) -> None:
    held = {"kind": "bytes", "arm": "moe", "loaded_bytes": 4e6, "touched_bytes": {"1": 1e6, "64": 3.5e6}}
    load = {"kind": "load", "arm": "moe", "loads": [[0.5, 0.3, 0.15, 0.05], [0.25] * 4]}
    with matplotlib.rc_context(RC):
        weights, experts = study_figures.moe(record([held, load], "moe"), layout).axes
    assert weights.get_xlabel() == "MB"
    assert [bar.get_width() for bar in weights.patches] == pytest.approx([4, 1, 3.5])
    assert experts.get_ylabel() == "load over an even share"
    first, second, even = experts.lines
    assert list(first.get_ydata()) == pytest.approx([2, 1.2, 0.6, 0.2])
    assert list(second.get_ydata()) == pytest.approx([1] * 4)
    assert set(even.get_ydata()) == {1}


def sparse(difference: list[float], half: float, layout: Layout) -> Any:
    at = list(range(1, len(difference) + 1))
    curve = {"positions": at, "difference": difference, "ci_low": [one - half for one in difference],
             "ci_high": [one + half for one in difference]}  # fmt: skip
    one = {"kind": "quality", "arm": "narrow", "curve": curve, "windows": [2]}
    with matplotlib.rc_context(RC):
        (axes,) = study_figures.sparse(record([one], "full", "narrow"), layout).axes
    return axes


@pytest.mark.parametrize("layout", ["wide", "narrow"])
def test_wide_intervals_are_cut_where_the_caption_says(layout: Layout) -> None:
    assert sparse([0.1, -0.2, 0.05], 9.0, layout).get_ylim() == pytest.approx((-CUT * 0.2, CUT * 0.2))
    low, high = sparse([0.1, -0.2, 0.05], 0.01, layout).get_ylim()
    assert -CUT * 0.2 < low < -0.2
    assert 0.11 < high < CUT * 0.2


@pytest.mark.filterwarnings("error")
def test_no_difference_at_all_is_drawn_without_a_cut() -> None:
    low, high = sparse([0.0, 0.0], 0.0, "wide").get_ylim()
    assert low < 0 < high
