"""Figures of the speed study."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.drawing import Layout, colour_of, legend, line_style, loglog, panels
from experiments.report.record import Record
from experiments.report.speed import lines, settings_of


def training(record: Record, layout: Layout) -> Figure:
    return _drawn(record, layout, [("train", "tokens_per_s", "tokens per second", "Training")])


def inference(record: Record, layout: Layout) -> Figure:
    wanted = [("prefill", "tokens_per_s", "tokens per second", "Prefill")]
    wanted.append(("decode", "tokens_per_s", "tokens per second", "Decode"))
    return _drawn(record, layout, wanted)


def decode(record: Record, layout: Layout) -> Figure:
    return _drawn(record, layout, [("decode", "ms_per_token", "ms per token", "Decode")])


def operators(record: Record, layout: Layout) -> Figure:
    return _drawn(record, layout, [("operator", "forward_tokens_per_s", "tokens per second", "Operation alone")])


def _drawn(record: Record, layout: Layout, wanted: list[tuple[str, str, str, str]]) -> Figure:
    """A panel per quantity and per batch, mode and type."""
    each = [(one, where) for one in wanted for where in settings_of(record, one[0])]
    drawn = set()
    figure, every = panels(layout, len(each), 3.0)
    for axes, ((phase, metric, unit, title), where) in zip(every, each, strict=True):
        contexts: set[int] = set()
        for at, arm in enumerate(record.arms):
            found = _line(axes, record, phase, metric, arm, at, where)
            contexts |= found
            drawn |= {arm} if found else set()
        told = [title]
        told += [f"batch {where['batch']}"] if where.get("batch") and phase != "operator" else []
        others = settings_of(record, phase)
        told += [where[name] for name in ("mode", "dtype") if len({other[name] for other in others}) > 1]
        axes.set_title(", ".join(told))
        axes.set_ylabel(unit)
        loglog(axes, sorted(contexts))
    legend(figure, record.arms, layout, drawn=drawn)
    return figure


def _line(axes: Axes, record: Record, phase: str, metric: str, arm: str, at: int, where: dict) -> set[int]:
    found = lines(record, phase, metric, arm, **where)
    contexts = [row.context or 0 for row in found]
    for row in found:
        if row.p5 and row.p95:
            axes.plot([row.context or 0] * 2, [row.p5, row.p95], color=colour_of(at), linewidth=1.2)
    axes.plot(contexts, [row.known for row in found], **line_style(at))
    return set(contexts)
