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
    for rows, named in ((record.rows, record.arms), (without, ["transformer", "hybrid"])):
        with matplotlib.rc_context(RC):
            figure = figures.PLOTS[name](replace(record, rows=rows), layout)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == list(named)
        colours = [handle.get_color() for handle in legend.get_lines()]
        drawn = {line.get_color() for axes in figure.axes for line in axes.lines if len(line.get_xdata())}
        assert set(colours) == drawn
