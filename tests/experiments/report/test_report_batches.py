"""More sequences than one: what is told of all of them and what of each; other batches than the usual one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest

from experiments.report import content, lineage, study_figures
from experiments.report.drawing import RC
from experiments.report.record import Record, read


def test_another_batch_never_stands_in_for_the_usual_one(make_run: Callable[..., Path]) -> None:
    run = make_run()
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    usual = [row for row in result["rows"] if (row["phase"], row["context"]) == ("decode", 128)]
    lost = [row for row in usual if row["arm"] == "mamba"]
    result["rows"] = [row for row in result["rows"] if row not in lost]
    result["rows"] = [row | {"batch": 64, "value": 1.0} for row in usual] + result["rows"]
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    record = read(run)
    kept = record.row("transformer", "decode", "tokens_per_s", 128)
    assert kept is not None
    assert (kept.batch, kept.value) == (1, next(
        row["value"] for row in usual
        if (row["arm"], row["metric"], row["seed"]) == ("transformer", "tokens_per_s", None)
    ))  # fmt: skip
    assert record.row("mamba", "decode", "tokens_per_s", 128) is None
    (other,) = record.over_seeds("decode", "tokens_per_s", "mamba", context=128, batch=64)
    assert other.value == 1.0


@pytest.fixture
def of_eight(make_run: Callable[..., Path]) -> Record:
    """A record whose prefill and decode took eight sequences at a time."""
    record = read(make_run())
    spec = record.spec | {"measurement": record.spec["measurement"] | {"batch": 8}}
    return replace(record, spec=spec, rows=[replace(row, batch=row.batch and 8) for row in record.rows])


def kept(record: Record) -> dict[str, float]:
    """Bytes of the cache or state of each arm after the longest context, of all sequences."""
    found = {arm: record.row(arm, "decode", "state_bytes", 2048) for arm in record.arms}
    return {arm: row.known for arm, row in found.items() if row is not None}


def test_what_is_of_all_sequences_is_told(of_eight: Record, make_run: Callable[..., Path]) -> None:
    told = "Prefill and decode take 8 sequences at a time"
    assert [section.id for section in content.document(of_eight).sections if told in section.intro] == [
        "results", "throughput",
    ]  # fmt: skip
    assert not any("sequences at a time" in section.intro for section in content.document(read(make_run())).sections)


@pytest.mark.parametrize("layout", ["wide", "narrow"])
def test_the_figures_of_caches_are_of_a_sequence(of_eight: Record, layout: study_figures.Layout) -> None:
    each = {arm: total / 8 for arm, total in kept(of_eight).items()}
    assert len(each) == 2
    curve = {"positions": [1, 2], "difference": [0.1, 0.2], "ci_low": [None] * 2, "ci_high": [None] * 2}
    one = {"kind": "quality", "arm": "mamba", "curve": curve, "windows": [2]}
    record = replace(of_eight, result=of_eight.result | {"findings": [one]})
    with matplotlib.rc_context(RC):
        losses, caches = study_figures.sparse(record, layout).axes
        _, held = study_figures.lineage(record, layout).axes
    assert losses.get_ylabel() == "nats/token"
    unit = {"kB of a sequence": 1e3, "MB of a sequence": 1e6}[caches.get_ylabel()]
    assert [line.get_ydata()[-1] * unit for line in caches.lines] == pytest.approx(list(each.values()))
    unit = {"kB": 1e3, "MB": 1e6}[held.get_xlabel().removeprefix("cache or state of a sequence\nafter 2,048 tokens, ")]
    assert [line.get_xdata()[0] * unit for line in held.lines] == pytest.approx(list(each.values()))
    assert "Cache or state of a sequence after 2,048 tokens" in lineage._alt(record)
