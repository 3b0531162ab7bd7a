"""A study may decode at more batches than the comparison's tables show."""

import json
from collections.abc import Callable
from pathlib import Path

from experiments.report.record import read


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
