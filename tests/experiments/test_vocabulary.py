"""The vocabulary study: the same text for every size, and what its findings say for each outcome."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import tokenizer
from experiments.data.places import PlacedBatches, token_bytes
from experiments.data.prepared import prepare_all, tokens_per_byte
from experiments.errors import CorpusError, RunFailedError, SpecError
from experiments.gates import check
from experiments.measurement.process import all_turns
from experiments.result import _check_same_data
from experiments.spec import Data, load
from experiments.store import Cell
from experiments.studies import vocabulary
from models.language_model import LanguageModel
from models.presets import preset

TEXT = "".join(f"line {i}: the cat sees {i * i} birds, né à {i % 7}\n" for i in range(400))


def encoded(size: int) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Tokens of TEXT, how many bytes each entry stands for, and each token's own bytes by the library's decoder."""
    trained = tokenizer.train([TEXT], size)
    ids = [tokenizer.END_OF_TEXT_ID, *trained.encode(TEXT, add_special_tokens=False).ids]
    pieces = [b"" if i == 0 else _spelled(trained.id_to_token(i)) for i in ids]
    return np.array(ids), token_bytes(trained), pieces


def _alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for 256 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = _alphabet()


def _spelled(token: str) -> bytes:
    return bytes(ALPHABET[character] for character in token)


@pytest.mark.parametrize("size", [257, 300, 400])
def test_bytes_of_tokens(size: int) -> None:
    ids, sizes, pieces = encoded(size)
    assert b"".join(pieces) == TEXT.encode()
    assert [len(piece) for piece in pieces] == sizes[ids].tolist()


def test_every_size_reads_the_same_places_of_the_text() -> None:
    window, steps, text = 60, 6, TEXT.encode()
    heard = {}
    for size in (257, 300, 400):
        ids, sizes, pieces = encoded(size)
        context = round(window * len(ids) / len(text))
        batches = PlacedBatches(ids, sizes, context=context, batch=3, seed=4, window_bytes=window)
        ends = np.cumsum([len(piece) for piece in pieces])
        places, total = [], 0
        for step in range(steps):
            inputs, targets = batches.at(step)
            assert inputs.shape == targets.shape == (3, context)
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            for place, row in zip(batches.places(step).tolist(), inputs, strict=True):
                at = next(i for i in range(len(ids)) if ends[i] - len(pieces[i]) >= place)  # by a search of its own
                at = min(at, len(ids) - context - 1)
                assert row.tolist() == ids[at : at + context].tolist()
                total += sum(len(piece) for piece in pieces[at + 1 : at + 1 + context])
                places.append(place)
        assert batches.seen(steps)[0] == total
        assert 0.8 < total / (window * 3 * steps) < 1.2
        heard[size] = (places, batches.seen(steps)[1])
    assert heard[257] == heard[300] == heard[400]
    ids, sizes, _ = encoded(257)
    other = PlacedBatches(ids, sizes, context=10, batch=3, seed=5, window_bytes=window)
    assert other.seen(steps)[1] != heard[257][1]


def test_a_text_shorter_than_a_window() -> None:
    with pytest.raises(CorpusError, match="a window of 4 needs more"):
        PlacedBatches(np.array([0, 1, 2, 3]), np.array([0, 1, 1, 1]), context=2, batch=1, seed=0, window_bytes=4)


def test_several_tokenizers_over_one_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT[i : i + 400] for i in range(0, len(TEXT), 400)), "utf-8")
    data = Data(corpus="text", path=str(tmp_path / "text.txt"), test_fraction=0.1, validation_fraction=0.1)
    prepared = prepare_all(data, (257, 300), tmp_path / "cache")
    facts = prepared.facts
    one, two = prepared.datasets.values()
    assert one.test_text == two.test_text
    assert facts["bytes"] == one.facts["bytes"] == two.facts["bytes"]
    assert facts["files"]["300/test.bin"] == two.facts["files"]["test.bin"]
    for size, dataset in prepared.datasets.items():
        expected = len(dataset.splits["test"].tokens) / len(dataset.test_text)
        assert tokens_per_byte(facts, size, "test") == tokens_per_byte(dataset.facts, size, "test") == expected
    assert prepare_all(data, (300,), tmp_path / "cache").facts == two.facts


