"""Token ids as text for people: what is complete so far while tokens come one by one, and a name for a single token."""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer, pre_tokenizers

from experiments.printable import clean

UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no character, or not yet one
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how a tokenizer with byte fallback names a byte
_SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def _bytes_by_sign() -> dict[str, int]:
    """Byte-level tokenizers spell a byte as the character of the same number where one sees it, and the rest, in order,
    as the characters from 256 on."""
    seen = {ord(sign) for sign in pre_tokenizers.ByteLevel.alphabet() if ord(sign) < 256}
    unseen = (byte for byte in range(256) if byte not in seen)
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


BYTES_BY_SIGN = _bytes_by_sign()


class Reader:
    """Tokens after `context`, one by one, as text in pieces of complete characters.

    Joined, the pieces and `rest` are what decoding all tokens at once adds to the context: a character that spans
    several tokens comes with its last one, and the space that a tokenizer drops from the start of a text is kept.
    Tokens without text, such as the end of a text, are left out. The tokenizers' own DecodeStream does not serve: with
    byte fallback it fails on bytes that spell no character, which a model writes that is not trained to the end.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._silent = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._before = list(context)  # read already; enough of it that what follows decodes as it does in the whole
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The characters that are complete with `token`; often none."""
        spelt = self._tokenizer.id_to_token(token)
        if spelt is None or token in self._silent:
            return ""
        self._new.append(token)
        if _ONE_BYTE.fullmatch(spelt):  # whether it is part of a character shows only where the run of bytes ends
            return ""
        piece = self._text()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._before, self._new = self._new, []
        return piece

    def rest(self) -> str:
        """What has not been given yet, with signs for what never became a character."""
        piece, self._new = self._text(), []
        return piece

    def _text(self) -> str:
        before, both = (self._tokenizer.decode(ids) for ids in (self._before, self._before + self._new))
        return both[len(before) :]


def name(tokenizer: Tokenizer, token: int) -> str:
    """One token, so that a person sees all of it: spaces and line breaks as signs, bytes that are no character by
    themselves as \\xNN, a token that the tokenizer does not know by its number."""
    spelt = tokenizer.id_to_token(token)
    if spelt is None:
        return f"#{token}"
    if token in tokenizer.get_added_tokens_decoder():  # spelt as it is read
        text = spelt
    elif byte := _ONE_BYTE.fullmatch(spelt):
        text = bytes([int(byte[1], 16)]).decode("utf-8", "backslashreplace")
    elif _byte_level(tokenizer) and all(sign in BYTES_BY_SIGN for sign in spelt):
        text = bytes(BYTES_BY_SIGN[sign] for sign in spelt).decode("utf-8", "backslashreplace")
    else:
        text = spelt.replace("▁", " ")
    return clean(text.translate(_SIGNS))


def _byte_level(tokenizer: Tokenizer) -> bool:
    return tokenizer.decoder is not None and b'"type":"ByteLevel"' in tokenizer.decoder.__getstate__()
