"""Figures of models taken apart on one prompt."""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from experiments.report.drawing import (
    ARMS,
    GRID,
    INK,
    MUTED,
    PAPER,
    SIZES,
    WIDTHS,
    Layout,
    colour_of,
    legend,
    line_style,
    log_y,
    marker_of,
    panels,
    short,
)
from experiments.report.trace import HEADS, SHOWN, attention, experts, last, memory, mixing, sampled
from experiments.tracing import Traced

LEVELS = 12  # shades of a heat map
LABELS = 24  # tokens named on an axis, at most
Plot = Callable[[Layout], Figure]


def plots(traced: Sequence[Traced]) -> dict[str, Plot]:
    """Every figure that these models have; the names are those of `report.trace.document`."""
    found: dict[str, Plot] = {
        "stream": lambda layout: _stream(traced, layout),
        "lens": lambda layout: _lens(traced, layout),
    }
    if any(mixing(one) for one in traced):
        found["mixing"] = lambda layout: _mixing(traced, layout)
    for at, one in enumerate(traced):
        if attention(one):
            found[f"attention-{at}"] = lambda layout, one=one: _attention(one, layout)
        if memory(one):
            found[f"memory-{at}"] = lambda layout, one=one, at=at: _written(one, at, layout)
        if experts(one):
            found[f"experts-{at}"] = lambda layout, one=one: _experts(one, layout)
    if any(memory(one) for one in traced):
        found["half-life"] = lambda layout: _half_life(traced, layout)
    return found


# --- by depth ---------------------------------------------------------------------------------------


def _stream(traced: Sequence[Traced], layout: Layout) -> Figure:
    figure, (left, right) = panels(layout, 2, 2.9)
    for at, one in enumerate(traced):
        stages = [stage for stage in one.trace.stages if stage.rms is not None]
        _line(left, range(len(stages)), [stage.rms or 0.0 for stage in stages], at)
        changes = [stage.change for stage in stages[1:] if stage.change is not None]
        _line(right, range(1, len(changes) + 1), changes, at)
    left.set_title("Size of the residual stream")
    left.set_ylabel("root mean square")
    right.set_title("What each block changed")
    right.set_ylabel("change, relative to its input")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        _depth(axes, traced)
    legend(figure, [one.subject.name for one in traced], layout)
    return figure


