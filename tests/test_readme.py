"""The README's numbers stand in the records that it names, as exactly as they are printed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = dict(zip(("compare-cpu", "compare-cuda"), README.split("## On a GPU"), strict=True))
PRINTED = r"(?<![\d.,])\d[\d,]*(?:\.\d+)?"
MB = 1e-6
LABELS = {  # of a line of numbers: phase, metric, factor to what is printed
    r"test bits per byte": ("quality", "test_bits_per_byte", 1),
    r"validation bits per byte": ("quality", "validation_bits_per_byte", 1),
    r"training at context (\d+), tokens/s": ("train", "tokens_per_s", 1),
    r"prefill of (\d+) tokens, tokens/s": ("prefill", "tokens_per_s", 1),
    r"decode after (\d+) tokens, tokens/s": ("decode", "tokens_per_s", 1),
    r"resident after loading, MB": ("load", "resident_bytes", MB),
    r"peak of a training step, MB": ("train", "peak_bytes", MB),
    r"peak of prefill of (\d+) tokens, MB": ("prefill", "peak_bytes", MB),
    r"peak of decode after (\d+) tokens, MB": ("decode", "peak_bytes", MB),
    r"cache or state after (\d+) tokens, MB": ("decode", "state_bytes", MB),
}


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / name / "result.json").read_text(encoding="utf-8"))


def agrees(printed: str, value: float) -> bool:
    """Whether it is the value, rounded to the digits that are printed: zeros before a point may be no digits."""
    whole, _, decimals = printed.replace(",", "").partition(".")
    unit = 10.0 ** (-len(decimals) if decimals else len(whole) - len(whole.rstrip("0")))
    return abs(float(f"{whole}.{decimals}") - value) <= unit / 2 * (1 + 1e-9)


def behind(text: str, of: str) -> str:
    """What follows a text that stands in `of` once."""
    assert of.count(text) == 1, text
    return of.partition(text)[2]


def table(after: str) -> list[list[str]]:
    """The cells of the first table behind a text, without its heading."""
    lines = behind(after, README).splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("|"))
    last = next(at for at, line in enumerate(lines) if at > first and not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 : last]]


def assert_told(text: str, verdict: dict[str, Any]) -> None:
    """text: begins with estimate and interval, or what leads to them. A difference is told as by how much."""
    low, high = sorted((verdict["ci_low"], verdict["ci_high"]), key=abs)
    told = [verdict["estimate"], low, high]
    for printed, value in zip(re.findall(PRINTED, text)[:3], told, strict=True):
        assert agrees(printed, abs(value)), (printed, value, verdict["phase"])


@pytest.mark.parametrize(("printed", "value", "whether"), [
    ("0.349", 0.34861, True), ("0.348", 0.34861, False), ("12,620", 12_624.9, True), ("12,620", 12_626, False),
    ("1,570,000", 1_574_000, True), ("1,570,000", 1_576_000, False), ("4.055", 4.0549, True), ("4.055", 4.0556, False),
])  # fmt: skip
def test_a_number_agrees_within_its_digits(printed: str, value: float, whether: bool) -> None:
    assert agrees(printed, value) is whether


@pytest.mark.parametrize(("name", "after", "lines"), [
    ("compare-cpu", "at commit 87192b0:", 11), ("compare-cuda", "which had passed the check on that card.", 12),
])  # fmt: skip
def test_the_tables_are_the_records(name: str, after: str, lines: int) -> None:
    found = table(after)
    assert len(found) == lines
    rows = [row for row in result(name)["rows"] if row["seed"] is None]
    for label, *cells in found:
        ((match, (phase, metric, factor)),) = [
            (match, of) for pattern, of in LABELS.items() if (match := re.match(pattern, label))
        ]
        context = int(match[1]) if match.groups() else None
        for arm, cell in zip(("transformer", "mamba"), cells, strict=True):
            (row,) = [
                row for row in rows if (row["arm"], row["phase"], row["metric"]) == (arm, phase, metric)
                and context in (None, row["context"])
            ]  # fmt: skip
            printed = re.findall(PRINTED, cell)
            values = [row[name] for name in ("value", "ci_low", "ci_high")][: len(printed)]
            assert len(printed) in (1, 3)
            for one, value in zip(printed, values, strict=True):
                assert agrees(one, value * factor), (label, arm, one, value)


@pytest.mark.parametrize(("name", "sentence", "phase", "metric"), [
    ("compare-cpu", "Mamba predicts the test text better, by", "quality", "test_bits_per_byte"),
    ("compare-cpu", "**Training**: Mamba is slower, at", "train", "tokens_per_s"),
    ("compare-cpu", "**Decode** after 2048 tokens: Mamba is", "decode", "tokens_per_s"),
    ("compare-cpu", "**Prefill** of 2048 tokens: Mamba is slower, at", "prefill", "tokens_per_s"),
    ("compare-cpu", "after 2048 tokens: Mamba's peak is", "decode", "peak_bytes"),
    ("compare-cpu", "**Memory after loading**: Mamba's is", "load", "resident_bytes"),
    ("compare-cuda", "Mamba predicts the test text better by", "quality", "test_bits_per_byte"),
    ("compare-cuda", "**Training**: Mamba runs at", "train", "tokens_per_s"),
    ("compare-cuda", "**Prefill** of 8192 tokens: Mamba runs at", "prefill", "tokens_per_s"),
    ("compare-cuda", "**Decode**: after 8192 tokens Mamba is", "decode", "tokens_per_s"),
])  # fmt: skip
def test_the_verdicts_are_the_records(name: str, sentence: str, phase: str, metric: str) -> None:
    (verdict,) = [one for one in result(name)["verdicts"] if (one["phase"], one["metric"]) == (phase, metric)]
    assert_told(behind(sentence, PARTS[name]), verdict)


def test_the_ratios_of_speed_are_the_records() -> None:
    lines = table("and these ratios of speed. In")
    names = ("compare-cpu", "compare-cpu-xeon", "compare-cpu-epyc", "compare-cpu-epyc-again")
    for (_, *cells), name in zip(lines, names, strict=True):
        verdicts = {one["phase"]: one for one in result(name)["verdicts"] if one["metric"] == "tokens_per_s"}
        for cell, phase in zip(cells, ("train", "prefill", "decode"), strict=True):
            assert_told(cell, verdicts[phase])
