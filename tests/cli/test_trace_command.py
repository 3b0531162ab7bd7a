"""`lab trace`: presets, trained runs and folders taken apart, as text, data and a page."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, InProcess
from tokenizers import Tokenizer

from models import checkpoint, folders
from models.language_model import LanguageModel
from models.presets import preset
from models.trace import LONGEST_TEXT

USAGE, LACKING = 2, 3
PHI = {"layers": 2, "width": 128, "feedforward.hidden": 32, "vocabulary": 300, "padding_index": 299}
PROMPT = "import os\ndef "


def settings(values: dict[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no number")


def data(in_process: InProcess, *arguments: object) -> list[dict[str, Any]]:
    code, stdout, stderr = in_process("trace", *arguments, "--json")
    assert code == 0, stderr
    return json.loads(stdout, parse_constant=refuse)["models"]


@torch.no_grad()
def chosen_by_hand(model: LanguageModel, ids: list[int]) -> int:
    return int(model(torch.tensor([ids]))[0, -1].argmax(-1))


def test_a_phi3_mini_of_small_width(in_process: InProcess) -> None:
    """Two bytes: 1 x 2 x width after the decoder, 1 x 2 x vocabulary after the head."""
    (found,) = data(in_process, "phi3-mini", "Hi", *settings(PHI))
    shapes = {stage["name"]: stage["output_shape"] for stage in found["stages"]}
    assert shapes["final norm"] == [1, 2, 128]
    assert shapes["head"] == [1, 2, 300]
    assert [token["id"] for token in found["tokens"]] == [72, 105]
    assert found["untrained"]
    model = LanguageModel(preset("phi3-mini").with_overrides(PHI), seed=0).eval()
    assert found["chosen"]["id"] == chosen_by_hand(model, [72, 105])
    other = data(in_process, "phi3-mini", "Hi", *settings(PHI), "--seed", 1)[0]
    assert other["logits"] != found["logits"]
    attention = found["blocks"][1]["mixer"]
    assert attention["seen"] == [[True, False], [True, True]]
    assert [row[0][1] for row in attention["scores"]] == [None] * 32
    for head in attention["weights"]:
        assert [sum(row) for row in head] == pytest.approx([1, 1], abs=1e-5)


def test_text_of_two_presets(in_process: InProcess) -> None:
    code, stdout, stderr = in_process("trace", "phi3-mini", "Hi", *settings(PHI), "--against", "mamba-tiny")
    assert (code, stderr) == (0, "")
    assert "Untrained: phi3-mini, mamba-tiny" in stdout
    assert "\x1b" not in stdout
    assert re.search(r"^ *head \[\w\] +1 x 2 x 128 +1 x 2 x 300 ", stdout, re.MULTILINE)
    assert re.search(r"^ *head \[\w\] +1 x 2 x 64 +1 x 2 x 512 ", stdout, re.MULTILINE)
    for words in ("each token gathers from", "each channel keeps a fading memory", "masked", "Half-life"):
        assert words in stdout
    assert max(map(len, stdout.splitlines())) <= 110


@pytest.mark.parametrize("arm", ["transformer", "mamba"])
def test_a_trained_run_and_the_folder_made_of_it(
    in_process: InProcess, smoke: Finished, tmp_path: Path, arm: str
) -> None:
    (found,) = data(in_process, "latest", PROMPT, "--arms", arm, "--out", smoke.out)
    tokenizer = Tokenizer.from_file(str(smoke.directory / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    model = checkpoint.load(smoke.directory / "cells" / arm / "seed0" / "checkpoint")
    assert [token["id"] for token in found["tokens"]] == ids
    assert found["chosen"]["id"] == chosen_by_hand(model, ids)
    assert found["chosen"]["text"] == tokenizer.decode([found["chosen"]["id"]])
    assert not found["untrained"]
    folder = tmp_path / "exported"
    assert in_process("export", "latest", folder, "--arm", arm, "--out", smoke.out)[0] == 0  # Hugging Face's
    (again,) = data(in_process, folder, PROMPT)
    assert again["logits"] == pytest.approx(found["logits"], abs=1e-5)
    assert again["candidates"][0]["text"] == found["candidates"][0]["text"]


def test_a_run_beside_a_preset(in_process: InProcess, smoke: Finished) -> None:
    """Each reads the prompt in its own tokens; equal names are told apart."""
    arms = ["transformer", "mamba"]
    found = data(in_process, "latest", PROMPT, "--out", smoke.out, "--against", "latest")
    assert [one["model"] for one in found] == [*arms, *(f"{arm} (2)" for arm in arms)]
    assert found[0]["logits"] == found[2]["logits"]
    found = data(in_process, smoke.directory, PROMPT, "--arms", "mamba", "--against", "gpt1")
    assert [one["untrained"] for one in found] == [False, True]
    assert [token["id"] for token in found[1]["tokens"]] == list(PROMPT.encode())
    assert len(found[0]["tokens"]) < len(PROMPT.encode())


def test_a_page(in_process: InProcess, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    prompt = "<script>x</script>"
    code, stdout, stderr = in_process("trace", "hybrid-tiny", prompt, "--html", page)
    assert code == 0
    assert stderr.strip() == str(page)
    assert prompt in stdout
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;x&lt;/script&gt;" in html
    assert not re.search(r"(src|href|srcset)=\"(?!data:|#)", html)  # nothing is fetched
    figures = re.findall(r"<img src=\"data:image/svg\+xml;base64,[^\"]+\" alt=\"([^\"]+)\"", html)
    # stream, lens, matrices, attention, half-lives, written and left
    assert len(figures) == len(re.findall("<figcaption>", html)) == 6
    assert all(re.search(r"\d", alt) for alt in figures)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mamba-tiny", ""], "the prompt is empty"),
        (["mamba-tiny", "x" * 101, "--against", "gpt1"], "gpt1: the model has 100 learned positions, 101 tokens"),
        (["mamba-tiny", "x" * (LONGEST_TEXT + 1)], f"at most {LONGEST_TEXT}"),
        (["mamba-tny", "x"], "no preset, run or folder 'mamba-tny': did you mean 'mamba-tiny'?"),
        (["mamba-tiny", "x", "--against", "gpt2"], "no preset, run or folder 'gpt2': did you mean 'gpt1'?"),
        (["mamba-tiny", "x", "--set", "mixer.stat=2"], "unknown model setting 'mixer.stat': did you mean 'state'?"),
        (["mamba-tiny", "x", "--set", "layers"], "--set takes KEY=VALUE"),
        (["mamba-tiny", "x", "--set", "vocabulary=100"], "a preset reads bytes"),
        (["mamba-tiny", "x", "--arms", "mamba"], "'mamba-tiny' is a preset: there is no arm"),
        (["mamba-tiny", "x", "--trained-seed", "1"], "'mamba-tiny' is a preset: there is no arm"),
        (["mamba-tiny", "\udcff"], "the prompt is not text"),
        (["mamba-tiny", "x", "--device", "cdua"], "unknown device 'cdua': did you mean 'cuda'?"),
    ],
)
def test_mistakes(in_process: InProcess, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, stdout, stderr = in_process("trace", *arguments, "--out", tmp_path)
    assert (code, stdout) == (USAGE, "")
    assert said in stderr
    assert stderr.count("\n") == 1


def test_mistakes_with_folders(in_process: InProcess, tmp_path: Path, smoke: Finished) -> None:
    def refused(*arguments: object) -> str:
        code, stdout, stderr = in_process("trace", *arguments)
        assert (code, stdout) == (USAGE, "")
        assert stderr.count("\n") == 1
        return stderr

    folder = tmp_path / "mine"
    checkpoint.save(LanguageModel(preset("mamba-tiny").with_overrides({"vocabulary": 300}), seed=0), folder)
    assert "has no tokenizer.json" in refused(folder, "x")
    assert "holds neither a model (config.json) nor a run" in refused(tmp_path, "x")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")
    assert "is no tokenizer" in refused(folder, "x")
    # a tokenizer of 512 entries for a model of 300
    tokenizer.write_bytes((smoke.directory / "tokenizer.json").read_bytes())
    beyond = next(
        text for text, id in Tokenizer.from_file(str(tokenizer)).get_vocab().items() if id >= 300 and text.isalpha()
        and text.isascii()
    )  # fmt: skip
    assert "is not in the model's vocabulary of 300" in refused(folder, beyond)
    assert "there is no arm and no trained seed" in refused(folder, "x", "--arms", "mamba")
    assert "--set changes a preset" in refused(folder, "x", "--set", "layers=1")
    assert "--seed initialises the weights of a preset" in refused(folder, "x", "--seed", 1)
    assert "no arm 'mmba'" in refused("latest", "x", "--arms", "mmba", "--out", smoke.out)
    assert "no seed 7" in refused("latest", "x", "--trained-seed", 7, "--out", smoke.out)
    code, stdout, stderr = in_process(
        "trace", "latest", "x", "--trained-seed", 1, "--arms", "mamba", "--out", smoke.out
    )
    assert code == 0, stderr
    assert "arm mamba, seed 1 of the run" in stdout
    weights = checkpoint.load(smoke.directory / "cells" / "mamba" / "seed0" / "checkpoint")
    weights.norm.weight.data.fill_(float("nan"))  # type: ignore[union-attr]
    checkpoint.save(weights, folder)
    assert "scores are not finite" in refused(folder, "x")


def test_a_run_that_never_finished(in_process: InProcess, smoke: Finished, tmp_path: Path) -> None:
    run = tmp_path / smoke.directory.name
    shutil.copytree(smoke.directory, run)
    shutil.rmtree(run / "cells" / "mamba" / "seed0")
    code, _, stderr = in_process("trace", "latest", "x", "--out", tmp_path)
    assert code == USAGE
    assert "arm 'mamba', seed 0" in stderr
    assert "was never trained to the end; trained are: transformer (choose by --arms)" in stderr
    assert [one["model"] for one in data(in_process, run, "x", "--arms", "transformer")] == ["transformer"]


def test_a_preset_that_no_memory_holds(in_process: InProcess) -> None:
    code, _, stderr = in_process("trace", "phi3-mini", "x", "--set", "layers=100000")
    assert code == LACKING
    assert "fewer layers will do" in stderr


def test_a_page_that_cannot_be_written(in_process: InProcess, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, stdout, stderr = in_process("trace", "mamba-tiny", "x", "--html", tmp_path / "file" / "page.html")
    assert (code, stdout) == (LACKING, "")
    assert stderr.startswith("lab: cannot write")


def test_a_folder_of_ours_with_a_tokenizer(in_process: InProcess, smoke: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    model = folders.load(smoke.directory / "cells" / "transformer" / "seed0" / "checkpoint")
    checkpoint.save(model, folder)
    (folder / "tokenizer.json").write_bytes((smoke.directory / "tokenizer.json").read_bytes())
    (found,) = data(in_process, folder, "x")
    assert found["model"] == "ours"
