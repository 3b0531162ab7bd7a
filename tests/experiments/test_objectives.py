"""What is hidden from a masked model: how much, how, and that it depends on nothing but the seed and the step."""

import numpy as np
import pytest
import torch

from experiments.objectives import IGNORED, MASKED, Name, Objective

V = 1000


def text(rows: int = 8, length: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, V, (rows, length)))


@pytest.mark.parametrize("name", ["causal", "unmasked"])
def test_predicting_the_next_token_leaves_a_batch_alone(name: Name) -> None:
    inputs, targets = text(seed=0), text(seed=1)
    got = Objective(name, V, seed=3).batch(inputs, targets, 5)
    assert got[0] is inputs
    assert got[1] is targets
    assert Objective(name, V).model_vocabulary == V


def test_a_mask_has_an_entry_of_its_own() -> None:
    assert Objective("masked", V).model_vocabulary == V + 1


def test_shares_of_what_is_hidden() -> None:
    """Within five standard deviations over 400 000 tokens."""
    objective, selected, masked, replaced, kept, anything = Objective("masked", V, seed=1), 0, 0, 0, 0, []
    n = 50 * 8000
    for step in range(50):
        original = text(80, 100, seed=step)
        inputs, targets = objective.batch(original, original, step)
        hidden = targets != IGNORED
        assert torch.equal(targets[hidden], original[hidden])
        assert torch.equal(inputs[~hidden], original[~hidden])
        was, now = original[hidden], inputs[hidden]
        selected += int(hidden.sum())
        masked += int((now == V).sum())
        kept += int((now == was).sum())
        replaced += int(((now != was) & (now != V)).sum())
        anything.append(now[(now != was) & (now != V)])

    def near(count: int, total: int, share: float) -> bool:
        return abs(count - total * share) < 5 * (total * share * (1 - share)) ** 0.5

    assert near(selected, n, 0.15)
    assert near(masked, selected, 0.8)
    assert near(replaced, selected, 0.1 * (1 - 1 / V))
    assert near(kept, selected, 0.1 + 0.1 / V)
    assert masked + replaced + kept == selected
    # any token of the tokenizer, none favoured
    drawn = torch.cat(anything)
    assert 0 <= drawn.min() < 20
    assert V - 20 < drawn.max() < V
    assert drawn.double().mean().item() == pytest.approx((V - 1) / 2, abs=5 * V / 12**0.5 / len(drawn) ** 0.5)
    assert len(drawn.unique()) > 0.95 * V


def test_an_evaluation_hides_all_that_it_asks_for() -> None:
    objective, original = Objective("masked", V, seed=1), text()
    inputs, targets = objective.hidden(original, 3)
    assert torch.equal(targets, objective.batch(original, original, 3)[1])  # the same tokens as training would ask for
    assert torch.equal(inputs, torch.where(targets == IGNORED, original, V))
    alone = objective.hidden(original[:1, :1], 3)  # one token is asked for even if none was chosen
    assert alone[0].tolist() == [[V]]


def test_every_place_is_as_likely() -> None:
    objective, original, counts = Objective("masked", V), text(10, 20), torch.zeros(10, 20)
    for step in range(1000):
        counts += objective.batch(original, original, step)[1] != IGNORED
    deviation = (1000 * 0.15 * 0.85) ** 0.5
    assert (counts - 150).abs().max() < 5 * deviation
    assert (counts.sum(0) - 1500).abs().max() < 5 * 10**0.5 * deviation


def test_it_is_a_function_of_seed_and_step_alone() -> None:
    original = text()
    first = Objective("masked", V, seed=2).batch(original, original, 7)
    torch.manual_seed(9)
    np.random.default_rng(4).random(3)
    torch.randn(5)
    moved = torch.random.get_rng_state()
    again = Objective("masked", V, seed=2).batch(original.clone(), text(seed=5), 7)
    assert torch.equal(torch.random.get_rng_state(), moved)  # and it draws nothing of others'
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (Objective("masked", V, seed=3).batch(original, original, 7),
                  Objective("masked", V, seed=2).batch(original, original, 8)):  # fmt: skip
        assert not torch.equal(first[1], other[1])
        # as different as chance: 15% of the hidden are hidden again
        both = ((first[1] != IGNORED) & (other[1] != IGNORED)).sum() / (first[1] != IGNORED).sum()
        assert both < 0.3
    # what is hidden does not depend on what stands there
    changed = Objective("masked", V, seed=2).batch(original.flip(0), original, 7)
    assert torch.equal(first[1] != IGNORED, changed[1] != IGNORED)


def test_the_given_batch_is_not_written_to() -> None:
    original = text()
    before = original.clone()
    Objective("masked", V).batch(original, original, 0)
    assert torch.equal(original, before)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_batch_always_asks_something(length: int) -> None:
    asked = set()
    for step in range(60):
        original = text(1, length, seed=step)
        inputs, targets = Objective("masked", V).batch(original, original, step)
        assert inputs.shape == targets.shape == (1, length)
        assert inputs.dtype == targets.dtype == torch.int64
        hidden = targets != IGNORED
        assert hidden.any()
        assert torch.equal(targets[hidden], original[hidden])
        asked |= set(hidden.nonzero()[:, 1].tolist())
    assert asked == set(range(length))


def test_the_stream_is_not_that_of_the_places_of_windows() -> None:
    """They share a key; were they one stream, the same words would say where a window starts and what is hidden."""
    original = text(8, 100)
    for step in range(3):
        words = np.random.Philox(key=np.array([5, step], dtype=np.uint64)).random_raw(
            800
        )  # as experiments.data.batches
        shared = torch.from_numpy((words >> np.uint64(11)) / 2.0**53 < 0.15).view(8, 100)
        hidden = Objective("masked", V, seed=5).batch(original, original, step)[1] != IGNORED
        assert (hidden & shared).sum() < 0.3 * hidden.sum()


def test_any_token_is_one_of_the_text_and_never_the_mask() -> None:
    """Of 4 entries a fifth of the replacements would be [MASK], were it one of them."""
    objective, tokens = Objective("masked", 4, 0), torch.zeros(64, 100, dtype=torch.int64)
    _, fate, anything = objective._drawn(tokens, 0)
    assert anything.unique().tolist() == [0, 1, 2, 3]
    inputs, targets = objective.batch(tokens, tokens, 0)
    replaced = (targets != IGNORED) & (fate >= MASKED)
    assert replaced.sum() > 100
    assert (inputs[replaced] < 4).all()
