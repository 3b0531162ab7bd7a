"""Byte-level BPE: any text in, the same text out, and one token that no text can spell."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.errors import CorpusError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
PIECE = 1 << 18  # characters

# The pre-tokenizer makes a lone line feed between visible characters a word of its own, so a cut right after
# it changes no token. ASCII only: there, everybody agrees on what is visible.
_CUT = re.compile(r"(?<=[!-~]\n)(?=[!-~])")


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learn `vocabulary` entries: end of text (id 0), the 256 bytes, then merges seen at least twice.

    Deterministic in `texts`. Raises CorpusError where they support fewer entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    learned = tokenizer.get_vocab_size()
    if learned < vocabulary:
        raise CorpusError(
            f"data.vocabulary = {vocabulary}: the train split supports {learned} entries; "
            f"set data.vocabulary to at most {learned} or use more text"
        )
    return _literal(tokenizer)


def load(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`, as `train` returned it. What one from elsewhere may keep in its file for a model's
    inputs, truncation and padding, is left out: a text is encoded as it is."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _literal(tokenizer)


def given(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, or in the model folder that holds one. Raises CorpusError."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CorpusError(f"data.tokenizer: no such file: {file}")
    try:
        return load(file)
    except Exception as error:  # the library raises nothing narrower
        raise CorpusError(f"data.tokenizer: {file} is no tokenizer: {error}") from None


def entries(tokenizer: Tokenizer) -> int:
    """Token ids are below it; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Of the token that stands before every document. Raises CorpusError where none of the usual ones is there."""
    for name in ENDS:
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    raise CorpusError(f"data.tokenizer has no end-of-text token; known are {', '.join(ENDS)}")


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """`text` in pieces of about `size` >= 1 characters that encode, one by one, exactly as the whole does.

    It keeps long documents from being encoded at once, which takes a hundred times their size in memory.
    """
    start = 0
    while cut := _CUT.search(text, start + size):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """Read "<|endoftext|>" in a text as those 13 characters. The setting is not part of the saved file."""
    tokenizer.encode_special_tokens = True
    return tokenizer
