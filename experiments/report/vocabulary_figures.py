"""Figures of the vocabulary study."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import curves
from experiments.report.drawing import Layout, colour_of, legend, line_style, loglog, pad_x, panels, ticks
from experiments.report.record import Record
from experiments.report.vocabulary import by_arm, lines, sizes

ENTRIES = "entries of the vocabulary"


def quality(record: Record, layout: Layout) -> Figure:
    figure, (left, right) = panels(layout, 2, 3.0)
    _draw(left, record, "text", "tokens_per_byte")
    _draw(right, record, "quality", "test_bits_per_byte")
    left.set_ylim(bottom=0)
    for axes, title, unit in ((left, "Tokens", "tokens per byte"), (right, "Quality", "test bits per byte")):
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xscale("log", base=2)
        _entries(axes, record)
    _legend(figure, record, layout, [("text", "tokens_per_byte"), ("quality", "test_bits_per_byte")])
    return figure


def speed(record: Record, layout: Layout) -> Figure:
    phases = [
        phase for phase in ("train", "decode") if any(lines(record, a, phase, "bytes_per_s") for a in by_arm(record))
    ]
    wanted = [(phase, metric) for phase in phases for metric in ("tokens_per_s", "bytes_per_s")]
    figure, every = panels(layout, len(wanted), 2.8)
    for axes, (phase, metric) in zip(every, wanted, strict=True):
        axes.set_yscale("log")
        _draw(axes, record, phase, metric)
        axes.set_title("Training" if phase == "train" else "Decode")
        axes.set_ylabel("tokens per second" if metric == "tokens_per_s" else "bytes of text per second")
        _loglog(axes, record)
    _legend(figure, record, layout, wanted)
    return figure


def state(record: Record, layout: Layout) -> Figure:
    figure, (axes,) = panels(layout, 1, 3.0)
    axes.set_yscale("log")
    _draw(axes, record, "model", "state_bytes_per_byte")
    axes.set_ylabel("bytes per byte of text")
    _loglog(axes, record)
    _legend(figure, record, layout, [("model", "state_bytes_per_byte")])
    return figure


def _draw(axes: Axes, record: Record, phase: str, metric: str) -> None:
    """A line per arm over the sizes, with intervals where rows have them."""
    for at, arm in enumerate(by_arm(record)):
        found = lines(record, arm, phase, metric)
        for size, row in found.items():
            low, high = curves.spread(record, row)
            if axes.get_yscale() == "log":  # where an interval that reaches zero has no place
                low = max(low, row.known / 4)
            axes.plot([size] * 2, [low, high], color=colour_of(at), linewidth=1.2)
        axes.plot(list(found), [row.known for row in found.values()], **line_style(at))


def _legend(figure: Figure, record: Record, layout: Layout, wanted: list[tuple[str, str]]) -> None:
    arms = list(by_arm(record))
    legend(figure, arms, layout, drawn={arm for arm in arms for one in wanted if lines(record, arm, *one)})


def _loglog(axes: Axes, record: Record) -> None:
    loglog(axes, sizes(record))
    _entries(axes, record)


def _entries(axes: Axes, record: Record) -> None:
    every = sizes(record)
    ticks(axes, every, [f"{size:,}" for size in every])
    pad_x(axes, every[0], every[-1])
    axes.set_xlabel(ENTRIES)
