"""A `Document` as HTML, Markdown and plain text. Each format escapes every string it prints."""

import base64
import io
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text as RichText

from experiments.report.document import Cell, Code, Document, Figure, Notice, Table, Text, Verdict

TERMINAL_WIDTH = 100
GAP = "  "
SIGNS = {
    "resolved": "[+]",
    "open": "[?]",
    "blocked": "[x]",
    "warning": "[!]",
    "failure": "[!]",
    "note": "[i]",
}

Drawn = dict[str, str]  # "wide", "wide-dark", "narrow", "narrow-dark" -> SVG text


# --- HTML -------------------------------------------------------------------------------------------


def html(document: Document, drawn: dict[str, Drawn]) -> str:
    """One self-contained page without scripts. `drawn`: figure name -> its variants."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"uri": _data_uri, "ident": id}
    source = (resources.files("experiments.report") / "page.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(source).render(document=document, drawn=drawn, numbered=_numbered(document))
    return page.rstrip("\n") + "\n"


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _numbered(document: Document) -> dict[int, int]:
    """id of a table or figure -> its number, counted apart."""
    numbers: dict[int, int] = {}
    seen = {"table": 0, "figure": 0}
    for section in document.sections:
        for block in section.blocks:
            if block.kind in seen:
                seen[block.kind] += 1
                numbers[id(block)] = seen[block.kind]
    return numbers


# --- Markdown ---------------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    """The page as Markdown; figures are links to figures/<name>.svg beside it."""
    numbered = _numbered(document)
    lines = [f"# {_md(document.title)}", ""]
    lines += [f"- {_md(name)}: {_md(value)}" for name, value in document.facts] + [""]
    for notice in document.notices:
        lines += _md_notice(notice)
    for section in document.sections:
        lines += [f"## {section.title}", "", _md(section.intro), ""]
        for block in section.blocks:
            lines += _md_block(block, numbered.get(id(block), 0))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def _md_block(block: Any, number: int) -> list[str]:
    if isinstance(block, Text):
        return [_md(block.text), ""]
    if isinstance(block, Notice):
        return _md_notice(block)
    if isinstance(block, Verdict):
        numbers = f"  \n  {_md(block.numbers)}" if block.numbers else ""
        return [f"- {_md(block.sentence)} **{_md(block.standing)}**{numbers}", ""]
    if isinstance(block, Figure):
        caption = f"*Figure {number}.* {_md(block.caption)}"
        return [f"![{_md(block.alt)}](figures/{block.name}.svg)", "", caption, ""]
    if isinstance(block, Code):
        text = (f"{block.prompt}▏" if block.prompt else "") + block.text
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
        return [f"{_md(block.label)}:", "", f"{fence}text", text, fence, ""]
    assert isinstance(block, Table)
    return _md_table(block, number)


def _md_notice(notice: Notice) -> list[str]:
    lines = [f"> **{_md(notice.title)}**"]
    lines += [">", *(f"> - {_md(point)}" for point in notice.points)] if notice.points else []
    return [*lines, ""]


def _md_table(table: Table, number: int) -> list[str]:
    lines = [f"*Table {number}.* {_md(table.caption)}.", ""]
    lines.append("| " + " | ".join(_md(column.title) for column in table.columns) + " |")
    lines.append("|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|")
    for heading, body in table.groups:
        if heading:
            lines.append("| " + " | ".join([f"**{_md(heading)}**"] + [""] * (len(table.columns) - 1)) + " |")
        lines += ["| " + " | ".join(_md_cell(cell) for cell in cells) + " |" for cells in body]
    lines.append("")
    for reason, letter in table.notes.items():
        lines.append(f"<sup>{letter}</sup> {_md(reason)}  ")
    return [*lines, ""]


def _md_cell(cell: Cell) -> str:
    text = f"**{_md(cell.text)}**" if cell.strong and cell.text else _md(cell.text)
    text += f", {_md(cell.unit)}" if cell.unit else ""
    return f"{text} <sup>{cell.marks}</sup>" if cell.marks else text


def _md(text: str) -> str:
    """`text` on one line as literal Markdown: no emphasis, link, image, code, table bar or HTML comes of it.

    Brackets stay as they are, because an interval is written with them, unless a link could follow.
    """
    text = " ".join(text.split())
    text = re.sub(r"([\\`*_~|$])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"\](?=[\[(:])", r"\\]", text)
    text = re.sub(r"^(#{1,6}|[+-]|-{2,}|=+)(?=\s|$)", r"\\\1", text)  # heading, list, rule
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    return re.sub(r"(?i)\b(https?|ftp|www)(:|\.)", r"\1&#8203;\2", text)  # no automatic link


# --- plain text -------------------------------------------------------------------------------------


def terminal(document: Document) -> str:
    """For a terminal, about 100 columns, no colour: notices and verdict first, then the tables."""
    file = io.StringIO()
    console = Console(file=file, width=TERMINAL_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)

    def say(text: str, indent: str = "", hanging: str | None = None) -> None:
        body = RichText(" ".join(text.split()))
        hanging = indent if hanging is None else hanging
        for at, line in enumerate(body.wrap(console, TERMINAL_WIDTH - len(hanging))):
            console.print(RichText(hanging if at else indent) + line, end="\n", soft_wrap=True)

    say(document.title)
    for name, value in document.facts:
        say(f"{name}: {value}", "  ")
    for notice in document.notices:
        console.print()
        _say_notice(notice, say)
    for section in document.sections:
        if not section.terminal:
            continue
        console.print()
        console.print(RichText(section.title.upper()))
        for block in section.blocks:
            if isinstance(block, Text) and block.terminal:
                console.print()
                say(block.text)
            elif isinstance(block, Notice):
                _say_notice(block, say)
            elif isinstance(block, Verdict):
                say(f"{SIGNS[block.tone]} {block.sentence}", hanging="    ")
                say(f"{block.standing}. {block.numbers}", "    ")
            elif isinstance(block, Code):
                console.print(RichText(f"  {block.text}"), soft_wrap=True)
            elif isinstance(block, Table):
                console.print()
                say(block.caption + ".")
                for part in _parts(block):
                    console.print(RichText(part), soft_wrap=True)
                shown = _marks(block)
                for reason, letter in block.notes.items():
                    if letter in shown:
                        say(f"[{letter}] {reason}", "  ", "      ")
    lines = [line.rstrip() for line in file.getvalue().split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def _say_notice(notice: Notice, say: Callable[..., None]) -> None:
    say(f"{SIGNS[notice.tone]} {notice.title}", hanging="    ")
    for point in notice.points:
        say(f"- {point}", "    ", "      ")


def _marks(table: Table) -> set[str]:
    """Of the footnotes of columns that a terminal shows."""
    lines = [cells for _, body in table.groups for cells in body]
    cells = [line[at] for line in lines for at, column in enumerate(table.columns) if column.terminal]
    return {mark for cell in cells for mark in cell.marks.split(",")}


def _parts(table: Table) -> list[str]:
    """The table, cut into several with the same key columns where it is too wide."""
    shown = [at for at, column in enumerate(table.columns) if column.terminal]
    keys = [at for at in shown if table.columns[at].key]
    lines = [cells for _, body in table.groups for cells in body]
    widths = {
        at: max([cell_len(table.columns[at].title), *(cell_len(_plain(cells[at])) for cells in lines)]) for at in shown
    }

    def room(columns: list[int]) -> int:
        return sum(widths[at] + len(GAP) for at in columns) - len(GAP)

    chunks: list[list[int]] = [[]]
    for at in shown:
        if at not in keys:
            if chunks[-1] and room([*keys, *chunks[-1], at]) > TERMINAL_WIDTH:
                chunks.append([])
            chunks[-1].append(at)
    parts = []
    for chunk in chunks:
        kept = sorted(keys + chunk)
        indent = "  " if room(kept) + 2 <= TERMINAL_WIDTH and any(heading for heading, _ in table.groups) else ""
        titles = {at: table.columns[at].title for at in kept}
        part = [indent + _line(table, titles, widths), "─" * min(room(kept) + len(indent), TERMINAL_WIDTH)]
        for heading, body in table.groups:
            part += [f"{heading}:"] if heading else []
            part += [indent + _line(table, {at: _plain(cells[at]) for at in kept}, widths) for cells in body]
        parts.append("\n".join(part))
    return parts


def _line(table: Table, texts: dict[int, str], widths: dict[int, int]) -> str:
    padded = []
    for at, text in texts.items():
        blank = " " * (widths[at] - cell_len(text))
        padded.append(blank + text if table.columns[at].numeric else text + blank)
    return GAP.join(padded).rstrip()


def _plain(cell: Cell) -> str:
    text = f"{cell.text}, {cell.unit}" if cell.unit else cell.text
    return f"{text} [{cell.marks}]" if cell.marks else text
