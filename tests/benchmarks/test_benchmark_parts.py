"""A benchmark that does not come to its end keeps what is done: where a part fails, where a process dies, on Ctrl-C."""

import json
import math
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import common, utilisation
from experiments.measurement.process import CellFailedError
from models import compiled, cost
from models.language_model import LanguageModel
from models.ops.cross_entropy import linear_cross_entropy
from models.presets import preset


def gives(value: int) -> dict[str, Any]:
    return {"value": value}


def fails(error: BaseException) -> dict[str, Any]:
    raise error


def told(stderr: str) -> dict[str, Any]:
    """The lines that are objects, as one."""
    return {
        name: said for line in stderr.splitlines() if line.startswith("{") for name, said in json.loads(line).items()
    }


def test_a_part_that_fails_takes_no_other_along(capsys: pytest.CaptureFixture) -> None:
    found, failures = common.parts({
        ("training", "a"): lambda: gives(1),
        ("training", "b"): lambda: fails(common.PartFailedError("the losses differ")),
        ("decode", "a"): lambda: fails(CellFailedError("ValueError: no", "Traceback")),
        ("decode", "b"): lambda: gives(2),
    })  # fmt: skip
    assert found == {("training", "a"): gives(1), ("decode", "b"): gives(2)}
    assert failures == {"training, b": "the losses differ", "decode, a": "ValueError: no\nTraceback"}
    assert told(capsys.readouterr().err) == {"training, a": gives(1), "decode, b": gives(2)} | failures
    with pytest.raises(SystemExit) as end:
        common.leave(failures)
    assert end.value.code == 1
    assert "no figures of training, b: the losses differ" in capsys.readouterr().err


def test_ctrl_c_leaves_what_is_done() -> None:
    found, failures = common.parts({
        ("a",): lambda: gives(1), ("b",): lambda: fails(common.PartFailedError("no")),
        ("c",): lambda: fails(KeyboardInterrupt()), ("d",): lambda: gives(2),
    })  # fmt: skip
    assert found == {("a",): gives(1)}
    assert failures == {"b": "no", "c": "interrupted", "d": "interrupted"}


def steady() -> common.Turn:
    return lambda: (5, "well")


def dying() -> common.Turn:
    return lambda: os._exit(3)


def unmade() -> common.Turn:
    raise SystemExit("no model")


def slow() -> common.Turn:
    return lambda: (5, time.sleep(0.4))


def mostly_aside() -> common.Turn:
    return lambda: (5, time.sleep(0.4), 0.3)


def test_a_side_that_dies_is_named_and_no_process_stays() -> None:
    samples, gave = common.rates({"steady": steady}, 2)
    assert gave == {"steady": "well"}
    assert len(samples["steady"]) == 2
    with pytest.raises(common.PartFailedError, match="the process of dying ended"):
        common.rates({"steady": steady, "dying": dying}, 2)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("other", [dying, unmade])
def test_the_other_sides_go_on_where_that_is_asked(other: common.Side) -> None:
    failures: dict[str, str] = {}
    samples, gave = common.rates({"other": other, "steady": steady}, 2, warm_ups=2, failures=failures)
    assert (list(samples), len(samples["steady"]), gave) == (["steady"], 2, {"steady": "well"})
    assert list(failures) == ["other"]
    assert "the process of other ended" in failures["other"]
    assert multiprocessing.active_children() == []


def test_what_a_turn_puts_aside_is_not_in_its_rate() -> None:
    ((whole,), (part,)) = (common.rates({"side": side}, 1)[0]["side"] for side in (slow, mostly_aside))
    assert whole <= 5 / 0.4
    assert 5 / 0.1 >= part > 5 / 0.35


def thousand() -> common.Turn:
    return lambda: (1000, time.sleep(0.05))


def test_a_rate_is_tokens_per_second() -> None:
    ((rate,),) = common.rates({"side": thousand}, 1)[0].values()
    assert 1000 / 0.05 > rate > 1000 / 0.5


