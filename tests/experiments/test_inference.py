"""What `lab generate` says of a model in a folder: text, probabilities, speeds, bytes, and what it refuses."""

import math
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from experiments import inference, tracing
from experiments.data import tokenizer
from experiments.errors import SpecError
from experiments.inference import read_tokenizer, write, writers
from models import checkpoint, cost
from models.errors import ConfigError
from models.generation import Sampling
from models.language_model import LanguageModel
from models.presets import preset

PROMPT = "the cat sees "
SHAPES = {
    "phi3-mini": {"padding_index": 7, "mixer.heads": 4, "mixer.kv_heads": 2, "feedforward.hidden": 48},
    "mamba-tiny": {},
    "gpt1": {"mixer.heads": 4, "positions": 20},
}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer.train(["the cat sees rain and the dog hears music 日本"] * 4, 290)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, words: Tokenizer) -> dict[str, Path]:
    """Small random models that prefer some tokens to others."""
    made = {}
    for name, shape in SHAPES.items():
        model = LanguageModel(
            preset(name).with_overrides(shape | {"layers": 2, "width": 32, "vocabulary": 290}), seed=1
        )
        with torch.no_grad():
            model.head.weight.mul_(40)
        made[name] = tmp_path_factory.mktemp("models") / name
        checkpoint.save(model, made[name])
        words.save(str(made[name] / "tokenizer.json"))
    return made


def by_hand(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """The likeliest first, in plain Python."""
    top = max(logits)
    weights = {i: math.exp((x - top) / (temperature or 1)) for i, x in enumerate(logits)}
    ordered = sorted(weights, key=lambda i: -weights[i])[:top_k]
    if top_p is not None:
        total = sum(weights[i] for i in ordered)
        before = [0.0, *accumulate(weights[i] / total for i in ordered)]
        ordered = [one for one, reached in zip(ordered, before, strict=False) if reached < top_p]
    total = sum(weights[i] for i in ordered)
    return {i: weights[i] / total for i in ordered}


@pytest.mark.parametrize("rule", [(0.0, None, None), (1.5, None, None), (0.7, 3, None), (1.2, 40, 0.8)])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_probabilities_are_of_the_distribution_drawn_from(folders, name, rule):
    temperature, top_k, top_p = rule
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    (writer,) = writers(folders[name], PROMPT, 6)
    made = write(writer, 6, sampling, seed=3, device="cpu", choices=True)
    model, ids = checkpoint.load(folders[name]), list(writer.ids)
    assert made.choices is not None
    assert [choice.chosen.token for choice in made.choices] == list(made.token_ids)
    for choice in made.choices:
        expected = by_hand(model(torch.tensor([ids]))[0, -1].double().tolist(), *rule)
        others = [token for token in expected if token != choice.chosen.token][:4]
        assert [one.token for one in choice.others] == others
        for one in (choice.chosen, *choice.others):
            assert one.probability == pytest.approx(expected[one.token], rel=1e-3)
        if sampling.greedy:
            assert choice.chosen.token == next(iter(expected))
        ids.append(choice.chosen.token)


@pytest.mark.parametrize("name", SHAPES)
def test_text_comes_while_it_is_made(folders, name, monkeypatch):
    events, read = [], []

    def watched(model, prompt, *arguments, **keywords):
        read.append(prompt.tolist())
        for step in steps(model, prompt, *arguments, **keywords):
            events.append("step")
            yield step

    steps = inference.steps
    (writer,) = writers(folders[name], PROMPT, 5)
    plain = write(writer, 5, Sampling(), seed=0, device="cpu")
    monkeypatch.setattr(inference, "steps", watched)
    made = write(writer, 5, Sampling(), seed=0, device="cpu", heard=events.append)
    assert events[:3] == ["step", "step", PROMPT]  # the rehearsal before
    assert read == [[list(writer.ids)]] * len(read)
    assert 2 <= len(read) <= 1 + inference.READINGS  # the rehearsal, the text, and readings for their time
    told = 3 + 2 * 5 + 1  # each token's piece, and what is left of characters
    assert events[3:told:2] == [*["step"] * 5, *events[told - 1 : told]][: len(events[3:told:2])]
    assert events[told:] == ["step"] * (len(read) - 2)
    assert "".join(event for event in events if event != "step") == PROMPT + made.text
    assert made.choices is None
    assert made.token_ids == plain.token_ids
    assert made.text == writer.tokenizer.decode([*writer.ids, *made.token_ids])[len(PROMPT) :]


@pytest.mark.parametrize("name", SHAPES)
def test_the_state_is_as_large_as_the_formula_says(folders, name):
    (writer,) = writers(folders[name], PROMPT, 7)
    made = write(writer, 7, Sampling(), seed=0, device="cpu")
    config = checkpoint.read_config(folders[name])
    assert made.state_bytes == cost.state_bytes(config, 1, len(writer.ids) + 7, 4) > 0
    assert made.prompt_tokens == len(writer.ids) == len(writer.tokenizer.encode(PROMPT).ids)


@pytest.mark.parametrize(
    ("readings", "fastest"),
    [
        ([2.0], 2.0),  # long enough to be told at once
        ([0.3, 0.1, 0.2], 0.1),  # after half a second
        ([0.02, *[0.03] * 8, 0.01], 0.01),  # ten of them
    ],
)
def test_prefill_and_decode_are_timed_apart(folders, monkeypatch, readings, fastest):
    first, *again = readings
    times = [first, *[0.25] * 4, *again]
    ticks = accumulate([0, *(second for one in times for second in (one, 5.0))])  # five between, which do not count
    (writer,) = writers(folders["mamba-tiny"], PROMPT, 5)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: next(ticks))
    made = write(writer, 5, Sampling(), seed=0, device="cpu")
    assert made.prefill_tokens_per_s == pytest.approx(len(writer.ids) / fastest)
    assert made.decode_tokens_per_s == pytest.approx(4)
    assert len(list(ticks)) == 1  # the last pause: every time was asked for


