"""Figures of the studies: what is drawn is what was found, in the units that the axes name."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest

from experiments.report import figures, study_figures
from experiments.report.drawing import RC, Layout
from experiments.report.record import Record, Row
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


def row(arm: str, phase: str, metric: str, value: float, **rest: Any) -> Row:
    usual = {"seed": None, "unit": "", "n": 1, "ci_low": None, "ci_high": None, "p5": None, "p95": None,
             "direction": "lower", "backend": "reference", "comparable": True, "reason": None, "context": None,
             "batch": None, "mode": None, "dtype": None}  # fmt: skip
    return Row(**({"arm": arm, "phase": phase, "metric": metric, "value": value} | usual | rest))


def of_rows(rows: list[Row], made: dict[str, dict], **spec: Any) -> Record:
    return Record(result={"arms": made, "findings": []}, result_text="", environment={}, spec=spec, spec_text="",
                  events=[], rows=rows, curves={}, evaluations={}, remarks=[])  # fmt: skip


def drawn(record: Record, name: str) -> Any:
    with matplotlib.rc_context(RC):
        return figures.PLOTS[name](record, "wide").axes


def test_parts_of_a_training_step_stand_on_each_other_and_the_peak_beside_them() -> None:
    parts = {"weight_bytes": 4e6, "optimizer_bytes": 8e6, "gradient_bytes": 3e6, "activation_bytes": 2e6,
             "peak_bytes": 15e6}  # fmt: skip
    rows = [row("a", "train", metric, size, context=64, batch=1) for metric, size in parts.items()]
    (axes,) = drawn(of_rows(rows, {"a": {}}), "memory-training")
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([0, 4, 12, 15])
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([4, 8, 3, 2])
    assert [list(line.get_xdata()) for line in axes.lines] == [[15, 15]]


def test_each_batch_has_its_own_peaks() -> None:
    rows = [row("a", "decode", "peak_bytes", batch * context * 1e6, context=context, batch=batch)
            for batch in (1, 4) for context in (8, 16)]  # fmt: skip
    alone, four = drawn(of_rows(rows, {"a": {}}), "memory-context")
    assert [list(line.get_ydata()) for line in alone.lines] == [[8, 16]]
    assert [list(line.get_ydata()) for line in four.lines] == [[32, 64]]


def test_guessed_tokens_are_in_per_cent_with_their_intervals() -> None:
    rows = [row("reader", "quality", "blanks_guessed", 0.25, ci_low=0.2, ci_high=0.35, n=3),
            row("judge", "quality", "blanks_guessed", 0.5, ci_low=0.4, ci_high=0.6, n=3)]  # fmt: skip
    arms = {"judge": {}, "reader": {"objective": "masked"}}
    (axes,) = drawn(of_rows(rows, {"judge": {}, "reader": {}}, arms=arms), "masking-blanks")
    assert [bar.get_width() for bar in axes.patches] == [25, 50]
    ends = [end for line in axes.lines for end in line.get_xdata()]
    assert ends == pytest.approx([20, 35, 40, 60])


def test_speeds_have_a_bar_from_their_5th_to_their_95th_percentile() -> None:
    how = {"batch": 1, "mode": "eager", "dtype": "float32"}
    rows = [row("a", "decode", "ms_per_token", at / 8, p5=at / 16, p95=at / 4, context=at, **how) for at in (8, 16)]
    rows += [replace(one, seed=0) for one in rows]
    (axes,) = drawn(of_rows(rows, {"a": {}}), "speed-decode")
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 2], [1, 4], [1, 2]]


def test_sizes_of_vocabulary_stand_at_their_quality() -> None:
    arms = {f"a-v{size}": {"config": {"vocabulary": size}} for size in (300, 600)}
    rows = [row(arm, "text", "tokens_per_byte", at) for arm, at in zip(arms, (1.0, 0.5), strict=True)]
    rows += [row(arm, "quality", "test_bits_per_byte", at) for arm, at in zip(arms, (3.0, 2.0), strict=True)]
    tokens, quality = drawn(of_rows(rows, arms), "vocabulary-quality")
    assert list(tokens.lines[-1].get_ydata()) == [1.0, 0.5]
    assert list(quality.lines[-1].get_xdata()) == [300, 600]
    assert list(quality.lines[-1].get_ydata()) == [3.0, 2.0]
