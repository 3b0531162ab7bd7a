"""The report: a pure function of a run directory.

`write_report` leaves report.html, report.md and figures/*.svg in it; `render` returns one format as text;
`frame` gives the rows to a notebook. The same directory gives the same bytes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from experiments import store
from experiments.errors import EnvironmentLacksError, SpecError
from experiments.report import content, formats
from experiments.report.document import Document, Figure
from experiments.report.record import COLUMNS, Record, read
from models.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from experiments.tracing import Traced

__all__ = ["FORMATS", "Format", "frame", "render", "render_trace", "write_report", "write_text"]

Format = Literal["table", "md", "html", "csv", "json"]
FORMATS: tuple[str, ...] = get_args(Format)


def write_report(run: Path) -> None:
    """Write report.html, report.md and figures/*.svg into the run directory, each file atomically.

    Raises SpecError or RunFailedError where `run` holds no usable result, EnvironmentLacksError where it
    cannot be written.
    """
    record = read(run)
    document = content.document(record)
    drawn = _drawn(record, document)
    files = {f"figures/{name}.svg": variants["wide"] for name, variants in drawn.items()}
    files |= {"report.md": formats.markdown(document), "report.html": formats.html(document, drawn)}
    for name, text in files.items():
        write_text(Path(run) / name, text)


def render(run: Path, format: Format) -> str:
    """The run as text: "table" for a terminal, "md", "html", "csv" (the rows), "json" (result.json itself).

    Markdown links to the figures that `write_report` writes. Raises as `write_report`, and SpecError for an
    unknown format.
    """
    if format not in FORMATS:
        raise SpecError(f"unknown format '{format}': {nearest(format, FORMATS)}")
    if format == "csv":
        return frame(run).to_csv(index=False, lineterminator="\n")
    record = read(run)
    if format == "json":
        return record.result_text
    document = content.document(record)
    if format == "html":
        return formats.html(document, _drawn(record, document))
    return formats.markdown(document) if format == "md" else formats.terminal(document)


def render_trace(prompt: str, traced: "Sequence[Traced]", format: Literal["table", "html"]) -> str:
    """Models taken apart on `prompt`, for a terminal or as one self-contained page."""
    from experiments.report import figures, trace, trace_figures

    document = trace.document(prompt, traced)
    if format == "table":
        return formats.terminal(document)
    plots = trace_figures.plots(traced)
    drawn = {
        name: figures.variants(lambda layout, plot=plot: figures.svg(plot, layout)) for name, plot in plots.items()
    }
    return formats.html(document, drawn)


def frame(run: Path) -> "pd.DataFrame":
    """The rows of result.json, one line each; missing whole numbers (seed, context, batch) are <NA>."""
    import pandas as pd

    rows = [[getattr(row, name) for name in COLUMNS] for row in read(run).rows]
    whole = dict.fromkeys(("seed", "n", "context", "batch"), "Int64")
    real = dict.fromkeys(("value", "ci_low", "ci_high", "p5", "p95"), "Float64")
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(whole | real | {"comparable": "bool"})


def _drawn(record: Record, document: Document) -> dict[str, formats.Drawn]:
    """Every figure of the document on a page and on a phone, light and dark."""
    from experiments.report import figures

    drawn: dict[str, formats.Drawn] = {}
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                name = block.name
                drawn[name] = figures.variants(lambda layout, name=name: figures.draw(record, name, layout))
    return drawn


def write_text(path: Path, text: str) -> None:
    """Atomically. Raises EnvironmentLacksError where it cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        store.write_text(path, text)
    except OSError as error:
        raise EnvironmentLacksError(f"cannot write {path}: {error.strerror}") from None
