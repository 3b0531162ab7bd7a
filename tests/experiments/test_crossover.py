"""Crossover lengths from samples whose answer is known, and what a speed cell says of its own work."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.measurement.ceilings import CeilingsMeter
from experiments.measurement.speed import OPERATIONS, OPERATORS, Subject
from experiments.spec import Speed
from experiments.studies.speed import _crossing_sentence, _growth_sentence, crossover, deciding, growth
from models import cost
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.presets import preset


def speeds(a: dict[int, float], b: dict[int, float], noise: float = 0.0, n: int = 9) -> dict:
    g = np.random.default_rng(1)
    return {at: tuple(side[at] * np.exp(noise * g.standard_normal(n)) for side in (a, b)) for at in a}


CONTEXTS = (64, 256, 1024, 4096, 16384)


@settings(deadline=None, max_examples=30)
@given(crossing=st.floats(65, 16000), grows=st.floats(0.01, 1), machine=st.floats(0.1, 10))
def test_a_cache_that_grows_is_overtaken_where_its_time_says(crossing: float, grows: float, machine: float):
    """Milliseconds per token: of a cache as many more as there are tokens, of a state the same."""
    cache = {c: 1 + grows * c for c in CONTEXTS}
    at = machine * (1 + grows * crossing)
    found = crossover(speeds({c: 1 / (machine * ms) for c, ms in cache.items()}, dict.fromkeys(CONTEXTS, 1 / at)))
    assert found["tokens"] == pytest.approx(crossing, rel=1e-6)
    assert found["ci_low"] == found["ci_high"] == found["tokens"]


TOLD = {"arm": "b", "against": "a", "phase": "decode", "mode": "eager", "dtype": "float32", "batch": 1,
        "comparable": True, "host_bound": False, "noisy": False, "lost": {}}  # fmt: skip
FASTER = "b decodes faster than a at batch 1, eager, in float32"


def test_faster_or_slower_everywhere():
    one, two = {64: 10.0, 128: 10.0}, {64: 20.0, 128: 11.0}
    always, never = crossover(speeds(one, two)), crossover(speeds(two, one))
    assert always == {"tokens": 0, "ci_low": 0, "ci_high": 0, "until": False, "ahead": [64, 128]}
    assert never == {"tokens": None, "ci_low": None, "ci_high": None, "until": False, "ahead": []}
    assert _crossing_sentence(TOLD | always, [64, 128]) == f"{FASTER}, at every length from 64 to 128 tokens."
    sentence = _crossing_sentence(TOLD | never, [64, 128])
    assert sentence == f"At none of the lengths from 64 to 128 tokens does b decode{FASTER.removeprefix('b decodes')}."
    # of two crossings the last one counts
    found = crossover(speeds({64: 10.0, 128: 10.0, 256: 10.0}, {64: 20.0, 128: 5.0, 256: 20.0}))
    assert found["tokens"] == pytest.approx(128 + 128 * 0.5 / (0.5 + 1), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(crossing=st.floats(65, 4000), grows=st.floats(0.01, 1), noise=st.sampled_from([0.0, 0.02]))
def test_the_crossing_is_the_same_whichever_arm_comes_first(crossing: float, grows: float, noise: float):
    cache = {c: 1 / (1 + grows * c) for c in CONTEXTS}
    both = speeds(cache, dict.fromkeys(CONTEXTS, 1 / (1 + grows * crossing)), noise)
    overtaking = crossover(both)
    overtaken = crossover({at: (b, a) for at, (a, b) in both.items()})
    assert overtaking["tokens"] is not None
    assert (overtaking.pop("until"), overtaken.pop("until")) == (False, True)
    overtaking.pop("ahead"), overtaken.pop("ahead")
    assert overtaken == {end: pytest.approx(at, rel=1e-9) for end, at in overtaking.items()}


def test_what_is_faster_at_shorter_lengths_only_is_so_up_to_one():
    found = crossover(speeds({64: 10.0, 128: 10.0}, {64: 20.0, 128: 8.0}))
    assert found["tokens"] == found["ci_low"] == found["ci_high"] == pytest.approx(64 + 64 * 0.5 / (0.5 + 0.25))
    sentence = _crossing_sentence(TOLD | found, [64, 128])
    assert sentence == f"{FASTER}, up to about 107 tokens and not from there to 128."
    # a tie at the longest is not faster
    assert crossover(speeds({64: 10.0, 128: 10.0}, {64: 20.0, 128: 10.0})) == {
        "tokens": 128, "ci_low": 128, "ci_high": 128, "until": True, "ahead": [64],
    }  # fmt: skip
    # ahead in between only, or twice: up to no length
    ones = dict.fromkeys((64, 128, 256, 512), 10.0)
    between = crossover(speeds(ones, {64: 8.0, 128: 12.0, 256: 8.0, 512: 8.0}))
    assert (between["tokens"], between["until"], between["ahead"]) == (None, False, [128])
    said = _crossing_sentence(TOLD | between, list(ones))
    assert said == f"{FASTER} at 128 tokens only, of the lengths from 64 to 512 tokens."
    said = _crossing_sentence(TOLD | between | {"ci_low": 70.0, "ci_high": None}, list(ones))  # of another question
    assert said == f"{FASTER} at 128 tokens only, of the lengths from 64 to 512 tokens."
    again = crossover(speeds(ones, {64: 12.0, 128: 12.0, 256: 8.0, 512: 12.0}))
    assert again["ahead"] == [64, 128, 512]
    said = _crossing_sentence(TOLD | again, list(ones))
    assert said == f"{FASTER}, from about {again['tokens']:,.0f} tokens on and at 64 and 128."
    twice = crossover(speeds(ones, {64: 12.0, 128: 8.0, 256: 12.0, 512: 8.0}))
    assert (twice["until"], twice["ahead"]) == (False, [64, 256])
    last = crossover(speeds(ones, {64: 9.0, 128: 12.0, 256: 8.0, 512: 12.0}))
    assert (last["tokens"], last["ahead"]) == (pytest.approx(256 + 256 * 0.2 / (0.2 + 0.2)), [128, 512])
    lost = {"a": [256], "b": [32, 512]}
    assert _crossing_sentence(TOLD | found | {"lost": lost}, [64, 128]) == (
        f"{sentence} Not counted, for want of a result: a at 256 and b at 32 and 512 tokens."
    )


def test_a_crossing_rests_on_the_lengths_around_it():
    lengths = [64, 128, 256]
    assert deciding(100.0, lengths) == [64, 128]
    assert deciding(200.0, lengths) == [128, 256]
    assert deciding(128.0, lengths) == [128, 128]
    assert deciding(0, lengths) == lengths  # at every length
    assert deciding(None, lengths) == lengths  # at none


def test_noise_widens_the_interval_around_the_truth():
    contexts = (64, 256, 1024, 4096)
    a, b = {c: 1000 * 600 / (100 + c) for c in contexts}, dict.fromkeys(contexts, 1000.0)
    quiet, noisy = (crossover(speeds(a, b, noise, n=15)) for noise in (0.02, 0.2))
    assert quiet["ci_low"] < 500 < quiet["ci_high"] < 700
    assert noisy["ci_high"] / noisy["ci_low"] > 3 * (quiet["ci_high"] / quiet["ci_low"] - 1) + 1


def test_the_interval_is_one_of_95_per_cent():
    """Behind in two turns of ten: the median of resampled turns is behind too often for 95%, and not for 90%."""
    ones, wavering = np.ones(10), np.array([1.1] * 8 + [0.9] * 2)
    assert crossover({64: (ones, ones / 2), 128: (ones, wavering)})["ci_high"] is None


def test_a_machine_that_slows_down_for_both_moves_nothing():
    """Turns are paired: noise that both arms share at a turn leaves the crossing where it is."""
    contexts = (64, 256, 1024, 4096)
    machine = np.random.default_rng(3).uniform(0.3, 1, (4, 12))
    a = {c: 1000 * 600 / (100 + c) * machine[i] for i, c in enumerate(contexts)}
    b = {c: 1000 * machine[i] for i, c in enumerate(contexts)}
    found = crossover({c: (a[c], b[c]) for c in contexts})
    assert found["tokens"] == pytest.approx(500, rel=1e-9)
    assert found["ci_high"] / found["ci_low"] == pytest.approx(1, rel=1e-9)


def test_growth_is_of_the_time_from_the_shortest_to_the_longest():
    machine = np.random.default_rng(4).uniform(0.3, 1, 11)
    found = growth({64: 100 * machine, 256: 125 * machine, 1024: 50 * machine, 4096: 80 * machine})
    expected = {"from": 64, "to": 4096, "ratio": 1.25, "ci_low": 1.25, "ci_high": 1.25}
    assert found == {key: pytest.approx(value) for key, value in expected.items()}
    noise = np.exp(0.1 * np.random.default_rng(5).standard_normal((2, 15)))
    spread = growth({64: 100 * noise[0], 128: 50 * noise[1]})
    assert 1.7 < spread["ci_low"] < spread["ratio"] < spread["ci_high"] < 2.3
    told = {
        "arm": "b",
        "mode": "eager",
        "dtype": "float32",
        "batch": 1,
        "comparable": True,
        "host_bound": False,
        "noisy": False,
        "lost": {},
    }
    assert "not resolved" not in _growth_sentence(told | spread)
    near = growth({64: np.full(9, 1.0), 128: np.full(9, 1 / 1.0004)})
    assert " in 1.0004 times (95% interval 1.0004 to 1.0004)" in _growth_sentence(told | near)
    unclear = growth({64: 100 * noise[0], 128: 100 * noise[1]})
    assert unclear["ci_low"] < 1 < unclear["ci_high"]
    assert "what it takes after 64: which is longer is not resolved." in _growth_sentence(told | unclear)
    missing = told | near | {"lost": {"b": [256, 1024]}}
    assert _growth_sentence(missing).endswith(" Not counted, for want of a result: b at 256 and 1,024 tokens.")


def test_ceilings_are_rates_of_what_they_count():
    ceilings = CeilingsMeter(torch.device("cpu"), torch.float32).measure()
    assert 1e8 < ceilings.flops_per_s < 1e14
    assert 1e8 < ceilings.bytes_per_s < 1e13


@pytest.mark.parametrize("phase", OPERATIONS)
@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny", "mamba2-tiny"])
def test_an_operation_processes_the_tokens_that_it_counts(name: str, phase: str, monkeypatch: pytest.MonkeyPatch):
    model = LanguageModel(preset(name), seed=0).eval()
    tokens = torch.zeros(2, 17, dtype=torch.int64)
    subject = Subject(model, Speed(decode_tokens=5), "eager", "float32")
    operation, counted = OPERATIONS[phase](subject, tokens)
    assert counted == (2 * 5 if phase == "decode" else 2 * 16)
    steps = []
    inner = subject.model.step
    monkeypatch.setattr(subject.model, "step", lambda token, state: steps.append(len(token)) or inner(token, state))
    operation()
    operation()  # from the same state again
    assert sum(steps) == (2 * counted if phase == "decode" else 0)


def test_operators_are_of_known_mixers():
    assert set(OPERATORS) <= set(MIXERS)
    assert set(OPERATORS) >= {"attention", "mamba", "mamba2"}


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(
    ("name", "operation", "laid_out"),
    [("mamba-tiny", "selective_scan", (0, 1, 3, 4, 6)), ("mamba2-tiny", "ssd", (0, 3, 4))],
)
def test_an_operation_alone_reads_what_a_mixer_hands_it(
    name: str, operation: str, laid_out: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
):
    """In shapes and strides: it would be timed with copies that no model makes, or without those that it does."""
    model = LanguageModel(preset(name).with_backend(backend), seed=0)
    ops, seen = model.blocks[0].mixer.ops, []
    inner = getattr(ops, operation)
    monkeypatch.setattr(
        ops, operation, lambda *args: seen.append([(args[i].shape, args[i].stride()) for i in laid_out]) or inner(*args)
    )
    tokens = torch.zeros(2, 17, dtype=torch.int64)
    model(tokens[:, :-1])
    in_the_model = seen[0]
    seen.clear()
    alone, _ = OPERATIONS["forward"](Subject(model, Speed(), "eager", "float32"), tokens)
    alone()
    assert seen == [in_the_model]


def test_bytes_of_a_decode_step():
    """Weights once, one row of an embedding, experts that were chosen, and the state."""
    tied = preset("transformer-tiny")
    assert cost.decode_bytes(tied, 1, 100, 4) == cost.weight_bytes(tied, 4) + cost.state_bytes(tied, 1, 100, 4)
    untied = preset("gpt1")
    unread = (untied.vocabulary - 3 + untied.positions - 1) * untied.width
    assert cost.decode_bytes(untied, 3, 50, 2) == (
        cost.weight_bytes(untied, 2) - 2 * unread + cost.state_bytes(untied, 3, 50, 2)
    )
    moe = preset("moe-tiny")
    counted = cost.parameters(moe)
    for size in (2, 4):
        assert cost.decode_bytes(moe, 1, 10, size) == size * counted.active + cost.state_bytes(moe, 1, 10, size)
    many = cost.decode_bytes(moe, 1000, 10, 4) - cost.state_bytes(moe, 1000, 10, 4)
    assert many == pytest.approx(cost.weight_bytes(moe, 4), rel=1e-6)
