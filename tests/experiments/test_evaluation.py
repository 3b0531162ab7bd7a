"""Bits per byte against values computed by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from experiments.data.batches import Batches
from experiments.data.dataset import TokenSplit
from experiments.errors import CorpusError
from experiments.evaluation import evaluate, evaluate_masked, expert_load, mean_loss
from experiments.objectives import Objective
from models.language_model import LanguageModel
from models.presets import preset

V = 32
CAUSAL, MASKED = Objective("causal", V), Objective("masked", V)


class Stub(nn.Module):
    """Logits that favour the token that equals the input by `favour` nats over all others."""

    device = torch.device("cpu")

    def __init__(self, favour: float = 0.0) -> None:
        super().__init__()
        self.favour = favour

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.favour * nn.functional.one_hot(tokens, V).float()


def split(tokens: np.ndarray, size: int = 100) -> TokenSplit:
    return TokenSplit(tokens=tokens.astype("<u2"), bytes=size, documents=1, sha256="")  # type: ignore[arg-type]


def run(model: nn.Module, tokens: np.ndarray, context: int = 8, batch: int = 3, size: int = 100):
    return evaluate(model, split(tokens, size), context=context, batch=batch, precision="float32")  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [9, 41, 44, 50])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_uniform_model(length: int, batch: int) -> None:
    quality = run(Stub(), np.arange(length) % V, batch=batch, size=77)
    assert quality.tokens == length - 1
    assert quality.bits_per_byte == pytest.approx(math.log2(V) * (length - 1) / 77, rel=1e-6)
    assert quality.nats_per_token == pytest.approx(math.log(V), rel=1e-6)
    assert quality.token_perplexity == pytest.approx(V, rel=1e-5)
    assert quality.loss_at_position == pytest.approx([math.log(V)] * 8, rel=1e-6)
    assert quality.windows == (length - 1) // 8
    assert quality.bytes == 77


def test_known_losses_by_position_and_in_total() -> None:
    favour = 3.0
    # a token repeats its predecessor at every even place: targets at positions 1, 3, 5, 7 of a window of 8 miss
    tokens = np.arange(33) // 2 % V
    hit = math.log(math.exp(favour) + V - 1) - favour
    miss = math.log(math.exp(favour) + V - 1)
    quality = run(Stub(favour), tokens)
    assert quality.loss_at_position == pytest.approx([hit, miss] * 4, rel=1e-5)
    assert quality.bits_per_byte == pytest.approx(16 * (hit + miss) / math.log(2) / 100, rel=1e-5)


def test_the_model_is_left_in_its_mode() -> None:
    model = Stub().train()
    run(model, np.arange(20) % V)
    assert model.training
    model.eval()
    run(model, np.arange(20) % V)
    assert not model.training


def test_too_short_is_an_error() -> None:
    with pytest.raises(CorpusError, match="context = 8 needs 9"):
        run(Stub(), np.arange(8) % V)
    with pytest.raises(CorpusError, match="context = 8 needs 9"):
        mean_loss(Stub(), split(np.arange(8)), CAUSAL, context=8, sequences=2, precision="float32")  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match="context = 8 needs 9"):
        evaluate_masked(Stub(), split(np.arange(8)), MASKED, context=8, batch=2, precision="float32")  # type: ignore[arg-type]


class Guesser(Stub):
    """Says `word` everywhere, by `favour` nats; notes what it was given."""

    def __init__(self, word: int, favour: float) -> None:
        super().__init__(favour)
        self.word, self.seen = word, []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.seen.append(tokens)
        return self.favour * nn.functional.one_hot(torch.full_like(tokens, self.word), V + 1).float()


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_masked_loss_and_accuracy_by_hand(batch: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 3, 1001)
    model, objective = Guesser(2, 3.0), Objective("masked", V, seed=7)
    quality = evaluate_masked(model, split(tokens), objective, context=50, batch=batch, precision="float32")  # type: ignore[arg-type]
    # what is hidden is a function of the window's place alone: seed 0, step by step
    right = count = 0
    for step, rows in enumerate(torch.from_numpy(tokens[:1000]).view(20, 50).split(batch)):
        inputs, targets = Objective("masked", V, seed=0).hidden(rows, step)
        assert torch.equal(inputs, model.seen[step])
        assert torch.equal(inputs == V, targets >= 0)  # no token that counts is in sight
        count += int((targets >= 0).sum())
        right += int((targets == 2).sum())
    assert quality.tokens == count
    assert quality.masked_accuracy == pytest.approx(right / count)
    miss = math.log(math.exp(3) + V)
    assert quality.masked_token_loss == pytest.approx(miss - 3 * right / count, rel=1e-5)
    assert set(quality.to_dict()) == {"masked_token_loss", "masked_accuracy", "tokens"}
    assert 0.1 * 1000 < count < 0.2 * 1000


def test_the_curve_is_the_mean_over_what_is_to_be_predicted() -> None:
    tokens = split(np.random.default_rng(1).integers(0, V, 500))
    for name, objective in (("causal", CAUSAL), ("masked", Objective("masked", V, seed=3))):
        config = preset("transformer-tiny").with_overrides({"vocabulary": objective.model_vocabulary})
        model = LanguageModel(config, seed=0)
        with torch.no_grad():
            model.norm.weight *= 10  # far from uniform
        length = {"context": 20, "sequences": 4, "precision": "float32"}
        got = mean_loss(model, tokens, objective, **length)
        again = mean_loss(model, tokens, Objective(name, V, seed=99), **length)
        assert got == again  # the same windows and the same hidden tokens for every seed of training
        assert model.training
        inputs, targets = Objective(name, V).batch(*Batches(tokens.tokens, context=20, batch=4, seed=0).at(0), 0)
        with torch.no_grad():
            expected = nn.functional.cross_entropy(model.eval()(inputs).flatten(0, 1), targets.flatten())
        assert got == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("what", ["evaluate", "masked", "curve"])
def test_precision_is_that_of_the_products(what: str) -> None:
    model = LanguageModel(preset("transformer-tiny").with_overrides({"vocabulary": V + 1}), seed=0)
    with torch.no_grad():
        model.norm.weight *= 4
    text = split(np.random.default_rng(1).integers(0, V, 500))
    losses = {}
    for precision in ("float32", "bfloat16"):
        how = {"context": 20, "precision": precision}
        losses[precision] = {
            "evaluate": lambda how=how: evaluate(model, text, batch=4, **how).nats_per_token,
            "masked": lambda how=how: evaluate_masked(model, text, MASKED, batch=4, **how).masked_token_loss,
            "curve": lambda how=how: mean_loss(model, text, CAUSAL, sequences=4, **how),
        }[what]()
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.01)


@pytest.mark.parametrize("what", ["evaluate", "masked", "curve", "experts"])
def test_nothing_is_dropped_but_in_training(what: str) -> None:
    config = preset("moe-tiny").with_overrides({"vocabulary": V + 1, "layers": 2})
    text, how = split(np.random.default_rng(1).integers(0, V, 500)), {"context": 20, "precision": "float32"}
    found = []
    for dropout in (0.5, 0.5, 0.0):
        model = LanguageModel(config.with_overrides({"dropout": dropout}), seed=0)
        found.append({
            "evaluate": lambda m: evaluate(m, text, batch=4, **how).nats_per_token,
            "masked": lambda m: evaluate_masked(m, text, MASKED, batch=4, **how).masked_token_loss,
            "curve": lambda m: mean_loss(m, text, CAUSAL, sequences=4, **how),
            "experts": lambda m: expert_load(m, text, CAUSAL, context=20, sequences=4),
        }[what](model))  # fmt: skip
        assert model.training
    assert found[0] == found[1] == found[2]


def test_experts_are_counted_on_what_the_curve_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrupted where tokens are hidden: as step 0 of seed 0 hides them, whatever the seed of the training."""
    config = preset("moe-tiny").with_overrides({"vocabulary": V + 1, "layers": 2, "mixer.causal": False})
    model, read = LanguageModel(config, seed=0), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens: read.append(tokens) or hidden(tokens))
    text, objective = split(np.random.default_rng(1).integers(0, V, 500)), Objective("masked", V, seed=3)
    mean_loss(model, text, objective, context=20, sequences=4, precision="float32")
    expert_load(model, text, objective, context=20, sequences=4)
    expected, _ = MASKED.batch(*Batches(text.tokens, context=20, batch=4, seed=0).at(0), 0)
    assert (expected == V).any()
    assert [torch.equal(tokens, expected) for tokens in read] == [True, True]


