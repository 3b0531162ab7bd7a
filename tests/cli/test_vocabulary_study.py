"""The vocabulary study from the command to its report, on small models and a few kilobytes of text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcess, assigned, legend_names, value
from tokenizers import Tokenizer

from models import checkpoint, cost

SIZES = (257, 280)
SETTINGS = (
    "data.corpus=text", "data.max_bytes=0", "data.test_fraction=0.1", "data.validation_fraction=0.1", "seeds=[0]",
    f"vocabulary.sizes={list(SIZES)}", "vocabulary.window_bytes=48", "vocabulary.text_bytes=96", "training.batch=4",
    "training.steps=4", "training.warmup_steps=1", "training.validate_every=4", "evaluation.curve_sequences=2",
    "measurement.seconds=0", "measurement.repeats=2", "measurement.decode_tokens=4",
)  # fmt: skip
CELLS = [f"{arm}-v{size}" for size in SIZES for arm in ("transformer", "mamba")]


@pytest.fixture(scope="module")
def run(in_process: InProcess, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vocabulary")
    assignments = assigned((*SETTINGS, f"data.path={corpus}"))
    code, _, stderr = in_process("run", "vocabulary", "--profile", "smoke", "--out", out, *assignments)
    assert code == 0, stderr
    (directory,) = out.iterdir()
    return directory


@pytest.fixture(scope="module")
def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def test_rows(run: Path, result: dict[str, Any], corpus: Path) -> None:
    assert (result["status"], result["failures"], list(result["arms"])) == ("complete", [], CELLS)
    data = json.loads((run / "environment.json").read_text(encoding="utf-8"))["data"]
    for name, arm in result["arms"].items():
        size = int(name.rpartition("-v")[2])
        assert arm["config"]["vocabulary"] == size
        model = checkpoint.load(run / "cells" / name / "seed0" / "checkpoint")
        assert value(result, arm=name, metric="embedding_parameters") == model.embedding.weight.numel()
        assert value(result, arm=name, metric="parameters") == sum(p.numel() for p in model.parameters())
        per_byte = value(result, arm=name, metric="tokens_per_byte")
        assert per_byte == data["vocabularies"][str(size)]["tokens"]["test"] / data["bytes"]["test"]
        tokens, text = (value(result, arm=name, phase="decode", metric=f"{what}_per_s") for what in ("tokens", "bytes"))
        assert text == pytest.approx(tokens / per_byte)
        cell = json.loads((run / "cells" / name / "seed0" / "evaluation.json").read_text(encoding="utf-8"))
        trained = cell["train"]["tokens"] / cell["text_bytes"]
        train = {metric: value(result, arm=name, phase="train", metric=metric)
                 for metric in ("tokens_per_s", "bytes_per_s", "flops_per_token", "flops_per_byte")}  # fmt: skip
        assert train["bytes_per_s"] == pytest.approx(train["tokens_per_s"] / trained)
        assert train["flops_per_byte"] == pytest.approx(train["flops_per_token"] * trained)
        whole = data["vocabularies"][str(size)]["tokens"]["train"] / data["bytes"]["train"]
        length = round(96 * whole)
        assert (
            value(result, arm=name, metric="state_bytes_per_byte") == cost.state_bytes(model.config, 1, length, 4) / 96
        )
        state = model.make_state(1, length + 4).nbytes
        assert value(result, arm=name, phase="decode", metric="state_bytes", context=length) == state
        assert value(result, arm=name, metric="test_bits_per_byte") > 0
    others = {name: arm["non_embedding_parameters"] for name, arm in result["arms"].items()}
    assert others["mamba-v257"] == others["mamba-v280"]


def test_arms_of_one_size_saw_the_same_tokens(result: dict[str, Any]) -> None:
    hashes = {name: arm["data_sha256"]["0"] for name, arm in result["arms"].items()}
    assert hashes["transformer-v257"] == hashes["mamba-v257"] != hashes["mamba-v280"]
    assert hashes["transformer-v280"] == hashes["mamba-v280"]


def test_the_report(run: Path, result: dict[str, Any], in_process: InProcess) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    for name in ("vocabulary-quality", "vocabulary-speed", "vocabulary-state"):
        assert (run / "figures" / f"{name}.svg").stat().st_size > 2000
    kinds = [one["kind"] for one in result["findings"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "tokens-per-byte": 1, "text-seen": 1, "best-size": 2, "embedding-share": 2, "bytes-per-s": 4,
        "state-per-byte": 2,
    }  # fmt: skip
    for one in result["findings"]:
        assert one["sentence"][:50].replace("'", "&#39;") in page
    assert "trained on different tokens" not in page
    code, table, _ = in_process("report", run.name, "--out", run.parent)
    assert code == 0
    assert "WHAT DOES A LARGER VOCABULARY CHANGE?" in table


def test_each_arm_generates_and_is_exported_with_its_own_tokenizer(
    run: Path, in_process: InProcess, tmp_path: Path
) -> None:
    code, stdout, stderr = in_process("generate", run, "the cat", "--tokens", 5, "--json")
    assert code == 0, stderr
    assert [one["arm"] for one in json.loads(stdout)] == CELLS
    for name in ("mamba-v280", "mamba-v257"):
        code, _, stderr = in_process("export", run, tmp_path / name, "--to", "hf", "--arm", name)
        assert code == 0, stderr
        kept = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        assert kept.get_vocab_size() == int(name[-3:])
    ids = kept.encode("the cat").ids
    model = checkpoint.load(run / "cells" / "mamba-v257" / "seed0" / "checkpoint")
    with torch.inference_mode():
        first = kept.decode([int(model(torch.tensor([ids]))[0, -1].argmax())])
    code, stdout, _ = in_process("generate", run, "the cat", "--tokens", 1, "--arms", "mamba-v257", "--json")
    assert json.loads(stdout)[0]["text"] == first


def test_a_legend_names_no_arm_without_a_line(run: Path) -> None:
    assert legend_names(run, "vocabulary-quality") == ["transformer", "mamba"]
    assert legend_names(run, "vocabulary-quality", without="mamba") == ["transformer"]