def _lens(traced: Sequence[Traced], layout: Layout) -> Figure:
    figure, (left, right) = panels(layout, 2, 2.9)
    for at, one in enumerate(traced):
        depths = range(len(one.trace.lens))
        _line(left, depths, [depth.chosen_probability for depth in one.trace.lens], at)
        _line(right, depths, [depth.chosen_rank for depth in one.trace.lens], at)
    left.set_title("Probability of the chosen token")
    left.set_ylabel("probability")
    left.set_ylim(0, 1.05 * max(depth.chosen_probability for one in traced for depth in one.trace.lens))
    right.set_title("Its place among all tokens")
    right.set_ylabel("rank, 1 is the likeliest")
    log_y(right, 1, max(2, *(depth.chosen_rank for one in traced for depth in one.trace.lens)))
    right.invert_yaxis()
    for axes in (left, right):
        _depth(axes, traced)
    legend(figure, [one.subject.name for one in traced], layout)
    return figure


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], at: int) -> None:
    axes.plot(x, y, **line_style(at, markevery=max(1, len(x) // 12)))


def _depth(axes: Axes, traced: Sequence[Traced]) -> None:
    deepest = max(len(one.trace.blocks) for one in traced)
    axes.set_xlim(-0.04 * deepest - 0.1, 1.04 * deepest + 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("blocks passed; 0 is the embedding")


# --- tokens by tokens -------------------------------------------------------------------------------


def _mixing(traced: Sequence[Traced], layout: Layout) -> Figure:
    """Models side by side, from the first to the last of the blocks shown; of one model its blocks side by side."""
    columns = [(one, mixing(one)) for one in traced if mixing(one)]
    rows = max(len(layers) for _, layers in columns)
    if layout == "narrow" or len(columns) == 1:
        cells = [(one, layer) for one, layers in columns for layer in layers]
        figure, every = _grid(len(cells), 2 if layout == "narrow" else len(cells), layout)
    else:
        cells = [(one, layers[row] if row < len(layers) else None) for row in range(rows) for one, layers in columns]
        figure, every = _grid(len(cells), len(columns), layout)
    for axes, (one, layer) in zip(every, cells, strict=True):
        if layer is None:
            axes.set_axis_off()
            continue
        _heat(axes, last(layer.matrix), last(layer.seen), one.names)
        axes.set_title(f"{short(one.subject.name, 16)}, block {layer.number}")
    _key(figure, layout, "of the largest", masked=True)
    return figure


def _attention(one: Traced, layout: Layout) -> Figure:
    """A row of heads for each block shown."""
    layers = attention(one)
    heads = sampled(range(layers[0].said.weights.shape[0]), HEADS)
    across = min(len(heads), 4 if layout == "wide" else 2)
    cells = [(layer, head) for layer in layers for head in sampled(range(layer.said.weights.shape[0]), HEADS)]
    figure, every = _grid(len(cells), across, layout)
    for axes, (layer, head) in zip(every, cells, strict=True):
        _heat(axes, last(layer.said.weights[head].numpy()), last(layer.said.seen.numpy()), one.names)
        axes.set_title(f"block {layer.number}, head {head + 1}")
    _key(figure, layout, "weight", masked=True)
    return figure


def _experts(one: Traced, layout: Layout) -> Figure:
    layers = experts(one)
    count = layers[0].said.probability.shape[1]
    figure = Figure(figsize=(WIDTHS[layout], len(layers) * (0.75 + 0.17 * count) + 0.3), layout="constrained")
    for row, layer in enumerate(layers):
        axes = figure.add_subplot(len(layers), 1, row + 1)
        choice = layer.said
        weight = np.zeros(tuple(choice.probability.shape))
        np.put_along_axis(weight, choice.chosen.numpy(), choice.weight.float().numpy(), 1)
        _heat(axes, last(weight, rows_only=True).T, None, one.names, rows=False)
        axes.set_yticks(range(count), [str(expert + 1) for expert in range(count)])
        axes.set_ylabel("expert")
        axes.set_title(f"block {layer.number}")
    _key(figure, layout, "weight", masked=False)
    return figure


def _grid(count: int, across: int, layout: Layout) -> tuple[Figure, list[Axes]]:
    across = min(across, count)
    down = math.ceil(count / across)
    side = min(WIDTHS[layout] / across, 3.6)
    figure = Figure(figsize=(WIDTHS[layout], down * (side + 0.25) + 0.35), layout="constrained")
    return figure, [figure.add_subplot(down, across, at + 1) for at in range(count)]


def _heat(axes: Axes, matrix: np.ndarray, seen: np.ndarray | None, names: Sequence[str], rows: bool = True) -> None:
    """matrix (R, S) from 0 to 1, its square root as a shade; what is not seen (R, S) is hatched. S are the last tokens
    of `names`, and R as well where `rows`."""
    R, S = matrix.shape
    shade = (np.sqrt(np.clip(matrix, 0, 1)) * LEVELS).round().astype(int)
    if seen is not None:
        shade[~seen] = 0
        _fill(axes, ~seen, facecolor=GRID, hatch="//////", edgecolor=PAPER)
    for level in range(1, LEVELS + 1):
        _fill(axes, shade == level, facecolor=ARMS[0], alpha=level / LEVELS, edgecolor="none")
    axes.set_xlim(-0.5, S - 0.5)
    axes.set_ylim(R - 0.5, -0.5)
    axes.set_aspect("equal" if rows else "auto")
    axes.grid(visible=False)
    size = SIZES["wide"] - 3.2
    axes.tick_params(length=1.5, pad=1.5, labelsize=size)
    width = axes.get_position().width * axes.figure.get_size_inches()[0] * 72  # type: ignore[union-attr]
    step = max(1, math.ceil(S / LABELS), math.ceil(S * 1.25 * size / width))
    shown = list(range(0, S, step))
    labels = [_label(name) for name in names[-S:][::step]]
    axes.set_xticks(shown, labels, rotation=90)
    if rows:
        axes.set_yticks(shown, labels)


def _fill(axes: Axes, where: np.ndarray, **style: object) -> None:
    """One patch over all cells (R, S) that are true, a rectangle for each run in a row."""
    vertices: list[tuple[float, float]] = []
    for row, line in enumerate(where):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(int)))
        for start, end in edges.reshape(-1, 2):
            left, right, top, bottom = start - 0.5, end - 0.5, row - 0.5, row + 0.5
            vertices += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    if vertices:
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(vertices) // 5)
        axes.add_patch(PathPatch(Path(vertices, codes), linewidth=0, **style))  # type: ignore[arg-type]


def _key(figure: Figure, layout: Layout, what: str, masked: bool) -> None:
    shares = (0.02, 0.1, 0.5, 1.0)
    handles: list = [Patch(facecolor=ARMS[0], alpha=share**0.5, edgecolor="none") for share in shares]
    names = [f"{share:g}" + (f" {what}" if share == 1 else "") for share in shares]
    if masked:
        handles.append(Patch(facecolor=GRID, hatch="//////", edgecolor=PAPER, linewidth=0))
        names.append("masked")
    legend(figure, names, layout, handles)


# --- memory -----------------------------------------------------------------------------------------


def _half_life(traced: Sequence[Traced], layout: Layout) -> Figure:
    """For each block the units between the 5th and the 95th percentile, the middle half, and the median."""
    those = [(at, one) for at, one in enumerate(traced) if memory(one)]
    figure, every = panels(layout, len(those), 2.9)
    values: list[float] = []
    for axes, (at, one) in zip(every, those, strict=True):
        for layer in memory(one, every=True):
            lives = layer.said.half_life[:, 1].double().numpy()
            low, quarter, middle, three, high = np.percentile(lives, [5, 25, 50, 75, 95])
            values += [float(low), float(high)]
            axes.plot([layer.number] * 2, [low, high], color=colour_of(at), linewidth=1.3)
            axes.plot([layer.number] * 2, [quarter, three], color=colour_of(at), linewidth=5, solid_capstyle="butt")
            axes.plot(layer.number, middle, marker_of(at), color=PAPER, markeredgecolor=INK, markersize=5)
        axes.set_title(short(one.subject.name))
        axes.set_ylabel("half-life, tokens")
        axes.set_xlabel("block")
        axes.set_xlim(0.4, len(one.trace.blocks) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for axes in every:
        log_y(axes, min(values), max(values))
    return figure


def _written(one: Traced, at: int, layout: Layout) -> Figure:
    """A row for each block shown: what each token wrote, outlined, and what is left of it, filled."""
    layers = memory(one)
    figure = Figure(figsize=(WIDTHS[layout], len(layers) * 1.75 + 0.3), layout="constrained")
    colour = colour_of(at)
    for row, layer in enumerate(layers):
        axes = figure.add_subplot(len(layers), 1, row + 1)
        written, left = (size.double().numpy()[-SHOWN:] for size in (layer.said.written, layer.said.left))
        places = range(len(written))
        axes.bar(places, written, width=0.8, color="none", edgecolor=MUTED, linewidth=0.8)
        axes.bar(places, left, width=0.8, color=colour, edgecolor="none")
        step = max(1, math.ceil(len(written) / (LABELS if layout == "wide" else LABELS // 2)))
        shown = list(places[::step])
        labels = [_label(name) for name in one.names[-len(written) :][::step]]
        axes.set_xticks(shown, labels, rotation=90)
        axes.tick_params(axis="x", length=1.5, labelsize=SIZES["wide"] - 2.5)
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.6, len(written) - 0.4)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.set_ylabel("size")
        axes.set_title(f"block {layer.number}")
    handles = [Patch(facecolor="none", edgecolor=MUTED, linewidth=0.8), Patch(facecolor=colour, edgecolor="none")]
    legend(figure, ["written", "left after the last token"], layout, handles)
    return figure


# --- names ------------------------------------------------------------------------------------------


def _label(name: str) -> str:
    """Short, and of signs that the font has."""
    return short("".join(sign if _drawable(sign) else "□" for sign in name), 9)


@cache
def _drawable(sign: str) -> bool:
    return get_font(findfont(FontProperties(family="DejaVu Sans"))).get_char_index(ord(sign)) != 0
