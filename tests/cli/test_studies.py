"""Studies that train, from the command to their reports, on small settings."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, InProcess, assigned

TINY = (*SMALL, "evaluation.samples=0", "measurement.decode_tokens=2")


def finished(in_process: InProcess, corpus: Path, out: Path, study: str, *more: str) -> tuple[Path, dict[str, Any]]:
    settings = assigned((*TINY, f"data.path={corpus}", *more))
    code, stdout, stderr = in_process(
        "run", study, "--profile", "smoke", "--seeds", 2, "--out", out, "--json", *settings
    )
    assert code == 0, stderr
    (directory,) = out.iterdir()
    return directory, json.loads(stdout)


def shown(directory: Path, result: dict[str, Any], figure: str) -> None:
    """The report begins with the study's section: its figure, and every sentence."""
    page, markdown = ((directory / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert (directory / "figures" / f"{figure}.svg").stat().st_size > 2000
    assert result["findings"]
    for one in result["findings"]:
        assert one["sentence"].split(" (")[0].replace("'", "&#39;") in page
    assert markdown.index(f"{figure}.svg") < markdown.index("Verdict")


def test_moe(in_process: InProcess, corpus: Path, tmp_path: Path) -> None:
    arms = ("measurement.contexts=[8]", "experts.batches=[1, 3]")
    directory, result = finished(in_process, corpus, tmp_path / "runs", "moe", *arms)
    shown(directory, result, "moe")
    assert (result["status"], result["failures"]) == ("complete", [])
    decodes = {
        (row["arm"], row["batch"]) for row in result["rows"]
        if (row["phase"], row["metric"], row["context"], row["seed"]) == ("decode", "tokens_per_s", 8, 1)
    }  # fmt: skip
    assert decodes == {(arm, batch) for arm in ("dense", "moe", "dense-total") for batch in (1, 3)}
    touched = {
        (row["arm"], row["batch"]): row["value"] for row in result["rows"]
        if row["metric"] == "touched_bytes_analytic" and row["seed"] is None
    }  # fmt: skip
    assert touched["moe", 1] < touched["moe", 3]
    asked = [(one["a"], one["b"], one["batch"]) for one in result["verdicts"] if one["metric"] == "tokens_per_s"
             and one["phase"] == "decode"]  # fmt: skip
    assert asked == [("dense", "moe", 1), ("dense", "moe", 3), ("dense-total", "moe", 1), ("dense-total", "moe", 3)]
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "Decode throughput, context 8, batch 3" in page
    assert "at 8 tokens of context and batch 3" in " ".join(one["sentence"] for one in result["verdicts"])


@pytest.mark.slow
def test_lineage(in_process: InProcess, corpus: Path, tmp_path: Path) -> None:
    directory, result = finished(in_process, corpus, tmp_path / "runs", "lineage", "measurement.contexts=[8]")
    shown(directory, result, "lineage")
    assert (result["status"], result["failures"]) == ("complete", [])
    assert [one["kind"] for one in result["findings"]] == ["step"] * 7 + ["overall"]
    assert all("as cache or state" in one["sentence"] for one in result["findings"][:-1])


@pytest.mark.slow
def test_sparse(in_process: InProcess, corpus: Path, tmp_path: Path) -> None:
    directory, result = finished(in_process, corpus, tmp_path / "runs", "sparse", "measurement.contexts=[8, 64, 128]")
    shown(directory, result, "sparse")
    assert (result["status"], result["failures"]) == ("complete", [])
    kinds = [one["kind"] for one in result["findings"]]
    assert kinds == ["quality"] * 3 + ["cost"] * 3 + (["overall"] if "overall" in kinds else [])
    assert [one["constant_from"] for one in result["findings"] if one["kind"] == "cost"] == [64, 64, 8]


@pytest.mark.parametrize(
    ("study", "setting", "said"),
    [
        ("compare", "experts.batches=[1]", "the comparison study does not read 'experts'"),
        ("moe", "experts.batches=[]", "experts.batches"),
        ("moe", "experts.batches=[64, 1]", "must be positive, distinct and ascending (got [64, 1])"),
        ("lineage", "learning_rates=[0.1]", "the lineage study does not read 'learning_rates'"),
        ("lineage", "measurement.contexts=[4096]", "the model has 2048 learned positions, measurement.contexts"),
    ],
)
def test_mistakes(in_process: InProcess, tmp_path: Path, study: str, setting: str, said: str) -> None:
    code, _, stderr = in_process("run", study, "--profile", "smoke", "--set", setting, "--out", tmp_path / "runs")
    assert code == 2
    assert said in stderr
    assert len(stderr.splitlines()) == 1
