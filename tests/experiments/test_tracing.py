"""What is taken apart: a preset reads bytes, equal names are told apart, and every number is finite."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.errors import SpecError
from experiments.tracing import _bytes, subjects, take_apart


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_a_preset_reads_the_bytes_of_any_text(text):
    tokenizer = _bytes()
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_text_is_what_the_chosen_byte_adds(tmp_path):
    """Tied and untrained, a model repeats the last byte that it read."""
    (one,) = take_apart(subjects("mamba-tiny", tmp_path), "abc", "cpu")
    assert (one.names, one.trace.chosen, one.text) == (("a", "b", "c"), ord("c"), "c")


@pytest.mark.parametrize("name", ["hybrid-tiny", "moe-tiny", "lstm-tiny", "mamba3-tiny"])
def test_data_is_finite_and_whole(tmp_path, name):
    (one,) = take_apart(subjects(name, tmp_path), "abcd", "cpu")
    data = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert len(data["stages"]) == len(data["blocks"]) + 4
    assert [token["text"] for token in data["tokens"]] == list("abcd")
    assert len(data["logits"]) == one.subject.config.vocabulary
    for block in data["blocks"]:
        mixer = block["mixer"]
        if mixer["kind"] == "attention":
            for row, (scores, weights) in enumerate(zip(mixer["scores"][0], mixer["weights"][0], strict=True)):
                assert [score is None for score in scores] == [s > row for s in range(4)]
                assert [weight == 0 for weight in weights] == [s > row for s in range(4)]
        else:
            assert all(one["shortest"] <= one["median"] <= one["longest"] for one in mixer["half_life"])
            assert len(mixer["written"]) == len(mixer["left"]) == 4
    assert (data["blocks"][0]["experts"] is None) == (name != "moe-tiny")


def test_the_same_preset_twice(tmp_path):
    """Once as it is changed, once as it is."""
    pair = subjects("mamba-tiny", tmp_path, against="mamba-tiny", settings=["mixer.state=3"], seed=5)
    assert [one.name for one in pair] == ["mamba-tiny", "mamba-tiny (2)"]
    assert [one.config.blocks[0].mixer.state for one in pair] == [3, 16]
    assert [one.seed for one in pair] == [5, 5]


def test_what_is_nowhere(tmp_path):
    with pytest.raises(SpecError, match="no preset, run or folder 'transformr-1m': did you mean 'transformer-1m'"):
        subjects("transformr-1m", tmp_path)
