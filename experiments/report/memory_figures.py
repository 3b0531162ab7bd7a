"""Figures of the memory study."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.numbers import number
from experiments.report.drawing import (
    INK,
    SIZES,
    Layout,
    bar_keys,
    bar_style,
    colour_of,
    legend,
    legend_columns,
    line_of,
    loglog,
    marker_of,
    panels,
    short,
)
from experiments.report.memory import PARTS, stages
from experiments.report.record import Record


def waterfall(record: Record, layout: Layout) -> Figure:
    """One panel per arm on one scale: what each stage takes, from the file to decode."""
    arms = [arm for arm in record.arms if stages(record, arm)]
    lines = max(len(stages(record, arm)) for arm in arms)
    figure, every = panels(layout, len(arms), 0.24 * lines + 0.75, stacked=False)
    top = max(value for arm in arms for _, value in stages(record, arm))
    for axes, arm in zip(every, arms, strict=True):
        at = record.arms.index(arm)
        found = stages(record, arm)
        for row, (_, value) in enumerate(found):
            axes.barh(row, value, height=0.7, **bar_style(at))
            axes.text(value, row, f" {number(value)}", va="center", ha="left", fontsize=SIZES[layout] - 1.5)
        axes.set_yticks(range(len(found)), [title for title, _ in found])
        axes.set_ylim(lines - 0.5, -0.5)
        axes.set_title(short(arm))
        _megabytes(axes, top * 1.22, layout)
    return figure


def against_context(record: Record, layout: Layout) -> Figure:
    """Markers: measured peaks; lines: predicted from shapes; one panel per phase and batch."""
    batches = sorted({row.batch for row in record.rows if row.phase == "decode" and row.batch})
    wanted = [(phase, batch) for batch in batches for phase in ("prefill", "decode")
              if record.over_seeds(phase, "peak_bytes", batch=batch)]  # fmt: skip
    figure, every = panels(layout, len(wanted), 2.9)
    for axes, (phase, batch) in zip(every, wanted, strict=True):
        for at, arm in enumerate(record.arms):
            colour = colour_of(at)
            for metric, style in (
                ("peak_bytes", {"linestyle": "none", "marker": marker_of(at), "markersize": 5.2}),
                ("peak_bytes_analytic", {"linestyle": line_of(at), "linewidth": 1.5}),
            ):
                rows = [row for row in record.over_seeds(phase, metric, arm, batch=batch) if row.value]
                points = sorted((row.context or 0, row.known / 1e6) for row in rows)
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, **style)
        axes.set_title(f"{phase.capitalize()}, batch {batch}")
        axes.set_ylabel("peak, MB")
        loglog(axes, record.contexts(phase, "peak_bytes"))
    drawn = {row.arm for phase, _ in wanted for metric in ("peak_bytes", "peak_bytes_analytic")
             for row in record.over_seeds(phase, metric) if row.value}  # fmt: skip
    legend(figure, record.arms, layout, drawn=drawn)
    return figure


def training_split(record: Record, layout: Layout) -> Figure:
    """Stacked counts per arm and context, and the measured peak as a line across the bar."""
    lines = [(arm, context) for arm in record.arms for context in record.contexts("train", "peak_bytes")
             if record.over_seeds("train", "peak_bytes", arm, context=context)]  # fmt: skip
    names = [*PARTS.values(), "measured peak"]
    of_legend = math.ceil(len(names) / legend_columns(names, layout))
    figure, (axes,) = panels(layout, 1, 0.24 * len(lines) + 0.19 * of_legend + 0.6, stacked=False)
    top = 0.0
    for row, (arm, context) in enumerate(lines):
        left = 0.0
        for at, metric in enumerate(PARTS):
            value = sum(one.known for one in record.over_seeds("train", metric, arm, context=context)) / 1e6
            axes.barh(row, value, left=left, height=0.7, **bar_style(at))
            left += value
        peak = sum(one.known for one in record.over_seeds("train", "peak_bytes", arm, context=context)) / 1e6
        axes.plot([peak, peak], [row - 0.42, row + 0.42], color=INK, linewidth=1.8)
        top = max(top, left, peak)
    axes.set_yticks(range(len(lines)), [f"{short(arm, 16)}, {context:,}" for arm, context in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    _megabytes(axes, top * 1.06, layout)
    legend(figure, names, layout, [*bar_keys(len(PARTS)), Line2D([], [], color=INK, linewidth=1.8)])
    return figure


def _megabytes(axes: Axes, top: float, layout: Layout) -> None:
    axes.set_xlim(0, top)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(4 if layout == "narrow" else 6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel("memory, MB")