def test_arms_must_have_consumed_the_same_places_and_of_one_size_the_same_tokens() -> None:
    experiment = load("vocabulary", profile="smoke")

    def made(**changes: Any) -> dict:
        cells = {Cell(name, 0, "train"): {"data_sha256": name.rpartition("-v")[2], "places_sha256": "here"}
                 for name in experiment.cells()}  # fmt: skip
        cells[Cell("mamba-v512", 0, "train")] |= changes
        return cells

    _check_same_data(made(), experiment)
    with pytest.raises(RunFailedError, match="different tokens"):
        _check_same_data(made(data_sha256="other"), experiment)
    with pytest.raises(RunFailedError, match="different text"):
        _check_same_data(made(places_sha256="elsewhere"), experiment)


def test_cells_lengths_and_tokenizers() -> None:
    experiment = load("vocabulary", profile="smoke")
    assert list(experiment.cells())[:3] == ["transformer-v257", "mamba-v257", "transformer-v512"]
    assert experiment.vocabulary_of("mamba-v512") == 512
    assert experiment.arm_of("mamba-v512") == "mamba"
    assert experiment.tokenizer_file("mamba-v512") == "tokenizer-512.json"
    seen = experiment.seen_with(0.5)
    assert (seen.training.context, seen.measurement.contexts, seen.evaluation.samples) == (64, (256,), 0)
    assert experiment.seen_with(0.499).training.context == 64  # to the nearest token
    compare = load("compare", profile="smoke")
    assert compare.seen_with(0.5) is compare
    assert (compare.vocabulary_of("mamba"), compare.tokenizer_file("mamba")) == (512, "tokenizer.json")
    sweep = load("learning-rate", profile="smoke")
    assert [sweep.arm_of(name) for name in sweep.cells()] == ["transformer"] * 2 + ["mamba"] * 2


def test_arms_and_sizes_change_places_from_seed_to_seed() -> None:
    experiment = load("vocabulary", profile="smoke", seeds=2)
    order = list(experiment.cells())
    for kind in ("train", "decode"):
        planned = [(cell.seed, cell.arm) for cell in vocabulary.plan(experiment) if cell.kind == kind]
        assert planned == [(0, arm) for arm in order] + [(1, arm) for arm in reversed(order)]


def test_the_bytes_of_a_training_are_of_all_its_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT[i : i + 400] for i in range(0, len(TEXT), 400)), "utf-8")
    data = Data(corpus="text", path=str(tmp_path / "text.txt"), test_fraction=0.1, validation_fraction=0.1)
    (dataset,) = prepare_all(data, (300,), tmp_path / "cache").datasets.values()
    settings = ("training.steps=3", "training.warmup_steps=1", "training.accumulate=2", "vocabulary.window_bytes=48")
    experiment = load("vocabulary", profile="smoke", assignments=settings)
    heard: list[np.ndarray] = []

    def trained(*given: Any) -> Any:
        heard.extend(given[-1].at(step)[1].numpy() for step in range(3 * 2))
        return {}
        yield

    monkeypatch.setattr(vocabulary.cells, "train_cell", trained)
    arm = experiment.arms["mamba"]
    made = all_turns(vocabulary.train_cell(print, experiment, "mamba-v300", arm, 0, dataset.folder, tmp_path))
    assert made["text_bytes"] == token_bytes(dataset.tokenizer)[np.concatenate(heard)].sum()


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("training.context=64", "the vocabulary study does not read 'training.context'"),
        ("data.vocabulary=512", "the vocabulary study does not read 'data.vocabulary'"),
        ("data.tokenizer=x", "the vocabulary study does not read 'data.tokenizer'"),
        ("evaluation.samples=1", "the vocabulary study does not read 'evaluation.samples'"),
        ("measurement.contexts=[8]", "the vocabulary study does not read 'measurement.contexts'"),
        ("learning_rates=[0.1]", "the vocabulary study does not read 'learning_rates'"),
        ("vocabulary.sizes=[512]", "two sizes or more"),
        ("vocabulary.sizes=[256, 512]", "from 257"),
        ("vocabulary.sizes=[512, 300]", "ascending"),
        ('evaluation.splits=["validation"]', "evaluation.splits must name test"),
        ("arms.mamba.objective=masked", "objective masked of arm 'mamba'"),
        ("arms.mamba.overrides.vocabulary=300", "leave out start = weights and overrides.vocabulary"),
    ],
)
def test_mistakes(assignment: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        load("vocabulary", profile="smoke", assignments=[assignment])
    assert said in str(caught.value)


def test_a_comparison_does_not_read_sizes() -> None:
    with pytest.raises(SpecError, match="the comparison study does not read 'vocabulary'"):
        load("compare", profile="smoke", assignments=["vocabulary.sizes=[257, 512]"])


@pytest.mark.parametrize("name", ["transformer-4m", "mamba-4m"])
def test_bytes_that_repeat_are_no_defect_of_a_model(name: str) -> None:
    model = LanguageModel(preset(name).with_overrides({"vocabulary": 257}), seed=0)
    tokens = torch.full((2, 24), 7)
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).item()
    assert abs(loss / math.log(257) - 1) > 0.1  # it expects what it has just read
    assert all(gate.passed for gate in check(model, tokens))


