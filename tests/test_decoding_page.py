"""The worked example of docs/decoding.md: its numbers, and the rules that it states of them."""

import math
import re
from pathlib import Path

import pytest
import torch

from experiments.inference import distribution
from models.generation import Sampling

PAGE = Path(__file__).resolve().parent.parent / "docs" / "decoding.md"


def table() -> tuple[list[str], list[list[str]]]:
    """The rules, and the rows below them: token, score, one entry for each rule."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return heading[2:], rows


RULES, ROWS = table()
SCORES = [float(row[1]) for row in ROWS]


def number(rule: str, name: str) -> float | None:
    found = re.search(rf"{name} ([\d.]+)", rule)
    return float(found[1]) if found else None


def as_written(rule: str) -> list[float]:
    """What the page says of the rule, done step by step."""
    if rule == "greedy":
        return [float(score == max(SCORES)) for score in SCORES]
    temperature, top_k, top_p = (number(rule, name) for name in ("temperature", "top-k", "top-p"))
    assert temperature is not None
    p = [math.exp(score / temperature) for score in SCORES]
    likeliest = sorted(range(len(p)), key=lambda i: -p[i])[: None if top_k is None else int(top_k)]
    total = sum(p[i] for i in likeliest)
    kept = next(
        likeliest[:n] for n in range(1, len(p) + 1)
        if n == len(likeliest) or (top_p is not None and sum(p[i] for i in likeliest[:n]) >= top_p * total)
    )  # fmt: skip
    return [p[i] / sum(p[k] for k in kept) if i in kept else 0.0 for i in range(len(p))]


def test_the_page_has_an_example_of_every_rule():
    assert len(ROWS) == 5
    assert "greedy" in RULES
    assert {name for name in ("temperature", "top-k", "top-p") if any(name in rule for rule in RULES)} == {
        "temperature", "top-k", "top-p",
    }  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_column_is_what_the_rule_gives(rule):
    column = [row[2 + RULES.index(rule)] for row in ROWS]
    expected = as_written(rule)
    assert column == [f"{p:.3f}" if 0 < p < 1 else f"{p:.0f}" for p in expected]
    top_k = number(rule, "top-k")
    sampling = Sampling(
        temperature=number(rule, "temperature") or 0.0, top_k=None if top_k is None else int(top_k),
        top_p=number(rule, "top-p"),
    )  # fmt: skip
    assert sampling.probabilities(torch.tensor([SCORES]))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_probabilities_shown_of_a_greedy_choice_are_those_of_temperature_1():
    shown = distribution(torch.tensor([SCORES]), Sampling())[0].tolist()
    assert shown == pytest.approx(as_written("temperature 1"), abs=1e-6)
