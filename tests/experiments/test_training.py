"""The recipe: every knob turns something, every arm sees the same tokens, and a seed repeats to the bit."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments import training
from experiments.data.batches import Batches, StreamHash
from experiments.objectives import IGNORED, Objective
from experiments.report.verdict import DIVERGED
from experiments.spec import Training
from experiments.training import NonFiniteLossError, dropout_seed, learning_rate_at, token_loss, train
from models.language_model import LanguageModel
from models.presets import PRESETS, preset

TOKENS = np.random.default_rng(0).integers(1, 64, 4000).astype("<u2")
CAUSAL = Objective("causal", 64)
SETTINGS = Training(context=12, batch=3, steps=3, warmup_steps=1)
TINY = [name for name in PRESETS if name.endswith("-tiny")]


def model(name: str = "mamba-tiny", seed: int = 0) -> LanguageModel:
    return LanguageModel(preset(name).with_overrides({"vocabulary": 64, "width": 32}), seed=seed)


def trained(settings: Training, name: str = "mamba-tiny", seed: int = 0, rate: float = 1e-2):
    made, stream = model(name, seed), StreamHash()
    batches = Batches(TOKENS, context=settings.context, batch=settings.batch, seed=seed)
    steps = list(train(made, batches, settings, rate, stream, CAUSAL))
    return torch.nn.utils.parameters_to_vector(made.parameters()).detach(), stream.hexdigest(), steps


def test_schedule() -> None:
    settings = Training(steps=100, warmup_steps=10, final_learning_rate_fraction=0.1)
    at = [learning_rate_at(step, 2.0, settings) for step in range(1, 101)]
    assert at[0] == pytest.approx(0.2)
    assert at[9] == 2.0
    assert at[99] == pytest.approx(0.2)
    assert at[54] == pytest.approx(2 * (0.1 + 0.9 * 0.5))  # half way down
    assert at[:10] == sorted(at[:10])
    assert at[9:] == sorted(at[9:], reverse=True)
    assert learning_rate_at(1, 2.0, Training(steps=1, warmup_steps=0)) == pytest.approx(0.2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_recipe_by_hand(accumulate: int) -> None:
    """AdamW with betas 0.9 and 0.95 at the schedule's rate, on clipped gradients, each micro-batch hidden anew."""
    settings = Training(context=12, batch=3, accumulate=accumulate, steps=2, warmup_steps=1, gradient_clip=0.3)
    config = preset("transformer-tiny").with_overrides({"vocabulary": 65, "width": 32, "mixer.causal": False})
    objective, batches = Objective("masked", 64, seed=4), Batches(TOKENS, context=12, batch=3, seed=0)
    ours, hand = LanguageModel(config, seed=0), LanguageModel(config, seed=0)
    steps = list(train(ours, batches, settings, 1e-2, StreamHash(), objective))
    optimizer = torch.optim.AdamW(hand.parameter_groups(0.1), betas=(0.9, 0.95), fused=True)
    for step, rate in enumerate((1e-2, 1e-3)):  # a warm-up of one step; a tenth of the rate at the last
        for group in optimizer.param_groups:
            group["lr"] = rate
        for index in range(accumulate * step, accumulate * (step + 1)):
            inputs, targets = objective.batch(*batches.at(index), index)
            (token_loss(hand, inputs, targets, with_ignored=True)[0] / accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.3)
        assert norm > 0.6
        assert steps[step].gradient_norm == pytest.approx(norm.item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(ours.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class OnTheHost:
    """torch as training sees it, where a GPU is named that is not there."""

    def __init__(self, synchronise: Any) -> None:
        self.cuda = SimpleNamespace(synchronize=synchronise)

    def zeros(self, *shape: Any, device: torch.device) -> torch.Tensor:
        return torch.zeros(*shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def test_a_steps_time_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last update is waited for; a clock here moves while that is done, and at no other time."""
    now = 0.0

    def synchronise(device: torch.device) -> None:
        nonlocal now
        now += 0.5

    made = model()
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
    monkeypatch.setattr(training, "torch", OnTheHost(synchronise))
    monkeypatch.setattr(training, "on_device", lambda batch, device: batch)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now))
    batches = Batches(TOKENS, context=12, batch=3, seed=0)
    steps = list(train(made, batches, SETTINGS, 1e-2, StreamHash(), CAUSAL))
    assert [step.step_ms for step in steps] == [500.0] * 3


class Halves:
    """The batches of `Batches`, each cut into two micro-batches."""

    def __init__(self, whole: Batches) -> None:
        self.whole = whole

    def at(self, step: int):
        inputs, targets = self.whole.at(step // 2)
        return inputs.chunk(2)[step % 2], targets.chunk(2)[step % 2]


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny"])
def test_two_micro_batches_are_one_batch(name: str) -> None:
    whole = Batches(TOKENS, context=12, batch=4, seed=0)
    one, two = model(name), model(name)
    settings = Training(context=12, batch=4, steps=3, warmup_steps=1)
    first = list(train(one, whole, settings, 1e-2, StreamHash(), CAUSAL))
    halved = settings.model_copy(update={"batch": 2, "accumulate": 2})
    second = list(train(two, Halves(whole), halved, 1e-2, StreamHash(), CAUSAL))  # type: ignore[arg-type]
    assert [step.tokens for step in first] == [step.tokens for step in second] == [48, 96, 144]
    for a, b in zip(first, second, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)


@pytest.mark.parametrize("name", [*TINY, "gpt1"])
def test_same_seed_same_bits(name: str) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.randn(3)  # draws of others do not matter
        runs.append(trained(SETTINGS, name, seed))
    (first, _, _), (second, _, _), (other, _, _) = runs
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_architectures_consume_the_same_tokens() -> None:
    mamba, transformer = (trained(SETTINGS, name)[1] for name in ("mamba-tiny", "transformer-tiny"))
    assert mamba == transformer
    assert trained(SETTINGS, seed=1)[1] != mamba


# gradient_clip: far below the norm. validate_every is the caller's, and is tested there.
CHANGES = {
    "context": 13, "batch": 4, "accumulate": 2, "steps": 4, "warmup_steps": 2, "final_learning_rate_fraction": 0.5,
    "weight_decay": 0.9, "beta1": 0.5, "beta2": 0.5, "gradient_clip": 1e-9, "precision": "bfloat16",
}  # fmt: skip


def test_every_setting_has_a_change() -> None:
    assert set(CHANGES) | {"validate_every"} == set(Training.model_fields)


@pytest.mark.parametrize("field", CHANGES)
def test_no_setting_is_ignored(field: str) -> None:
    before, _, _ = trained(SETTINGS)
    after, _, _ = trained(SETTINGS.model_copy(update={field: CHANGES[field]}))
    assert not torch.equal(before, after)


def test_non_finite_loss_says_where_and_keeps_the_weights() -> None:
    made = model()
    batches = Batches(TOKENS, context=12, batch=3, seed=0)
    steps = train(made, batches, Training(context=12, batch=3, steps=3, warmup_steps=2), 1e-2, StreamHash(), CAUSAL)
    next(steps)
    made.norm.weight.data[0] = float("inf")
    before = torch.nn.utils.parameters_to_vector(made.parameters()).clone()
    with pytest.raises(NonFiniteLossError, match=r"^loss \S+, gradient norm \S+ at step 2, learning rate 0.01$"):
        next(steps)
    assert torch.equal(before, torch.nn.utils.parameters_to_vector(made.parameters()))


def test_a_gradient_that_is_not_finite_ends_a_training_whose_loss_is() -> None:
    made = model()
    made.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = torch.nn.utils.parameters_to_vector(made.parameters()).clone()
    batches = Batches(TOKENS, context=12, batch=3, seed=0)
    with pytest.raises(NonFiniteLossError, match=r"^loss \d\.\d+, gradient norm (inf|nan) at step 1,") as raised:
        next(train(made, batches, SETTINGS, 1e-2, StreamHash(), CAUSAL))
    assert DIVERGED.search(str(raised.value))  # by which a report tells it from other failures
    assert torch.equal(before, torch.nn.utils.parameters_to_vector(made.parameters()))


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_dropout_draws_other_numbers_than_initialisation(seed: int) -> None:
    """A CPU's generator keeps 32 bits of a seed: one that differs only above them draws the same."""
    drawn = [torch.rand(8, generator=torch.Generator().manual_seed(one)) for one in (seed, dropout_seed(seed))]
    assert not torch.equal(*drawn)
    assert dropout_seed(seed) == dropout_seed(seed) < 2**32
    assert dropout_seed(seed) != dropout_seed(seed + 1)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_training_seeds_nothing_but_dropout(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seeded = model(), []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    batches = Batches(TOKENS, context=12, batch=3, seed=0)
    list(train(made, batches, SETTINGS, 1e-2, StreamHash(), Objective("causal", 64, seed)))
    assert seeded == [dropout_seed(seed)]


def test_dropout_has_a_stream_of_its_own() -> None:
    """It depends on the seed of the run, not on the model's or on what was drawn before; and it is on in training."""
    config = preset("gpt1").with_overrides({"vocabulary": 64, "width": 32, "layers": 1})
    losses = {}
    for name, seed, dropout in (("a", 0, 0.5), ("b", 1, 0.5), ("none", 0, 0.0), ("none again", 1, 0.0)):
        made = LanguageModel(config.with_overrides({"dropout": dropout}), seed=5).eval()  # however it comes
        batches = Batches(TOKENS, context=12, batch=3, seed=0)
        steps = train(made, batches, SETTINGS, 1e-2, StreamHash(), Objective("causal", 64, seed))
        losses[name] = [step.loss for step in steps]
    assert losses["a"] != losses["b"]
    assert losses["a"] != losses["none"]
    assert losses["none"] == losses["none again"]


def test_the_balance_of_experts_is_trained_and_not_reported() -> None:
    config = preset("moe-tiny").with_overrides({"vocabulary": 64, "width": 32, "layers": 2})
    inputs, targets = Batches(TOKENS, context=12, batch=3, seed=0).at(0)
    grads = {}
    for weight in (0.0, 10.0):
        made = LanguageModel(config.with_overrides({"feedforward.balance": weight}), seed=0)
        loss, balance = token_loss(made, inputs, targets)
        expected = torch.nn.functional.cross_entropy(made(inputs).flatten(0, 1), targets.flatten())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert balance.item() == pytest.approx(sum(used.balance.item() for used in made.hidden(inputs).routing))
        assert 2 * weight * 0.8 <= balance.item() <= 2 * weight * 8
        steps = train(made, Batches(TOKENS, context=12, batch=3, seed=0), SETTINGS, 1e-2, StreamHash(), CAUSAL)
        first = next(steps)
        assert first.loss == pytest.approx(loss.item(), rel=1e-5)
        grads[weight] = first.gradient_norm
    assert grads[10.0] > 1.1 * grads[0.0]
    assert token_loss(model(), inputs, targets)[1] == 0


def test_the_balance_weighs_the_same_in_micro_batches() -> None:
    """Of which both are the same here, so that they are as balanced as one."""
    config = preset("moe-tiny").with_overrides({"vocabulary": 64, "width": 32, "feedforward.balance": 10.0})
    batch = Batches(TOKENS, context=12, batch=3, seed=0).at(0)
    norms = []
    for accumulate in (1, 2):
        settings = Training(context=12, batch=3, accumulate=accumulate, steps=2, warmup_steps=1)
        same = SimpleNamespace(at=lambda index: batch)
        steps = train(LanguageModel(config, seed=0), same, settings, 1e-2, StreamHash(), CAUSAL)  # type: ignore[arg-type]
        norms.append(next(steps).gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_only_hidden_tokens_are_counted() -> None:
    made = model("transformer-tiny")
    inputs, targets = Batches(TOKENS, context=12, batch=3, seed=0).at(0)
    some = torch.full_like(targets, IGNORED)
    some[0, 3], some[2, 7] = targets[0, 3], targets[2, 7]
    logits = made(inputs)
    expected = (logits[0, 3].logsumexp(0) - logits[0, 3, targets[0, 3]]) / 2
    expected += (logits[2, 7].logsumexp(0) - logits[2, 7, targets[2, 7]]) / 2
    loss, _ = token_loss(made, inputs, some, with_ignored=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    whole, _ = token_loss(made, inputs, targets, with_ignored=True)
    assert whole.item() == pytest.approx(token_loss(made, inputs, targets)[0].item(), rel=1e-6)


def test_a_model_that_sees_both_ways_learns_what_was_hidden() -> None:
    """Every second token repeats the one before it: a hidden one can be read off its neighbour, on either side."""
    text = np.repeat(np.random.default_rng(0).integers(1, 64, 3000), 2).astype("<u2")
    objective = Objective("masked", 64)
    settings = Training(context=32, batch=16, steps=150, warmup_steps=10)
    losses = {}
    for causal in (False, True):
        config = preset("transformer-tiny").with_overrides({"vocabulary": 65, "mixer.causal": causal})
        made, stream = LanguageModel(config, seed=0), StreamHash()
        batches = Batches(text, context=32, batch=16, seed=0)
        steps = list(train(made, batches, settings, 1e-2, stream, objective))
        assert steps[0].loss == pytest.approx(np.log(65), rel=0.05)
        losses[causal] = np.mean([step.loss for step in steps[-20:]])
        plain = StreamHash()
        for step in range(150):
            plain.update(*batches.at(step))
        assert stream.hexdigest() == plain.hexdigest()  # of the text, whatever was hidden of it
    assert losses[False] < 0.75 * np.log(65)
    assert losses[False] < losses[True] - 0.2