def test_one_token_has_no_speed_of_decode(folders):
    (writer,) = writers(folders["mamba-tiny"], PROMPT, 1)
    assert write(writer, 1, Sampling(), seed=0, device="cpu").decode_tokens_per_s is None


def test_a_tokenizers_own_limits_do_not_cut_or_pad_a_prompt(folders, words, tmp_path):
    model = checkpoint.load(folders["mamba-tiny"])
    checkpoint.save(model, tmp_path / "limited")
    limited = Tokenizer.from_str(words.to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=30)
    limited.save(str(tmp_path / "limited" / "tokenizer.json"))
    (writer,) = writers(tmp_path / "limited", PROMPT, 2)
    assert writer.ids == tuple(words.encode(PROMPT).ids)


def test_a_prompt_spells_no_special_token(tmp_path):
    """As no text does in training; the file does not say so."""
    learned, text = tokenizer.train(["def f(x): return x\n"] * 9, 260), f"a{tokenizer.END_OF_TEXT}b"
    learned.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.END_OF_TEXT_ID in Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    ids = read_tokenizer(tmp_path / "tokenizer.json").encode(text).ids
    assert ids == learned.encode(text).ids
    assert tokenizer.END_OF_TEXT_ID not in ids


def test_a_folder_without_a_model(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SpecError, match=f"'{path}' is neither a run directory nor a folder with a model's config"):
            inference.source(str(path), tmp_path)


def test_refused_before_anything_is_loaded(folders, words, tmp_path):
    count = len(words.encode(PROMPT).ids)
    room = 20 - count + 1
    assert writers(folders["gpt1"], PROMPT, room)
    with pytest.raises(ConfigError, match=f"20 learned positions.*ask for at most {room}$"):
        writers(folders["gpt1"], PROMPT, room + 1)
    with pytest.raises(SpecError, match="the prompt is empty"):
        writers(folders["gpt1"], "", 1)
    small = LanguageModel(preset("mamba-tiny").with_overrides({"vocabulary": 260, "layers": 1, "width": 16}), seed=0)
    checkpoint.save(small, tmp_path / "small")
    with pytest.raises(ConfigError, match=r"small has no tokenizer.json"):
        writers(tmp_path / "small", PROMPT, 1)
    words.save(str(tmp_path / "small" / "tokenizer.json"))
    token = next(token for token in words.encode(PROMPT).ids if token >= 260)
    text = words.decode([token]).replace(" ", "␣")
    with pytest.raises(
        SpecError, match=f"'{text}' of the prompt is token {token}, outside the model's vocabulary of 260"
    ):
        writers(tmp_path / "small", PROMPT, 1)


def test_weights_that_are_no_numbers(folders, words, tmp_path):
    model = checkpoint.load(folders["mamba-tiny"])
    with torch.no_grad():
        model.head.weight[3] = math.nan
    checkpoint.save(model, tmp_path / "broken")
    words.save(str(tmp_path / "broken" / "tokenizer.json"))
    (writer,) = writers(tmp_path / "broken", PROMPT, 2)
    with pytest.raises(SpecError, match="scores are not finite"):
        write(writer, 2, Sampling(temperature=1), seed=0, device="cpu")


def test_a_word_that_the_tokenizer_does_not_know(folders, tmp_path):
    few = Tokenizer(WordLevel({"the": 0, "cat": 1}))
    few.pre_tokenizer = Whitespace()
    checkpoint.save(checkpoint.load(folders["mamba-tiny"]), tmp_path / "few")
    few.save(str(tmp_path / "few" / "tokenizer.json"))
    (writer,) = writers(tmp_path / "few", "the cat", 1)
    assert writer.ids == (0, 1)
    with pytest.raises(SpecError, match=r"the tokenizer cannot read the prompt: .*UNK"):
        writers(tmp_path / "few", "the dog", 1)
    subject = tracing.subjects(str(tmp_path / "few"), tmp_path)
    with pytest.raises(SpecError, match=r"the tokenizer cannot read the prompt: .*UNK"):
        tracing.take_apart(subject, "the dog", "cpu")
