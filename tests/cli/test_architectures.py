"""Every architecture and objective through the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import InProcess

from cli.main import in_bytes
from experiments.cells import folder_hashes
from experiments.spec import load
from models import cost
from models.presets import PRESETS

ARMS = ("transformer", "mamba", "mamba2", "mamba3", "hybrid", "moe", "sliding", "lstm")
USAGE = 2


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("lab: "))
    return line


def rows(result: dict[str, Any], arm: str, metric: str, seed: int | None = 0) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if (row["arm"], row["metric"], row["seed"]) == (arm, metric, seed)]


@pytest.fixture(scope="module")
def everything(
    in_process: InProcess, small: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("architectures") / "runs"
    arms = ("--arms", ",".join(ARMS), "--seeds", 1)
    code, stdout, stderr = in_process("run", *small, *arms, "--set", "measurement.contexts=[8]", "--out", out, "--json")
    assert code == 0, stderr
    return json.loads(stdout), out


def test_all_run_in_one_record(everything: tuple[dict[str, Any], Path]) -> None:
    result, _ = everything
    assert (result["status"], result["failures"]) == ("complete", [])
    assert tuple(result["arms"]) == ARMS
    assert len({arm["data_sha256"]["0"] for arm in result["arms"].values()}) == 1
    assert not [warning for warning in result["warnings"] if "gate" in warning]
    for name, arm in result["arms"].items():
        config = PRESETS[f"{name}-tiny"].with_overrides({"vocabulary": 300})
        count = cost.parameters(config)
        assert (arm["parameters"], arm["active_parameters"]) == (count.total, count.active)
        (state,) = rows(result, name, "state_bytes")
        assert state["value"] == cost.state_bytes(config, 1, 8 + 8, 4)
        (bits,) = rows(result, name, "test_bits_per_byte")
        assert 0 < bits["value"] < 9


def test_the_load_of_experts_is_recorded(everything: tuple[dict[str, Any], Path]) -> None:
    result, out = everything
    (busiest,) = rows(result, "moe", "busiest_expert_load")
    (directory,) = out.iterdir()
    evaluation = json.loads((directory / "cells/moe/seed0/evaluation.json").read_text(encoding="utf-8"))
    (load,) = evaluation["expert_load"]
    assert sum(load) == pytest.approx(1)
    assert busiest["value"] == pytest.approx(8 * max(load))
    assert all(rows(result, arm, "busiest_expert_load") == [] for arm in ARMS if arm != "moe")


def test_a_masked_encoder_has_its_own_rows(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    arm = ("objective=masked", "overrides.mixer.causal=false")
    words = [word for setting in arm for word in ("--set", f"arms.transformer.{setting}")]
    quick = ["--seeds", 1, "--set", "measurement.contexts=[8]"]
    code, stdout, stderr = in_process(
        "run", *small, "--arms", "transformer", *quick, *words, "--out", tmp_path / "runs", "--json"
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["arms"]["transformer"]["config"]["vocabulary"] == 301  # [MASK]
    (loss,) = rows(result, "transformer", "test_masked_token_loss")
    (accuracy,) = rows(result, "transformer", "test_masked_accuracy")
    assert 0 < loss["value"] < 10
    assert 0 <= accuracy["value"] <= 1
    (bits,) = rows(result, "transformer", "test_bits_per_byte")
    assert bits["value"] is None
    assert "no likelihood" in bits["reason"]
    assert {row["phase"] for row in result["rows"]} == {"quality", "train", "load"}  # it does not decode


def test_a_run_may_start_from_a_folder(
    in_process: InProcess, everything: tuple[dict[str, Any], Path], small: list[str], tmp_path: Path
) -> None:
    trained, out = everything
    (directory,) = out.iterdir()
    folder = tmp_path / "theirs"
    code, _, stderr = in_process("export", directory, "--to", "hf", folder, "--arm", "mamba2")
    assert code == 0, stderr
    arm = (f"model={folder}", "start=weights")
    words = [word for setting in arm for word in ("--set", f"arms.mamba2.{setting}")]
    common = ["run", *small, "--arms", "mamba2", "--seeds", 1, "--set", "measurement.enabled=false", *words]
    code, _, stderr = in_process(*common, "--out", tmp_path / "none")
    assert code == USAGE
    assert f"mean nothing without their tokenizer: set data.tokenizer={folder}" in one_line(stderr)
    tokenizer = ["--set", f"data.tokenizer={folder}"]
    code, _, stderr = in_process(*common, *tokenizer, "--set", "data.vocabulary=290", "--out", tmp_path / "none")
    assert code == USAGE
    assert "has 300 entries: set data.vocabulary=300" in one_line(stderr)
    code, stdout, stderr = in_process(*common, *tokenizer, "--out", tmp_path / "runs", "--json")
    assert code == 0, stderr
    before = rows(json.loads(stdout), "mamba2", "initial_test_bits_per_byte")[0]["value"]
    assert before == pytest.approx(rows(trained, "mamba2", "test_bits_per_byte")[0]["value"], rel=1e-5)


def test_a_folder_may_also_give_its_shape_alone(in_process: InProcess, everything, tmp_path: Path) -> None:
    (directory,) = everything[1].iterdir()
    folder = directory / "cells/lstm/seed0/checkpoint"
    code, stdout, stderr = in_process(
        "run", "compare", "--profile", "smoke", "--arms", "lstm", "--set", f"arms.lstm.model={folder}", "--dry-run"
    )
    assert code == 0, stderr
    assert f'model = "{folder}"' in stdout


def test_a_hybrid_of_several_rounds_is_measured(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    settings = ("overrides.layers=4", "overrides.hybrid.pattern=MMT")
    words = [word for setting in settings for word in ("--set", f"arms.hybrid.{setting}")]
    quick = ["--seeds", 1, "--set", "measurement.contexts=[8]"]
    code, stdout, stderr = in_process(
        "run", *small, "--arms", "hybrid", *quick, *words, "--out", tmp_path / "runs", "--json"
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    assert {row["phase"] for row in result["rows"]} == {"quality", "train", "load", "prefill", "decode"}
    config = PRESETS["hybrid-tiny"].with_overrides({"vocabulary": 300, "layers": 4, "hybrid.pattern": "MMT"})
    (state,) = rows(result, "hybrid", "state_bytes")
    assert state["value"] == cost.state_bytes(config, 1, 8 + 8, 4)


def test_no_split_is_a_result_without_quality(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    quick = ["--seeds", 1, "--set", "measurement.enabled=false", "--set", "evaluation.splits=[]"]
    code, stdout, stderr = in_process("run", *small, "--arms", "mamba", *quick, "--out", tmp_path / "runs", "--json")
    assert code == 0, stderr
    assert "one arm: it will be trained and measured, and compared with nothing" in stderr
    assert {row["phase"] for row in json.loads(stdout)["rows"]} == {"train"}


def test_a_changed_folder_is_another_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"one")
    settings = [f"arms.mamba.model={folder}", "arms.mamba.start=weights", f"data.tokenizer={folder}"]
    experiment = load("compare", profile="smoke", assignments=settings)
    scratch = load("compare", profile="smoke", assignments=settings[:1])
    first, shape = folder_hashes(experiment), folder_hashes(scratch)
    assert set(first) == {"mamba"}
    (folder / "model.safetensors").write_bytes(b"two")
    assert folder_hashes(experiment) != first
    assert folder_hashes(scratch) == shape  # its weights are not used
    (folder / "config.json").write_text("{ }", encoding="utf-8")
    assert folder_hashes(scratch) != shape


def test_a_masked_arm_is_not_taken_for_a_causal_one(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    quick = ["--seeds", 1, "--set", "measurement.enabled=false", "--set", "arms.mamba.objective=masked"]
    code, _, stderr = in_process("run", *small, "--arms", "mamba", *quick, "--out", tmp_path / "runs")
    assert code == 0, stderr
    (directory,) = (tmp_path / "runs").iterdir()
    code, _, stderr = in_process("export", directory, "--to", "hf", tmp_path / "folder")
    assert code == USAGE
    assert "arm 'mamba' fills in hidden tokens" in one_line(stderr)
    assert not (tmp_path / "folder").exists()
    code, stdout, stderr = in_process("generate", directory, "the cat")
    assert (code, stdout) == (USAGE, "")
    assert "arm 'mamba' fills in hidden tokens, it was not trained to continue a text" in one_line(stderr)


def test_inspect_takes_the_largest_preset_apart() -> None:
    """In a process of its own, whose memory is counted."""
    program = (
        "import resource, sys\nfrom cli.main import app\n"
        "try:\n    app(['inspect', 'phi3-mini', '--json'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["parameters"] == 3_821_079_552
    assert found["weight_bytes"] == 2 * 3_821_079_552
    assert sum(part["parameters"] for part in found["parts"] if part["depth"] == 0) == 3_821_079_552
    shapes = {part["name"].removeprefix("blocks.0-31."): tuple(part["shape"]) for part in found["parts"]}
    assert shapes["mixer.qkv_proj.weight"] == (9216, 3072)
    assert shapes["feedforward.gate_up_proj.weight"] == (16384, 3072)
    assert shapes["embedding.weight"] == shapes["head.weight"] == (32064, 3072)
    assert int(done.stderr.split()[-1]) < 1_000_000  # kB


@pytest.mark.parametrize("name", ["hybrid-tiny", "moe-tiny", "mamba2-tiny", "gpt1"])
def test_inspect_adds_up(in_process: InProcess, name: str) -> None:
    code, stdout, _ = in_process("inspect", name, "--json", "--dtype", "fp32", "--context", 64, "--batch", 3)
    assert code == 0
    found = json.loads(stdout)
    config = PRESETS[name]
    top = [part for part in found["parts"] if part["depth"] == 0]
    leaves = [part for part in found["parts"] if part["shape"]]
    assert sum(part["parameters"] for part in top) == cost.parameters(config).total
    assert sum(part["parameters"] for part in leaves) == cost.parameters(config).total
    assert sum(part["bytes"] for part in top) == found["weight_bytes"] == cost.weight_bytes(config, 4)
    assert found["state_bytes"] == cost.state_bytes(config, 3, 64, 4)
    code, stdout, _ = in_process("inspect", name)
    assert code == 0
    assert f"FLOPs per token at {config.positions or 4096} tokens: " in stdout
    assert f"{cost.parameters(config).total:,}" in stdout


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1000, "1 kB"), (999_499, "999 kB"), (999_600, "1 MB"),
    (12_345_678, "12.3 MB"), (2.5e12, "2.5 TB"), (1.5e15, "1500 TB"),
])  # fmt: skip
def test_bytes_have_three_digits_and_the_unit_that_these_fit(count: float, text: str) -> None:
    assert in_bytes(count) == text


def test_models_lists_every_preset(in_process: InProcess) -> None:
    code, stdout, _ = in_process("models", "--json")
    assert code == 0
    listed = {one["model"]: one for one in json.loads(stdout)}
    assert list(listed) == list(PRESETS)
    assert listed["hybrid-1m"]["mixer"] == "mamba x6 + attention x1"
    assert listed["gpt1"]["state_bytes_16bit"] == {"1024": None, "16384": None}  # it has 100 positions
    assert listed["moe-1m"]["feedforward"] == "moe"
    assert listed["moe-1m"]["active"] < listed["moe-1m"]["parameters"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "phi3-mni"], "unknown model 'phi3-mni': did you mean 'phi3-mini'?"),
        (["inspect", "./nowhere"], "nowhere"),
        (["inspect", "gpt1", "--context", "101"], "'gpt1' has 100 positions: --context 101 is beyond them"),
        (["inspect", "gpt1", "--dtype", "bf61"], "unknown dtype 'bf61': did you mean 'bf16'?"),
        (["run", "compare", "--arms", "hybrid", "--set", "arms.hybrid.overrides.hybrid.pattern=MMX", "--dry-run"],
         "unknown letter 'X' in hybrid.pattern 'MMX': known: 2, 3, A, L, M, S"),
        (["run", "compare", "--arms", "mamba2", "--set", "arms.mamba2.overrides.mixer.head_width=48", "--dry-run"],
         "the expanded width = 256 is not a multiple of mamba2.head_width = 48"),
        (["run", "compare", "--arms", "moe", "--set", "arms.moe.overrides.feedforward.top_k=9", "--dry-run"],
         "moe.top_k = 9 is more than moe.experts = 8"),
        (["run", "compare", "--arms", "sliding", "--set", "arms.sliding.overrides.mixer.window=0", "--dry-run"],
         "attention.window must be a positive whole number, got 0"),
        (["run", "compare", "--set", "arms.mamba.objective=maskd", "--dry-run"], "objective"),
        (["run", "compare", "--set", "arms.transformer.overrides.mixer.causal=false", "--dry-run"],
         "sees the token that it is to predict (causal = false)"),
        (["run", "compare", "--arms", "hybrid", "--set", "arms.hybrid.overrides.hybrid.blocks.A.mixer.causal=false",
          "--dry-run"], "sees the token that it is to predict"),
        (["run", "compare", "--arms", "hybrid", "--set", "arms.hybrid.overrides.hybrid.blocks.S.mixer.window=8",
          "--dry-run"], "does nothing: the pattern 'MMMMMMA' has no 'S'"),
        (["run", "compare", "--set", "arms.transformer.model=gpt1", "--dry-run"],
         "the model has 100 learned positions, training.context need 256"),
        (["run", "compare", "--set", "arms.transformer.overrides.norm_eps=inf", "--dry-run"], "norm_eps"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(in_process: InProcess, arguments: list[str], said: str) -> None:
    code, _, stderr = in_process(*arguments)
    assert code == USAGE
    assert said in one_line(stderr)