# --- findings


def rows_of(values: dict[str, list[float]], phase: str, metric: str, direction: str = "lower") -> list[dict]:
    """Rows of each cell's seeds and over them."""
    common = {"phase": phase, "metric": metric, "unit": "u", "direction": direction, "comparable": True,
              "reason": None, "context": None, "batch": None}  # fmt: skip
    found = []
    for name, seeds in values.items():
        found += [common | {"arm": name, "seed": seed, "value": value} for seed, value in enumerate(seeds)]
        found.append(common | {"arm": name, "seed": None, "value": sum(seeds) / len(seeds)})
    return found


def told(*rows: list[dict]) -> dict[str, dict]:
    experiment = load("vocabulary", profile="smoke", arms=["mamba"])
    every = [one for group in rows for one in group]
    return {one["kind"]: one for one in vocabulary.findings(every, experiment, None)}  # type: ignore[arg-type]


def three(*of_sizes: list[float]) -> dict[str, list[float]]:
    return {f"mamba-v{size}": values for size, values in zip((257, 512, 1024), of_sizes, strict=False)}


def test_tokens_per_byte() -> None:
    one = told(rows_of(three([1.0], [0.6], [0.5]), "text", "tokens_per_byte"))["tokens-per-byte"]
    assert one["falling"] is True
    assert one["sentence"].startswith("A larger vocabulary reads fewer tokens at every step of size")
    assert "1.000 at 257, 0.600 at 512, 0.500 at 1,024" in one["sentence"]
    one = told(rows_of(three([1.0], [0.6], [0.6]), "text", "tokens_per_byte"))["tokens-per-byte"]
    assert one["falling"] is False
    assert "does not read fewer tokens at every step" in one["sentence"]
    assert told(rows_of(three([1.0]), "text", "tokens_per_byte")) == {}


@pytest.mark.parametrize(
    ("values", "said", "size", "resolved"),
    [
        (([3.0, 3.1], [2.0, 2.1001], [2.5, 2.6]), "at 512 entries: −1.000 bits per byte (95% interval", 512, True),
        (([3.0, 3.1], [2.0, 3.05], [3.5, 3.6]), "not resolved.", 512, False),
        (([3.0], [2.0], [2.5]), "one seed says nothing about the spread over seeds", 512, False),
        (([3.0, 3.1], [2.5, 2.7], [2.0, 2.1]), "It is the largest size tried", 1024, True),
        (([2.0, 2.1], [3.0, 3.1], [3.5, 3.9]), "the smallest, with 1 of 2 larger sizes resolved as worse", 257, False),
    ],
)  # fmt: skip
def test_the_best_size(values: tuple, said: str, size: int, resolved: bool) -> None:
    one = told(rows_of(three(*values), "quality", "test_bits_per_byte"))["best-size"]
    assert said in one["sentence"]
    assert (one["size"], one["resolved"], one["edge"]) == (size, resolved, size == 1024)


