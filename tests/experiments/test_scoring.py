"""What trained models make of given text, against the same computed one token at a time."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import scoring
from experiments.cells import PROMPT, model_config, spread
from experiments.data.dataset import Dataset, prepare
from experiments.errors import CorpusError, RunFailedError
from experiments.spec import Arm, Data, Evaluation, Experiment, Masking, Training
from models import checkpoint
from models.errors import ConfigError
from models.generation import Sampling, generate, generate_by_forward
from models.language_model import LanguageModel

NO_MASK = {"mixer.causal": False}
ARMS = {
    "causal": Arm(model="transformer-tiny", learning_rate=1e-3),
    "unmasked": Arm(model="transformer-tiny", learning_rate=1e-3, objective="unmasked", overrides=NO_MASK),
    "encoder": Arm(model="transformer-tiny", learning_rate=1e-3, objective="masked", overrides=NO_MASK),
}
CONTEXT, WRITTEN, PROMPTS, WINDOWS = 12, 5, 3, 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("text")
    lines = [f"the {['cat', 'dog', 'bird'][i % 3]} counts {i} and {i * i}, says café number {i}." for i in range(200)]
    (folder / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    data = Data(corpus="text", path=str(folder / "text.txt"), vocabulary=280, validation_fraction=0.2)
    return prepare(data, folder / "cache")


@pytest.fixture(scope="module")
def experiment(dataset: Dataset) -> Experiment:
    return Experiment(
        name="masking", title="", study="masking", seeds=(0,), arms=ARMS, data=Data(vocabulary=280),
        training=Training(context=CONTEXT), evaluation=Evaluation(sample_tokens=WRITTEN, batch=5),
        masking=Masking(prompts=PROMPTS, windows=WINDOWS),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that never trained, with weights far enough from the first that they prefer something."""
    folder = tmp_path_factory.mktemp("cells")
    for seed, (name, arm) in enumerate(ARMS.items()):
        model = LanguageModel(model_config(arm, dataset.vocabulary), seed=seed)
        with torch.no_grad():
            model.embedding.weight.mul_(4)
        checkpoint.save(model, folder / name / "seed0" / "checkpoint")
    return folder


def trained(run: Path, arm: str) -> LanguageModel:
    return checkpoint.load(run / arm / "seed0" / "checkpoint")


def nothing(message: object) -> None:
    pass


@given(count=st.integers(0, 6), length=st.integers(1, 9), more=st.integers(0, 50))
def test_windows_are_spread_over_a_split(count: int, length: int, more: int) -> None:
    tokens = np.arange(length + more, dtype=np.uint16)
    found = spread(tokens, count, length)
    assert found.shape == (count, length)
    assert found.dtype == torch.int64
    for row in found.tolist():
        assert row == list(range(row[0], row[0] + length))
    starts = [row[0] for row in found.tolist()]
    assert starts == sorted(starts)
    assert not starts or (starts[0] == 0 and starts[-1] <= more)
    apart = np.diff(starts)
    assert len(apart) == 0 or apart.max() - apart.min() <= 1


@torch.no_grad()
def test_a_continuation_costs_what_its_tokens_cost_one_by_one(run: Path) -> None:
    model = trained(run, "causal")
    drawn = torch.randint(280, (4, 11), generator=torch.Generator().manual_seed(1))
    found = scoring.continuation_losses(model, drawn[:, :6], drawn[:, 6:])
    assert found.shape == (4, 5)
    for row, text in enumerate(drawn):
        logits, state = model.prefill(text[None, :6], model.make_state(1, 11))
        for at in range(5):
            expected = -logits[0].double().log_softmax(0)[text[6 + at]].item()
            assert found[row, at].item() == pytest.approx(expected, abs=1e-4)
            logits, state = model.step(text[None, 6 + at], state)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_tokens_hidden_one_by_one(run: Path, batch: int) -> None:
    model, mask = trained(run, "encoder"), 280
    text = torch.randint(280, (9,), generator=torch.Generator().manual_seed(2))
    found = scoring.hidden_one_by_one(model, text, mask, batch=batch)
    assert found.shape == (9, 281)
    for at in range(9):
        ids = text.tolist()
        ids[at] = mask
        expected = model(torch.tensor([ids]))[0, at].double().log_softmax(0)
        torch.testing.assert_close(found[at].double(), expected, rtol=0, atol=1e-4)
    assert mask not in text  # the given text stays