@pytest.mark.parametrize(("nats", "finite"), [(699.0, True), (701.0, False)])
def test_a_perplexity_beyond_floating_point_is_none(nats: float, finite: bool) -> None:
    """Certain of the token that stands there, where another one follows."""
    quality = run(Stub(nats), np.arange(17) % V)
    assert quality.nats_per_token == pytest.approx(nats, rel=1e-6)
    assert quality.token_perplexity == (pytest.approx(math.exp(nats), rel=1e-3) if finite else None)


def test_the_load_of_experts_sums_to_one_in_each_layer() -> None:
    config = preset("moe-tiny").with_overrides({"vocabulary": V, "layers": 3})
    model = LanguageModel(config, seed=0)
    text = split(np.random.default_rng(1).integers(0, V, 500))
    loads = expert_load(model, text, CAUSAL, context=20, sequences=4)
    assert [len(load) for load in loads] == [8, 8, 8]
    assert [sum(load) for load in loads] == pytest.approx([1, 1, 1])
    inputs, _ = Batches(text.tokens, context=20, batch=4, seed=0).at(0)
    assert loads == [used.load.tolist() for used in model.hidden(inputs).routing]
    assert len({tuple(load) for load in loads}) == 3
    dense = LanguageModel(preset("transformer-tiny"), seed=0)
    assert expert_load(dense, text, CAUSAL, context=20, sequences=4) == []
