"""The intervals that pages in docs/ tell stand in a record that the same section links to."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from test_readme import PRINTED, ROOT, agrees, result

# a number, perhaps with its unit in words, and its interval
INTERVAL = re.compile(rf"([+−]?{PRINTED})(?:\*\*)?(?: [a-z]+){{0,4}} \[([+−]?{PRINTED}), ([+−]?{PRINTED})\]")
LINK = re.compile(r"\(results/([\w-]+)/")
UNITS = (1, 1e-3, 1e-6)  # bytes are printed as kB or MB
ESTIMATES = ("value", "estimate", "difference", "tokens", "ratio")
PAGES = {  # and how many intervals each tells
    "architectures.md": 52, "masking.md": 15, "memory-and-speed.md": 11, "studies.md": 54, "vocabulary.md": 14,
}  # fmt: skip


def same(printed: str, value: float) -> bool:
    """With its sign; a minus sign of what is printed as 0 says nothing."""
    digits = printed.lstrip("+−")
    negative = printed.startswith("−")
    return agrees(digits, abs(value)) and (negative == (value < 0) or not digits.strip("0.,"))


def told(page: str) -> list[tuple[str, set[str], tuple[str, str, str]]]:
    """Of every interval in a section that links to records: the heading, the records, what is printed."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [
        (part.partition("\n")[0], set(links), found)
        for part in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:] if (links := LINK.findall(part))
        for found in INTERVAL.findall(" ".join(part.split()))
    ]  # fmt: skip


def triples(of: Any) -> Iterator[tuple[float, float, float]]:
    """Estimate and interval of everything in a record that has them; also turned round, as a loss is told as a gain."""
    if isinstance(of, dict):
        low, high = of.get("ci_low"), of.get("ci_high")
        if isinstance(low, float) and isinstance(high, float):
            for middle in [of[name] for name in ESTIMATES if of.get(name) is not None]:
                yield middle, low, high
                yield -middle, -high, -low
    for one in of.values() if isinstance(of, dict) else of if isinstance(of, list) else ():
        yield from triples(one)


@pytest.mark.parametrize("page", PAGES)
def test_intervals_are_the_records(page: str) -> None:
    found = told(page)
    assert len(found) == PAGES[page]
    for heading, links, printed in found:
        known = [triple for link in links for triple in triples(result(link))]
        assert any(
            all(same(one, value * unit) for one, value in zip(printed, triple, strict=True))
            for triple in known for unit in UNITS
        ), (heading, links, printed)  # fmt: skip


def test_the_table_of_vocabularies_is_the_records() -> None:
    page = (ROOT / "docs" / "vocabulary.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in page.splitlines() if re.match(r"\| [\d,]+ \| \d\.\d{3} ", line)]
    assert len(lines) == 4
    rows = [row for row in result("vocabulary-cpu")["rows"] if row["seed"] is None]

    def value(arm: str, metric: str) -> dict[str, Any]:
        (row,) = [row for row in rows if (row["arm"], row["metric"]) == (arm, metric)]
        return row

    for cells in lines:
        entries, tokens, frequencies, *quality, share, cache, state = (cell.strip() for cell in cells)
        arms = [f"{arm}-v{entries.replace(',', '')}" for arm in ("transformer", "mamba")]
        for arm, printed in zip(arms, quality, strict=True):
            row = value(arm, "test_bits_per_byte")
            numbers = re.findall(PRINTED, printed)
            assert all(map(agrees, numbers, (row["value"], row["ci_low"], row["ci_high"]))), (arm, printed)
        assert agrees(tokens, value(arms[0], "tokens_per_byte")["value"])
        assert agrees(frequencies, value(arms[0], "unigram_bits_per_byte")["value"])
        assert agrees(share.removesuffix("%"), 100 * value(arms[0], "embedding_share")["value"])
        assert agrees(cache, value(arms[0], "state_bytes_per_byte")["value"])
        assert agrees(state, value(arms[1], "state_bytes_per_byte")["value"])
