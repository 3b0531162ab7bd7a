"""How every figure is drawn: palette, lines and markers, axes, legend.

Arms differ by colour (after Okabe and Ito), by line and by marker, so that none of the three is needed alone.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

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


def colour_of(at: int) -> str:
    """Of the at-th arm. The ninth has the first one's again, with another line, marker and hatch."""
    return ARMS[at % len(ARMS)]


def line_of(at: int) -> Any:
    return LINES[(at + at // len(ARMS)) % len(LINES)]


def marker_of(at: int) -> str:
    return MARKERS[(at + at // len(ARMS)) % len(MARKERS)]


def hatch_of(at: int) -> str:
    return HATCHES[(at + at // len(ARMS)) % len(HATCHES)]


def line_style(at: int, **other: Any) -> dict[str, Any]:
    """For `Axes.plot`, of the at-th arm's points. other: in place of what is usual, or beside it."""
    return {
        "color": colour_of(at), "linestyle": line_of(at), "linewidth": 1.7, "marker": marker_of(at), "markersize": 5.2,
        "markeredgecolor": PAPER, "markeredgewidth": 0.6,
    } | other  # fmt: skip


def bar_style(at: int) -> dict[str, Any]:
    """For `Axes.barh`, of the at-th arm, or of the at-th of what the bars show beside each other."""
    return {"color": colour_of(at), "hatch": hatch_of(at), "edgecolor": PAPER, "linewidth": 0}


def bar_keys(count: int) -> list[Patch]:
    """For `legend`, of the first `count` of `bar_style`."""
    return [Patch(facecolor=colour_of(at), hatch=hatch_of(at), edgecolor=PAPER, linewidth=0) for at in range(count)]


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
WIDTHS = {"wide": 7.2, "narrow": 3.7}  # inches


def panels(layout: Layout, count: int, height: float, stacked: bool = True) -> tuple[Figure, list[Axes]]:
    """Side by side (at most two in a row) on a page, stacked on a phone; `height` in inches of one panel."""
    across = 1 if layout == "narrow" else min(count, 2)
    down = math.ceil(count / across)
    tall = height * (0.84 if layout == "narrow" and stacked else 1.0)
    figure = Figure(figsize=(WIDTHS[layout], tall * down), layout="constrained")
    axes = [figure.add_subplot(down, across, at + 1) for at in range(count)]
    return figure, axes


def loglog(axes: Axes, contexts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    ticks(axes, contexts)
    pad_x(axes, contexts[0], contexts[-1])
    axes.set_xlabel("context, tokens")
    log_y(axes, axes.dataLim.ymin, axes.dataLim.ymax)


def log_y(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis over `low` to `high`, with labels at 1, 2 and 5, or at powers of ten where these are many."""
    axes.set_yscale("log")
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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))


def ticks(axes: Axes, at: Sequence[float], labels: Sequence[str] | None = None) -> None:
    axes.set_xticks(at, labels or [f"{tick:,}" for tick in at])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if len(at) > 6 and labels:
        axes.tick_params(axis="x", labelrotation=45)


def pad_x(axes: Axes, low: float, high: float) -> None:
    """Room on both sides of a logarithmic axis, also where it has a single point."""
    pad = (high / low) ** 0.06 if high > low else 2.0
    axes.set_xlim(low / pad, high * pad)


def same_y(*every: Axes) -> None:
    limits = [axes.get_ylim() for axes in every]
    for axes in every:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def short(name: str, most: int = 26) -> str:
    """At most so many letters, of the beginning and the end: names differ in either."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"


def legend_columns(names: Sequence[str], layout: Layout) -> int:
    longest = max(len(short(name)) for name in names)
    return max(1, min(len(names), (36 if layout == "narrow" else 84) // (longest + 7)))


def legend(
    figure: Figure, names: Sequence[str], layout: Layout, handles: list | None = None,
    drawn: Collection[str] | None = None,
) -> None:  # fmt: skip
    """names: of the arms in order, of which those that are `drawn` are told, or all; handles: of what is no arm's
    line."""
    if handles is None:
        places = [at for at, name in enumerate(names) if drawn is None or name in drawn]
        names = [names[at] for at in places]
        handles = [
            Line2D(
                [], [], color=colour_of(at), linestyle=line_of(at), linewidth=1.8, marker=marker_of(at), markersize=5
            )
            for at in places
        ]
    if not names:
        return
    # labels are set afterwards: matplotlib leaves out those that begin with an underscore
    told = figure.legend(
        handles, [str(at) * (len(short(name))) for at, name in enumerate(names)], loc="outside upper left",
        ncols=legend_columns(names, layout), frameon=False, handlelength=2.6, borderaxespad=0.2, columnspacing=1.4,
    )  # fmt: skip
    for text, name in zip(told.get_texts(), names, strict=True):
        text.set_text(short(name))
