"""Text that nobody here wrote, made harmless to print: control characters, lone surrogates and bidirectional overrides
become visible escapes."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any


def clean(value: Any) -> Any:
    """`value` with every string in it (keys too) made harmless to print; newline and tab stay."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(_visible(character) for character in value)
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return value


def without_gaps(text: str) -> str:
    """More than two empty lines in a row as one line that counts them: models trained little write pages of them."""
    return re.sub(r"\n(?:[^\S\n]*\n){3,}", lambda gap: f"\n⋯ {gap[0].count(chr(10)) - 1} empty lines ⋯\n", text)


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # the control pictures: ESC becomes one visible sign
    # Cc, Cf, Cs: controls, bidirectional overrides, lone surrogates; Zl, Zp: line breaks in disguise
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character != "\u200d":
        return f"‹U+{ord(character):04X}›"
    return character
