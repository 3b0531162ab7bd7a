"""Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from experiments.runner import Event


class Progress:
    """A listener for `experiments.runner.run`, and the context in which its bars are drawn."""

    def __init__(self) -> None:
        # rich honours NO_COLOR by itself
        self.console = Console(file=sys.stderr, highlight=False)
        self.bars: Bars | None = None
        self.begun = time.monotonic()
        self.cells: Any = None
        self.steps: Any = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self.bars = Bars(*columns, console=self.console, transient=True)
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, event: Event) -> None:
        if event.kind in ("note", "warning", "failure", "skip"):
            what = f"{event.kind}: " if event.kind != "note" else ""
            where = f"{event.cell}: " if event.cell else ""
            self._say(f"{what}{where}{event.message}")
        elif self.bars is not None:
            self._advance(self.bars, event)
        elif event.kind == "finish":
            self._say(f"[{event.done}/{event.total}] {event.cell} ({time.monotonic() - self.begun:.0f} s)")

    def _advance(self, bars: Bars, event: Event) -> None:
        if event.kind == "start":
            if self.cells is None:
                self.cells = bars.add_task("cells", total=event.total)
                self.steps = bars.add_task("", total=None)
            bars.reset(self.steps, description=escape(event.cell or ""), total=None)
            bars.update(self.cells, completed=event.done)
        elif event.kind == "step":
            bars.update(self.steps, description=escape(event.cell or ""), completed=event.done, total=event.total)
        elif event.kind == "finish":
            bars.update(self.cells, completed=event.done)

    def _say(self, line: str) -> None:
        self.console.print(escape(line), soft_wrap=True)
