"""Splits that cannot leak, token files that spell their text, a cache that is never stale or half there."""

import errno
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments.data import corpora, dataset
from experiments.data.baselines import lzma_bits_per_byte, unigram_bits_per_byte
from experiments.data.corpora import Document
from experiments.data.dataset import SPLITS, Dataset, cache_key, default_cache, prepare, token_type
from experiments.errors import CorpusError, EnvironmentLacksError
from experiments.spec import Data

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "<|endoftext|>",
    "é",
    "\U0001f600",
]


def some_texts(count: int = 60, seed: int = 0) -> list[str]:
    """Distinct documents of 20 to 120 words."""
    draw = random.Random(seed)
    return [f"{number}\n" + " ".join(draw.choices(WORDS, k=draw.randint(20, 120))) for number in range(count)]


def write(folder: Path, texts: list[str]) -> Data:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_bytes(text.encode())
    return Data(corpus="text", path=str(folder), vocabulary=300, validation_fraction=0.1, test_fraction=0.2)


def split_texts(prepared: Dataset, split: str) -> list[str]:
    """The documents that a token file spells."""
    tokens = prepared.splits[split].tokens
    starts = np.flatnonzero(tokens == 0)
    assert starts[0] == 0
    return [prepared.tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return write(tmp_path / "corpus", some_texts())


@pytest.fixture
def prepared(data: Data, tmp_path: Path) -> Dataset:
    return prepare(data, tmp_path / "cache")


def test_the_token_files_spell_every_document_once(prepared: Dataset):
    found = {split: split_texts(prepared, split) for split in SPLITS}
    assert Counter(chain.from_iterable(found.values())) == Counter(some_texts())
    for split, texts in found.items():
        assert prepared.splits[split].documents == len(texts) > 0
        assert prepared.splits[split].bytes == sum(len(text.encode()) for text in texts)
        assert [text for text in some_texts() if text in set(texts)] == texts  # in the order of reading
    assert prepared.test_text == "".join(found["test"]).encode()
    assert max(int(split.tokens.max()) for split in prepared.splits.values()) < prepared.vocabulary == 300


def test_fractions_are_of_bytes(tmp_path: Path):
    data = write(tmp_path / "corpus", some_texts(400))
    facts = prepare(data, tmp_path / "cache").facts
    total, largest = sum(facts["bytes"].values()), max(len(text.encode()) for text in some_texts(400))
    assert 0 <= facts["bytes"]["test"] - 0.2 * total < largest
    assert 0 <= facts["bytes"]["validation"] - 0.1 * total < largest


def test_a_document_larger_than_a_splits_share_stays_in_train(tmp_path: Path):
    data = write(tmp_path / "corpus", [*some_texts(), "gigantic " * 2000])
    prepared = prepare(data, tmp_path / "cache")
    assert any(text.startswith("gigantic") for text in split_texts(prepared, "train"))
    assert prepared.facts["bytes"]["test"] < 0.25 * sum(prepared.facts["bytes"].values())


def test_of_documents_larger_than_a_splits_share_it_takes_the_smallest():
    data = Data(test_fraction=0.1, validation_fraction=0.1)
    split = dataset._assign(data, np.arange(4), np.array([500, 300, 200, 400]))
    assert [SPLITS[at] for at in split] == ["train", "validation", "test", "train"]


def test_a_split_is_full_when_its_share_is_reached():
    data = Data(test_fraction=0.25, validation_fraction=0.125)
    split = dataset._assign(data, np.arange(8), np.full(8, 10))
    assert [SPLITS[at] for at in split] == ["test"] * 2 + ["validation"] + ["train"] * 5


def test_content_alone_decides_the_split(data: Data, prepared: Dataset, tmp_path: Path):
    shuffled = write(tmp_path / "other", some_texts()[::-1])
    other = prepare(shuffled, tmp_path / "cache")
    for split in SPLITS:
        assert sorted(split_texts(prepared, split)) == sorted(split_texts(other, split))
    # in the order of their hashes: another Python or another day gives the same test text
    hashes = {split: [sha256(text.encode()).digest() for text in split_texts(prepared, split)] for split in SPLITS}
    assert max(hashes["test"]) < min(hashes["validation"])
    assert max(hashes["validation"]) < min(hashes["train"])


def test_equal_documents_count_once_and_blank_ones_not_at_all(data: Data, prepared: Dataset, tmp_path: Path):
    padded = write(tmp_path / "other", some_texts() + some_texts()[:25] + ["", " \n", "\t"])
    other = prepare(padded, tmp_path / "cache")
    assert (other.facts["duplicates_dropped"], other.facts["blank_dropped"]) == (25, 3)
    assert (prepared.facts["duplicates_dropped"], prepared.facts["blank_dropped"]) == (0, 0)
    for split in SPLITS:
        assert np.array_equal(other.splits[split].tokens, prepared.splits[split].tokens)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text("ab \n", max_size=6), max_size=40),
    test=st.floats(0.01, 0.49),
    validation=st.floats(0.01, 0.49),
    max_bytes=st.integers(0, 60),
)
@example(texts=["a", "b", "ab", "ba", "aa"], test=0.3, validation=0.3, max_bytes=8)  # which is all of it
def test_no_text_is_in_two_splits(texts: list[str], test: float, validation: float, max_bytes: int):
    data = Data(test_fraction=test, validation_fraction=validation, max_bytes=max_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(corpora.CORPORA, "stdlib", lambda data: [Document("", text) for text in texts])
        try:
            plan = dataset._plan(data)
        except CorpusError:
            return
        split = {name: [text for at, text, _ in dataset._planned(data, plan) if at == name] for name in SPLITS}
    chosen = list(chain.from_iterable(split.values()))
    assert all(split.values())
    assert len(chosen) == len(set(chosen)) <= len({text for text in texts if text.strip()})
    room = max_bytes - sum(map(len, chosen))
    assert not max_bytes or 0 <= room < min((len(text) for text in {*texts} - {*chosen} if text.strip()), default=61)
    assert len(texts) == len(chosen) + plan.blank + plan.duplicates + plan.beyond_max_bytes


def test_max_bytes_bounds_the_text_and_keeps_smaller_choices_inside_larger_ones(data: Data, tmp_path: Path):
    sizes = {}
    for limit in (4_000, 8_000):
        limited = data.model_copy(update={"max_bytes": limit, "vocabulary": 260})
        small = prepare(limited, tmp_path / "cache")
        sizes[limit] = sum(small.facts["bytes"].values())
        assert limit - 120 < sizes[limit] <= limit
        assert small.facts["beyond_max_bytes"] == 60 - sum(small.facts["documents"].values())
    order = write(tmp_path / "other", some_texts()[::-1]).model_copy(update={"max_bytes": 4_000, "vocabulary": 260})
    renamed = prepare(order, tmp_path / "cache")
    again = prepare(data.model_copy(update={"max_bytes": 4_000, "vocabulary": 260}), tmp_path / "cache")
    for split in SPLITS:
        assert sorted(split_texts(renamed, split)) == sorted(split_texts(again, split))


def test_facts_are_complete_and_true(data: Data, prepared: Dataset):
    facts = json.loads(json.dumps(prepared.facts))
    assert facts["tokens"] == {split: len(prepared.splits[split].tokens) for split in SPLITS}
    assert facts["tokens_sha256"] == {split: prepared.splits[split].sha256 for split in SPLITS}
    assert facts["tokenizer_sha256"] == dataset._sha256(prepared.tokenizer_path)
    assert facts["settings"] == data.model_dump()
    assert facts["python"] is None  # the text is not Python's
    tokens = {split: prepared.splits[split].tokens for split in SPLITS}
    assert facts["baselines"] == {
        "unigram_bits_per_byte": unigram_bits_per_byte(
            tokens["train"], tokens["test"], prepared.splits["test"].bytes, 300
        ),
        "lzma_bits_per_byte": lzma_bits_per_byte(prepared.test_text),
        "bytes": len(prepared.test_text),
    }


def test_the_tokenizer_has_seen_the_train_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    train = dataset.tokenizer.train

    def spy(texts: Iterator[str], vocabulary: int):
        seen.extend(texts)
        return train(seen, vocabulary)

    monkeypatch.setattr(dataset.tokenizer, "train", spy)
    prepared = prepare(write(tmp_path / "corpus", some_texts()), tmp_path / "cache")
    assert seen == split_texts(prepared, "train")


def test_tokens_are_memory_mapped(prepared: Dataset):
    for split in prepared.splits.values():
        assert isinstance(split.tokens, np.memmap)
        assert split.tokens.dtype == np.uint16
        assert not split.tokens.flags.writeable


def test_the_width_follows_the_vocabulary(data: Data, prepared: Dataset, tmp_path: Path, monkeypatch):
    assert [token_type(vocabulary) for vocabulary in (257, 65_536, 65_537)] == ["<u2", "<u2", "<u4"]
    monkeypatch.setattr(dataset, "token_type", lambda vocabulary: "<u4")
    wide = prepare(data, tmp_path / "another cache")
    for split in SPLITS:
        assert wide.splits[split].tokens.dtype == np.uint32
        assert np.array_equal(wide.splits[split].tokens, prepared.splits[split].tokens)


def test_long_documents_are_encoded_in_bounded_chunks_to_the_same_tokens(
    data: Data, prepared: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dataset, "_CHUNK", 50)
    pieces = dataset.tokenizer.pieces
    monkeypatch.setattr(dataset.tokenizer, "pieces", lambda text: pieces(text, 2))
    chopped = prepare(data, tmp_path / "another cache")
    for split in SPLITS:
        assert np.array_equal(chopped.splits[split].tokens, prepared.splits[split].tokens)


def test_another_process_makes_the_same_files(prepared: Dataset, data: Data, tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from experiments.spec import Data\n"
        "from experiments.data.dataset import prepare\n"
        "prepare(Data.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules"
    )
    other = tmp_path / "another cache"
    subprocess.run([sys.executable, "-c", code, data.model_dump_json(), str(other)], check=True)
    for file in prepared.folder.iterdir():
        assert (other / prepared.folder.name / file.name).read_bytes() == file.read_bytes(), file.name


# --- the cache


def test_a_prepared_folder_is_reused_and_reopened(data: Data, prepared: Dataset, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(dataset, "_make", lambda *_: pytest.fail("made again"))
    again = prepare(data, tmp_path / "cache")
    loaded = Dataset.load(prepared.folder)
    assert again.folder == loaded.folder == prepared.folder
    assert again.facts == loaded.facts == prepared.facts
    assert np.array_equal(loaded.splits["test"].tokens, prepared.splits["test"].tokens)
    assert os.listdir(tmp_path / "cache") == [prepared.folder.name]


def test_an_edited_corpus_is_prepared_anew(data: Data, prepared: Dataset, tmp_path: Path):
    (Path(data.path) / "0003.txt").write_text("edited " * 30)
    other = prepare(data, tmp_path / "cache")
    assert other.folder != prepared.folder
    assert any("edited" in text for split in SPLITS for text in split_texts(other, split))


def test_the_key_covers_every_setting_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    base = Data()
    tokenizer_file = tmp_path / "tokenizer.json"
    dataset.tokenizer.train(["the cat sat on the mat " * 9], 262).save(str(tokenizer_file))
    changes = {
        "corpus": "text",
        "path": "elsewhere",
        "vocabulary": 4096,
        "validation_fraction": 0.03,
        "test_fraction": 0.03,
        "max_bytes": 1,
        "tokenizer": str(tokenizer_file),
    }
    assert changes.keys() == Data.model_fields.keys()
    keys = [cache_key(base, "hash"), cache_key(base, "another hash")]
    keys += [cache_key(base.model_copy(update={field: value}), "hash") for field, value in changes.items()]
    monkeypatch.setattr(dataset.tokenizers, "__version__", "0.0")
    keys.append(cache_key(base, "hash"))
    monkeypatch.setattr(dataset, "FORMAT", 0)
    keys.append(cache_key(base, "hash"))
    monkeypatch.setattr(dataset.platform, "python_version", lambda: "3.0")
    keys.append(cache_key(base, "hash"))
    assert len(set(keys)) == len(keys) == 12


def test_each_setting_changes_what_is_prepared(data: Data, prepared: Dataset, tmp_path: Path):
    for field, value in {
        "vocabulary": 290,
        "validation_fraction": 0.3,
        "test_fraction": 0.4,
        "max_bytes": 9000,
    }.items():
        other = prepare(data.model_copy(update={field: value}), tmp_path / "cache")
        assert other.facts["tokens_sha256"] != prepared.facts["tokens_sha256"], field


@pytest.mark.parametrize("name", ["tokenizer.json", "train.bin", "validation.bin", "test.bin", "test.txt"])
def test_a_damaged_file_is_found_and_made_anew(data: Data, prepared: Dataset, tmp_path: Path, name: str):
    good = (prepared.folder / name).read_bytes()
    for bad in (good[:-1], bytes([good[0] ^ 1]) + good[1:], None):
        (prepared.folder / name).unlink()
        if bad is not None:
            (prepared.folder / name).write_bytes(bad)
        with pytest.raises(CorpusError, match=r"is damaged .*delete that folder") as caught:
            Dataset.load(prepared.folder)
        assert str(prepared.folder) in str(caught.value)
        messages: list[str] = []
        again = prepare(data, tmp_path / "cache", messages.append)
        assert any("making it anew" in message for message in messages)
        assert (again.folder / name).read_bytes() == good
        assert os.listdir(tmp_path / "cache") == [prepared.folder.name]


@pytest.mark.parametrize("facts", ["", "[]", "{}", '{"files": 3}', '{"files": {"train.bin": 1}}'])
def test_damaged_facts_are_found(prepared: Dataset, facts: str):
    (prepared.folder / "facts.json").write_text(facts)
    with pytest.raises(CorpusError, match="is damaged"):
        Dataset.load(prepared.folder)


def test_a_folder_that_is_not_there_is_an_error_not_a_traceback(tmp_path: Path):
    with pytest.raises(CorpusError, match="No such file"):
        Dataset.load(tmp_path / "nothing")


def test_an_interrupted_preparation_leaves_nothing(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "lzma_bits_per_byte", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_the_second_of_two_processes_takes_the_first_ones_folder(data: Data, tmp_path: Path, monkeypatch):
    make = dataset._make

    def overtaken(*arguments) -> None:
        make(*arguments)
        monkeypatch.setattr(dataset, "_make", make)
        prepare(data, tmp_path / "cache")

    monkeypatch.setattr(dataset, "_make", overtaken)
    prepared = prepare(data, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == [prepared.folder.name]


def test_processes_may_prepare_the_same_data_at_once(data: Data, tmp_path: Path):
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        folders = list(pool.map(_prepared_folder, [data] * 3, [tmp_path / "cache"] * 3))
    assert len(set(folders)) == 1
    assert os.listdir(tmp_path / "cache") == [folders[0].name]


def _prepared_folder(data: Data, cache: Path) -> Path:
    return prepare(data, cache).folder


def test_the_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    monkeypatch.setenv("LAB_CACHE", "~/lab")
    assert default_cache() == Path("/home/somebody/lab")
    monkeypatch.delenv("LAB_CACHE")
    assert default_cache() == Path("/var/xdg/sequence-lab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path("/home/somebody/.cache/sequence-lab")


def test_a_cache_that_cannot_be_written_names_the_remedy(data: Data, tmp_path: Path):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EnvironmentLacksError, match="set LAB_CACHE"):
            prepare(data, cache)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_is_somebody_elses_names_the_remedy(data: Data, tmp_path: Path):
    (tmp_path / "theirs").mkdir(mode=0)
    with pytest.raises(EnvironmentLacksError, match=r"Permission denied\); set LAB_CACHE"):
        prepare(data, tmp_path / "theirs" / "cache")


def test_a_full_disk_names_the_remedy_and_leaves_nothing(data: Data, tmp_path: Path, monkeypatch):
    def full(*_: object) -> float:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset, "unigram_bits_per_byte", full)
    with pytest.raises(EnvironmentLacksError, match=r"No space left on device\); set LAB_CACHE"):
        prepare(data, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


# --- corpora that cannot be used


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["", " \n"], "holds no text"),
        (["one", "two"], "has 2 distinct documents, too few: its train split is empty"),
        (["one"] * 50, "has 1 distinct document, too few: its train split is empty"),
        (["one", "two", "three"], "data.vocabulary = 300: the train split supports 257 entries"),
    ],
)
def test_too_little_text(tmp_path: Path, texts: list[str], expected: str):
    with pytest.raises(CorpusError, match=expected):
        prepare(write(tmp_path / "corpus", texts), tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []


def test_a_single_file_of_blank_lines(tmp_path: Path):
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(CorpusError, match="holds no text"):
        prepare(Data(corpus="text", path=str(tmp_path / "blank.txt")), tmp_path / "cache")


def test_max_bytes_below_every_document(data: Data, tmp_path: Path):
    with pytest.raises(CorpusError, match=r"has 0 distinct documents within data\.max_bytes = 10, too few"):
        prepare(data.model_copy(update={"max_bytes": 10}), tmp_path / "cache")


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_a_corpus_that_changes_while_it_is_read(data: Data, tmp_path: Path, change: str):
    def edit(message: str) -> None:
        if message.startswith("encoding"):
            last = Path(data.path, "0059.txt")
            {"edit": lambda: last.write_text("edited"), "remove": last.unlink}.get(change, lambda: None)()
            if change == "add":
                Path(data.path, "9999.txt").write_text("added")

    with pytest.raises(CorpusError, match="changed while it was being read"):
        prepare(data, tmp_path / "cache", edit)


def test_the_standard_library_end_to_end(tmp_path: Path):
    data = Data(max_bytes=600_000, vocabulary=512)
    prepared = prepare(data, tmp_path / "cache")
    facts = prepared.facts
    assert facts["python"] == dataset.platform.python_version()
    assert 500_000 < sum(facts["bytes"].values()) <= 600_000
    assert facts["bytes"]["test"] < 0.05 * 600_000
    assert "".join(split_texts(prepared, "test")).encode() == prepared.test_text
    assert 1 < facts["baselines"]["lzma_bits_per_byte"] < facts["baselines"]["unigram_bits_per_byte"] < 5


def given_tokenizer(folder: Path, normalizer=None) -> Path:
    trained = dataset.tokenizer.train(some_texts(), 280)
    if normalizer is not None:
        trained.normalizer = normalizer
    trained.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_given_tokenizer_is_used_as_it_is(data: Data, tmp_path: Path):
    file = given_tokenizer(tmp_path)
    theirs = data.model_copy(update={"tokenizer": str(file), "vocabulary": 280})
    made = prepare(theirs, tmp_path / "cache")
    assert made.tokenizer.to_str() == dataset.tokenizer.load(file).to_str()
    assert "".join(split_texts(made, "test")).encode() == made.test_text
    assert made.facts["learned_bytes"] == 0
    wrong = data.model_copy(update={"tokenizer": str(file), "vocabulary": 300})
    with pytest.raises(CorpusError, match=r"has 280 entries: set data\.vocabulary=280"):
        prepare(wrong, tmp_path / "cache")


def test_another_tokenizer_in_the_same_place_is_another_key(tmp_path: Path):
    file = given_tokenizer(tmp_path)
    data = Data(tokenizer=str(file))
    before = cache_key(data, "hash")
    dataset.tokenizer.train(some_texts(), 290).save(str(file))
    assert cache_key(data, "hash") != before


def test_a_tokenizer_that_loses_something_is_refused(data: Data, tmp_path: Path):
    from tokenizers import normalizers

    file = given_tokenizer(tmp_path, normalizers.Replace("e", "x"))
    theirs = data.model_copy(update={"tokenizer": str(file), "vocabulary": 280})
    with pytest.raises(CorpusError, match="does not give back the text that it encodes"):
        prepare(theirs, tmp_path / "cache")


def test_a_tokenizer_that_lacks_words_is_refused(data: Data, tmp_path: Path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<eos>": 0, "the": 1})).save(str(tmp_path / "tokenizer.json"))
    theirs = data.model_copy(update={"tokenizer": str(tmp_path / "tokenizer.json"), "vocabulary": 2})
    with pytest.raises(CorpusError, match=r"data.tokenizer cannot read the text: .*UNK.*; use another"):
        prepare(theirs, tmp_path / "cache")


# --- documents that a corpus skips, and what the tokenizer learns from


def test_what_was_skipped_and_installed_is_in_the_facts_and_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    listed = ["alpha 1.0"]
    documents = [Document(str(number), text) for number, text in enumerate(some_texts())]
    documents[7:7] = [Document("bad", "", skipped="not UTF-8 text")] * 3 + [Document("blank", " ")]
    monkeypatch.setitem(corpora.CORPORA, "installed-python", lambda data: documents)
    monkeypatch.setattr(corpora, "packages", lambda data: listed)
    data = Data(corpus="installed-python", vocabulary=300, validation_fraction=0.1, test_fraction=0.2)
    messages: list[str] = []
    facts = prepare(data, tmp_path / "cache", messages.append).facts
    assert (facts["skipped"], facts["blank_dropped"]) == ({"not UTF-8 text": 3}, 1)
    assert facts["packages"] == ["alpha 1.0"]
    assert facts["python"] == dataset.platform.python_version()
    assert sum(facts["documents"].values()) == 60
    assert "left out of corpus installed-python: documents that are not UTF-8 text: 3" in messages
    listed.append("zeta 2.0")
    again = prepare(data, tmp_path / "cache").facts
    assert again["packages"] == ["alpha 1.0", "zeta 2.0"]
    assert again["files"] == facts["files"]


def test_max_bytes_draws_from_every_folder(tmp_path: Path):
    data = write(tmp_path / "corpus", [])
    for package in ("aaa", "mmm", "zzz"):
        (tmp_path / "corpus" / package).mkdir()
        for number, text in enumerate(some_texts(100, seed=ord(package[0]))):
            (tmp_path / "corpus" / package / f"{number}.txt").write_text(f"{package} {text}", encoding="utf-8")
    prepared = prepare(data.model_copy(update={"max_bytes": 20_000}), tmp_path / "cache")
    drawn = Counter(text[:3] for split in SPLITS for text in split_texts(prepared, split))
    assert drawn.keys() == {"aaa", "mmm", "zzz"}
    assert min(drawn.values()) > 0.15 * drawn.total()


def test_a_tokenizer_is_learned_from_a_bounded_part_of_the_train_split(data: Data, prepared: Dataset, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    bound = prepared.facts["bytes"]["train"] // 2
    monkeypatch.setattr(dataset, "LEARNED_BYTES", bound)
    learned: list[str] = []
    learn = dataset.tokenizer.train

    def listen(texts, vocabulary):
        learned.extend(texts)
        return learn(learned, vocabulary)

    monkeypatch.setattr(dataset.tokenizer, "train", listen)
    other = prepare(data, tmp_path / "another cache")
    size = sum(len(text.encode()) for text in learned)
    train = split_texts(other, "train")
    assert bound <= size < bound + max(len(text.encode()) for text in learned)
    assert other.facts["learned_bytes"] == size
    assert prepared.facts["learned_bytes"] == prepared.facts["bytes"]["train"]
    assert [text for text in train if text in set(learned)] == learned  # of the train split, in the order of reading
    digests = {text: dataset._digest(text.encode()) for text in train}
    assert max(digests[text] for text in learned) < min(digests[text] for text in set(train) - set(learned))
    assert train == split_texts(prepared, "train")  # what is encoded is everything still
    assert prepared.tokenizer.to_str() != other.tokenizer.to_str()
