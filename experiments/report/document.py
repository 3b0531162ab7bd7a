"""A report as a value: sections of paragraphs, tables, figures and text, all plain strings.

Nothing here is markup: each format escapes every string as it prints it.
"""

from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["resolved", "open", "blocked", "warning", "failure", "note"]


@dataclass(frozen=True)
class Cell:
    text: str
    marks: str = ""  # letters of its footnotes, "a" or "a,b"
    strong: bool = False
    unit: str = ""  # of the numbers in its line, with an arrow towards better


@dataclass(frozen=True)
class Column:
    title: str
    numeric: bool = False
    key: bool = False  # names its line; repeated where a terminal splits a wide table
    terminal: bool = True  # whether the plain-text table has it


@dataclass
class Table:
    """Lines of cells under headings; a footnote's letter is given out when its reason first appears."""

    caption: str
    columns: list[Column]
    groups: list[tuple[str, list[list[Cell]]]] = field(default_factory=list)  # heading ("": none), lines
    notes: dict[str, str] = field(default_factory=dict)  # reason -> letter
    kind: str = "table"

    def group(self, heading: str = "") -> None:
        self.groups.append((heading, []))

    def add(self, *cells: "Cell | str") -> None:
        assert len(cells) == len(self.columns)
        if not self.groups:
            self.group()
        self.groups[-1][1].append([Cell(cell) if isinstance(cell, str) else cell for cell in cells])

    def cell(self, text: str, *reasons: str | None, strong: bool = False) -> Cell:
        marks = [self.notes.setdefault(reason, _letters(len(self.notes))) for reason in reasons if reason]
        return Cell(text, ",".join(dict.fromkeys(marks)), strong)

    @property
    def empty(self) -> bool:
        return not any(lines for _, lines in self.groups)


def _letters(index: int) -> str:
    letters = ""
    while index >= 0:
        letters = chr(ord("a") + index % 26) + letters
        index = index // 26 - 1
    return letters


@dataclass(frozen=True)
class Text:
    text: str
    terminal: bool = True
    kind: str = "text"


@dataclass(frozen=True)
class Notice:
    tone: Tone
    title: str
    points: tuple[str, ...] = ()
    kind: str = "notice"


@dataclass(frozen=True)
class Verdict:
    """One headline: the sentence, how it stands, and the numbers behind it."""

    tone: Tone
    sentence: str
    standing: str
    numbers: str
    kind: str = "verdict"


@dataclass(frozen=True)
class Figure:
    """name: of what is drawn, by `figures.PLOTS` for a run and by `trace_figures.plots` for a trace. alt: in numbers,
    what is seen."""

    name: str
    alt: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Code:
    label: str
    text: str
    folded: bool = False
    prompt: str = ""  # the part of `text` that was given rather than generated, shown before it
    kind: str = "code"


Block = Table | Text | Notice | Verdict | Figure | Code


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    intro: str
    blocks: list[Block]
    terminal: bool = True  # whether the plain-text table shows it


@dataclass(frozen=True)
class Document:
    title: str
    facts: list[tuple[str, str]]
    notices: list[Notice]
    sections: list[Section]