def telling(name: str, log: Path) -> common.Turn:
    def turn() -> tuple[int, str]:
        with log.open("a") as file:
            file.write(f"{name} ")
        return 1, name

    return turn


def test_rounds_alternate_and_slow_sides_are_in_two(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sides = {name: partial(telling, name, log) for name in ("a", "b", "slow")}
    samples, _ = common.rates(sides, 3, slow=frozenset({"slow"}), warm_ups=2)
    # what is not slow warms up, one after the other; then each round runs in the order opposite to the one before
    assert log.read_text().split() == [*"aabb", "a", "b", "slow", "slow", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "slow": 2}


def test_a_sitting_is_the_geometric_mean_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    sittings = iter(([1.0, 100.0], [8.0, 2.0]))
    monkeypatch.setattr(common, "rates", lambda sides, rounds: ({"a": next(sittings)}, {}))
    assert common.rates_over_sittings({"a": steady}, 2, 2)["a"] == pytest.approx([10.0, 4.0])


@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_published_is_the_median(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(common, "describe", lambda device, threads: {})
    common.publish("x", {}, {"a": [100.0, 900.0, 200.0]}, {}, as_json)
    said = capsys.readouterr().out
    assert (json.loads(said)["tokens_per_s"] == {"a": 200.0}) if as_json else ("| a | 200 |" in said)


TURNS = {
    "samples": {"ms": [10.0] * 6}, "turns": [1] * 6, "tokens_per_sample": 64, "first_call_ms": 5.0, "backend": "sdpa",
    "ceilings": [{"flops_per_s": 1e15, "bytes_per_s": 4e12}] * 6,
}  # fmt: skip


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, benchmark: Any, *arguments: str) -> int:
    """The exit code of a benchmark that finds a GPU, with what it measures replaced before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    return end.value.code


def test_utilisation_tells_of_every_arm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def measured(function: Any, arm: str, turns: int, size: str) -> dict[str, Any]:
        assert function is utilisation.decode
        assert (turns, size) == (7, "7b")
        return fails(CellFailedError("out of memory")) if arm == "mamba" else TURNS

    monkeypatch.setattr(utilisation, "run_fresh", measured)
    monkeypatch.setattr(utilisation, "describe", lambda device, threads: {"device": device})
    assert on_a_gpu(monkeypatch, utilisation, "--phases", "decode", "--decode-size", "7b", "--json") == 1
    stdout, stderr = capsys.readouterr()
    result = json.loads(stdout)
    assert (list(result["found"]), list(result["found"]["decode"])) == (["decode"], ["transformer", "mamba2"])
    assert result["failures"] == {"decode, mamba": "out of memory"}
    assert (result["settings"]["decode_size"], result["environment"]) == ("7b", {"device": "cuda"})
    one = result["found"]["decode"]["transformer"]
    read = cost.decode_bytes(utilisation.large("transformer", "7b"), 1, 1024, 2)
    assert one["tokens_per_s"]["value"] == pytest.approx(6400)
    assert one["share"]["value"] == pytest.approx(read * 6400 / 4e12)
    assert told(stderr)["decode, transformer"] == one


def test_a_serial_decode_is_compiled_without_overlap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And is only measured where it is asked for."""
    compiled_with: list[dict[str, Any]] = []

    def measured(function: Any, *arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr(compiled, "ONE_ROW", dict(compiled.ONE_ROW))  # as a process of its own has it
        monkeypatch.setattr(utilisation, "_work", lambda *_: compiled_with.append(dict(compiled.ONE_ROW)))
        function(print, *arguments)
        return TURNS

    monkeypatch.setattr(utilisation, "run_fresh", measured)
    usual = dict(compiled.ONE_ROW)
    options = ("--phases", "decode,decode-serial", "--arms", "mamba", "--decode-size", "1b")
    assert on_a_gpu(monkeypatch, utilisation, *options) == 0
    assert compiled_with == [usual, usual | {"triton.enable_pdl": False}] != [usual, usual]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[-1]) for row in rows] == [("| decode", "75% |"), ("| decode-serial", "- |")]
    compiled_with.clear()
    assert on_a_gpu(monkeypatch, utilisation, "--arms", "mamba") == 0
    assert "serial" not in capsys.readouterr().out