@torch.no_grad()
def test_guesses_from_the_left_know_nothing_of_the_right(run: Path) -> None:
    model = trained(run, "causal")
    text = torch.randint(280, (9,), generator=torch.Generator().manual_seed(3))
    found = scoring.from_the_left(model, text)
    assert found.shape == (8, 280)
    for at in range(1, 9):
        expected = model(text[None, :at])[0, -1].double().log_softmax(0)
        torch.testing.assert_close(found[at - 1].double(), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("arm", ["causal", "unmasked"])
def test_the_judge(run: Path, dataset: Dataset, experiment: Experiment, arm: str) -> None:
    found = scoring.judge_cell(nothing, experiment, "causal", 3, dataset.folder, run / arm / "seed0")
    json.dumps(found, allow_nan=False)
    assert list(found["written"]) == ["greedy", "sampled"] + ["true"] * (arm == "causal")
    text = spread(dataset.splits["validation"].tokens, PROMPTS, PROMPT + WRITTEN)
    model, judging = trained(run, arm), trained(run, "causal")
    write = generate if arm == "causal" else generate_by_forward
    for way, scored in found["written"].items():
        heat = {"greedy": 0.0, "sampled": experiment.evaluation.temperature}
        ids = text[:, PROMPT:] if way == "true" else torch.stack(
            list(write(model, text[:, :PROMPT], WRITTEN, Sampling(temperature=heat[way]), seed=3)), 1
        )  # fmt: skip
        total, size = 0.0, 0
        for prompt, row, kept in zip(text[:, :PROMPT], ids, scored["texts"], strict=True):
            whole, cost = torch.cat([prompt, row]), 0.0
            for at in range(PROMPT, PROMPT + WRITTEN):
                cost -= judging(whole[None, :at])[0, -1].double().log_softmax(0)[whole[at]].item()
            assert kept["nats_per_token"] == pytest.approx(cost / WRITTEN, abs=1e-4)
            assert kept["text"] == dataset.tokenizer.decode(row.tolist())
            assert kept["prompt"] == dataset.tokenizer.decode(prompt.tolist())
            total, size = total + cost, size + len(kept["text"].encode())
        assert scored["tokens"] == PROMPTS * WRITTEN
        assert scored["nats_per_token"] == pytest.approx(total / (PROMPTS * WRITTEN), abs=1e-4)
        assert scored["bytes"] == size
        assert scored["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)


def test_the_judge_is_of_the_writers_seed(run: Path, dataset: Dataset, experiment: Experiment, tmp_path: Path) -> None:
    for arm in ("causal", "unmasked"):
        shutil.copytree(run / arm / "seed0", tmp_path / arm / "seed7")
    other = LanguageModel(model_config(ARMS["causal"], dataset.vocabulary), seed=9)
    checkpoint.save(other, tmp_path / "causal" / "seed0" / "checkpoint")
    found, expected = (
        scoring.judge_cell(nothing, experiment, "causal", 3, dataset.folder, folder)
        for folder in (tmp_path / "unmasked" / "seed7", run / "unmasked" / "seed0")
    )
    assert found == expected


def test_without_temperature_nothing_is_sampled(run: Path, dataset: Dataset, experiment: Experiment) -> None:
    cold = experiment.model_copy(update={"evaluation": Evaluation(sample_tokens=WRITTEN, temperature=0)})
    found = scoring.judge_cell(nothing, cold, "causal", 0, dataset.folder, run / "unmasked" / "seed0")
    assert list(found["written"]) == ["greedy"]


def test_what_a_judge_needs(run: Path, dataset: Dataset, experiment: Experiment) -> None:
    with pytest.raises(RunFailedError, match="needs the trained model of other/seed0"):
        scoring.judge_cell(nothing, experiment, "other", 0, dataset.folder, run / "causal" / "seed0")
    long = experiment.model_copy(update={"evaluation": Evaluation(sample_tokens=10**6)})
    with pytest.raises(CorpusError, match=r"evaluation.sample_tokens = 1000000 need 1000032"):
        scoring.judge_cell(nothing, long, "causal", 0, dataset.folder, run / "causal" / "seed0")


@torch.no_grad()
@pytest.mark.parametrize("arm", ["causal", "encoder"])
def test_blanks(run: Path, dataset: Dataset, experiment: Experiment, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "AROUND", 4)
    objective = ARMS[arm].objective
    found = scoring.blanks_cell(nothing, experiment, objective, dataset.folder, run / arm / "seed0")
    json.dumps(found, allow_nan=False)
    model, right, total = trained(run, arm), 0, 0.0
    windows = spread(dataset.splits["validation"].tokens, WINDOWS, CONTEXT).tolist()
    for ids, example in zip(windows, found["examples"], strict=True):
        for at in range(CONTEXT):
            if arm == "encoder":
                scores = model(torch.tensor([[*ids[:at], 280, *ids[at + 1 :]]]))[0, at].double().log_softmax(0)
                total += scores[ids[at]].item()
            elif at:
                scores = model(torch.tensor([ids[:at]]))[0, -1].double().log_softmax(0)
            else:
                continue  # nothing to guess the first from
            right += at > 0 and int(scores.argmax()) == ids[at]
            if at == CONTEXT // 2:
                read = dataset.tokenizer.decode
                around = example["left"], example["token"], example["right"]
                assert around == (read(ids[at - 4 : at]), read([ids[at]]), read(ids[at + 1 : at + 5]))
                best, order = (one[:5] for one in scores.exp().sort(descending=True))
                named = [read([i]) if i < 280 else "[MASK]" for i in order.tolist()]
                assert [one["token"] for one in example["guesses"]] == named
                told = torch.tensor([one["probability"] for one in example["guesses"]], dtype=torch.float64)
                torch.testing.assert_close(told, best, rtol=1e-3, atol=1e-6)
    assert (found["guessed"], found["asked"]) == (right, WINDOWS * (CONTEXT - 1))
    if arm == "encoder":
        assert found["tokens"] == WINDOWS * CONTEXT
        assert found["pseudo_log_likelihood"] == pytest.approx(total, rel=1e-5)
    else:
        assert "pseudo_log_likelihood" not in found


def test_who_may_see_what() -> None:
    """A model without a mask may not pass for one that predicts, nor one with a mask for one without."""
    assert not model_config(ARMS["unmasked"], 300).causal
    assert model_config(ARMS["unmasked"], 300).vocabulary == 300
    seeing = ARMS["causal"].model_copy(update={"overrides": NO_MASK})
    with pytest.raises(ConfigError, match="sees the token that it is to predict"):
        model_config(seeing, 300)
    masked = ARMS["unmasked"].model_copy(update={"overrides": {}})
    with pytest.raises(ConfigError, match=r"needs overrides.mixer.causal = false"):
        model_config(masked, 300)
