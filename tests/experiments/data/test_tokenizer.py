"""Any text comes back as it went in; no text spells the end-of-text token; pieces change nothing."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from experiments.data import tokenizer
from experiments.errors import CorpusError

TEXTS = ["the cat sat on the mat, the cat sat\n  and sat again\n" * 3, "def f(x):\n    return x + x\n" * 4]
any_text = st.text(st.characters(exclude_categories=["Cs"]))
awkward = st.lists(
    st.sampled_from(["<|endoftext|>", "\U0001f468‍\U0001f469", "\n", " ", "\t", "the cat", "'s", "\x00", "\x1c\n", "é"])
).map("".join)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(TEXTS, 280)


@settings(max_examples=300, deadline=None)
@given(text=any_text | awkward)
def test_every_text_round_trips_and_none_spells_end_of_text(trained: Tokenizer, text: str):
    ids = trained.encode(text).ids
    assert tokenizer.END_OF_TEXT_ID not in ids
    assert trained.decode(ids) == text
    with_ends = [tokenizer.END_OF_TEXT_ID, *ids, tokenizer.END_OF_TEXT_ID]
    assert trained.decode(with_ends) == text
    assert trained.encode_batch_fast([text], add_special_tokens=False)[0].ids == ids


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(any_text | awkward | st.sampled_from(["a", "the", "", " x ", "'s", "1"])),
    size=st.integers(1, 9),
)
def test_pieces_are_the_text_and_split_into_words_as_the_whole(trained: Tokenizer, lines: list[str], size: int):
    text = "\n".join(lines)
    parts = list(tokenizer.pieces(text, size))
    assert "".join(parts) == text
    # equal words are equal tokens, whatever vocabulary was learned
    words = trained.pre_tokenizer.pre_tokenize_str
    assert [word for part in parts for word, _ in words(part)] == [word for word, _ in words(text)]


def test_pieces_are_bounded_where_lines_are():
    text = "some words here\n" * 10_000
    parts = list(tokenizer.pieces(text, 1000))
    assert len(parts) > 150
    assert max(map(len, parts)) <= 1016


def test_the_vocabulary_is_end_of_text_then_every_byte_then_merges(trained: Tokenizer):
    assert trained.get_vocab_size() == 280
    assert trained.token_to_id(tokenizer.END_OF_TEXT) == tokenizer.END_OF_TEXT_ID == 0
    bytes_only = tokenizer.train(["x"], 257)
    every_character = bytes(range(256)).decode("latin-1")
    ids = set(bytes_only.encode(every_character).ids)
    assert len(ids) == 128 + 64 + 2  # ASCII, continuation bytes, and the two lead bytes of U+0080 to U+00FF
    assert len(trained.encode(TEXTS[0]).ids) < 0.6 * len(TEXTS[0])


def test_training_and_loading_are_exact(trained: Tokenizer, tmp_path: Path):
    again = tokenizer.train(iter(TEXTS), 280)
    assert again.to_str() == trained.to_str()
    trained.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode("a<|endoftext|>b").ids == trained.encode("a<|endoftext|>b").ids
    assert 0 not in loaded.encode("a<|endoftext|>b").ids


def test_a_vocabulary_too_large_for_the_text_is_answered_with_the_size_it_supports():
    with pytest.raises(CorpusError, match=r"data.vocabulary = 5000: the train split supports (\d+)") as caught:
        tokenizer.train(TEXTS, 5000)
    supported = int(str(caught.value).split("supports ")[1].split()[0])
    assert 280 < supported < 400
    assert tokenizer.train(TEXTS, supported).get_vocab_size() == supported


def test_what_a_given_file_says_of_a_models_inputs_is_left_out(tmp_path: Path) -> None:
    trained = tokenizer.train(TEXTS, 280)
    trained.enable_truncation(3)
    trained.enable_padding(length=40)
    trained.save(str(tmp_path / "tokenizer.json"))
    text = "".join(TEXTS)
    theirs = tokenizer.given(tmp_path)
    assert theirs.decode(theirs.encode(text).ids) == text
    assert tokenizer.entries(theirs) == 280


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file"):
        tokenizer.given(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorpusError, match="is no tokenizer"):
        tokenizer.given(tmp_path)


def test_the_end_of_a_text_must_have_a_token() -> None:
    with pytest.raises(CorpusError, match="no end-of-text token"):
        tokenizer.end_of_text_id(Tokenizer(models.BPE()))
    assert tokenizer.end_of_text_id(tokenizer.train(TEXTS, 280)) == 0
