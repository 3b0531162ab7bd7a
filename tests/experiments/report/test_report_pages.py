"""What a reader sees: the right numbers with unit, n and interval, nothing hostile, the same bytes twice."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from synthetic_run import CONTEXT, HOSTILE, REFUSED, TEST_BYTES, UNLISTED, VARIANTS

from experiments.errors import EnvironmentLacksError, RunFailedError, SpecError
from experiments.numbers import DASH
from experiments.report import (
    FORMATS,
    Format,
    content,
    curves,
    drawing,
    figures,
    formats,
    frame,
    render,
    verdict,
    write_report,
)
from experiments.report.document import Cell, Column, Document, Section, Table, Verdict
from experiments.report.record import read
from experiments.report.tables import TITLES

Runs = Callable[[str], Path]
UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "MFLOP/token": 1e6}
MARKDOWN_TAGS = {
    "h1", "h2", "ul", "li", "p", "strong", "em", "blockquote", "table", "thead", "tbody", "tr", "th", "td",
    "sup", "br", "pre", "code", "img",
}  # fmt: skip
NUMBER = r"[−+]?[\d,]+(?:\.\d+)?"


@cache
def rendered(run: Path, format: Format) -> str:
    """Of the variants that are built once and only read; their pages are written once."""
    if format in ("html", "md"):
        if not (run / "report.html").is_file():
            write_report(run)
        return (run / f"report.{format}").read_text(encoding="utf-8")
    return render(run, format)


class Page(HTMLParser):
    """Tags, tables and visible text; fails on a tag that is not closed in order."""

    VOID = frozenset({"meta", "link", "img", "source", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        assert tag in self.VOID
        self.handle_starttag(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def number(text: str) -> tuple[float, float]:
    """(value, half of its last place)."""
    plain = text.replace(",", "").replace("−", "-")
    whole = re.search(r"0*$", plain)
    decimals = len(plain.partition(".")[2])
    last = 10.0**-decimals if "." in plain else 10.0 ** len(whole[0] if whole else "")
    return float(plain), last / 2


def matches(text: str, value: float, low: float | None, high: float | None, factor: float) -> bool:
    found = re.match(rf"({NUMBER})(?: \[({NUMBER}), ({NUMBER})\])?", text)
    if not found or (low is None) != (found[2] is None):
        return False
    for shown, true in zip(found.groups(), (value, low, high), strict=True):
        if true is not None:
            got, slack = number(shown)
            if abs(got - true * factor) > slack * (1 + 1e-9):
                return False
    return True


def tables(run: Path) -> list[Table]:
    document = content.document(read(run))
    return [block for section in document.sections for block in section.blocks if isinstance(block, Table)]


def table(run: Path, caption: str) -> Table:
    (found,) = [one for one in tables(run) if one.caption.startswith(caption)]
    return found


def lines(one: Table) -> list[list[Cell]]:
    return [cells for _, body in one.groups for cells in body]


def x(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata(), dtype=float).tolist()


def y(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata(), dtype=float).tolist()


# --- every variant in every format ------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_renders_without_a_hole(runs: Runs, variant: str) -> None:
    run = runs(variant)
    html, markdown, text = (rendered(run, format) for format in ("html", "md", "table"))
    for shown in (Page(html).text, markdown, text):
        assert not re.search(r"\b(nan|NaN|None|inf|Infinity|null|undefined)\b", shown)
        assert "{{" not in shown
    for link in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (run / link).read_text(encoding="utf-8").startswith("<?xml")
    assert max(len(line) for line in text.splitlines()) <= 100


def test_the_report_adds_only_its_own_files(make_run: Callable[..., Path]) -> None:
    run = make_run(seeds=(0,), measured=False)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_report(run)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    added = {"report.html", "report.md", "figures/losses.svg", "figures/position.svg"}
    assert {str(path.relative_to(run)) for path in after.keys() - before.keys()} == added
    assert render(run, "md") == (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("variant", ["complete", "sweep", "hostile"])
def test_page_is_one_file_without_scripts_or_network(runs: Runs, variant: str) -> None:
    html = rendered(runs(variant), "html")
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.attributes}
    for tag, attributes in page.attributes:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "href"):
            link = attributes.get(name) or "data:"
            assert link.startswith("data:") or (link.startswith("#") and link[1:] in ids)
        if tag == "img":
            assert re.search(r"\d", attributes["alt"] or "")
    assert not re.search(r"url\(|@import", html)
    schemes = [attributes.get("media") or "" for tag, attributes in page.attributes if tag == "source"]
    assert sum("dark" in media for media in schemes) == 2 * sum(tag == "img" for tag, _ in page.attributes)


def test_same_directory_same_bytes(runs: Runs, tmp_path: Path) -> None:
    assert rendered(runs("complete"), "html")
    copy = tmp_path / "elsewhere"
    shutil.copytree(runs("complete"), copy, ignore=shutil.ignore_patterns("report.*", "figures"))
    write_report(copy)
    written = [path.relative_to(copy) for path in copy.rglob("*") if path.is_file()]
    assert len([path for path in written if path.suffix == ".svg"]) == 5
    for path in written:
        assert (copy / path).read_bytes() == (runs("complete") / path).read_bytes()


# --- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["complete", "partial", "incomparable", "eight-arms"])
def test_main_table_shows_the_rows(runs: Runs, variant: str) -> None:
    """Through the HTML as a reader has it: value, interval, unit and n of every row over seeds."""
    run = runs(variant)
    record = read(run)
    longest = max(record.contexts("decode"))
    places = {"train": CONTEXT, "prefill": longest, "decode": longest}
    body = Page(rendered(run, "html")).tables[0]
    header, checked = body[0], 0
    arms = [name for name in header if name in record.arms]
    titles = {title: key for key, title in TITLES.items()}
    for line in body[1:]:
        label = re.match(r"(.*?)(?: (\S+))?(?: [↓↑])?$", line[0]) if len(line) > 1 else None
        if label is None:
            continue  # a heading
        title = next(title for title in titles if line[0].startswith(title))
        unit = line[0].removeprefix(title).strip()
        phase, metric = titles[title]
        counts = []
        for at, arm in enumerate(arms, 1):
            row = record.row(arm, phase, metric, places.get(phase))
            if row is None or row.value is None:
                assert line[at].startswith("–")
                counts.append(0)
                continue
            factor = 1 / UNITS.get(unit.split(" ")[0], 1.0)
            assert matches(line[at], row.known, row.ci_low, row.ci_high, factor), (line, row)
            assert ("↓" in unit, "↑" in unit) == (row.direction == "lower", row.direction == "higher")
            assert unit
            counts.append(row.n)
            checked += 1
        shown = line[header.index("n")]
        assert shown == (str(counts[0]) if len(set(counts)) == 1 else " / ".join(map(str, counts)))
    assert checked >= 20 * len(arms) - 8


@pytest.mark.parametrize("format", ["md", "table"])
def test_other_formats_carry_the_same_cells(runs: Runs, format: Format) -> None:
    text = rendered(runs("complete"), format).replace("**", "")
    for name in ("Quality", "Paired comparisons", "Speed", "Memory", "Measured"):
        one = table(runs("complete"), name)
        for cells in lines(one):
            for cell, column in zip(cells, one.columns, strict=True):
                assert cell.text in text or (format == "table" and not column.terminal)


def test_paired_comparisons_show_the_verdicts(runs: Runs) -> None:
    verdicts = json.loads(rendered(runs("complete"), "json"))["verdicts"]
    shown = lines(table(runs("complete"), "Paired comparisons"))
    assert len(shown) == len(verdicts) == 11
    for cells, one in zip(shown, verdicts, strict=True):
        text = cells[2].text.replace("×", "")
        assert matches(text, one["estimate"], one["ci_low"], one["ci_high"], 1.0)
        assert cells[1].text == ("mamba − transformer" if one["kind"] == "difference" else "mamba / transformer")
        assert cells[2].text.endswith("bits/byte") == (one["kind"] == "difference")
        assert cells[3].text == "3"
        open_ = "not resolved, even odds with about 4 more seeds"
        expected = f"resolved: {one['better']} is better" if one["resolved"] else open_
        assert cells[6].text == expected
    assert {one["better"] for one in verdicts} == {"transformer", "mamba", None}


def test_speed_and_memory_by_context(runs: Runs) -> None:
    record = read(runs("complete"))
    for caption, metrics in (("Speed", 4), ("Memory", 5)):
        one = table(runs("complete"), caption)
        titles = {title: key for key, title in TITLES.items()}
        seen = 0
        for heading, body in one.groups:
            if heading not in titles or titles[heading][0] not in ("prefill", "decode"):
                continue
            seen += 1
            phase, metric = titles[heading]
            assert len(body) == 3
            for cells in body:
                context = int(cells[0].text.removeprefix("context ").replace(",", ""))
                factor = 1 / UNITS.get(cells[0].unit.split(" ")[0], 1.0)
                for arm, cell in zip(("transformer", "mamba"), cells[1:3], strict=True):
                    row = record.row(arm, phase, metric, context)
                    assert row is not None
                    assert matches(cell.text, row.known, row.ci_low, row.ci_high, factor)
        assert seen == metrics


def test_only_a_resolved_comparison_is_bold(runs: Runs) -> None:
    for cells in lines(table(runs("complete"), "Quality")):
        winner = {"transformer": 1, "mamba": 2}.get(cells[5].text)
        assert [cell.strong for cell in cells[1:3]] == [winner == 1, winner == 2]


def test_start_and_end_of_the_curves_are_of_one_text(runs: Runs) -> None:
    record = read(runs("complete"))
    for cells in lines(table(runs("complete"), "Start and end")):
        found = list(record.curves[cells[0].text].values())
        for cell, at in ((cells[1], 0), (cells[3], -1)):
            losses = [curve.validation_loss[at] for curve in found]
            assert cell.text == f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        assert cells[5].text == str(len(found))


@pytest.mark.parametrize("rates", [(), (1e-3, 2e-3)])
def test_losses_of_other_objectives_are_told_apart(make_run: Callable[..., Path], rates: tuple[float, ...]) -> None:
    """In words, tables and descriptions of figures; not where all arms have the same one, whichever that is."""
    run = make_run(rates=rates)
    said = {
        "unmasked": "the model saw the token that it was to predict",
        "masked": "the loss of selected tokens, most of them hidden, guessed from both sides",
    }
    plain = (run / "spec.toml").read_text(encoding="utf-8")
    for objective, reason in said.items():
        for arms in (("mamba",), ("mamba", "transformer")):
            text = plain
            for arm in arms:
                head = f"[arms.{arm}]\n"
                assert head in text
                text = text.replace(head, f'{head}objective = "{objective}"\n')
            text = "\n".join(line for line in text.split("\n") if line != 'objective = "causal"')
            (run / "spec.toml").write_text(text, encoding="utf-8")
            record = read(run)
            section = content.training_curves(record)
            (figure,) = (block for block in section.blocks if isinstance(block, content.Figure))
            (shown,) = (block for block in section.blocks if isinstance(block, Table))
            letters = [letter for note, letter in shown.notes.items() if reason in note]
            marked = [cells[0].text for cells in lines(shown) if set(letters) & set(cells[3].marks.split(","))]
            wanted = [arm for arm in record.arms if arm.startswith("mamba")] if arms == ("mamba",) else []
            assert marked == wanted
            told = "; ".join(f"{arm} ({reason})" for arm in wanted)
            for where in (section.intro, figure.alt):
                assert ("Not comparable" in where) == bool(wanted)
                assert told in where


@pytest.mark.parametrize(("objective", "phase", "metric", "why"), [
    ("masked", "quality", "test_token_perplexity", "a masked model gives no likelihood of a text"),
    ("masked", "decode", "ms_per_token", "keeps no cache"), ("unmasked", "prefill", "tokens_per_s", "keeps no cache"),
    ("causal", "quality", "test_masked_accuracy", "not trained to guess hidden tokens"),
    ("causal", "quality", "nothing_known", "not recorded by this run"),
    ("masked", "load", "nothing_known", "not recorded by this run"),
])  # fmt: skip
def test_what_an_objective_has_no_number_of_is_not_called_unrecorded(runs: Runs, objective, phase, metric, why) -> None:
    record = read(runs("complete"))
    arms = {"mamba": {"objective": objective}}
    assert why in replace(record, spec=record.spec | {"arms": arms}).absence("mamba", phase, metric, 77)


def test_placing_has_every_method_from_worst_to_best(runs: Runs) -> None:
    one = table(runs("complete"), "To place")
    values = [number(cells[1].text.split(" ")[0])[0] for cells in lines(one)]
    assert values == sorted(values, reverse=True)
    shown = {cells[0].text.split(",")[0].split(" ")[0]: cells[1].text for cells in lines(one)}
    assert shown["Token"] == "3.412"
    assert shown["lzma"] == "1.914"
    assert f"{TEST_BYTES:,} bytes" in one.caption
    assert sum("before training" in cells[0].text for cells in lines(one)) == 2


def test_what_a_process_holds_on_a_card_stands_in_the_tables_of_a_gpu_only(make_run: Callable[..., Path],
                                                                            runs: Runs) -> None:  # fmt: skip
    run = make_run(gpu=True)
    for caption in ("Memory, mean", "Quality, throughput"):
        loaded = {cells[0].text: [cell.text for cell in cells[1:]] for cells in lines(table(run, caption))}
        assert loaded["Peak reserved by torch while loading"][:3] == ["420 [420, 420]", "422 [422, 422]", "3"]
        assert loaded["Process on the GPU, loaded"][:2] == [DASH, DASH]
    last = {cells[0].text: [cell.text for cell in cells[1:]] for cells in lines(table(run, "Quality, throughput"))}
    assert last["Process on the GPU in decode"][:2] == ["950 [950, 950]"] * 2
    assert last["Peak reserved by torch in training"][0] == "420 [420, 420]"
    page = rendered(run, "md")
    assert UNLISTED in page
    assert "is all that the driver counts as its own when the phase ends" in page
    without = rendered(runs("complete"), "md")
    for word in ("reserved by torch", "Process on the GPU", "the driver counts"):
        assert word not in without


def test_a_line_without_a_number_has_no_arrow(runs: Runs) -> None:
    units = {cells[0].text: cells[0].unit for cells in lines(table(runs("complete"), "Quality"))}
    assert (units["GPU peak while loading"], units["Host peak while loading"]) == ("", "MB ↓")
    assert "| GPU peak while loading | –" in rendered(runs("complete"), "md")


@pytest.mark.parametrize("folders", [{}, {"mamba": "ab12", "transformer": "cd34"}])
def test_the_folders_of_models_are_named_or_said_not_to_be_there(
    make_run: Callable[..., Path], folders: dict[str, str]
) -> None:
    run = make_run(seeds=(0,), measured=False)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8")) | {"folders": folders}
    (run / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    (shown,) = (cells[1] for cells in lines(table(run, "Environment")) if cells[0].text == "Model folders")
    assert shown.text == ("mamba: ab12, transformer: cd34" if folders else DASH)
    assert bool(shown.marks) == (not folders)


@pytest.mark.parametrize(
    ("batch", "whose"), [(1, "one sequence keeps"), (8, "the 8 sequences of a batch keep together")]
)
def test_whose_cache_is_told(runs: Runs, batch: int, whose: str) -> None:
    record = read(runs("complete"))
    record = replace(record, spec=record.spec | {"measurement": record.spec["measurement"] | {"batch": batch}})
    assert f"The cache or state is what {whose} between decoded tokens" in content.memory(record).intro


def test_residuals(runs: Runs) -> None:
    one = table(runs("complete"), "Measured against analytic")
    found = {(cells[0].text, cells[1].text): cells[4] for cells in lines(one)}
    assert found["mamba", "cache or state, context 128"].text == "+8.00%"
    assert found["mamba", "cache or state, context 128"].marks == "a"
    assert found["mamba", "cache or state, context 512"] == Cell("0.00%")
    assert "beyond 5%" in next(iter(one.notes))


def test_one_seed_has_no_interval_and_says_so(runs: Runs) -> None:
    one = table(runs("one-seed"), "Quality")
    rows = {row.metric: row for row in read(runs("one-seed")).rows if (row.arm, row.seed) == ("mamba", 0)}
    for cells in lines(one):
        assert "[" not in cells[1].text + cells[2].text
        assert cells[1].marks
        assert not cells[5].strong
    (speed,) = [cells for cells in lines(one) if cells[0].text == "Training throughput"]
    found = re.fullmatch(rf"({NUMBER}) \(({NUMBER}) to ({NUMBER})\)", speed[2].text)
    source = next(
        row
        for row in read(runs("one-seed")).rows
        if (row.arm, row.seed, row.phase, row.metric) == ("mamba", 0, "train", "tokens_per_s")
    )
    assert found
    for shown, true in zip(found.groups(), (source.value, source.p5, source.p95), strict=True):
        got, slack = number(shown)
        assert true is not None
        assert abs(got - true) <= slack
    (bits,) = [cells for cells in lines(one) if cells[0].text == "Test bits per byte"]
    assert bits[2].text == f"{rows['test_bits_per_byte'].known:.3f}"
    assert "one seed has no interval" in rendered(runs("one-seed"), "table")


# --- what went wrong comes first --------------------------------------------------------------------


def test_partial_run_says_so_before_anything_else(runs: Runs) -> None:
    text = rendered(runs("partial"), "table")
    assert text.index("This run is partial: 3 planned cells gave no result") < text.index("VERDICT")
    assert "It is corrected for the comparisons that are there" in " ".join(text.split())
    assert text.index("mamba/seed2/train: killed: out of memory") < text.index("VERDICT")
    html = rendered(runs("partial"), "html")
    assert html.index("This run is partial") < html.index("<nav")
    assert "This run is partial" not in rendered(runs("complete"), "html")


def test_an_arm_without_results_has_dashes_with_their_reason(runs: Runs) -> None:
    one = table(runs("arm-lost"), "Quality")
    for cells in lines(one):
        assert cells[2].text == "–"
        reason = next(reason for reason, letter in one.notes.items() if letter == cells[2].marks)
        assert reason.startswith("mamba/seed0/train: killed: out of memory")
        assert cells[3].text in ("3 / 0", "0")
    assert "no seed has both arms" in rendered(runs("arm-lost"), "md")


def test_what_is_not_comparable_is_marked_and_its_ratio_withheld(runs: Runs) -> None:
    text = rendered(runs("incomparable"), "table")
    assert text.index("must not be compared") < text.index("VERDICT")
    assert text.index(REFUSED) < text.index("VERDICT")
    one = table(runs("incomparable"), "Paired comparisons")
    for cells in lines(one):
        if cells[0].text == "Test bits per byte":
            assert cells[6].text == "resolved: mamba is better"
        else:
            assert (cells[2].text, cells[4].text, cells[6].text) == ("–", "–", "not comparable")
            assert f"not comparable: {REFUSED}" in one.notes
    for cells in lines(table(runs("incomparable"), "Quality"))[4:]:
        assert cells[2].marks
        assert not cells[1].strong
        assert not cells[2].strong


def test_arms_that_saw_other_data_are_called_out(make_run: Callable[..., Path]) -> None:
    run = make_run()
    result = json.loads((run / "result.json").read_text())
    result["arms"]["mamba"]["data_sha256"]["1"] = "0" * 63 + "f"
    (run / "result.json").write_text(json.dumps(result))
    text = render(run, "table")
    assert "trained on different tokens" in text[: text.index("VERDICT")]
    assert "- seed 1\n" in text


def test_nothing_measured_is_said_and_draws_nothing(runs: Runs) -> None:
    markdown = rendered(runs("unmeasured"), "md")
    assert "measurement.enabled = false" in markdown
    assert re.findall(r"figures/(\w+)", markdown) == ["losses", "position"]


def test_limits_name_size_corpus_machine_and_seeds(runs: Runs) -> None:
    text = " ".join(rendered(runs("complete"), "table").split())
    assert "4,521,984 parameters), one corpus (stdlib), 245,760 training tokens at context 256" in text
    assert "one machine (Example CPU 3.0 GHz, 2 threads), and 3 seeds" in text
    assert "Its corpus" not in text


def test_a_corpus_of_installed_files_is_said_to_be_that_machines(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    environment["data"] |= {"corpus": "installed-python", "packages": ["alpha 1.0", "zeta 2.0"]}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    text = " ".join(rendered(folder, "md").split())
    assert "Its corpus is 1,241 files (19.8 MB) of Python source, of that machine's standard library and 2 " in text
    assert "2 installed packages (listed with the environment): only the same files give these numbers again" in text
    assert "| packages | alpha 1.0, zeta 2.0 |" in text


@pytest.mark.parametrize(("overlap", "splits", "told"), [
    ({"test": 0.1278, "validation": 0.3}, ["validation", "test"], "13% of the test text is in documents whose lines"),
    ({"test": 0.1278, "validation": 0.3}, ["validation"], "30% of the validation text is in documents whose lines"),
    ({"test": 0.005, "validation": 0.3}, ["validation", "test"], None),
    ({"test": 0.0051, "validation": 0.3}, ["validation", "test"], "1% of the test text is in documents whose lines"),
    (None, ["validation", "test"], None),
])  # fmt: skip
def test_limits_tell_what_a_model_may_know_by_heart(
    make_run: Callable[..., Path], overlap: dict[str, float] | None, splits: list[str], told: str | None
) -> None:
    folder = make_run()
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    environment["data"] |= {} if overlap is None else {"overlap": overlap}
    record = read(folder)
    record = replace(record, environment=environment, spec=record.spec | {"evaluation": {"splits": splits}})
    said = verdict.limits(record)
    assert told in said if told else "by heart" not in said


# --- sweep ------------------------------------------------------------------------------------------


def test_sweep_marks_the_lowest_mean_and_claims_nothing_about_test(runs: Runs) -> None:
    record = read(runs("sweep"))
    one = table(runs("sweep"), "Validation bits per byte")
    assert len(lines(one)) == 8
    for base in ("transformer", "mamba"):
        means = {}
        for cells in lines(one):
            if cells[0].text == base:
                row = record.row(f"{base}-lr{cells[1].text}", "quality", "validation_bits_per_byte")
                assert row is not None
                assert matches(cells[2].text, row.known, row.ci_low, row.ci_high, 1.0)
                means[cells[1].text] = (row.known, cells[4].text)
        assert min(means.values())[1] == "lowest"
        assert [mark for _, mark in means.values()].count("lowest") == 1
        assert min(means, key=lambda rate: means[rate]) == "0.002"
    text = rendered(runs("sweep"), "md")
    assert "Test bits per byte" not in text
    assert "inside the grid" in text
    assert "at the grid's edge" not in text
    assert "The test split was not read" in text


def test_sweep_warns_at_the_edge_of_the_grid(runs: Runs) -> None:
    text = rendered(runs("sweep-edge"), "table")
    assert " ".join(text.split()).count("at the grid's edge (the highest rate with a result): widen the grid") == 2


def test_sweep_edge_counts_only_rates_with_a_result(make_run: Callable[..., Path]) -> None:
    lost = tuple(f"mamba-lr0.004/seed{seed}/train" for seed in range(3))
    text = render(make_run(rates=(1e-3, 2e-3, 4e-3), lost=lost), "md")
    edge = "at the grid's edge (the highest rate with a result): widen the grid before using it"
    assert text.count(f"not every rate has a result at every seed; {edge}") == text.count("at the grid's edge") == 1
    assert text.count("inside the grid") == 1
    assert "Not counted: 0.004." in text


def test_sweep_takes_a_rate_that_diverged_for_worse(make_run: Callable[..., Path]) -> None:
    """As the training loop says it; beyond the chosen rate it makes an end of the grid, beside it no doubt."""
    run = make_run(rates=(1e-3, 2e-3, 4e-3), lost=("mamba-lr0.004/seed1/train",))
    record = read(run)
    for said, standing in (
        ("loss nan, gradient norm nan at step 7, learning rate 0.004", "inside the grid"),
        ("it needs more memory than there is", "not every rate has a result at every seed; at the grid's edge (the "
         "highest rate with a result): widen the grid before using it"),
    ):  # fmt: skip
        failures = [one | {"message": said} for one in record.failures]
        told = content.document(replace(record, result=record.result | {"failures": failures})).sections[0].blocks
        (mamba,) = (one for one in told if isinstance(one, Verdict) and one.sentence.startswith("mamba"))
        assert mamba.standing == standing
        assert ("Training diverged at 0.004." in mamba.sentence) == ("nan" in said)


def test_sweep_of_one_rate_has_no_lowest_of_several(make_run: Callable[..., Path]) -> None:
    assert "means is on the low side" not in render(make_run(rates=(2e-3,), best_rate=2e-3), "md")
    assert "; the lowest of 3 means is on the low side by chance, too" in render(
        make_run(rates=(1e-3, 2e-3, 4e-3)), "md"
    )


@pytest.mark.parametrize("lost", [0.001, 0.004])
def test_sweep_is_not_inside_a_grid_of_which_a_rate_has_no_result(make_run: Callable[..., Path], lost: float) -> None:
    """Next to the chosen rate and beyond it, at every seed."""
    cells = tuple(f"mamba-lr{lost}/seed{seed}/train" for seed in range(3))
    text = render(make_run(rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3), lost=cells), "md")
    assert text.count("not every rate has a result at every seed**") == text.count("inside the grid") == 1
    assert "finish the run" not in text  # what failed is not missing
    assert f"Not counted: {lost:g}." in text
    assert "at the grid's edge" not in text


def test_sweep_warns_at_the_lower_edge_too(make_run: Callable[..., Path]) -> None:
    text = render(make_run(rates=(2e-3, 4e-3, 8e-3)), "md")
    assert text.count("at the grid's edge (the lowest rate with a result)") == 2
    assert "inside the grid" not in text


def test_sweep_chooses_no_rate_that_lacks_a_seed(make_run: Callable[..., Path]) -> None:
    """Its mean may be the lowest for want of the hardest seed."""
    run = make_run(rates=(1e-3, 2e-3, 4e-3), lost=("mamba-lr0.002/seed2/train",))
    record = read(run)
    assert curves.best_rate(record, "transformer") == 2e-3
    rows = curves.rate_rows(record, "mamba")
    assert min(rows, key=lambda rate: rows[rate].known) == 2e-3
    assert curves.best_rate(record, "mamba") in (1e-3, 4e-3)
    text = render(run, "md")
    assert "mamba: of the rates with a result at every seed, " in text
    assert "Not counted: 0.002." in text
    lacks = "not every rate has a result at every seed"
    assert text.count(lacks) == text.count("inside the grid") == text.count("not counted: a seed is missing") == 1
    record = replace(record, result=record.result | {"failures": [], "missing": ["mamba-lr0.002/seed2/train"]})
    told = [one.standing for one in content.document(record).sections[0].blocks if isinstance(one, Verdict)]
    assert sum(f"{lacks}: finish the run before using it" in standing for standing in told) == 1


def test_sweep_without_a_rate_at_every_seed_chooses_none(make_run: Callable[..., Path]) -> None:
    lost = tuple(f"mamba-lr{rate}/seed{seed}/train" for seed, rate in enumerate((0.001, 0.002, 0.004)))
    run = make_run(rates=(1e-3, 2e-3, 4e-3), lost=lost)
    assert curves.best_rate(read(run), "mamba") is None
    for format in ("md", "html", "table"):
        assert "mamba: no learning rate has a result at every seed." in " ".join(render(run, format).split())


def test_sweep_of_an_arm_without_bits_per_byte_says_why(make_run: Callable[..., Path]) -> None:
    record = read(make_run(rates=(1e-3, 2e-3, 4e-3)))
    why = "no likelihood of a text"
    rows = [
        replace(row, value=None, reason=why) if row.arm.startswith("mamba") and row.phase == "quality" else row
        for row in record.rows
    ]
    verdict = content.document(replace(record, rows=rows)).sections[0]
    told = [block.sentence for block in verdict.blocks if isinstance(block, Verdict)]
    assert f"mamba: no learning rate has a result; {why}." in told


def test_sweep_chooses_no_rate_of_an_arm_that_may_not_be_compared(make_run: Callable[..., Path]) -> None:
    run = make_run(rates=(5e-4, 1e-3, 2e-3, 4e-3))
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    for row in result["rows"]:
        if row["arm"] == "mamba-lr0.001":
            row |= {"comparable": False, "reason": "failed before timing: causality"}
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    verdict = content.document(read(run)).sections[0]
    told = {block.sentence.partition(":")[0]: block for block in verdict.blocks if isinstance(block, Verdict)}
    assert (told["mamba"].tone, told["mamba"].standing) == (
        "blocked",
        "not comparable: failed before timing: causality",
    )
    assert (told["transformer"].tone, told["transformer"].standing) == ("resolved", "inside the grid")


# --- hostile text -----------------------------------------------------------------------------------


def test_hostile_text_stays_text(runs: Runs) -> None:
    html = rendered(runs("hostile"), "html")
    assert "<script" not in html.lower()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    shown = HOSTILE.replace("\x1b", "␛").replace("\ud800", "‹U+D800›")
    assert Page(html).text.count(shown) >= 3
    for format in ("md", "table", "html"):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", rendered(runs("hostile"), format))


def test_hostile_text_in_markdown_stays_text(runs: Runs) -> None:
    """Through a real Markdown renderer that lets raw HTML and tables pass."""
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(rendered(runs("hostile"), "md"))
    assert "<script" not in html
    shown = HOSTILE.replace("\x1b", "␛").replace("\ud800", "‹U+D800›")
    page = Page(html)
    assert page.text.count(shown) == 6 + 1 + 2 + 1  # samples, title, failure at both places, warning
    assert {tag for tag, _ in page.attributes} <= MARKDOWN_TAGS
    links = [attributes.get("href") or attributes.get("src") or "figures/" for _, attributes in page.attributes]
    assert all(link.startswith("figures/") for link in links)
    assert len(page.tables) == len(tables(runs("hostile")))


def test_markdown_escapes() -> None:
    text = "a_b_ *c* `d` [e](f) ![g](h) <i>&amp; | ~~j~~ $k$ \\ https://l.m www.n.o [p]: q"
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(formats._md(text))
    page = Page(html)
    assert page.text.strip().replace("\u200b", "") == text
    assert [tag for tag, _ in page.attributes] == ["p"]
    for start in ("# x", "- x", "1. x", "+ x", "> x", "=== "):
        page = Page(MarkdownIt("commonmark").render(formats._md(start)))
        assert page.text.strip() == start.strip()
        assert [tag for tag, _ in page.attributes] == ["p"]


def test_arm_names_that_matplotlib_would_interpret(make_run: Callable[..., Path]) -> None:
    run = make_run(arms=("_hidden", "a" * 60))
    record = read(run)
    figure = figures.throughput(record, "narrow")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_hidden", "a" * 13 + "…" + "a" * 12]


# --- figures ----------------------------------------------------------------------------------------


def test_throughput_figure_draws_the_rows(runs: Runs) -> None:
    record = read(runs("complete"))
    figure = figures.throughput(record, "wide")
    for axes, phase in zip(figure.axes, ("prefill", "decode"), strict=True):
        marked = [line for line in axes.lines if line.get_marker() not in ("None", None)]
        for line, arm in zip(marked, record.arms, strict=True):
            rows = [record.row(arm, phase, "tokens_per_s", context) for context in (128, 512, 2048)]
            assert x(line) == [128, 512, 2048]
            assert y(line) == [row.known for row in rows if row]
        assert len({str(line.get_color()) for line in marked}) == len({str(line.get_marker()) for line in marked}) == 2


def test_memory_figure_draws_the_rows_and_marks_gaps(runs: Runs) -> None:
    record = read(runs("complete"))
    (axes,) = figures.memory(record, "wide").axes
    widths = sorted(patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle))
    wanted = [("load", name, None) for name in ("file_bytes", "host_peak_bytes", "resident_bytes")]
    wanted += [(phase, "peak_bytes", at) for phase in ("prefill", "decode") for at in (128, 512, 2048)]
    rows = [record.row(arm, *key) for arm in record.arms for key in wanted]
    assert widths == pytest.approx(sorted(row.known / 1e6 for row in rows if row))
    (axes,) = figures.memory(read(runs("arm-lost")), "wide").axes
    assert sum(text.get_text().strip() == "not measured" for text in axes.texts) == len(wanted)


def test_state_figure_is_measured_over_analytic(runs: Runs) -> None:
    record = read(runs("complete"))
    (axes,) = figures.state(record, "wide").axes
    measured = [line for line in axes.lines if line.get_linestyle() == "None"]
    analytic = [line for line in axes.lines if line.get_marker() == "None" and len(x(line)) == 3]
    for line, arm in zip(measured, record.arms, strict=True):
        assert y(line)[0] == pytest.approx(record.row(arm, "decode", "state_bytes", 128).known / 1e6)  # type: ignore[union-attr]
    for line, arm in zip(analytic, record.arms, strict=True):
        row = record.row(arm, "decode", "state_bytes_analytic", 2048)
        assert row is not None
        assert y(line)[2] == pytest.approx(row.known / 1e6)


def test_loss_figure_has_every_seed_and_their_mean(runs: Runs) -> None:
    figure = figures.losses(read(runs("complete")), "wide")
    validation = figure.axes[1].lines
    assert len(validation) == 2 * (3 + 1)
    for arm in (validation[:4], validation[4:]):
        seeds = [y(line) for line in arm[:3]]
        assert y(arm[3]) == pytest.approx([sum(values) / 3 for values in zip(*seeds, strict=True)])
        assert [(x(line)[0], y(line)[0]) for line in arm] == [(0, 7.63)] * 4
        assert x(arm[3])[-1] == pytest.approx(120 * 2.048)
        assert arm[3].get_linewidth() > arm[0].get_linewidth()


def test_a_seed_that_ended_early_cuts_no_mean_off(make_run: Callable[..., Path]) -> None:
    """Nor is its last loss one of those at the end."""
    whole = read(make_run())
    curve = whole.curves["mamba"][1]
    early = replace(curve, validation_tokens=curve.validation_tokens[:1], validation_loss=curve.validation_loss[:1])
    cut = replace(whole, curves=whole.curves | {"mamba": whole.curves["mamba"] | {1: early}})
    for record, seeds in ((whole, (0, 1, 2)), (cut, (0, 2))):
        found = [record.curves["mamba"][seed] for seed in seeds]
        tokens, loss = curves.mean_validation(record, "mamba")
        np.testing.assert_allclose(loss, np.mean([one.validation_loss for one in found], axis=0))
        assert tokens[-1] == found[0].validation_tokens[-1]
        alt = content._loss_alt(record).split("; mamba")[1]
        assert f"(mean of {len(seeds)} seeds" in alt
        assert ("1 seed that ended early left out" in alt) == (record is cut)
        (cells,) = [cells for cells in lines(content._loss_table(record)) if cells[0].text == "mamba"]
        ends = [float(one.validation_loss[-1]) for one in found]
        assert cells[3].text == f"{np.mean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})"
        assert (cells[5].text, bool(cells[5].marks)) == (str(len(seeds)), record is cut)


def test_a_legend_names_what_is_drawn_as_it_is_drawn(runs: Runs) -> None:
    whole = read(runs("complete"))
    assert whole.arms == ["transformer", "mamba"]
    only = replace(whole, evaluations={"mamba": whole.evaluations["mamba"]})
    for record, arms in ((whole, whole.arms), (only, ["mamba"])):
        figure = figures.position(record, "wide")
        assert [text.get_text() for text in figure.legends[0].get_texts()] == arms
        (axes,) = figure.axes
        bold = [line.get_color() for line in axes.lines if line.get_linewidth() > 1.5]
        assert [handle.get_color() for handle in figure.legends[0].get_lines()] == bold


def test_arms_beyond_the_eighth_differ_from_the_first_ones() -> None:
    looks = {(drawing.colour_of(at), str(drawing.line_of(at)), drawing.marker_of(at)) for at in range(64)}
    fills = {(drawing.colour_of(at), drawing.hatch_of(at)) for at in range(64)}
    assert len(looks) == len(fills) == 64


@pytest.mark.parametrize("most", [5, 16, 26])
def test_names_are_cut_in_the_middle(most: int) -> None:
    names = ["transformer-dense-active-and-more", "transformer-dense-total-and-others", "a" * most]
    cut = [drawing.short(name, most) for name in names]
    assert [len(one) for one in cut] == [most] * 3
    assert len(set(cut)) == 3
    assert cut[2] == names[2]
    for name, one in zip(names[:2], cut[:2], strict=True):
        start, _, end = one.partition("…")
        assert name.startswith(start)
        assert name.endswith(end)


@pytest.mark.parametrize("variant", ["eight-arms", "sweep"])
def test_both_palettes_cover_every_colour(runs: Runs, variant: str) -> None:
    record = read(runs(variant))
    for name in ("sweep", "sweep-curves") if variant == "sweep" else ("memory", "state"):
        light = figures.draw(record, name, "narrow")
        dark = figures.dark(light)
        colours = set(re.findall(r"#[0-9a-f]{6}\b", light))
        assert colours <= set(figures.DARK)
        assert set(re.findall(r"#[0-9a-f]{6}\b", dark)) == {figures.DARK[colour] for colour in colours}
        assert "<text" not in light


# --- reading ----------------------------------------------------------------------------------------


def test_frame_and_csv_are_the_rows(runs: Runs) -> None:
    rows = json.loads((runs("complete") / "result.json").read_text())["rows"]
    for found in (frame(runs("complete")), pd.read_csv(io.StringIO(rendered(runs("complete"), "csv")))):
        assert len(found) == len(rows)
        for column in found.columns:
            for got, row in zip(found[column], rows, strict=True):
                assert (pd.isna(got) and row[column] is None) or got == row[column]


def test_json_is_the_result_itself(runs: Runs) -> None:
    assert rendered(runs("hostile"), "json") == (runs("hostile") / "result.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_that_is_no_run(tmp_path: Path, format: Format) -> None:
    with pytest.raises(SpecError, match=r"no run directory at .*absent"):
        render(tmp_path / "absent", format)
    with pytest.raises(RunFailedError, match=r"no result\.json"):
        render(tmp_path, format)


def test_unknown_format_names_the_nearest(runs: Runs) -> None:
    with pytest.raises(SpecError, match=r"unknown format 'htm': did you mean 'html'\?"):
        render(runs("complete"), "htm")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda result: "{", "not valid JSON"),
        (lambda result: "[]", "must hold one JSON object"),
        (lambda result: "{}", "'schema_version' is missing"),
        (lambda result: json.dumps(result | {"schema_version": 9}), "schema_version 9"),
        (lambda result: json.dumps(result | {"arms": []}), "'arms' is of another kind"),
        (
            lambda result: json.dumps(result | {"rows": [result["rows"][0] | {"value": "abc"}]}),
            r"rows\[0\]: 'value' is no number",
        ),
        (
            lambda result: json.dumps(result | {"rows": [result["rows"][0] | {"p95": [1]}]}),
            r"rows\[0\]: 'p95' is no number",
        ),
        (lambda result: json.dumps(result | {"rows": [3]}), r"rows\[0\] has no 'arm'"),
        (lambda result: json.dumps({k: v for k, v in result.items() if k != "arms"}), "'arms' is missing"),
        (lambda result: json.dumps(result | {"rows": result["rows"] + result["rows"][:1]}), "two rows for"),
        (lambda result: json.dumps(result | {"rows": [{"arm": "mamba"}]}), r"rows\[0\] has no 'phase'"),
        (
            lambda result: json.dumps(result | {"verdicts": [{"phase": "quality"}]}),
            "its verdicts has no 'metric'",
        ),
        (lambda result: json.dumps(result | {"verdicts": None}), "'verdicts' is of another kind"),
        (lambda result: json.dumps(result | {"verdicts": [None]}), "'verdicts' is of another kind"),
        (lambda result: json.dumps(result | {"failures": [{"cell": "a/seed0/train"}]}), "failures has no 'message'"),
    ],
)
def test_a_damaged_result_is_one_line(make_run: Callable[..., Path], damage: Callable, message: str) -> None:
    run = make_run(seeds=(0,), measured=False)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(damage(result))
    with pytest.raises(RunFailedError, match=message) as caught:
        render(run, "table")
    assert "\n" not in str(caught.value)
    assert (f"; lab resume {run} builds it again" in str(caught.value)) is (message != "schema_version 9")


@pytest.mark.parametrize(("name", "text", "message"), [
    ("spec.toml", "", "it has no arms"), ("spec.toml", "arms = 3", "it has no arms"),
    ("spec.toml", "[arms]\nmamba = 1", "it has no arms"), ("spec.toml", "arms = ", "not valid TOML"),
    ("environment.json", '{"data": 3}', "'data' is of another kind"),
    ("environment.json", '{"packages": []}', "'packages' is of another kind"),
    ("environment.json", '{"data": {"overlap": null}}', "'overlap' is of another kind"),
])  # fmt: skip
def test_other_damaged_files_are_one_line(make_run: Callable[..., Path], name: str, text: str, message: str) -> None:
    """Of a record that has no hash of its specification, as older ones have none."""
    run = make_run(seeds=(0,), measured=False)
    (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(RunFailedError, match=f"{name} is damaged: {message}") as caught:
        render(run, "table")
    assert "\n" not in str(caught.value)


def test_a_terminal_shows_no_footnote_of_a_column_that_it_leaves_out() -> None:
    table = Table("Numbers", [Column("What", key=True), Column("Value"), Column("Verdict", terminal=False)])
    table.add("speed", table.cell("1", "a note"), table.cell("2", "another note"))
    page = Document("title", [], [], [Section("results", "Results", "", [table])])
    said = formats.terminal(page)
    assert "[a] a note" in said
    assert "another" not in said
    assert "another note" in formats.markdown(page)


def test_torn_line_and_loss_that_is_not_finite_are_remarked(make_run: Callable[..., Path]) -> None:
    run = make_run(seeds=(0,), measured=False)
    log = run / "cells" / "mamba" / "seed0" / "metrics.jsonl"
    lines_ = log.read_text().splitlines()
    broken = json.loads(lines_[51]) | {"loss": float("nan")}
    lines_[51] = json.dumps(broken)
    log.write_text("\n".join([*lines_, '{"step": 12']))
    text = " ".join(render(run, "table").split())
    assert f"mamba/seed0: the training loss is not finite at step {broken['step']} (1 steps)" in text
    assert "the last line is torn" in text
    lines_[3] = "{"
    log.write_text("\n".join(lines_))
    with pytest.raises(RunFailedError, match="line 4: not valid JSON"):
        render(run, "table")


def test_a_value_that_is_not_finite_becomes_a_dash_with_its_reason(make_run: Callable[..., Path]) -> None:
    run = make_run()
    result = json.loads((run / "result.json").read_text())
    for row in result["rows"]:
        if (row["arm"], row["metric"], row["seed"]) == ("mamba", "test_token_perplexity", None):
            row |= {"value": float("inf"), "ci_low": float("nan")}
    (run / "result.json").write_text(json.dumps(result))
    one = table(run, "Quality")
    (cells,) = [cells for cells in lines(one) if cells[0].text == "Test token perplexity"]
    assert cells[2].text == "–"
    assert one.notes["the recorded value is not a finite number"] == cells[2].marks
    assert pd.isna(frame(run).query("arm == 'mamba' and metric == 'test_token_perplexity'")["value"].iloc[-1])


def test_a_run_without_environment_still_reports(make_run: Callable[..., Path]) -> None:
    run = make_run(seeds=(0,), measured=False)
    (run / "environment.json").unlink()
    text = render(run, "table")
    assert "environment.json is missing" in text
    assert "one machine" in " ".join(text.split())


def test_writing_is_atomic(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(seeds=(0,), measured=False)
    (run / "report.html").write_text("old")

    def refuse(self: Path, target: Path) -> Path:
        if target.name == "report.html":
            raise OSError(28, "No space left on device")
        return original(self, target)

    original = Path.replace
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(EnvironmentLacksError, match=r"cannot write .*report\.html: No space left on device"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.rglob("*.part"))


def test_plain_text_needs_no_matplotlib(runs: Runs) -> None:
    code = (
        "import sys; from pathlib import Path; from experiments.report import render; "
        "render(Path(sys.argv[1]), 'table'); print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    )
    root = Path(content.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs("one-seed"))], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_a_seed_of_which_nothing_is_finished_is_not_counted(make_run: Callable[..., Path]) -> None:
    run = make_run(seeds=(0, 1), measured=False)
    shutil.copytree(run / "cells" / "mamba" / "seed1", run / "cells" / "mamba" / "seed2")
    (run / "cells" / "mamba" / "seed2" / "evaluation.json").unlink()
    record = read(run)
    assert list(record.curves["mamba"]) == [0, 1, 2]
    assert record.seeds == [0, 1]
    assert "Seeds: 2 (0, 1)\n" in render(run, "table")
    assert ", and 2 seeds. It says nothing" in " ".join(render(run, "table").split())