def test_a_model_below_the_frequencies_of_tokens() -> None:
    bits = rows_of(three([5.0], [4.0], [3.0]), "quality", "test_bits_per_byte")
    one = told(bits, rows_of(three([5.5], [3.9], [2.9]), "text", "unigram_bits_per_byte"))["best-size"]
    assert one["sentence"].endswith(
        "At 512 and 1,024 entries it has not learned more than the frequencies of single tokens."
    )
    one = told(bits, rows_of(three([5.5], [4.9], [3.9]), "text", "unigram_bits_per_byte"))["best-size"]
    assert "frequencies" not in one["sentence"]


def test_refused_numbers_decide_nothing() -> None:
    rows = rows_of(three([3.0, 3.1], [2.0, 2.1], [2.5, 2.6]), "quality", "test_bits_per_byte")
    rows = [one | {"comparable": False, "reason": "a gate"} if one["arm"] == "mamba-v257" else one for one in rows]
    one = told(rows)["best-size"]
    assert "does not compare with 257 (mamba-v257: a gate)." in one["sentence"]
    assert one["resolved"] is False
    refused = [row | {"comparable": row["arm"] != "mamba-v512", "reason": "a gate"} for row in rows]
    one = told(refused)["best-size"]
    assert one["size"] == 1024
    assert "at 1,024 entries" in one["sentence"]
    assert "(not counted: 512)" in one["sentence"]
    one = told([row for row in rows if row["arm"] != "mamba-v257"])["best-size"]
    assert "at 512 entries; the smallest size, 257, gave no result." in one["sentence"]


def test_no_seed_in_common_is_no_best_size() -> None:
    rows = rows_of(three([3.0, 3.1, 3.2], [2.0, 2.1, 2.2], [2.5, 2.6, 2.7]), "quality", "test_bits_per_byte")
    lost = {"mamba-v257": 0, "mamba-v512": 1, "mamba-v1024": 2}
    one = told([row for row in rows if row["seed"] != lost[row["arm"]]])["best-size"]
    assert (one["size"], one["resolved"], one["comparable"]) == (None, False, False)
    assert one["sentence"] == "At which size mamba predicts best is not said: no seed has a value of every size."


def test_the_most_bytes_per_second_are_those_of_a_size_that_compares_over_the_same_seeds() -> None:
    tokens = rows_of(three([100.0, 40.0], [90.0, 91.0], [40.0, 25.0]), "train", "tokens_per_s", "higher")
    text = rows_of(three([100.0, 50.0], [150.0, 151.0], [120.0, 55.0]), "train", "bytes_per_s", "higher")
    refused = [row | {"comparable": row["arm"] != "mamba-v512", "reason": "a gate"} for row in text]
    one = told(tokens, refused)["bytes-per-s"]
    assert one["fastest"] == 1024
    assert one["sentence"].endswith("It has its most bytes per second at 1,024 entries (not counted: 512).")
    # 512 lacks the slow seed: over its only one it is slower than 1,024
    text = rows_of(three([100.0, 50.0], [110.0, 0.0], [120.0, 55.0]), "train", "bytes_per_s", "higher")
    one = told(tokens, [row for row in text if row["value"] or row["seed"] is None])["bytes-per-s"]
    assert one["fastest"] == 1024
    assert "at 1,024 entries (over 1 seed of 2, which all of these have)." in one["sentence"]


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (([1000.0], [1020.0], [1010.0]), "1,000 to 1,020 bytes of text to predict, mean over seeds, from the same "
         "places of the text: within 2.0%."),
        (([1000.0], [1000.0], [1000.0]), "the same amount."),
        (([1000.0], [1100.0], [1010.0]), "They differ by 10%, so the sizes were not "
         "trained on equal amounts of text"),
    ],
)  # fmt: skip
def test_text_seen(seen: tuple, said: str) -> None:
    assert said in told(rows_of(three(*seen), "text", "bytes_seen"))["text-seen"]["sentence"]


