"""A corpus, split, tokenized and kept on disk: prepared once, then memory-mapped by every cell.

    <cache>/<key>/
        tokenizer.json
        train.bin validation.bin test.bin    one stream each: for every document [end-of-text] tokens...
        test.txt                             the test documents, back to back: what `test.bin` spells
        facts.json                           counts, baselines, and the SHA-256 of each file above

A document is the unit of the split, and its content alone decides where it goes: documents are ordered by
their SHA-256, the first ones are test, the next validation, the rest train. Names and order of files have no
say in it, equal documents count once, so no text is in two splits. Within a split, documents keep the order
in which they were read.

The corpus is streamed three times (hash, learn the tokenizer, encode); between passes 41 bytes per document are kept,
and hashes of lines of the test and validation text, never a text itself. The tokenizer learns from the
first documents of the train split, by content again, until they are `LEARNED_BYTES`.
"""

import hashlib
import json
import os
import platform
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from experiments.data import corpora, tokenizer
from experiments.data.baselines import lzma_bits_per_byte, unigram_bits_per_byte
from experiments.data.overlap import Overlap
from experiments.errors import CorpusError, EnvironmentLacksError
from experiments.numbers import plural
from experiments.spec import Data

FORMAT = 4  # of everything in the folder; another number is another key
SPLITS = ("train", "validation", "test")
_TOKENIZER, _TEST_TEXT, _FACTS = "tokenizer.json", "test.txt", "facts.json"
LEARNED_BYTES = 32 << 20  # of train text a tokenizer is learned from: of Python, 96 << 20 saves 0.3% of the tokens
_CHUNK = 1 << 20  # characters encoded at once


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """tokens: (n,) uint16 or uint32, mapped from disk. bytes: of the documents' text in UTF-8, which
    end-of-text tokens add nothing to. sha256: of the token file."""

    tokens: np.memmap
    bytes: int
    documents: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared corpus. Pass `folder`, not the object, to another process, and `load` it there.

    vocabulary: token ids are below it. facts: JSON-able; for the record of a run.
    """

    folder: Path
    splits: dict[str, TokenSplit]
    vocabulary: int
    facts: dict[str, Any]

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / _TOKENIZER

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer.load(self.tokenizer_path)

    @property
    def test_text(self) -> bytes:
        return (self.folder / _TEST_TEXT).read_bytes()

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Open a prepared folder. Raises CorpusError where a file is missing or not what was written."""
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            for name, sha256 in facts["files"].items():
                if _sha256(folder / name) != sha256:
                    raise CorpusError(f"prepared data in {folder} is damaged ({name}); delete that folder")
            splits = {
                split: TokenSplit(
                    tokens=np.memmap(folder / f"{split}.bin", dtype=facts["token_type"], mode="r"),
                    bytes=facts["bytes"][split],
                    documents=facts["documents"][split],
                    sha256=facts["tokens_sha256"][split],
                )
                for split in SPLITS
            }
            return cls(folder=folder, splits=splits, vocabulary=facts["vocabulary"], facts=facts)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = _FACTS
        raise CorpusError(f"prepared data in {folder} is damaged ({problem}); delete that folder")


def default_cache() -> Path:
    """$LAB_CACHE, else $XDG_CACHE_HOME/sequence-lab, else ~/.cache/sequence-lab."""
    chosen = os.environ.get("LAB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(chosen or os.path.join(base, "sequence-lab")))


def prepare(data: Data, cache: Path, progress: Callable[[str], None] = lambda message: None) -> Dataset:
    """The dataset that `data` describes, from `cache` if it is there, else made and put there.

    Text is read and hashed every time, so an edited corpus is never mistaken for the cached one. A damaged
    folder is made anew. Several processes may prepare the same data at once.
    Raises SpecError or CorpusError for what cannot be used, EnvironmentLacksError where `cache` cannot be
    written.
    """
    progress(f"reading corpus {data.corpus} {data.path}".rstrip())
    plan = _plan(data)
    for reason, count in plan.skipped.items():
        progress(f"left out of {_shown(data)}: documents that are {reason}: {count}")
    folder = cache / cache_key(data, plan.corpus_sha256)
    damaged = False
    if os.path.exists(folder):  # Path.exists raises where the cache is not ours to look into
        try:
            return Dataset.load(folder)
        except CorpusError as error:
            progress(f"{error}: making it anew")
            damaged = True
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=cache, ignore_cleanup_errors=True) as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            _make(data, plan, made, progress)
            if damaged:
                os.replace(folder, Path(scratch, "damaged"))
            try:
                os.rename(made, folder)
            except OSError:
                if not os.path.exists(folder):  # otherwise another process was first, with the same files
                    raise
    return Dataset.load(folder)


