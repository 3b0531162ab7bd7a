"""The data of a run: one prepared dataset, or, where the vocabulary varies, one for each size over the same text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.data.dataset import Dataset, prepare
from experiments.errors import CorpusError
from experiments.spec import Data

_OF_THE_TEXT = (
    "format", "corpus", "python", "packages", "tokenizers", "documents", "bytes", "overlap", "learned_bytes",
    "skipped", "blank_dropped", "duplicates_dropped", "beyond_max_bytes", "corpus_sha256",
)  # fmt: skip
_OF_A_TOKENIZER = ("token_type", "tokens", "tokenizer_sha256", "tokens_sha256")


@dataclass(frozen=True)
class Prepared:
    """datasets: by the entries of their tokenizers, ascending; at least one."""

    datasets: dict[int, Dataset]

    @property
    def first(self) -> Dataset:
        return next(iter(self.datasets.values()))

    @property
    def facts(self) -> dict[str, Any]:
        """Those of the only dataset; of several what they share, and under `vocabularies` what each has of its own.
        `files` has the hash of every file."""
        if len(self.datasets) == 1:
            return self.first.facts
        every = {str(size): dataset.facts for size, dataset in self.datasets.items()}
        text = self.first.facts["baselines"]
        return {key: self.first.facts[key] for key in _OF_THE_TEXT} | {
            "vocabularies": {
                size: {key: facts[key] for key in _OF_A_TOKENIZER}
                | {"unigram_bits_per_byte": facts["baselines"]["unigram_bits_per_byte"]}
                for size, facts in every.items()
            },
            "baselines": {key: text[key] for key in ("lzma_bits_per_byte", "bytes")},
            "files": {
                f"{size}/{name}": sha256 for size, facts in every.items() for name, sha256 in facts["files"].items()
            },
        }


def prepare_all(
    data: Data, sizes: Sequence[int], cache: Path, progress: Callable[[str], None] = lambda message: None
) -> Prepared:
    """`data` with a tokenizer of each of `sizes`. Raises as `prepare` does, and CorpusError where the text changed from
    one to the next."""
    datasets = {size: prepare(data.model_copy(update={"vocabulary": size}), cache, progress) for size in sizes}
    if len({dataset.facts["corpus_sha256"] for dataset in datasets.values()}) > 1:
        raise CorpusError(f"corpus {data.corpus} {data.path} changed while it was being read; start again")
    return Prepared(datasets)


def tokens_per_byte(facts: dict[str, Any], vocabulary: int, split: str = "train") -> float:
    """Tokens that a tokenizer spends on a byte of a split. `facts`: of a run's data, see `Prepared.facts`."""
    own = facts["vocabularies"][str(vocabulary)] if "vocabularies" in facts else facts
    return own["tokens"][split] / facts["bytes"][split]
