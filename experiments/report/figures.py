"""Figures as SVG text: drawn once per layout in the light palette, recoloured for the dark one.

The same record gives the same bytes: no dates, a fixed salt for ids, text as outlines of matplotlib's own font.
"""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.numbers import number
from experiments.report import curves, masking_figures, speed_figures, study_figures, vocabulary_figures
from experiments.report.bundles import bundle, tokens_axis
from experiments.report.drawing import (
    DARK,
    INK,
    MUTED,
    RC,
    SIZES,
    Layout,
    bar_keys,
    bar_style,
    colour_of,
    legend,
    line_of,
    line_style,
    loglog,
    marker_of,
    pad_x,
    panels,
    same_y,
    short,
    ticks,
)
from experiments.report.memory_figures import against_context, training_split, waterfall
from experiments.report.record import Record


def draw(record: Record, name: str, layout: Layout) -> str:
    """The figure `name` of PLOTS as SVG text, in the light palette."""
    return svg(lambda layout: PLOTS[name](record, layout), layout)


def variants(drawn: Callable[[Layout], str]) -> dict[str, str]:
    """A figure on a page and on a phone, light and dark, under the names that `formats.html` takes. drawn: its SVG."""
    wide, narrow = drawn("wide"), drawn("narrow")
    return {"wide": wide, "narrow": narrow, "wide-dark": dark(wide), "narrow-dark": dark(narrow)}