def cache_key(data: Data, corpus_sha256: str) -> str:
    """SHA-256 over everything that a prepared folder depends on."""
    ingredients = {
        "format": FORMAT,
        "settings": data.model_dump(mode="json"),
        "corpus": corpus_sha256,
        "python": _python(data),
        "packages": corpora.packages(data),
        "tokenizers": tokenizers.__version__,
        "tokenizer": tokenizer.given(Path(data.tokenizer)).to_str() if data.tokenizer else None,
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def token_type(vocabulary: int) -> str:
    """Little-endian, the narrowest that holds every id, as numpy spells it."""
    return "<u2" if vocabulary <= 1 << 16 else "<u4"


# --- pass 1: which document goes where


@dataclass(frozen=True)
class _Plan:
    """digests: (n, 32) uint8, SHA-256 of every document. split: (n,) int8 into SPLITS, -1: unused. learned: (n,) bool,
    whether the tokenizer learns from it; learned_bytes: of their text. skipped: documents whose text the corpus left
    out, by the reason."""

    digests: np.ndarray
    split: np.ndarray
    learned: np.ndarray
    learned_bytes: int
    skipped: dict[str, int]
    blank: int
    duplicates: int
    beyond_max_bytes: int

    @property
    def corpus_sha256(self) -> str:
        """SHA-256 of the documents' SHA-256s in the order of reading."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()


def _plan(data: Data) -> _Plan:
    hashes, lengths, skipped = bytearray(), array("q"), Counter[str]()
    for document in corpora.read(data):
        text = document.text.encode()
        hashes += _digest(text)
        if document.skipped:
            skipped[document.skipped] += 1
        lengths.append(len(text) if text and not document.text.isspace() else 0)
    digests = np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32)
    sizes = np.frombuffer(lengths, dtype=np.int64)

    (written,) = np.nonzero(sizes)
    order = written[_by_content(digests[written])]
    if not len(order):
        raise CorpusError(f"{_shown(data)} holds no text")
    chosen = _within(order, sizes, data.max_bytes)
    split = _assign(data, chosen, sizes)
    train = chosen[split[chosen] == SPLITS.index("train")]
    learned = np.zeros(len(sizes), dtype=bool)
    learned[_until(train, sizes, LEARNED_BYTES)] = True
    return _Plan(
        digests=digests,
        split=split,
        learned=learned,
        learned_bytes=int(sizes[learned].sum()),
        skipped=dict(skipped),
        blank=len(sizes) - len(written) - skipped.total(),
        duplicates=len(written) - len(order),
        beyond_max_bytes=len(order) - len(chosen),
    )


def _by_content(digests: np.ndarray) -> np.ndarray:
    """Indices of the distinct rows of (n, 32) in ascending order, of equal rows the first."""
    words = digests.copy().view(">u8")
    order = np.lexsort(words.T[::-1])  # stable: equal rows stay in the order of reading
    ordered = words[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[new]


def _within(order: np.ndarray, sizes: np.ndarray, max_bytes: int) -> np.ndarray:
    """The documents used: in the order of content, each that still fits into `max_bytes` (0: all)."""
    if not max_bytes:
        return order
    chosen, room = [], max_bytes
    for index in order:
        if sizes[index] <= room:
            chosen.append(index)
            room -= sizes[index]
    return np.array(chosen, dtype=np.int64)


def _until(order: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """The first of `order`, until `share` bytes are reached: those before which they are not yet."""
    return order[np.cumsum(sizes[order]) - sizes[order] < share]


def _assign(data: Data, chosen: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Fill test, then validation, up to their fraction of the bytes; train gets the rest.

    Documents larger than a split's whole share come last, smallest first: one of them would turn a small
    corpus into mostly test text.
    """
    split = np.full(len(sizes), -1, dtype=np.int8)
    total, rest = sizes[chosen].sum(), chosen
    for name, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        share = fraction * total
        oversize = np.where(sizes[rest] > share, sizes[rest], 0)
        candidates = rest[np.argsort(oversize, kind="stable")]
        needed = _until(candidates, sizes, share)
        split[needed] = SPLITS.index(name)
        rest = rest[~np.isin(rest, needed)]
    split[rest] = SPLITS.index("train")
    for index, name in enumerate(SPLITS):
        if not (split == index).any():
            limit = f" within data.max_bytes = {data.max_bytes}" if data.max_bytes else ""
            raise CorpusError(
                f"{_shown(data)} has {plural(len(chosen), 'distinct document')}{limit}, too few: its {name} split is "
                f"empty; use more text, or divide it into more documents (files, blank lines or .jsonl)"
            )
    return split


def _planned(data: Data, plan: _Plan) -> Iterator[tuple[str, str, bool]]:
    """(split, text, learned) of each used document, read anew. Raises CorpusError where it is not what it was."""
    for document, digest, split, learned in zip_longest(corpora.read(data), plan.digests, plan.split, plan.learned):
        if document is None or digest is None or _digest(document.text.encode()) != digest.tobytes():
            raise CorpusError(f"{_shown(data)} changed while it was being read; start again once it is settled")
        if split >= 0:
            yield SPLITS[split], document.text, learned


# --- passes 2 and 3: tokenizer and token files


def _make(data: Data, plan: _Plan, folder: Path, progress: Callable[[str], None]) -> None:
    """Write every file of the dataset into the empty `folder`."""
    overlap = Overlap()
    texts = (text for split, text, learned in _judged(_planned(data, plan), overlap) if learned)
    if data.tokenizer:
        progress(f"taking the tokenizer of {data.tokenizer}")
        trained = tokenizer.given(Path(data.tokenizer))
        entries = tokenizer.entries(trained)
        if entries != data.vocabulary:
            raise CorpusError(
                f"data.vocabulary = {data.vocabulary}, but the tokenizer in {data.tokenizer} has {entries} entries: "
                f"set data.vocabulary={entries}"
            )
        deque(texts, maxlen=0)  # which are judged all the same
    else:
        progress(f"training a tokenizer of {data.vocabulary} entries")
        trained = tokenizer.train(texts, data.vocabulary)
    (folder / _TOKENIZER).write_text(trained.to_str(), encoding="utf-8")

    progress("encoding documents")
    kind = token_type(data.vocabulary)
    counts = {fact: {str(split): 0 for split in SPLITS} for fact in ("documents", "bytes")}
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        test_text = stack.enter_context((folder / _TEST_TEXT).open("wb"))
        documents = _counted(_planned(data, plan), counts, test_text, overlap)
        for split, ids in _encoded(documents, trained, whole=bool(data.tokenizer)):
            files[split].write(np.array(ids, dtype=kind).tobytes())

    progress("computing the baselines")
    tokens = {split: np.memmap(folder / f"{split}.bin", dtype=kind, mode="r") for split in SPLITS}
    test_bytes = counts["bytes"]["test"]
    baselines = {
        "unigram_bits_per_byte": unigram_bits_per_byte(tokens["train"], tokens["test"], test_bytes, data.vocabulary),
        "lzma_bits_per_byte": lzma_bits_per_byte((folder / _TEST_TEXT).read_bytes()),
        "bytes": test_bytes,
    }
    hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    facts = {
        "format": FORMAT,
        "corpus": data.corpus,
        "packages": corpora.packages(data),
        "settings": data.model_dump(mode="json"),
        "python": _python(data),
        "tokenizers": tokenizers.__version__,
        "vocabulary": data.vocabulary,
        "token_type": kind,
        **counts,
        "tokens": {split: len(tokens[split]) for split in SPLITS},
        "overlap": overlap.shares(),
        "learned_bytes": 0 if data.tokenizer else plan.learned_bytes,
        "skipped": plan.skipped,
        "blank_dropped": plan.blank,
        "duplicates_dropped": plan.duplicates,
        "beyond_max_bytes": plan.beyond_max_bytes,
        "corpus_sha256": plan.corpus_sha256,
        "tokenizer_sha256": hashes[_TOKENIZER],
        "tokens_sha256": {split: hashes[f"{split}.bin"] for split in SPLITS},
        "baselines": baselines,
        "files": hashes,
    }
    (folder / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _judged(documents: Iterable[tuple[str, str, bool]], overlap: Overlap) -> Iterator[tuple[str, str, bool]]:
    """Passes documents through and tells `overlap` of those that models are judged by."""
    for split, text, learned in documents:
        if split != "train":
            overlap.judge(split, text)
        yield split, text, learned


def _counted(
    documents: Iterable[tuple[str, str, bool]],
    counts: dict[str, dict[str, int]],
    test_text: IO[bytes],
    overlap: Overlap,
) -> Iterator[tuple[str, str]]:
    """Passes documents through, counts them, keeps the test split's text, and tells `overlap` of the train split's."""
    for split, text, _ in documents:
        raw = text.encode()
        counts["documents"][split] += 1
        counts["bytes"][split] += len(raw)
        if split == "test":
            test_text.write(raw)
        if split == "train":
            overlap.train(text)
        yield split, text


def _encoded(documents: Iterable[tuple[str, str]], trained: Tokenizer, whole: bool) -> Iterator[tuple[str, list[int]]]:
    """(split, token ids) in order, each document behind an end-of-text token; in bounded memory, except that `whole`
    documents are encoded at once: of a foreign tokenizer nobody knows where a text may be cut."""
    end = tokenizer.end_of_text_id(trained)
    heads: list[tuple[str, list[int]]] = []
    bodies: list[str] = []
    length = 0

    def flush() -> Iterator[tuple[str, list[int]]]:
        try:
            encodings = trained.encode_batch_fast(bodies, add_special_tokens=False)
        except Exception as error:  # the library raises no narrower class
            raise CorpusError(f"data.tokenizer cannot read the text: {error}; use another") from None
        for (split, start), encoding, body in zip(heads, encodings, bodies, strict=True):
            if whole and trained.decode(encoding.ids, skip_special_tokens=False) != body:
                raise CorpusError(
                    "data.tokenizer does not give back the text that it encodes (it changes case or spaces, or has no "
                    "token for a character), so bits per byte of the text would be wrong; use another"
                )
            yield split, start + encoding.ids

    for split, text in documents:
        start = [end]
        for piece in (text,) if whole else tokenizer.pieces(text):
            heads.append((split, start))
            bodies.append(piece)
            length, start = length + len(piece), []
            if length >= _CHUNK:
                yield from flush()
                heads, bodies, length = [], [], 0
    yield from flush()


# --- small things


def _python(data: Data) -> str | None:
    return platform.python_version() if data.corpus != "text" else None


def _shown(data: Data) -> str:
    return f"corpus {data.corpus}" + (f" at {data.path}" if data.path else "")


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Raises EnvironmentLacksError for an OSError, which is the cache's: corpora turn theirs into CorpusErrors."""
    try:
        yield
    except BrokenPipeError:  # nobody listens to the progress any more
        raise
    except OSError as error:
        raise EnvironmentLacksError(
            f"cannot write the cache folder {cache} ({error.strerror}); set LAB_CACHE to a folder that can be written"
        ) from None
