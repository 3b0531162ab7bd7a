"""How much of a text that models are judged by may be known by heart: no document is in two splits, but code and tables
are copied from one into another."""

import hashlib
from collections.abc import Iterator

LONG = 20  # characters of a line that says something: shorter ones are alike by chance
ALIKE = 0.9  # of a document's long lines


class Overlap:
    """First every judged document (`judge`), then every document of the train split (`train`); then `shares`.

    Of each long line of the judged text a hash is kept, of the train text nothing.
    """

    def __init__(self) -> None:
        self._documents: dict[str, list[tuple[int, list[bytes]]]] = {}
        self._met: dict[bytes, bool] = {}

    def judge(self, split: str, text: str) -> None:
        lines = list(_long_lines(text))
        self._documents.setdefault(split, []).append((len(text.encode()), lines))
        self._met.update(dict.fromkeys(lines, False))

    def train(self, text: str) -> None:
        for line in _long_lines(text):
            if line in self._met:
                self._met[line] = True

    def shares(self) -> dict[str, float]:
        """By split, the share of its bytes that lie in documents of which at least `ALIKE` of the lines of `LONG` or
        more characters stand in the train split, too; a document without any counts as new."""
        return {
            split: sum(size for size, lines in documents if self._alike(lines)) / sum(size for size, _ in documents)
            for split, documents in sorted(self._documents.items())
        }

    def _alike(self, lines: list[bytes]) -> bool:
        return bool(lines) and sum(self._met[line] for line in lines) >= ALIKE * len(lines)


def _long_lines(text: str) -> Iterator[bytes]:
    """Their hashes."""
    for line in text.splitlines():
        if len(line) >= LONG:
            yield hashlib.blake2b(line.encode(), digest_size=16).digest()
