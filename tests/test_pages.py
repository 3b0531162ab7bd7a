"""The intervals that pages in docs/ tell stand in a record that the same section links to."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from test_readme import PRINTED, ROOT, agrees, result

# a number, perhaps with its unit in words, and its interval
INTERVAL = re.compile(rf"({PRINTED})(?:\*\*)?(?: [a-z]+){{0,4}} \[[+−]?({PRINTED}), [+−]?({PRINTED})\]")
LINK = re.compile(r"\(results/([\w-]+)/")
UNITS = (1, 1e-3, 1e-6)  # bytes are printed as kB or MB
PAGES = {"architectures.md": 52, "memory-and-speed.md": 11, "vocabulary.md": 14}  # and how many intervals they tell


def number(printed: str) -> float:
    return float(printed.replace(",", ""))


def told(page: str) -> list[tuple[str, set[str], tuple[str, str, str]]]:
    """Of every interval in a section that links to records: the heading, the records, what is printed."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [
        (part.partition("\n")[0], set(links), found)
        for part in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:] if (links := LINK.findall(part))
        for found in INTERVAL.findall(" ".join(part.split()))
    ]  # fmt: skip


def triples(of: Any) -> Iterator[tuple[float, float, float]]:
    """Estimate and interval of everything in a record that has them, without signs, the end nearer to 0 first."""
    if isinstance(of, dict):
        ends = of.get("ci_low"), of.get("ci_high")
        if None not in ends and not isinstance(ends[0], list):
            low, high = sorted(map(abs, ends))
            for name in ("value", "estimate", "tokens", "ratio"):
                if of.get(name) is not None:
                    yield abs(of[name]), low, high
    for one in of.values() if isinstance(of, dict) else of if isinstance(of, list) else ():
        yield from triples(one)


@pytest.mark.parametrize("page", PAGES)
def test_intervals_are_the_records(page: str) -> None:
    found = told(page)
    assert len(found) == PAGES[page]
    for heading, links, (middle, *ends) in found:
        known = [triple for link in links for triple in triples(result(link))]
        printed = [middle, *sorted(ends, key=number)]
        assert any(
            all(agrees(one, value * unit) for one, value in zip(printed, triple, strict=True))
            for triple in known for unit in UNITS
        ), (heading, links, printed)  # fmt: skip
