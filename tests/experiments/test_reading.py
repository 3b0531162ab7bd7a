"""Token ids as text: pieces while they come, and one token by itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from experiments.data import tokenizer
from experiments.reading import UNFINISHED, Reader, name

TEXTS = ["the cat sees rain, the dog hears it", "ein Bär, café, naïve façade", "日本語 中文 한국어", "🙂🎈👩‍🚀 é"]


def byte_level() -> Tokenizer:
    """As the lab trains them."""
    return tokenizer.train(TEXTS * 3, 300)


def byte_fallback() -> Tokenizer:
    """As Llama's and Phi-3's: ▁ for a space, one more before the text, and bytes for what has no token."""
    words = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s", "é", "▁▁", "t", "日"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(["<s>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def metaspace() -> Tokenizer:
    words = ["▁", "▁the", "▁cat", "s", "▁▁▁", "a▁b", "t"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def suffixes() -> Tokenizer:
    """As GPT-1's: the end of a word is part of its token."""
    words = ["t", "t</w>", "cat</w>", "s</w>", "the</w>", ".</w>"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return made


KINDS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace, suffixes)}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_pieces_joined_are_the_whole(kind, data):
    made = KINDS[kind]
    entries = st.integers(0, made.get_vocab_size() + 2)  # a model's vocabulary may be larger than its tokenizer's
    ids = data.draw(st.lists(entries | st.integers(0, 5), max_size=24))
    context = data.draw(st.sampled_from([[], *(made.encode(text).ids for text in TEXTS), ids[:3]]))
    reader = Reader(made, context)
    pieces = [reader.add(token) for token in ids]
    assert not any(piece.endswith(UNFINISHED) for piece in pieces)
    whole = made.decode(context + ids)
    assert "".join(pieces) + reader.rest() == whole[len(made.decode(context)) :]
    assert reader.rest() == ""


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_with_its_last_byte(text):
    made = KINDS["byte_level"]
    ids = [made.token_to_id(sign) for one in text for sign in _spelt(one)]
    reader = Reader(made, made.encode("the ").ids)
    pieces = [reader.add(token) for token in ids]
    assert [piece for piece in pieces if piece] == list(text)
    ends = [len(text[: i + 1].encode()) - 1 for i in range(len(text))]
    assert [i for i, piece in enumerate(pieces) if piece] == ends
    assert reader.rest() == ""


def _spelt(character: str) -> str:
    ((signs, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)
    return signs


def test_what_never_became_a_character_comes_at_the_end():
    made = KINDS["byte_level"]
    reader = Reader(made, [])
    assert [reader.add(made.token_to_id(sign)) for sign in _spelt("日")[:2]] == ["", ""]
    assert reader.rest() == UNFINISHED


def test_the_space_before_a_word_is_kept():
    made = KINDS["byte_fallback"]
    reader = Reader(made, made.encode("the").ids)
    assert reader.add(made.token_to_id("▁cat")) == " cat"
    assert made.decode([made.token_to_id("▁cat")]) == "cat"  # what decoding the new tokens alone would give


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_no_byte_is_lost_in_a_name(kind):
    made = KINDS[kind]
    for byte in range(128, 256):  # none is a character by itself
        at = _ID_OF_BYTE[kind](made, byte)
        assert name(made, at) == f"\\x{byte:02x}"
    for byte in range(33, 127):
        assert name(made, _ID_OF_BYTE[kind](made, byte)) == chr(byte)


_ID_OF_BYTE = {
    # the first byte of a character of two bytes, or its second
    "byte_level": lambda made, byte: made.token_to_id(
        _spelt(chr(byte)) if byte < 128
        else _spelt(bytes([0xC2, byte]).decode())[1] if byte < 0xC0
        else _spelt(bytes([byte, 0x80]).decode())[0] if 0xC2 <= byte < 0xE0
        else chr(byte)
    ),
    "byte_fallback": lambda made, byte: made.token_to_id(f"<0x{byte:02X}>"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "token", "shown"),
    [
        ("byte_level", "Ġ", "␣"), ("byte_level", "Ċ", "↵"), ("byte_level", "ĉ", "⇥"), ("byte_level", "ě", "␛"),
        ("byte_level", "<|endoftext|>", "<|endoftext|>"), ("byte_level", "Ġthe", "␣the"),
        ("byte_fallback", "▁the", "␣the"), ("byte_fallback", "é", "é"), ("byte_fallback", "<0x0A>", "↵"),
        ("byte_fallback", "<s>", "<s>"), ("suffixes", "cat</w>", "cat</w>"),
    ],
)  # fmt: skip
def test_a_name_shows_all_of_a_token(kind, token, shown):
    assert name(KINDS[kind], KINDS[kind].token_to_id(token)) == shown


def test_an_added_token_is_no_row_of_bytes():
    made = Tokenizer.from_str(KINDS["byte_level"].to_str())
    made.add_tokens(["née"])
    assert name(made, made.token_to_id("née")) == "née"


def test_a_token_that_the_tokenizer_does_not_know_has_its_number():
    assert name(KINDS["suffixes"], 99) == "#99"