def svg(plot: Callable[[Layout], Figure], layout: Layout) -> str:
    size = SIZES[layout]
    settings: Any = RC | {
        "font.size": size, "axes.titlesize": size + 0.5, "axes.labelsize": size, "legend.fontsize": size,
        "xtick.labelsize": size - 0.5, "ytick.labelsize": size - 0.5,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = plot(layout)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # hundredths of a point in outlines, no indentation: half the size
    rounded = re.sub(r'\bd="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), file.getvalue())
    return re.sub(r"\n\s+", "\n", rounded)


def dark(svg: str) -> str:
    """The same figure for a dark page. Every colour must have its counterpart in `DARK`."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: DARK[found[0]], svg)


# --- the figures ------------------------------------------------------------------------------------


def losses(record: Record, layout: Layout) -> Figure:
    figure, (left, right) = panels(layout, 2, 3.1)
    factor, unit = tokens_axis(record)
    for at, arm in enumerate(record.arms):
        for axes, series, points in (
            (left, curves.training(record, arm), False),
            (right, curves.validation(record, arm), True),
        ):
            bundle(axes, series, at, factor, points)
    left.set_title("Training")
    right.set_title("Validation")
    for axes in (left, right):
        axes.set_ylabel("loss, nats/token")
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
    same_y(left, right)
    drawn = {arm for arm in record.arms if curves.training(record, arm) or curves.validation(record, arm)}
    legend(figure, record.arms, layout, drawn=drawn)
    return figure


def sweep_curves(record: Record, layout: Layout) -> Figure:
    """Validation loss for every learning rate, one panel per base arm."""
    bases = curves.sweep_rates(record)
    figure, all_axes = panels(layout, len(bases), 3.0)
    factor, unit = tokens_axis(record)
    rates = sorted({rate for found in bases.values() for rate in found})
    for axes, (base, found) in zip(all_axes, bases.items(), strict=True):
        for rate, arm in found.items():
            bundle(axes, curves.validation(record, arm), rates.index(rate), factor, True)
        axes.set_title(short(base))
        axes.set_ylabel("validation loss, nats/token")
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
    same_y(*all_axes)
    drawn = {f"rate {rate:g}" for found in bases.values() for rate, arm in found.items()
             if curves.validation(record, arm)}  # fmt: skip
    legend(figure, [f"rate {rate:g}" for rate in rates], layout, drawn=drawn)
    return figure


def position(record: Record, layout: Layout) -> Figure:
    figure, (axes,) = panels(layout, 1, 3.3)
    longest = 1.0
    for at, arm in enumerate(record.arms):
        series = curves.positions(record, arm)
        longest = max([longest, *(float(x[-1]) for x, _ in series)])
        bundle(axes, series, at, 1.0, True)
    axes.set_xscale("log", base=2)
    powers = [1 << k for k in range(int(math.log2(longest)) + 2)]
    ticks(axes, powers if len(powers) <= 9 or layout == "wide" else powers[::2])
    axes.set_xlim(0.8, longest * 1.25)
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("loss, nats/token")
    legend(figure, record.arms, layout, drawn={arm for arm in record.arms if curves.positions(record, arm)})
    return figure


def throughput(record: Record, layout: Layout) -> Figure:
    phases = [phase for phase in ("prefill", "decode") if record.contexts(phase, "tokens_per_s")]
    figure, all_axes = panels(layout, len(phases), 3.1)
    for axes, phase in zip(all_axes, phases, strict=True):
        for at, arm in enumerate(record.arms):
            _whiskered(axes, record, arm, at, phase, "tokens_per_s", 1.0)
        axes.set_title(phase.capitalize())
        axes.set_ylabel("tokens per second")
        loglog(axes, record.contexts(phase, "tokens_per_s"))
    legend(figure, record.arms, layout, drawn=record.arms_with((phase, "tokens_per_s") for phase in phases))
    return figure


def memory(record: Record, layout: Layout) -> Figure:
    """Bars per quantity and arm, from the top: loading, prefill, decode."""
    lines = curves.memory_lines(record)
    arms = record.arms
    thick = 0.8 / len(arms)
    inches = 0.20 if len(arms) < 3 else 0.13
    height = len(lines) * (len(arms) * inches + 0.10) + 0.9 + (0.18 * len(arms) if layout == "narrow" else 0.2)
    figure, (axes,) = panels(layout, 1, height, stacked=False)
    top = 0.0
    for row, (_, phase, metric, context) in enumerate(lines):
        if row and phase != lines[row - 1][1]:
            axes.axhline(row - 0.5, color=MUTED, linewidth=0.6)
        for at, arm in enumerate(arms):
            y = row + (at - (len(arms) - 1) / 2) * thick
            found = record.row(arm, phase, metric, context)
            if found is None or found.value is None:
                axes.text(0, y, " not measured", va="center", ha="left", color=MUTED, fontsize=SIZES[layout] - 2)
                continue
            value = found.value / 1e6
            low, high = (end / 1e6 for end in curves.spread(record, found))
            axes.barh(y, value, height=thick * 0.88, **bar_style(at))
            axes.plot([low, high], [y, y], color=INK, linewidth=0.9, solid_capstyle="butt")
            top = max(top, value, high)
            if len(arms) <= 4:
                text = f"  {number(value)}"
                axes.text(max(value, high), y, text, va="center", ha="left", fontsize=SIZES[layout] - 1.5)
    axes.set_yticks(range(len(lines)), [title for title, *_ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(0, top * (1.16 if layout == "wide" else 1.24) or 1)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5 if layout == "narrow" else 7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel("memory, MB")
    legend(figure, arms, layout, bar_keys(len(arms)))
    return figure


def state(record: Record, layout: Layout) -> Figure:
    figure, (axes,) = panels(layout, 1, 3.2)
    contexts = record.contexts("decode", "state_bytes")
    values = [
        row.value
        for row in record.rows
        if row.phase == "decode" and row.metric in ("state_bytes", "state_bytes_analytic") and row.value
    ]
    factor, unit = (1e-6, "MB") if max(values) >= 1e6 else (1e-3, "kB")
    for at, arm in enumerate(record.arms):
        _whiskered(axes, record, arm, at, "decode", "state_bytes", factor, line=False)
        rows = [record.row(arm, "decode", "state_bytes_analytic", context) for context in contexts]
        known = [(row.context, row.value * factor) for row in rows if row is not None and row.value]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour_of(at), linestyle=line_of(at), linewidth=1.4)
    axes.set_ylabel(f"cache or state, {unit}")
    loglog(axes, contexts)
    drawn = record.arms_with([("decode", "state_bytes"), ("decode", "state_bytes_analytic")])
    legend(figure, record.arms, layout, drawn=drawn)
    return figure


def sweep(record: Record, layout: Layout) -> Figure:
    figure, (axes,) = panels(layout, 1, 3.3)
    bases = curves.sweep_rates(record)
    every: set[float] = set()
    for at, (base, rates) in enumerate(bases.items()):
        colour = colour_of(at)
        for seed in record.seeds:
            rows = [
                (rate, record.row(arm, "quality", "validation_bits_per_byte", seed=seed)) for rate, arm in rates.items()
            ]
            known = [(rate, row.value) for rate, row in rows if row is not None and row.value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colour, linewidth=0.7, alpha=0.45)
        rows_by_rate = curves.rate_rows(record, base)
        best = curves.best_rate(record, base)
        xs, ys = [], []
        for rate, row in rows_by_rate.items():
            xs.append(rate)
            ys.append(row.known)
            low, high = curves.spread(record, row)
            axes.plot([rate, rate], [low, high], color=colour, linewidth=1.1)
            if rate == best:
                ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.1}
                axes.plot(rate, row.known, "o", **ring)
        axes.plot(xs, ys, color=colour, linestyle=line_of(at), linewidth=1.9, marker=marker_of(at), markersize=5.5)
        every |= set(rates)
    axes.set_xscale("log")
    ticks(axes, sorted(every), [f"{rate:g}" for rate in sorted(every)])
    pad_x(axes, min(every), max(every))
    axes.margins(y=0.14)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation bits per byte")
    legend(figure, list(bases), layout, drawn={base for base in bases if curves.rate_rows(record, base)})
    return figure


PLOTS: dict[str, Callable[[Record, Layout], Figure]] = {
    "losses": losses,
    "sweep-curves": sweep_curves,
    "position": position,
    "throughput": throughput,
    "memory": memory,
    "state": state,
    "sweep": sweep,
    "memory-waterfall": waterfall,
    "memory-context": against_context,
    "memory-training": training_split,
    "speed-training": speed_figures.training,
    "speed-inference": speed_figures.inference,
    "speed-decode": speed_figures.decode,
    "speed-operators": speed_figures.operators,
    "masking-decoders": masking_figures.decoders,
    "masking-blanks": masking_figures.blanks,
    "lineage": study_figures.lineage,
    "sparse": study_figures.sparse,
    "moe": study_figures.moe,
    "vocabulary-quality": vocabulary_figures.quality,
    "vocabulary-speed": vocabulary_figures.speed,
    "vocabulary-state": vocabulary_figures.state,
}


# --- parts ------------------------------------------------------------------------------------------


def _whiskered(
    axes: Axes, record: Record, arm: str, at: int, phase: str, metric: str, factor: float, line: bool = True
) -> None:
    xs, ys = [], []
    for context in record.contexts(phase, metric):
        row = record.row(arm, phase, metric, context)
        if row is None or not row.value:
            continue
        low, high = curves.spread(record, row)
        floor = row.value / 4  # an interval that reaches zero has no place on a logarithmic axis
        axes.plot([context] * 2, [max(low, floor) * factor, high * factor], color=colour_of(at), linewidth=1.2)
        xs.append(context)
        ys.append(row.value * factor)
    axes.plot(xs, ys, **line_style(at, linestyle=line_of(at) if line else "none"))