def test_embeddings() -> None:
    total = rows_of(three([200.0], [300.0], [500.0]), "model", "parameters")
    own = rows_of(three([100.0], [200.0], [400.0]), "model", "embedding_parameters")
    one = told(total, own)["embedding-share"]
    assert one["sentence"] == (
        "Embeddings take 50.0% of mamba's 200 parameters at 257 entries and 80.0% of 500 at 1,024; its other 100 are "
        "as many at every size."
    )
    own = rows_of(three([100.0], [200.0], [300.0]), "model", "embedding_parameters")
    assert "do not compare by vocabulary alone" in told(total, own)["embedding-share"]["sentence"]


def test_speed() -> None:
    # the paired token ratio is sqrt(0.4 x 0.625), not the ratio of the means, 0.551
    tokens = rows_of(three([100.0, 40.0], [90.0, 91.0], [40.0, 25.0]), "train", "tokens_per_s", "higher")
    text = rows_of(three([100.0, 101.0], [150.0, 151.0], [120.0, 121.201]), "train", "bytes_per_s", "higher")
    one = told(tokens, text)["bytes-per-s"]
    assert one["sentence"].startswith(
        "At 1,024 entries mamba trains on 1.20 times the bytes of text per second (95% interval"
    )
    assert one["sentence"].endswith(
        "that it does at 257, resolved; of tokens, 0.500 times as many. "
        "It has its most bytes per second at 512 entries."
    )
    text = rows_of(three([100.0, 101.0], [150.0, 151.0], [70.0, 131.0]), "train", "bytes_per_s", "higher")
    one = told(tokens, text)["bytes-per-s"]
    assert "that it does at 257, not resolved;" in one["sentence"]
    assert one["resolved"] is False


@pytest.mark.parametrize(
    ("values", "course", "said"),
    [
        (([40.0], [40.0], [40.0]), "constant", "20.5 kB whatever the vocabulary: 40.0 bytes for each of them."),
        (([40.0], [30.0], [20.0]), "falling", "20.5 kB at 257 entries and 10.2 kB at 1,024, falling at every step"),
        (([40.0], [30.0], [30.0]), "mixed", "not falling at every step of size;"),
        (([1032.0], [400.75], [8.0]), "falling", "bytes: 1,032.0 at 257, 400.8 at 512, 8.0 at 1,024."),
    ],
)  # fmt: skip
def test_state(values: tuple, course: str, said: str) -> None:
    one = told(rows_of(three(*values), "model", "state_bytes_per_byte"))["state-per-byte"]
    assert one["course"] == course
    assert said in one["sentence"]


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6))
def test_falling_is_strict(values: list[float]) -> None:
    expected = values == sorted(values, reverse=True) and len(set(values)) == len(values)
    assert vocabulary.falling(dict(enumerate(values))) is expected


def test_bytes_per_second_of_a_largest_size_that_failed_are_not_passed_over() -> None:
    text = rows_of(three([100.0, 101.0], [150.0, 151.0]), "train", "bytes_per_s", "higher")
    one = told(text)["bytes-per-s"]
    assert (one["comparable"], one["fastest"]) == (False, 512)
    assert one["sentence"] == (
        "How many bytes per second mamba trains on at 1,024 entries beside 257 is not known: no seed has a value of "
        "both."
    )
    assert "bytes-per-s" not in told(rows_of(three([100.0]), "train", "bytes_per_s", "higher"))


def test_what_is_open_after_the_correction_says_so_and_is_not_rounded_away() -> None:
    one = {"kind": "difference", "n": 2, "resolved": False, "p": 0.03, "tested": 6, "estimate": -0.1, "ci_low": -0.2}
    one |= {"ci_high": -0.0004}
    assert vocabulary._standing(one) == "not resolved after correcting for 6 comparisons"
    assert vocabulary._standing(one | {"p": 0.3}) == "not resolved"
    said = "−0.100 bits per byte (95% interval −0.200 to −0.0004, 2 paired seeds)"
    assert vocabulary._interval(one, "bits per byte") == said
    small = one | {"estimate": 0.0008, "ci_low": 0.0004, "ci_high": 0.0012}
    said = "+0.00080 bits per byte (95% interval +0.00040 to +0.00120, 2 paired seeds)"
    assert vocabulary._interval(small, "bits per byte") == said
