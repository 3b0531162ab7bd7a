"""What of a judged text stands in the training text, against hand-made figures and a naive count."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.dataset import SPLITS, prepare
from experiments.data.overlap import ALIKE, LONG, Overlap
from experiments.spec import Data

LINES = [f"line number {number} of the training text" for number in range(10)]
OTHER = "a line that stands in no training text"


def shares(judged: dict[str, list[str]], train: list[str]) -> dict[str, float]:
    overlap = Overlap()
    for split, texts in judged.items():
        for text in texts:
            overlap.judge(split, text)
    for text in train:
        overlap.train(text)
    return overlap.shares()


def test_nine_of_ten_long_lines_make_a_document_alike() -> None:
    nine, eight = "\n".join([*LINES[:9], OTHER]), "\n".join([*LINES[:8], OTHER, OTHER])
    found = shares({"test": [nine, eight], "validation": [eight]}, ["\n".join(LINES[:5]), "\n".join(LINES[5:])])
    assert found == {"test": len(nine) / (len(nine) + len(eight)), "validation": 0}


def test_short_lines_and_documents_without_a_long_one_do_not_count() -> None:
    short = "x" * (LONG - 1)
    assert shares({"test": [f"{short}\n" * 3 + LINES[0]]}, [LINES[0]]) == {"test": 1}
    assert shares({"test": [short]}, [short]) == {"test": 0}
    assert shares({"test": [f"{short}x"]}, [f"{short}x"]) == {"test": 1}


def test_bytes_weigh_not_documents() -> None:
    known, new = LINES[0], OTHER + "é" * 100
    assert shares({"test": [known, new]}, LINES) == {"test": len(known) / (len(known) + len(OTHER) + 200)}


texts = st.lists(st.lists(st.sampled_from([*LINES[:4], OTHER, "short"]), min_size=1, max_size=12).map("\n".join),
                 min_size=1, max_size=6)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(judged=texts, train=texts)
def test_it_is_a_count_of_lines(judged: list[str], train: list[str]) -> None:
    known = {line for text in train for line in text.split("\n")}
    bytes_alike = 0
    for text in judged:
        lines = [line for line in text.split("\n") if len(line) >= LONG]
        if lines and sum(line in known for line in lines) / len(lines) >= ALIKE:
            bytes_alike += len(text)
    assert shares({"test": judged}, train)["test"] == pytest.approx(bytes_alike / sum(map(len, judged)))


def test_a_prepared_corpus_says_it_of_both_judged_splits(tmp_path: Path) -> None:
    """Copies with another head: as many go to each split as its share of the bytes asks for."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text("\n".join([f"{number} is a file's own first line", *LINES]))
    data = Data(corpus="text", path=str(folder), vocabulary=300, validation_fraction=0.1, test_fraction=0.2)
    prepared = prepare(data, tmp_path / "cache")
    assert prepared.facts["overlap"] == dict.fromkeys(SPLITS[1:], 1)
    given = data.model_copy(update={"tokenizer": str(prepared.tokenizer_path)})  # which has nothing to learn
    assert prepare(given, tmp_path / "cache").facts["overlap"] == dict.fromkeys(SPLITS[1:], 1)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.write_text("\n".join(f"{number} is what begins this and no other file: {line}" for line in LINES))
    assert prepare(data, tmp_path / "cache").facts["overlap"] == dict.fromkeys(SPLITS[1:], 0)
