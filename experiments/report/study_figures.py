"""Figures of the studies that train and say more than the comparison."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.numbers import number, scale
from experiments.report import curves
from experiments.report import lineage as lineage_study
from experiments.report.drawing import (
    ARMS,
    INK,
    SIZES,
    Layout,
    bar_keys,
    bar_style,
    colour_of,
    legend,
    line_style,
    loglog,
    marker_of,
    panels,
    short,
    ticks,
)
from experiments.report.record import Record
from experiments.report.sparse import CUT


def lineage(record: Record, layout: Layout) -> Figure:
    """From the oldest arm down: test bits per byte, and the cache or state that it keeps."""
    kept = lineage_study.kept(record)
    figure, every = panels(layout, 2 if kept else 1, 0.26 * len(record.arms) + 0.8, stacked=False)
    quality = every[0]
    for row in lineage_study.quality(record):
        at = record.arms.index(row.arm)
        low, high = curves.spread(record, row)
        quality.plot([low, high], [at, at], color=colour_of(at), linewidth=1.6)
        quality.plot(row.known, at, color=colour_of(at), marker=marker_of(at), markersize=7, markeredgewidth=0)
    quality.margins(x=0.1)
    quality.set_title("Quality")
    quality.set_xlabel("test bits per byte")
    if kept:
        factor, unit = scale([row.known / record.batch for row in kept], "bytes")
        for row in kept:
            at = record.arms.index(row.arm)
            value = row.known / record.batch * factor
            every[1].plot(value, at, color=colour_of(at), marker=marker_of(at), markersize=7, markeredgewidth=0)
            every[1].annotate(number(value), (value, at), xytext=(6, 0), textcoords="offset points", va="center",
                              color=INK, fontsize=SIZES[layout] - 1.5)  # fmt: skip
        every[1].set_xscale("log")
        every[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        every[1].xaxis.set_minor_formatter(NullFormatter())
        every[1].margins(x=0.2)
        every[1].set_title("Memory of the text")
        every[1].set_xlabel(f"cache or state of a sequence\nafter {kept[0].context:,} tokens, {unit}")
    for axes in every:
        axes.set_yticks(range(len(record.arms)), [short(arm, 16) for arm in record.arms])
        axes.set_ylim(len(record.arms) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    return figure


def sparse(record: Record, layout: Layout) -> Figure:
    """The loss of every window less that of full attention by position; the cache of every arm over context lengths."""
    contexts = record.contexts("decode", "state_bytes")
    figure, every = panels(layout, 2 if contexts else 1, 3.1)
    longest, most = 1.0, 0.0
    for one in (one for one in record.findings if one["kind"] == "quality"):
        at, curve = record.arms.index(one["arm"]), one["curve"]
        longest = max(longest, curve["positions"][-1])
        most = max([most, *map(abs, curve["difference"])])
        for x, low, high in zip(curve["positions"], curve["ci_low"], curve["ci_high"], strict=True):
            if low is not None and high is not None:
                every[0].plot([x, x], [low, high], color=colour_of(at), linewidth=0.8, alpha=0.6)
        _line(every[0], curve["positions"], curve["difference"], at)
        every[0].axvline(min(one["windows"]), color=colour_of(at), linewidth=0.9, linestyle=":")
    every[0].axhline(0, color=INK, linewidth=0.9)
    if most:
        low, high = every[0].get_ylim()
        every[0].set_ylim(max(low, -CUT * most), min(high, CUT * most))
    every[0].set_xscale("log", base=2)
    powers = [1 << k for k in range(int(math.log2(longest)) + 2)]
    ticks(every[0], powers[::2])
    every[0].set_xlim(0.8, longest * 1.25)
    every[0].set_title("Loss less that of full attention")
    every[0].set_xlabel("position in the text, tokens")
    every[0].set_ylabel("nats/token")
    if contexts:
        every[1].set_title("Cache")
        batch = record.batch
        factor, unit = scale([row.known / batch for row in record.over_seeds("decode", "state_bytes")], "bytes")
        for at, arm in enumerate(record.arms):
            rows = [row for row in record.over_seeds("decode", "state_bytes", arm) if row.value]
            points = sorted((row.context or 0, row.known / batch * factor) for row in rows)
            _line(every[1], [x for x, _ in points], [y for _, y in points], at)
        every[1].set_ylabel(f"{unit} of a sequence")
        loglog(every[1], contexts)
    compared = {one["arm"] for one in record.findings if one["kind"] == "quality"}
    legend(figure, record.arms, layout, drawn=compared | record.arms_with([("decode", "state_bytes")]))
    return figure


def moe(record: Record, layout: Layout) -> Figure:
    """Bars of bytes by arm, loaded and touched; then a panel per arm with experts, their load by layer."""
    held = [one for one in record.findings if one["kind"] == "bytes"]
    loads = [one for one in record.findings if one["kind"] == "load"]
    batches = list(held[0]["touched_bytes"])
    names = ["must be loaded", *(f"touched at batch {batch}" for batch in batches)]
    figure, every = panels(layout, 1 + len(loads), 0.2 * len(held) * len(names) + 0.9, stacked=False)
    factor, unit = scale([one["loaded_bytes"] for one in held], "bytes")
    thick = 0.8 / len(names)
    for row, one in enumerate(held):
        for at, value in enumerate([one["loaded_bytes"], *(one["touched_bytes"][batch] for batch in batches)]):
            y = row + (at - (len(names) - 1) / 2) * thick
            every[0].barh(y, value * factor, height=thick * 0.88, **bar_style(at))
            every[0].annotate(number(value * factor), (value * factor, y), xytext=(3, 0), textcoords="offset points",
                              va="center", fontsize=SIZES[layout] - 1.5)  # fmt: skip
    every[0].set_yticks(range(len(held)), [short(one["arm"], 16) for one in held])
    every[0].set_ylim(len(held) - 0.5, -0.5)
    every[0].set_xlim(0, max(one["loaded_bytes"] for one in held) * factor * 1.2)
    every[0].tick_params(axis="y", length=0)
    every[0].grid(axis="y", visible=False)
    every[0].set_title("Weights")
    every[0].set_xlabel(unit)
    for axes, one in zip(every[1:], loads, strict=True):
        for layer, shares in enumerate(one["loads"], 1):
            spots = [layer + 0.5 * (at / max(1, len(shares) - 1) - 0.5) for at in range(len(shares))]
            axes.plot(spots, [share * len(shares) for share in shares], color=ARMS[0], marker="o", markersize=3.5,
                      linewidth=0.8)  # fmt: skip
        axes.axhline(1, color=INK, linewidth=0.9)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0.5, len(one["loads"]) + 0.5)
        axes.set_xticks(range(1, len(one["loads"]) + 1, 1 + len(one["loads"]) // 10))
        axes.set_title(f"Experts of {short(one['arm'], 16)}")
        axes.set_xlabel("layer of experts")
        axes.set_ylabel("load over an even share")
    legend(figure, names, layout, bar_keys(len(names)))
    return figure


def _line(axes: Axes, x: list[float], y: list[float], at: int) -> None:
    axes.plot(x, y, **line_style(at, markersize=4.6, markeredgewidth=0.5))
