"""Figures of the masking study."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.numbers import number
from experiments.report import curves
from experiments.report.bundles import bundle, tokens_axis
from experiments.report.drawing import INK, MUTED, PAPER, SIZES, Layout, colour_of, hatch_of, legend, line_of, panels
from experiments.report.masking import TRUE, costs, guesses, writers
from experiments.report.record import Record, Row


def decoders(record: Record, layout: Layout) -> Figure:
    """What decoders are trained on, beside what their text costs under the judge."""
    figure, (left, right) = panels(layout, 2, 3.1)
    factor, unit = tokens_axis(record)
    for arm in writers(record):
        bundle(left, curves.training(record, arm), record.arms.index(arm), factor, False)
    left.set_title("Trained on: its own loss")
    left.set_ylabel("training loss, nats/token")
    left.set_xlabel(unit)
    left.set_xlim(left=0)
    left.set_ylim(bottom=0)
    kinds = costs(record)
    for at, (_, arm, row) in enumerate(kinds):
        index = record.arms.index(arm)
        colour, hatch = (MUTED, "") if row.mode == TRUE else (colour_of(index), hatch_of(index))
        _bar(right, at, row, 1.0, colour, hatch, layout)
    _bars(right, [title for title, *_ in kinds], layout)
    right.set_title("Worth: its text under the judge")
    right.set_xlabel("nats/token")
    indices = [record.arms.index(arm) for arm in writers(record)]
    handles = [Line2D([], [], color=colour_of(at), linestyle=line_of(at), linewidth=1.8) for at in indices]
    legend(figure, writers(record), layout, handles)
    return figure


def blanks(record: Record, layout: Layout) -> Figure:
    shares = guesses(record)
    figure, (axes,) = panels(layout, 1, 0.32 * len(shares) + 0.8, stacked=False)
    for at, (arm, row) in enumerate(shares):
        index = record.arms.index(arm)
        _bar(axes, at, row, 100.0, colour_of(index), hatch_of(index), layout)
    _bars(axes, [arm for arm, _ in shares], layout)
    axes.set_xlabel("hidden tokens guessed, %")
    return figure


def _bar(axes: Axes, at: int, row: Row, factor: float, colour: str, hatch: str, layout: Layout) -> None:
    """From the top, with its interval and its number."""
    value = row.known * factor
    low, high = (value if end is None else end * factor for end in (row.ci_low, row.ci_high))
    axes.barh(at, value, height=0.66, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0)
    axes.plot([low, high], [at, at], color=INK, linewidth=0.9, solid_capstyle="butt")
    axes.text(max(value, high), at, f"  {number(value)}", va="center", ha="left", fontsize=SIZES[layout] - 1.5)


def _bars(axes: Axes, titles: list[str], layout: Layout) -> None:
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_xlim(0, axes.dataLim.xmax * 1.22)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(4 if layout == "narrow" else 6))
