"""What has no result: no figure passes over it in silence, and no legend names what is not drawn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest

from experiments.report import content, figures
from experiments.report.document import Figure
from experiments.report.drawing import RC, Layout
from experiments.report.record import Record, read

LOST = " Without a result in this run: "
REST = ". What is missing is not drawn, lines pass over it, and means are of the rest."


def captions(record: Record) -> dict[str, str]:
    blocks = (block for section in content.document(record).sections for block in section.blocks)
    return {block.name: block.caption for block in blocks if isinstance(block, Figure)}


def test_every_figure_names_what_it_lacks(make_run: Callable[..., Path]) -> None:
    whole, lacking = read(make_run()), read(make_run(lost=("mamba/seed2/decode-512",)))
    assert len(captions(whole)) > 4
    assert not any(LOST in caption for caption in captions(whole).values())
    assert captions(lacking) == {
        name: f"{caption}{LOST}mamba/seed2/decode-512{REST}" for name, caption in captions(whole).items()
    }


def test_many_that_are_lacking_are_counted(make_run: Callable[..., Path]) -> None:
    record = read(make_run())
    missing = [f"mamba/seed{seed}/decode-512" for seed in range(5)]
    record = replace(record, result=record.result | {"missing": missing})
    told = f"{LOST}mamba/seed0/decode-512, mamba/seed1/decode-512 and 3 more{REST}"
    assert all(caption.endswith(told) for caption in captions(record).values())


@pytest.mark.parametrize("layout", ["wide", "narrow"])
@pytest.mark.parametrize(("name", "metric"), [("throughput", "tokens_per_s"), ("state", "state_bytes")])
def test_a_legend_has_the_arms_that_are_drawn(
    make_run: Callable[..., Path], name: str, metric: str, layout: Layout
) -> None:
    record = read(make_run(arms=("transformer", "mamba", "hybrid")))
    without = [row for row in record.rows if row.arm != "mamba" or not row.metric.startswith(metric)]
    # at another batch than the usual one nothing is drawn
    other = [replace(row, batch=64) if row.arm == "mamba" and row.metric.startswith(metric) else row
             for row in record.rows]  # fmt: skip
    assert told(record, name, layout) == list(record.arms)
    assert told(replace(record, rows=without), name, layout) == ["transformer", "hybrid"]
    assert told(replace(record, rows=other), name, layout) == ["transformer", "hybrid"]


def told(record: Record, name: str, layout: Layout) -> list[str]:
    """The names in a figure's legend; where lines have the arms' colours alone, these are its."""
    with matplotlib.rc_context(RC):
        figure = figures.PLOTS[name](record, layout)
    (legend,) = figure.legends
    if name in ("throughput", "state"):
        drawn = {line.get_color() for axes in figure.axes for line in axes.lines if len(line.get_xdata())}
        assert {handle.get_color() for handle in legend.get_lines()} == drawn
    return [text.get_text() for text in legend.get_texts()]


def test_curves_that_are_not_there_are_in_no_legend(make_run: Callable[..., Path]) -> None:
    record = read(make_run())
    assert told(record, "losses", "wide") == ["transformer", "mamba"]
    assert told(replace(record, curves={"mamba": record.curves["mamba"]}), "losses", "wide") == ["mamba"]
    record = read(make_run(rates=(1e-3, 2e-3, 4e-3)))
    assert told(record, "sweep", "wide") == ["transformer", "mamba"]
    assert told(record, "sweep-curves", "wide") == ["rate 0.001", "rate 0.002", "rate 0.004"]
    kept = [row for row in record.rows if not row.arm.startswith("mamba")]
    assert told(replace(record, rows=kept), "sweep", "wide") == ["transformer"]
    slow = {arm: curve for arm, curve in record.curves.items() if not arm.endswith("0.004")}
    assert told(replace(record, curves=slow), "sweep-curves", "wide") == ["rate 0.001", "rate 0.002"]
