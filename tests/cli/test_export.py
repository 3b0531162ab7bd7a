"""`lab export` and `lab generate` with a folder: what was trained here runs elsewhere, and comes back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, InProcess

from experiments.store import RunDirectory
from models import checkpoint, hf


def generated(in_process: InProcess, *arguments: object) -> dict[str, str]:
    code, stdout, stderr = in_process("generate", *arguments, "--tokens", 12, "--json")
    assert code == 0, stderr
    return {one["arm"]: one["text"] for one in json.loads(stdout)}


@pytest.mark.parametrize(("arm", "architecture"), [("transformer", "LlamaForCausalLM"), ("mamba", "MambaForCausalLM")])
def test_there_and_back(in_process: InProcess, smoke: Finished, tmp_path: Path, arm: str, architecture: str) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()  # an empty one may be there
    options = ("--to", "hf", "--arm", arm, "--out", smoke.out, "--json")
    code, stdout, stderr = in_process("export", "latest", folder, *options)
    assert code == 0, stderr
    written = json.loads(stdout)
    assert (written["arm"], written["architecture"]) == (arm, architecture)
    assert sorted(written["files"]) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert written["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert values["max_position_embeddings"] == RunDirectory(smoke.directory).experiment().training.context
    ours = checkpoint.load(smoke.directory / "cells" / arm / "seed0" / "checkpoint")
    for mine, theirs in zip(ours.parameters(), hf.load(folder).parameters(), strict=True):
        assert torch.equal(mine, theirs)
    expected = generated(in_process, "latest", "import ", "--arms", arm, "--out", smoke.out)
    assert generated(in_process, folder, "import ") == {"exported": expected[arm]}


def test_transformers_continues_the_same_text(in_process: InProcess, smoke: Finished, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="not installed: pip install 'transformers>=5'")
    folder = tmp_path / "exported"
    assert in_process("export", "latest", folder, "--arm", "mamba", "--out", smoke.out)[0] == 0
    model, tokenizer = (
        getattr(transformers, name).from_pretrained(folder) for name in ("AutoModelForCausalLM", "AutoTokenizer")
    )
    prompt = tokenizer("import ", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    text = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :])
    assert generated(in_process, folder, "import ") == {"exported": text}


def test_a_checkpoint_with_a_tokenizer_beside_it(in_process: InProcess, smoke: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    ours = checkpoint.load(smoke.directory / "cells" / "mamba" / "seed0" / "checkpoint")
    checkpoint.save(ours, folder)
    code, _, stderr = in_process("generate", folder, "import ")
    assert code == 2
    assert "mine has no tokenizer.json" in stderr
    (folder / "tokenizer.json").write_bytes((smoke.directory / "tokenizer.json").read_bytes())
    expected = generated(in_process, "latest", "import ", "--arms", "mamba", "--out", smoke.out)
    assert generated(in_process, folder, "import ") == {"mine": expected["mamba"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "--to", "gguf"], "unknown format 'gguf': known: hf"),
        (["new"], "has several arms, choose one: transformer, mamba"),
        (["new", "--arm", "mmba"], "no arm 'mmba' in "),
        (["new", "--arm", "mamba", "--trained-seed", "9"], "no seed 9 in "),
        (["full", "--arm", "mamba"], "exists and is not an empty folder"),
        (["file", "--arm", "mamba"], "exists and is not an empty folder"),
    ],
)
def test_refused(in_process: InProcess, smoke: Finished, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep", encoding="utf-8")
    (tmp_path / "file").write_text("keep", encoding="utf-8")
    name, *options = arguments
    code, _, stderr = in_process("export", "latest", tmp_path / name, *options, "--out", smoke.out)
    assert code == 2
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


def test_a_run_whose_tokenizer_is_damaged(in_process: InProcess, smoke: Finished, tmp_path: Path) -> None:
    shutil.copytree(smoke.directory, tmp_path / smoke.directory.name)
    (tmp_path / smoke.directory.name / "tokenizer.json").write_text("[]", encoding="utf-8")
    code, _, stderr = in_process("export", "latest", tmp_path / "new", "--arm", "mamba", "--out", tmp_path)
    assert code == 2
    assert "tokenizer.json is missing or damaged; lab resume" in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_folder_has_no_arms(in_process: InProcess, smoke: Finished) -> None:
    folder = smoke.directory / "cells" / "mamba" / "seed0" / "checkpoint"
    for option, value in (("--arms", "mamba"), ("--trained-seed", 0)):
        code, _, stderr = in_process("generate", folder, "import ", option, value)
        assert code == 2
        assert "holds one model" in stderr


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "{", "is no tokenizer"),
        ("config.json", '{"architectures": ["GPT2LMHeadModel"]}', "unknown architecture 'GPT2LMHeadModel'"),
        ("model.safetensors", "", "damaged weights"),
    ],
)
def test_a_damaged_folder(
    in_process: InProcess, smoke: Finished, tmp_path: Path, file: str, content: str, said: str
) -> None:
    folder = tmp_path / "exported"
    assert in_process("export", "latest", folder, "--arm", "mamba", "--out", smoke.out)[0] == 0
    (folder / file).write_text(content, encoding="utf-8")
    code, _, stderr = in_process("generate", folder, "import ")
    assert code == 2
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1
