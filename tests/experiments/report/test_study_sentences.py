"""Sentences of the studies' reports that depend on how a run was made: the device, the type, how much text."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.report import masking, moe, speed, vocabulary
from experiments.report.document import Table
from experiments.report.record import Record, Row, read
from experiments.report.tables import room
from experiments.spec import load
from experiments.store import RunDirectory
from experiments.studies.speed import findings


@pytest.fixture
def record(make_run: Callable[..., Path]) -> Record:
    return read(make_run(seeds=(0,), measured=False))


@pytest.mark.parametrize(("device", "said", "drifted"), [
    ("cpu", "decode of one arm at all lengths shares one. The arms at one length, and of decode every arm at every "
            "length, took turns", "the arms at one length and of decode every length, was measured"),
    ("cuda", "An arm had one process for all lengths of a phase. The arms at all these lengths took turns",
             "the arms at every length of a phase, was measured"),
])  # fmt: skip
def test_who_shared_a_process_and_took_turns(record: Record, device: str, said: str, drifted: str) -> None:
    assert said in speed.verdict(replace(record, spec=record.spec | {"device": device})).intro
    rows = [
        {"metric": "ceiling_flops_per_s", "seed": 0, "dtype": "float32", "value": value} for value in (1e12, 1.5e12)
    ]
    experiment = load("speed", profile="cuda" if device == "cuda" else "cpu", device=device)  # type: ignore[arg-type]
    (drift,) = findings(rows, experiment, RunDirectory(Path("nowhere")))
    assert drifted in drift["sentence"]
    assert "up to 1.50 times" in drift["sentence"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_of_the_weights_that_are_counted(record: Record, dtype: str) -> None:
    (section,) = moe.sections(replace(record, spec=record.spec | {"measurement": {"dtype": dtype}}))
    assert f"of weights alone, in {dtype}; the rest is measured" in section.intro


@pytest.mark.parametrize(("learned", "said"), [
    (300_000_000, "learned from the training split's 300 MB; a model was trained on at most 1 MB of that split "
                  "(0.33%)"),
    (33_600_000, "learned from the first 33.6 MB of the training split's 300 MB; a model was trained on at most 1 MB"),
])  # fmt: skip
def test_what_the_tokenizers_were_learned_from(record: Record, learned: int, said: str) -> None:
    seen = Row("a-v300", None, "text", "bytes_seen", 1e6, "bytes", 1, None, None, None, None, "none", None, True, None,
               None, None, None, None)  # fmt: skip
    data = {"bytes": {"train": 300_000_000}, "learned_bytes": learned}
    record = replace(
        record, rows=[seen], result=record.result | {"arms": {"a-v300": {"config": {"vocabulary": 300}}}},
        environment=record.environment | {"data": data},
    )  # fmt: skip
    assert said in vocabulary._caution(record)


@pytest.mark.parametrize(("bounds", "lost", "standing"), [
    ((100.0, 200.0), {}, "measured"), ((0, 0), {}, "measured"), ((None, None), {}, "measured"),
    ((0, 200.0), {}, "open at the shortest measured length"),
    ((100.0, None), {}, "open at the longest measured length"),
    ((0, None), {}, "open at the shortest and the longest measured length"),
    ((100.0, 200.0), {"a": [512]}, "not measured at every length"),
])  # fmt: skip
def test_how_a_crossing_stands(record: Record, bounds: tuple, lost: dict, standing: str) -> None:
    one = {
        "kind": "crossover",
        "comparable": True,
        "sentence": "one",
        "ci_low": bounds[0],
        "ci_high": bounds[1],
        "lost": lost,
    }
    told = speed.verdict(replace(record, result=record.result | {"findings": [one]})).blocks[0]
    assert (told.standing, told.tone == "resolved") == (standing, standing == "measured")


def test_what_a_cache_has_room_for_is_told(record: Record) -> None:
    said = " A cache or state has room for the 16 tokens that are decoded, too."
    assert room(replace(record, spec=record.spec | {"measurement": {"decode_tokens": 16}})) == said
    assert room(replace(record, spec=record.spec | {"measurement": {}})) == ""
    both = {"study": "memory", "memory": {"decode_tokens": 16}, "measurement": {"decode_tokens": 64}}
    assert room(replace(record, spec=record.spec | both)) == said


@pytest.mark.parametrize("reliable", [True, False])
def test_what_a_judge_that_failed_a_gate_judged_is_marked(record: Record, reliable: bool) -> None:
    def over_seeds(arm: str, metric: str, mode: str | None, comparable: bool) -> Row:
        reason = None if comparable else "failed before timing: causality"
        return Row(arm, None, "quality", metric, 2.5, "", 3, 2.4, 2.6, None, None, "lower", None, comparable, reason,
                   None, None, mode, None)  # fmt: skip

    rows = [over_seeds("writer", "judged_nats_per_token", "greedy", True),
            over_seeds("judge", "test_bits_per_byte", None, reliable)]  # fmt: skip
    arms = {"judge": {"objective": "causal"}, "writer": {"objective": "unmasked"}}
    made = replace(record, rows=rows, spec=record.spec | {"arms": arms}, result=record.result | {"arms": arms})
    table = Table("", [])
    cell = masking._judged_cell(table, made, "writer", "greedy")
    assert cell.text == "2.50 [2.40, 2.60]"
    assert list(table.notes) == ([] if reliable else [
        "its judge is not to be relied on: failed before timing: causality"
    ])  # fmt: skip
