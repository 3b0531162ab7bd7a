"""Curves of several seeds, as figures draw them against the tokens trained on."""

import numpy as np
from matplotlib.axes import Axes

from experiments.report import curves
from experiments.report.drawing import colour_of, line_of, marker_of
from experiments.report.record import Record


def tokens_axis(record: Record) -> tuple[float, str]:
    """What tokens are multiplied by on an axis, and its label."""
    last = max((curve.tokens[-1] for arm in record.curves.values() for curve in arm.values()), default=0)
    return (1e-6, "tokens, millions") if last >= 2e6 else (1e-3, "tokens, thousands")


def bundle(axes: Axes, series: list[curves.Series], at: int, factor: float, points: bool) -> None:
    """The curves of an arm, the `at`-th: every seed thin, their mean bold; x times `factor`."""
    colour = colour_of(at)
    for x, y in series if len(series) > 1 else []:
        axes.plot(*_thinned(x * factor, y), color=colour, linewidth=0.7, alpha=0.5)
    middle = curves.mean(series)
    if middle is not None:
        x, y = _thinned(middle[0] * factor, middle[1])
        every = max(1, len(x) // 12)
        style = {"marker": marker_of(at), "markersize": 4.2, "markevery": every} if points else {}
        axes.plot(x, y, color=colour, linestyle=line_of(at), linewidth=1.8, **style)


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> curves.Series:
    """At most about `most` points, the first and the last among them: finer than any screen here."""
    if len(x) <= most:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))
    return x[keep], y[keep]