def test_what_decodes_has_no_size_where_nothing_decodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert on_a_gpu(monkeypatch, utilisation, "--phases", "training", "--decode-size", "7b") == 2
    assert "--phases leaves out" in capsys.readouterr().err


FORMS = ("our Mamba", "our Mamba compiled", "mamba_ssm's Mamba")


def official_with(monkeypatch: pytest.MonkeyPatch, opinions: dict[str, list[float]], dead: set[str]) -> Any:
    """The benchmark, with rates of 20 of our sides and 10 of theirs in place of what it measures. opinions: of a side,
    where it is not 3 and -4; dead: sides whose process ended."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'transformers>=5'")
    from benchmarks import official

    def rates(sides: Any, rounds: int, warm_ups: int, failures: dict[str, str]) -> tuple[dict, dict]:
        failures |= {name: "it ended" for name in sides if name in dead}
        alive = [name for name in sides if name not in dead]
        found = {name: [10.0 if name.startswith("mamba_ssm") else 20.0] * rounds for name in alive}
        return found, {name: opinions.get(name, [3.0, -4.0]) for name in alive}

    monkeypatch.setattr(common, "rates", rates)
    monkeypatch.setattr(common, "describe", lambda device, threads: {"device": device})
    return official


def test_official_compares_where_the_logits_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A side that thinks otherwise, or whose process ended, takes no other along; theirs takes its phase along."""
    ours, compiled_, theirs = FORMS
    opinions = {
        f"{ours}, training": [3.0, -3.9],
        f"{compiled_}, training": [2.0, -3.0],
        f"{theirs}, prefill": [3.0, 4.0],
    }
    official = official_with(monkeypatch, opinions, {f"{compiled_}, decode"})
    assert on_a_gpu(monkeypatch, official, "--arms", "mamba", "--phases", "training,prefill,decode", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    pairs = [f"{ours}, {phase} / {theirs}, {phase}" for phase in ("training", "decode")]
    assert list(result["ratios"]) == pairs
    assert [one["ratio"] for one in result["ratios"].values()] == pytest.approx([2.0] * 2)
    assert result["samples"].keys() == {
        f"{side}, {phase}" for side in (ours, theirs) for phase in ("training", "decode")
    }
    told = result["failures"]
    assert told.keys() == {f"{compiled_}, training", f"{compiled_}, decode", "prefill, mamba"}
    assert "logits are 0.283 of their spread from those of mamba_ssm's Mamba" in told[f"{compiled_}, training"]
    assert told[f"{compiled_}, decode"] == "it ended"
    assert "its logits are 1.6 of" in told["prefill, mamba"]


def test_official_has_nothing_to_compare_without_theirs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    official = official_with(monkeypatch, {}, {f"{FORMS[2]}, decode"})
    assert on_a_gpu(monkeypatch, official, "--arms", "mamba", "--phases", "decode", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["ratios"], result["samples"]) == ({}, {})
    assert result["failures"] == {"decode, mamba": f"{FORMS[2]}, decode: it ended"}


@pytest.mark.parametrize(
    ("opinion", "apart"),
    # 0.75 and 1.25 from theirs, which is 5 long: 0.15 and 0.25 of it
    [([3.0, -3.25], None), ([3.0, -2.75], "0.25"), ([math.nan, -4.0], "nan"), ([3.0, math.inf], "inf")],
)
def test_official_compares_no_side_that_thinks_otherwise(
    opinion: list[float], apart: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = f"{FORMS[0]}, decode", f"{FORMS[2]}, decode"
    found = official_with(monkeypatch, {ours: opinion}, set()).compared("decode", "mamba", 2)
    assert (f"{ours} / {theirs}" in found["ratios"]) == (ours in found["samples"]) == (apart is None)
    assert list(found["failures"]) == ([] if apart is None else [ours])
    assert apart is None or f"logits are {apart} of" in found["failures"][ours]


@pytest.mark.parametrize("compiles", [False, True])
def test_official_counts_the_tokens_that_steps_write(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of NEW tokens the first comes of reading the prompt, which is timed by itself and put aside twice."""
    official = official_with(monkeypatch, {}, set())
    vocabulary, prompt, new, order = 32, 3, 5, []

    class Model:
        def make_state(self, rows: int, length: int) -> str:
            assert (rows, length) == (1, prompt + new)
            return "empty"

        def prefill(self, tokens: torch.Tensor, state: str) -> tuple[torch.Tensor, str]:
            assert tokens.shape == (1, prompt)
            order.append("prompt")
            return torch.eye(vocabulary)[None, 7], "read"

        def eval(self) -> "Model":
            return self

    class Recorded:
        def __init__(self, model: Model, state: str, limit: int) -> None:
            assert limit == prompt + new
            self.token = torch.tensor([0])

        def load(self, state: str) -> None:
            assert state == "read"

        def step(self, token: torch.Tensor | None = None) -> torch.Tensor:
            order.append("step" if token is None else token.item())
            return torch.arange(float(vocabulary))[None]

    monkeypatch.setattr(official, "PROMPT", prompt)
    monkeypatch.setattr(official, "NEW", new)
    monkeypatch.setattr(official, "TOLD", 2)
    monkeypatch.setattr(official, "RecordedDecode", Recorded)
    monkeypatch.setattr(official, "_model", lambda *which: Model())
    monkeypatch.setattr(official, "_tokens", lambda rows, length: torch.arange(10, 10 + length)[None])
    monkeypatch.setattr(official, "compile_blocks", lambda model, method: order.append(f"compiled {method}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    clock = iter((100.0, 103.0))
    monkeypatch.setattr(official, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    turn = official.decode("mamba", official.COMPILED if compiles else official.OURS)
    # what it thinks comes after the prompt and two tokens that are given
    assert order == ["compiled step"] * compiles + ["prompt", "wait", 13, 14]
    order.clear()
    tokens, opinion, aside = turn()
    assert order == ["prompt", "wait", "prompt", 7, "step", "step", "step", "wait"]
    assert (tokens, aside) == (4, 6.0)  # the prompt's three seconds, twice
    assert opinion == [-15.5, 0.5]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_official_trains_with_the_weights_whose_logits_it_compares(
    recorded: bool, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded or not: nothing moves until the logits are known, and then every step of a turn does."""
    official = official_with(monkeypatch, {}, set())
    model, order = LanguageModel(preset("mamba-tiny").with_overrides({"vocabulary": 64}), seed=0), []
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    form = ModuleType("models.ops.kernels.cuda_form")
    form.linear_cross_entropy = linear_cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, form.__name__, form)
    monkeypatch.setattr(official, "DEVICE", "cpu")
    monkeypatch.setattr(official, "_model", lambda *which: model)
    monkeypatch.setattr(official, "_tokens", lambda *size: tokens)
    monkeypatch.setattr(official, "compile_blocks", lambda model, method: order.append(f"compiled {method}"))

    def record(step: Any, device: torch.device) -> Any:
        for _ in range(3):
            step()
        order.append("recorded")
        return step

    monkeypatch.setattr(official, "Recording", record)
    side = official.COMPILED if compiles else official.OURS
    turn = (official.PHASES["recorded-training"] if recorded else official.training)("mamba", side)
    assert order == ["compiled forward"] * compiles + ["recorded"] * recorded
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), before)
    taken, opinion = turn()
    assert taken == official.STEPS * 2 * 8
    moved = (torch.nn.utils.parameters_to_vector(model.parameters()) - before).abs().max().item()
    assert official.STEPS / 2 * official.LEARNING_RATE < moved < 1.5 * official.STEPS * official.LEARNING_RATE
    torch.nn.utils.vector_to_parameters(before, model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.head(model.hidden(tokens[:, :-1]).x)[0, -1]
    assert official.unlike(opinion, official._opinion(logits)) < 0.02
