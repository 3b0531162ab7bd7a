"""Decoding through the state, and the arithmetic of sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import checkpoint
from models.config import ModelConfig
from models.errors import ConfigError
from models.generation import Sampling, generate, generate_by_forward, steps
from models.language_model import LanguageModel
from models.mixers.attention import AttentionConfig
from models.mixers.lstm import LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.ops.attention import forget_tables
from models.presets import preset

MIXERS = {
    "attention": AttentionConfig(heads=2, kv_heads=1),
    "window": AttentionConfig(heads=2, window=4),
    "mamba-numba": MambaConfig(state=4, backend="numba"),
    "mamba-torch": MambaConfig(state=4, backend="torch"),
    "mamba2": Mamba2Config(state=4, head_width=8),
    "mamba3": Mamba3Config(state=4, head_width=8),
    "lstm": LSTMConfig(),
}


def build(name: str) -> LanguageModel:
    """Weights far from the initial ones, so that greedy text does not repeat one token."""
    model = LanguageModel(
        ModelConfig(vocabulary=29, width=16, layers=2, mixer=MIXERS[name], tie_embeddings=False), seed=0
    )
    with torch.no_grad():
        model.embedding.weight.mul_(16)
        model.head.weight.mul_(30)
        for block in model.blocks:
            getattr(block.mixer, "o_proj", getattr(block.mixer, "out_proj", None)).weight.mul_(8)
    return model


PROMPT = torch.randint(29, (3, 5), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_greedy_is_the_argmax_of_the_whole_forward(name):
    model = build(name)
    text = PROMPT
    for token in generate(model, PROMPT, 12, Sampling()):
        scores = model(text)[:, -1]
        assert torch.equal(token, scores.argmax(1))
        text = torch.cat([text, token[:, None]], 1)
    assert text.shape == (3, 17)
    assert len(text[:, 5:].unique()) > 3


@pytest.mark.parametrize("name", MIXERS)
def test_a_seed_reproduces_a_sample(name):
    model, sampling = build(name), Sampling(temperature=2.0, top_k=20, top_p=0.98)

    def text(seed: int):
        torch.randn(3)  # draws of others do not matter
        return torch.stack(list(generate(model, PROMPT, 10, sampling, seed=seed)), 1)

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=20, top_p=0.9)])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_steps_say_what_each_token_was_chosen_from(name, sampling):
    model, generator = build(name), torch.Generator().manual_seed(5)
    text = PROMPT
    for step in steps(model, PROMPT, 6, sampling, seed=5):
        torch.testing.assert_close(step.logits, model(text)[:, -1], rtol=1e-3, atol=1e-3)
        assert torch.equal(step.token, sampling.choose(step.logits, generator))  # one draw for each token, in order
        assert step.state.length == text.shape[1]
        text = torch.cat([text, step.token[:, None]], 1)
    assert torch.equal(text[:, 5:], torch.stack(list(generate(model, PROMPT, 6, sampling, seed=5)), 1))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_as_many_tokens_as_asked(count):
    assert len(list(generate(build("attention"), PROMPT, count, Sampling()))) == count


@pytest.mark.parametrize("name", MIXERS)
def test_a_model_can_be_trained_after_it_generated(name):
    forget_tables()
    model = build(name)
    list(generate(model, PROMPT, 4, Sampling()))  # in inference mode, whose tensors autograd refuses
    model(PROMPT).sum().backward()
    assert model.head.weight.grad.isfinite().all()


@st.composite
def logits(draw):
    """Distinct scores (B, V): with ties `the k likeliest` is not one set."""
    V = draw(st.integers(2, 30))
    order = torch.tensor([draw(st.permutations(range(V))) for _ in range(2)])
    return order * draw(st.floats(0.01, 1.0))


@given(logits(), st.floats(0.05, 5), st.none() | st.integers(1, 40), st.none() | st.floats(0.001, 1))
@settings(max_examples=150, deadline=None)
def test_probabilities(scores, temperature, top_k, top_p):
    p = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(scores)
    assert p.shape == scores.shape
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    for row, expected in zip(p, (scores.double() / temperature).softmax(1), strict=True):
        order = expected.argsort(descending=True)
        kept = int((row > 0).sum())
        assert set(order[:kept].tolist()) == set(row.nonzero()[:, 0].tolist())  # the likeliest, no others
        if top_k is not None:
            assert kept <= top_k
            expected = torch.where(expected >= expected[order[:top_k][-1]], expected, 0.0)
            expected = expected / expected.sum()
        if top_p is not None:
            reached = expected[order].cumsum(0)
            assert reached[kept - 1] >= top_p - 1e-5
            assert kept == 1 or reached[kept - 2] < top_p + 1e-5
            expected = torch.where(expected >= expected[order[kept - 1]], expected, 0.0)
            expected = expected / expected.sum()
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-6)
        if top_k is None and top_p is None:
            assert torch.equal(row > 0, expected.float() > 0)


@given(logits(), st.floats(1e-308, 1e300) | st.floats(-308, 300).map(lambda power: 10.0**power) | st.just(5e-324))
@settings(max_examples=150, deadline=None)
def test_every_temperature_is_well_defined(scores, temperature):
    p = Sampling(temperature=temperature).probabilities(scores)
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    assert torch.equal(p.gather(1, scores.argmax(1, keepdim=True))[:, 0], p.amax(1))
    if temperature < 1e-6:  # scores lie 0.01 apart at the least
        assert torch.equal(p, Sampling().probabilities(scores))
    if temperature > 1e9:
        torch.testing.assert_close(p, torch.full_like(p, 1 / p.shape[1]))


def test_by_hand():
    scores = torch.tensor([[0.5, 0.2, 0.25, 0.05]]).log()
    at = lambda **kwargs: Sampling(temperature=1.0, **kwargs).probabilities(scores)[0].tolist()  # noqa: E731
    assert at() == pytest.approx([0.5, 0.2, 0.25, 0.05])
    assert at(top_k=2) == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert at(top_p=0.6) == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert at(top_p=0.8) == pytest.approx([0.5 / 0.95, 0.2 / 0.95, 0.25 / 0.95, 0])
    assert at(top_k=3, top_p=0.5) == pytest.approx([1, 0, 0, 0])  # 0.5 / 0.95 of what top_k left reaches 0.5
    assert Sampling().probabilities(scores)[0].tolist() == [1, 0, 0, 0]
    hot = Sampling(temperature=0.5).probabilities(scores)[0].tolist()
    assert hot == pytest.approx([x / 0.355 for x in (0.25, 0.04, 0.0625, 0.0025)])


def test_a_token_that_reaches_top_p_to_the_bit_is_the_last_one() -> None:
    """Of tokens that are alike so many are kept as reach it, and none more."""
    for alike, top_p, kept in ((2, 0.5, 1), (4, 0.5, 2), (4, 0.75, 3), (4, 0.51, 3), (4, 1.0, 4)):
        p = Sampling(temperature=1.0, top_p=top_p).probabilities(torch.zeros(1, alike))[0]
        assert sorted(p.tolist(), reverse=True) == pytest.approx([1 / kept] * kept + [0] * (alike - kept))


def test_samples_follow_the_probabilities():
    scores = torch.tensor([0.5, 0.2, 0.25, 0.05]).log().expand(20_000, 4)
    drawn = Sampling(temperature=1.0, top_k=3).choose(scores, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert share.tolist() == pytest.approx([0.5 / 0.95, 0.2 / 0.95, 0.25 / 0.95, 0], abs=0.015)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0}, "top_p"),
    ],
)
def test_bad_values_are_user_errors(values, word):
    with pytest.raises(ConfigError, match=f"^{word} must be") as caught:
        Sampling(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"top_k": 3}, {"top_p": 0.5}])
def test_greedy_refuses_what_would_change_nothing(values):
    with pytest.raises(ConfigError, match=r"changes nothing at temperature 0.*set a temperature above 0"):
        Sampling(**values)
    assert Sampling(temperature=0.1, **values)


def test_an_empty_prompt_is_a_user_error():
    with pytest.raises(ConfigError, match="at least one"):
        next(generate(build("attention"), torch.zeros(1, 0, dtype=torch.int64), 3, Sampling()))


def test_a_model_without_a_mask_cannot_generate():
    model = LanguageModel(preset("transformer-tiny").with_overrides({"mixer.causal": False}), seed=0)
    with pytest.raises(ConfigError, match="cannot decode"):
        next(generate(model, PROMPT, 3, Sampling()))


@torch.no_grad()
def test_a_model_from_disk_generates_without_dropout(tmp_path):
    config = preset("gpt1").with_overrides({"vocabulary": 29, "width": 16, "layers": 2, "dropout": 0.5})
    made = LanguageModel(config, seed=0)
    made.head.weight.mul_(30)
    checkpoint.save(made, tmp_path)
    texts = [torch.stack(list(generate(checkpoint.load(tmp_path), PROMPT, 12, Sampling())), 1) for _ in range(2)]
    expected = torch.stack(list(generate(made.eval(), PROMPT, 12, Sampling())), 1)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], expected)


@torch.no_grad()
def test_learned_positions_end_in_one_line():
    model = LanguageModel(preset("gpt1").with_overrides({"width": 16, "layers": 1, "mixer.heads": 2}), seed=0).eval()
    prompt = torch.zeros(1, 98, dtype=torch.int64)
    assert len(list(generate(model, prompt, 3, Sampling()))) == 3  # the last one is chosen, not read
    long = prompt.repeat(1, 2)
    for text, said in ((prompt, "98 tokens and 4 more: ask for at most 3"), (long, "use a shorter prompt")):
        with pytest.raises(ConfigError, match=said) as caught:
            next(generate(model, text, 4, Sampling()))  # before anything is made
        assert "the model has 100 learned positions" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_causal_model_writes_the_same_by_whole_passes(name, sampling):
    model = build(name)
    cached, whole = (list(write(model, PROMPT, 10, sampling, seed=3)) for write in (generate, generate_by_forward))
    assert torch.equal(torch.stack(cached), torch.stack(whole))
    assert len(torch.stack(whole).unique()) > 3


@torch.no_grad()
def test_a_model_without_a_mask_reads_its_whole_text_again():
    mixer = AttentionConfig(heads=2, causal=False)
    model = LanguageModel(ModelConfig(vocabulary=29, width=16, layers=2, mixer=mixer), seed=0)
    with torch.no_grad():
        model.embedding.weight.mul_(16)
    with pytest.raises(ConfigError, match="cannot decode"):
        next(generate(model, PROMPT, 3, Sampling()))
    text = PROMPT
    for token in generate_by_forward(model, PROMPT, 6, Sampling()):
        # of each row by itself: rows of a batch know nothing of each other
        alone = torch.stack([model(row[None])[0, -1].argmax() for row in text])
        assert torch.equal(token, alone)
        text = torch.cat([text, token[:, None]], 1)
    assert text.shape == (3, 11)
    with pytest.raises(ConfigError, match="no tokens"):
        next(generate_by_forward(model, PROMPT[:, :0], 3, Sampling()))
