"""What the study of experts says, from shapes and from rows made by hand."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from study_rows import quality, speed

from experiments.numbers import size
from experiments.report import moe as report
from experiments.spec import Arm, Data, Experiment, Experts, Measurement, load
from experiments.store import Cell, RunDirectory
from experiments.studies import moe
from models.language_model import LanguageModel

NOWHERE = RunDirectory(Path("nowhere"))
V, D, HIDDEN, X, K = 512, 64, 128, 8, 2  # of the tiny presets
EXPERT = 3 * D * HIDDEN * 4  # bytes
ARMS = {
    "dense": Arm(model="transformer-tiny", learning_rate=1e-3),
    "moe": Arm(model="moe-tiny", learning_rate=1e-3),
    "wide": Arm(model="transformer-tiny", learning_rate=1e-3, overrides={"feedforward": {"hidden": X * HIDDEN}}),
    "other": Arm(model="transformer-tiny", learning_rate=1e-3, overrides={"feedforward": {"hidden": 40}}),
}  # fmt: skip


def experiment(*arms: str, batches: tuple[int, ...] = (1, 4), batch: int = 1) -> Experiment:
    return Experiment(
        name="x", title="x", study="moe", arms={name: ARMS[name] for name in arms}, seeds=(0, 1, 2),
        data=Data(vocabulary=V), experts=Experts(batches=batches),
        measurement=Measurement(contexts=(64, 128), batch=batch),
    )  # fmt: skip


def kind(found: list[dict], name: str) -> list[dict]:
    return [one for one in found if one["kind"] == name]


def test_bytes_against_the_tensors_of_the_model() -> None:
    setting = experiment("dense", "moe")
    model = LanguageModel(moe.cells.model_config(ARMS["moe"], V), seed=0)
    whole = sum(4 * p.numel() for p in model.parameters())
    dense, sparse = kind(moe.findings([], setting, NOWHERE), "bytes")
    assert sparse["loaded_bytes"] == whole
    assert sparse["touched_bytes"]["1"] == whole - (X - K) * EXPERT  # one token meets K experts and the router
    assert sparse["touched_bytes"]["4"] == pytest.approx(whole - X * (1 - K / X) ** 4 * EXPERT)
    assert dense["touched_bytes"] == {"1": dense["loaded_bytes"], "4": dense["loaded_bytes"]}
    halved = setting.model_copy(update={"measurement": Measurement(contexts=(64,), dtype="bfloat16")})
    assert [one["loaded_bytes"] for one in kind(moe.findings([], halved, NOWHERE), "bytes")] == [
        dense["loaded_bytes"] / 2, whole / 2
    ]  # fmt: skip
    assert "evenly" in sparse["sentence"]
    assert "evenly" not in dense["sentence"]
    assert f"({sparse['touched_bytes']['1'] / whole:.0%})" in sparse["sentence"]
    assert f"; {size(sparse['touched_bytes']['4'] / 4)} a token)" in sparse["sentence"]


def test_what_the_arms_are_equal_in_and_what_that_bought() -> None:
    rows = quality("dense", (3.0, 3.1, 3.2)) + quality("moe", (2.9, 2.999, 3.1)) + quality("wide", (2.7, 2.801, 2.9))
    for batch, rate in ((1, 100.0), (4, 300.0)):
        for arm, factor in (("dense", 1.0), ("moe", 0.5), ("wide", 0.4 * batch)):
            rows += speed(arm, "decode", [rate * factor * f for f in (1, 1.1, 1.2)], context=64, batch=batch)
    dense, wide = kind(moe.findings(rows, experiment("dense", "moe", "wide"), NOWHERE), "bought")
    assert dense["sentence"].startswith("moe against dense (equal parameters, active): it loads 2.5")
    assert "moe predicts better, by 0.100 bits per byte" in dense["sentence"]
    assert "moe decodes after 64 tokens at batch 1 0.500 times" in dense["sentence"]
    assert "moe decodes after 64 tokens at batch 4 0.500 times" in dense["sentence"]
    assert wide["sentence"].startswith("moe against wide (equal parameters, in total): it loads 1.00 times the bytes")
    assert "wide predicts better, by 0.199 bits per byte" in wide["sentence"]
    assert "moe decodes after 64 tokens at batch 1 1.25 times" in wide["sentence"]
    assert "moe decodes after 64 tokens at batch 4 0.312 times" in wide["sentence"]
    (other,) = kind(moe.findings([], experiment("other", "moe"), NOWHERE), "bought")
    assert "times the parameters, active" in other["sentence"]
    assert other["bits_per_byte"] is None


def test_without_experts_the_verdicts_are_the_comparisons() -> None:
    rows = quality("dense", (3.0, 3.1, 3.2)) + quality("wide", (2.7, 2.801, 2.9))
    assert [(one["a"], one["b"]) for one in moe.verdicts(rows, experiment("dense", "wide"))] == [("dense", "wide")]
    assert not kind(moe.findings(rows, experiment("dense", "wide"), NOWHERE), "bought")


def test_the_load_is_ranked_within_a_seed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    first = [0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    second = [0.05, 0.05, 0.5, 0.08, 0.08, 0.08, 0.08, 0.08]
    for seed, loads in enumerate((first, second)):
        run.finish(Cell("moe", seed, "train"), {"expert_load": [loads]})
    (one,) = kind(moe.findings([], experiment("dense", "moe"), run), "load")
    assert one["busiest"] == pytest.approx(X * (0.3 + 0.5) / 2)
    assert one["idlest"] == pytest.approx(X * (0.1 + 0.05) / 2)
    assert one["loads"][0][1] == pytest.approx((0.1 + 0.08) / 2)
    assert "the busiest expert of any layer gets 3.20 times an even share, the idlest 0.600 times" in one["sentence"]
    met = [sum(1 - (1 - K * load) ** 4 for load in loads if K * load < 1) + sum(K * load >= 1 for load in loads)
           for loads in (first, second)]  # fmt: skip
    assert one["touched_experts"] == pytest.approx(sum(met) / 2)
    assert "; with this load 4 independent tokens touch " in one["sentence"]
    assert json.dumps(one)


def test_a_question_that_the_comparison_asks_already_is_asked_once() -> None:
    """Of decode at the usual batch, where there is one length."""
    setting = experiment("dense", "moe").model_copy(update={"measurement": Measurement(contexts=(64,), batch=1)})
    rows = [one for arm, rate in (("dense", 100.0), ("moe", 50.0)) for batch in (1, 4)
            for one in speed(arm, "decode", [rate, 1.1 * rate, 1.3 * rate], context=64, batch=batch)]  # fmt: skip
    assert [one["batch"] for one in moe.verdicts(rows, setting)] == [1, 4]


def test_the_busiest_expert_is_that_of_the_comparisons_row(tmp_path: Path) -> None:
    """Of the busiest layer of every seed, whichever that is: the mean of the extremes, not an extreme of means."""
    run, even = RunDirectory(tmp_path), [1 / X] * X
    skewed = [0.3, *[0.1] * (X - 1)]
    for seed, layers in enumerate(([skewed, even], [even, skewed])):
        run.finish(Cell("moe", seed, "train"), {"expert_load": layers})
    two = experiment("dense", "moe")
    overrides = {"moe": two.arms["moe"].model_copy(update={"overrides": two.arms["moe"].overrides | {"layers": 2}})}
    (one,) = kind(moe.findings([], two.model_copy(update={"arms": two.arms | overrides}), run), "load")
    assert (one["busiest"], one["idlest"]) == (pytest.approx(X * 0.3), pytest.approx(X * 0.1))


def test_expected_experts_against_every_choice() -> None:
    """One expert a token: all 3^4 sequences of choices with their probabilities."""
    loads = [0.7, 0.2, 0.1]
    told = sum(np.prod([loads[i] for i in one]) * len(set(one)) for one in product(range(3), repeat=4))
    assert moe.expected(loads, 1, 4) == pytest.approx(told)
    assert moe.expected([1 / X] * X, K, 1) == pytest.approx(K)
    assert moe.expected([0.6, 0.4, 0.0], 2, 1) == pytest.approx(1.8)  # no expert is chosen twice by one token


def test_the_plan_decodes_at_the_other_batches_once() -> None:
    cells = moe.plan(experiment("dense", "moe", batches=(1, 4, 64), batch=4))
    decodes = [(cell.arm, cell.context, cell.batch) for cell in cells if cell.kind == "decode" and cell.seed == 0]
    assert decodes == [
        ("dense", 64, None), ("moe", 64, None), ("dense", 128, None), ("moe", 128, None),
        ("dense", 64, 1), ("moe", 64, 1), ("dense", 64, 64), ("moe", 64, 64),
    ]  # fmt: skip
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize("profile", ["smoke", "cpu", "cuda"])
def test_the_catalog_is_matched_twice(profile: str) -> None:
    setting = load("moe", profile=profile)
    found = kind(moe.findings([], setting, NOWHERE), "bought")
    assert [(one["against"], one["sentence"].split("(")[1].split(")")[0]) for one in found] == [
        ("dense", "equal parameters, active"), ("dense-total", "equal parameters, in total"),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_report_says_in_which_type_the_bytes_are(dtype: str) -> None:
    record: Any = SimpleNamespace(spec={"measurement": {"dtype": dtype}}, findings=[])
    (section,) = report.sections(record)
    assert f"of weights alone, in {dtype};" in section.intro


def test_what_may_not_be_compared_is_told_as_that() -> None:
    rows = quality("dense", [2.0, 2.1, 2.2]) + quality("moe", [1.9, 2.0, 2.1])
    (one,) = kind(moe.findings(rows, experiment("dense", "moe"), NOWHERE), "bought")
    assert one["comparable"]
    refused = [row | {"comparable": row["arm"] != "moe", "reason": "a gate"} for row in rows]
    (one,) = kind(moe.findings(refused, experiment("dense", "moe"), NOWHERE), "bought")
    assert (one["comparable"], one["resolved"]) == (False, False)
    (one,) = kind(moe.findings(rows[:-1], experiment("dense", "moe"), NOWHERE), "bought")
    assert one["sentence"].endswith(" It leaves out seed 2 of moe, where there is no value.")
    assert not one["identical"]
    alike = quality("dense", [2.0, 2.1]) + quality("moe", [2.0, 2.1])
    (one,) = kind(moe.findings(alike, experiment("dense", "moe"), NOWHERE), "bought")
    assert one["identical"]
