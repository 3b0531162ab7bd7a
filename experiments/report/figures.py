"""Figures as SVG text: drawn once per layout in the light palette, recoloured for the dark one.

The same record gives the same bytes: no dates, a fixed salt for ids, text as outlines of matplotlib's own font.
Arms differ by colour (after Okabe and Ito), by line and by marker, so that none of the three is needed alone.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from experiments.report import curves
from experiments.report.numbers import number
from experiments.report.record import Record

Layout = Literal["wide", "narrow"]  # a page and a phone

INK, MUTED, GRID, PAPER = "#22262b", "#5d656e", "#e1e4e8", "#fefefe"
ARMS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#56b4e9", "#4a4f57", "#a39a00")
DARK = {
    INK: "#e3e6ea", MUTED: "#a2abb5", GRID: "#343b44", PAPER: "#15181c",
    "#0072b2": "#5cb8ec", "#d55e00": "#f4874b", "#009e73": "#35c79c", "#cc79a7": "#e3a0c4",
    "#b07d00": "#e8b23c", "#56b4e9": "#3f8fd0", "#4a4f57": "#c9ced6", "#a39a00": "#efe45a",
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)),
                (0, (2.5, 2.5)), (0, (1, 3)))  # fmt: skip
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "||||", "++++")

RC: dict[str, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "lab-report",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "axes.unicode_minus": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.color": INK,
    "patch.edgecolor": INK,
    "hatch.color": PAPER,
    "hatch.linewidth": 0.8,
    "path.simplify": True,
}
SIZES = {"wide": 9.0, "narrow": 8.2}  # points


def draw(record: Record, name: str, layout: Layout) -> str:
    """The figure `name` of PLOTS as SVG text, in the light palette."""
    size = SIZES[layout]
    settings: Any = RC | {
        "font.size": size, "axes.titlesize": size + 0.5, "axes.labelsize": size, "legend.fontsize": size,
        "xtick.labelsize": size - 0.5, "ytick.labelsize": size - 0.5,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = PLOTS[name](record, layout)
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
    figure, (left, right) = _panels(layout, 2, 3.1)
    factor, unit = _tokens(record)
    for at, arm in enumerate(record.arms):
        for axes, series, points in (
            (left, curves.training(record, arm), False),
            (right, curves.validation(record, arm), True),
        ):
            _bundle(axes, series, at, factor, points)
    left.set_title("Training")
    right.set_title("Validation")
    for axes in (left, right):
        axes.set_ylabel("loss, nats/token")
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
    _same_y(left, right)
    _legend(figure, record.arms, layout)
    return figure


def sweep_curves(record: Record, layout: Layout) -> Figure:
    """Validation loss for every learning rate, one panel per base arm."""
    bases = curves.sweep_rates(record)
    figure, panels = _panels(layout, len(bases), 3.0)
    factor, unit = _tokens(record)
    rates = sorted({rate for found in bases.values() for rate in found})
    for axes, (base, found) in zip(panels, bases.items(), strict=True):
        for rate, arm in found.items():
            _bundle(axes, curves.validation(record, arm), rates.index(rate), factor, True)
        axes.set_title(_short(base))
        axes.set_ylabel("validation loss, nats/token")
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
    _same_y(*panels)
    _legend(figure, [f"rate {rate:g}" for rate in rates], layout)
    return figure


def position(record: Record, layout: Layout) -> Figure:
    figure, (axes,) = _panels(layout, 1, 3.3)
    longest = 1.0
    for at, arm in enumerate(record.arms):
        series = curves.positions(record, arm)
        longest = max([longest, *(float(x[-1]) for x, _ in series)])
        _bundle(axes, series, at, 1.0, True)
    axes.set_xscale("log", base=2)
    ticks = [1 << k for k in range(int(math.log2(longest)) + 2)]
    _ticks(axes, ticks if len(ticks) <= 9 or layout == "wide" else ticks[::2])
    axes.set_xlim(0.8, longest * 1.25)
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("loss, nats/token")
    _legend(figure, record.arms, layout)
    return figure


def throughput(record: Record, layout: Layout) -> Figure:
    phases = [phase for phase in ("prefill", "decode") if record.contexts(phase, "tokens_per_s")]
    figure, panels = _panels(layout, len(phases), 3.1)
    for axes, phase in zip(panels, phases, strict=True):
        for at, arm in enumerate(record.arms):
            _whiskered(axes, record, arm, at, phase, "tokens_per_s", 1.0)
        axes.set_title(phase.capitalize())
        axes.set_ylabel("tokens per second")
        _loglog(axes, record.contexts(phase, "tokens_per_s"))
    _legend(figure, record.arms, layout)
    return figure


def memory(record: Record, layout: Layout) -> Figure:
    """Bars per quantity and arm, from the top: loading, prefill, decode."""
    lines = curves.memory_lines(record)
    arms = record.arms
    thick = 0.8 / len(arms)
    inches = max(0.20 if len(arms) < 3 else 0.13, 0.12)
    height = len(lines) * (len(arms) * inches + 0.10) + 0.9 + (0.18 * len(arms) if layout == "narrow" else 0.2)
    figure, (axes,) = _panels(layout, 1, height, stacked=False)
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
            style = {"color": ARMS[at % 8], "hatch": HATCHES[at % 8], "edgecolor": PAPER, "linewidth": 0}
            axes.barh(y, value, height=thick * 0.88, **style)
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
    handles = [
        Patch(facecolor=ARMS[at % 8], hatch=HATCHES[at % 8], edgecolor=PAPER, linewidth=0) for at in range(len(arms))
    ]
    _legend(figure, arms, layout, handles)
    return figure


def state(record: Record, layout: Layout) -> Figure:
    figure, (axes,) = _panels(layout, 1, 3.2)
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
            axes.plot(*zip(*known, strict=True), color=ARMS[at % 8], linestyle=LINES[at % 8], linewidth=1.4)
    axes.set_ylabel(f"cache or state, {unit}")
    _loglog(axes, contexts)
    _legend(figure, record.arms, layout)
    return figure


def sweep(record: Record, layout: Layout) -> Figure:
    figure, (axes,) = _panels(layout, 1, 3.3)
    bases = curves.sweep_rates(record)
    every: set[float] = set()
    for at, (base, rates) in enumerate(bases.items()):
        colour = ARMS[at % 8]
        for seed in record.seeds:
            rows = [
                (rate, record.row(arm, "quality", "validation_bits_per_byte", seed=seed)) for rate, arm in rates.items()
            ]
            known = [(rate, row.value) for rate, row in rows if row is not None and row.value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colour, linewidth=0.7, alpha=0.45)
        rows_by_rate = curves.rate_rows(record, base)
        best = curves.best_rate(record, base) if rows_by_rate else None
        xs, ys = [], []
        for rate, row in rows_by_rate.items():
            xs.append(rate)
            ys.append(row.known)
            low, high = curves.spread(record, row)
            axes.plot([rate, rate], [low, high], color=colour, linewidth=1.1)
            if rate == best:
                axes.plot(
                    rate,
                    row.known,
                    "o",
                    markersize=13,
                    markerfacecolor="none",
                    markeredgecolor=INK,
                    markeredgewidth=1.1,
                )
        axes.plot(
            xs,
            ys,
            color=colour,
            linestyle=LINES[at % 8],
            linewidth=1.9,
            marker=MARKERS[at % 8],
            markersize=5.5,
        )
        every |= set(rates)
    axes.set_xscale("log")
    _ticks(axes, sorted(every), [f"{rate:g}" for rate in sorted(every)])
    _pad_x(axes, min(every), max(every))
    axes.margins(y=0.14)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation bits per byte")
    _legend(figure, list(bases), layout)
    return figure


PLOTS: dict[str, Callable[[Record, Layout], Figure]] = {
    "losses": losses,
    "sweep-curves": sweep_curves,
    "position": position,
    "throughput": throughput,
    "memory": memory,
    "state": state,
    "sweep": sweep,
}


# --- parts ------------------------------------------------------------------------------------------


def _panels(layout: Layout, panels: int, height: float, stacked: bool = True) -> tuple[Figure, list[Axes]]:
    """Side by side (at most two in a row) on a page, stacked on a phone; `height` in inches of one panel."""
    across = 1 if layout == "narrow" else min(panels, 2)
    down = math.ceil(panels / across)
    width = 3.7 if layout == "narrow" else 7.2
    tall = height * (0.84 if layout == "narrow" and stacked else 1.0)
    figure = Figure(figsize=(width, tall * down), layout="constrained")
    axes = [figure.add_subplot(down, across, at + 1) for at in range(panels)]
    return figure, axes


def _bundle(axes: Axes, series: list[curves.Series], at: int, factor: float, points: bool) -> None:
    """Every seed thin, their mean bold."""
    colour = ARMS[at % 8]
    for x, y in series if len(series) > 1 else []:
        axes.plot(*_thinned(x * factor, y), color=colour, linewidth=0.7, alpha=0.5)
    middle = curves.mean(series)
    if middle is not None:
        x, y = _thinned(middle[0] * factor, middle[1])
        every = max(1, len(x) // 12)
        style = {"marker": MARKERS[at % 8], "markersize": 4.2, "markevery": every} if points else {}
        axes.plot(x, y, color=colour, linestyle=LINES[at % 8], linewidth=1.8, **style)


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> curves.Series:
    """At most about `most` points, the first and the last among them: finer than any screen here."""
    if len(x) <= most:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))
    return x[keep], y[keep]


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
        axes.plot([context] * 2, [max(low, floor) * factor, high * factor], color=ARMS[at % 8], linewidth=1.2)
        xs.append(context)
        ys.append(row.value * factor)
    style = LINES[at % 8] if line else "none"
    axes.plot(
        xs, ys, color=ARMS[at % 8], linestyle=style, linewidth=1.7, marker=MARKERS[at % 8], markersize=5.2,
        markeredgecolor=PAPER, markeredgewidth=0.6,
    )  # fmt: skip


def _loglog(axes: Axes, contexts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _ticks(axes, contexts)
    _pad_x(axes, contexts[0], contexts[-1])
    axes.set_xlabel("context, tokens")
    low, high = axes.dataLim.ymin, axes.dataLim.ymax
    ladder = [
        m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for m in (1, 2, 5)
    ]
    bottom = max(step for step in ladder if step <= low)
    top = min(step for step in ladder if step >= high)
    shown = [step for step in ladder if bottom <= step <= top]
    if len(shown) > 8:
        shown = [step for step in shown if math.isclose(math.log10(step) % 1, 0, abs_tol=1e-9)]
    axes.set_ylim(bottom / 1.04, top * 1.04)
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _ticks(axes: Axes, at: Sequence[float], labels: Sequence[str] | None = None) -> None:
    axes.set_xticks(at, labels or [f"{tick:,}" for tick in at])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if len(at) > 6 and labels:
        axes.tick_params(axis="x", labelrotation=45)


def _pad_x(axes: Axes, low: float, high: float) -> None:
    """Room on both sides of a logarithmic axis, also where it has a single point."""
    pad = (high / low) ** 0.06 if high > low else 2.0
    axes.set_xlim(low / pad, high * pad)


def _same_y(*panels: Axes) -> None:
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _tokens(record: Record) -> tuple[float, str]:
    last = max((curve.tokens[-1] for arm in record.curves.values() for curve in arm.values()), default=0)
    return (1e-6, "tokens, millions") if last >= 2e6 else (1e-3, "tokens, thousands")


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _legend(figure: Figure, names: Sequence[str], layout: Layout, handles: list | None = None) -> None:
    if handles is None:
        handles = [
            Line2D(
                [],
                [],
                color=ARMS[at % 8],
                linestyle=LINES[at % 8],
                linewidth=1.8,
                marker=MARKERS[at % 8],
                markersize=5,
            )
            for at in range(len(names))
        ]
    longest = max(len(_short(name)) for name in names)
    room = 36 if layout == "narrow" else 84
    columns = max(1, min(len(names), room // (longest + 7)))
    # labels are set afterwards: matplotlib leaves out those that begin with an underscore
    legend = figure.legend(
        handles, [str(at) * (len(_short(name))) for at, name in enumerate(names)], loc="outside upper left",
        ncols=columns, frameon=False, handlelength=2.6, borderaxespad=0.2, columnspacing=1.4,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(_short(name))
