"""Mistakes end in one line that says what is wrong and what would be right, with the exit code of their kind."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import InProcess

from experiments import runner
from experiments.measurement.process import CellFailedError

OK, USAGE, LACKING, SOME_FAILED = 0, 2, 3, 5


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("lab: ")]
    assert len(lines) == 1, stderr
    assert stderr.splitlines()[-1] == lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "comparre"], "unknown experiment 'comparre': did you mean 'compare'?"),
        (["run", "compare", "--arms", "mmba"], "unknown arm 'mmba' in experiment 'compare': did you mean 'mamba'?"),
        (["run", "compare", "--arms", "mamba,mamba"], "each arm may appear once, got mamba, mamba"),
        (["run", "compare", "--set", "trainin.steps=1"], "unknown key 'trainin': did you mean 'training'?"),
        (["run", "compare", "--set", "training.stepz=1"], "unknown key 'training.stepz': did you mean 'steps'?"),
        (["run", "compare", "--set", "arms.mamba.modle=x"], "unknown key 'modle' of an arm: did you mean 'model'?"),
        (["run", "compare", "--set", "arms.mmba.model=x"], "unknown arm 'mmba': did you mean 'mamba'?"),
        (["run", "compare", "--set", "training.steps"], "--set takes KEY=VALUE, got 'training.steps'"),
        (["run", "compare", "--set", "training=3"], "'training' is a table"),
        (["run", "compare", "--set", "training.steps.x=3"], "'training.steps' is a value, it has no 'x'"),
        (["run", "compare", "--set", "training.steps=many"], "training.steps: must be an integer (got 'many')"),
        (["run", "compare", "--set", "training.steps=2.5"], "training.steps: must be an integer (got 2.5)"),
        (["run", "compare", "--set", "training.gradient_clip=hard"], "gradient_clip: must be a number (got 'hard')"),
        (["run", "compare", "--set", "measurement.enabled=maybe"], "measurement.enabled: must be true or false"),
        (["run", "compare", "--set", "data.corpus=3"], "data.corpus: must be text (got 3)"),
        (["run", "compare", "--set", "seeds=3"], "seeds: must be a list, in brackets (got 3)"),
        (["run", "compare", "--set", "evaluation.splits=test"], "splits: must be a list, in brackets (got 'test')"),
        (["run", "memory", "--set", "memory.contexts=[]"], "memory.contexts: must not be empty (got [])"),
        (["run", "compare", "--set", "measurement.dtype=float16"], "measurement.dtype: "),
        (["run", "compare", "--set", "training.steps=0"], "training.steps: "),
        (["run", "compare", "--set", "training.warmup_steps=9999"], "warmup_steps = 9999 must be below steps"),
        (["run", "compare", "--profile", "smoke", "--set", "training.steps=4"], "set training.warmup_steps too"),
        (["run", "compare", "--set", "arms.mamba.model=mmba-1m"], "unknown model 'mmba-1m': did you mean 'mamba-1m'?"),
        (["run", "compare", "--set", "arms.mamba.overrides.mixer.stat=3"], "mixer.stat': did you mean 'state'?"),
        (["run", "compare", "--set", "arms.mamba.overrides.mixer.state=-3"], "mamba.state must be a positive"),
        (["run", "compare", "--set", "arms.mamba.overrides.mixer=3"], "'mixer' is a table; set one of its keys"),
        (["run", "compare", "--set", "arms.mamba.overrides.mixer.dt_min=abc"], "dt_min"),
        (["run", "compare", "--set", "arms.transformer.overrides.mixer.backend=numbaa", "--dry-run"], "backend"),
        (["run", "compare", "--set", "data.corpus=stdlb", "--profile", "smoke"], "did you mean 'stdlib'?"),
        (["run", "compare", "--set", "data.corpus=installed-pyton"], "did you mean 'installed-python'?"),
        (["run", "compare", "--profile", "smok"], "unknown profile 'smok': did you mean 'smoke'?"),
        (["run", "compare", "--seeds", "0"], "--seeds must be from 1 to 1000, got 0"),
        (["run", "compare", "--seeds", "1000000000", "--dry-run"], "--seeds must be from 1 to 1000, got 1000000000"),
        (["run", "compare", "--device", "cdua"], "unknown device 'cdua': did you mean 'cuda'?"),
        (["run", "nowhere/spec.toml"], "no such file: nowhere/spec.toml"),
        (["report", "/"], "/ is no run: it has neither environment.json nor spec.toml and result.json"),
        (["run", "/"], "/ is a folder; name a specification, a .toml file"),
        (["run", "compare", "--set", "training.learning_rate=1"], "an arm has 'learning_rate', e.g. arms.transformer."),
        (["report", "--format", "htm"], "unknown format 'htm': did you mean 'html'?"),
        (["report", "yesterday"], "make one with: lab run compare"),
        (["resume"], "make one with: lab run compare"),
    ],
)
def test_misspelt(in_process: InProcess, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, _, stderr = in_process(*arguments, "--out", tmp_path / "runs")
    assert code == USAGE
    assert said in one_line(stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said", "ending"),
    [
        (["rum"], "lab: No such command 'rum'", "(see lab --help)\n"),
        (["kernels", "chek"], "lab: No such command 'chek'", "(see lab kernels --help)\n"),
        (["--nothing"], "lab: No such option: --nothing", "(see lab --help)\n"),
        (["run"], "lab: Missing argument", "(see lab run --help)\n"),
        (["run", "compare", "again"], "lab: Got unexpected extra argument", "(see lab run --help)\n"),
        (["run", "compare", "--set"], "lab: Option '--set' requires an argument", "\n"),
        (["run", "compare", "--out", ""], "lab: Invalid value for '--out': the name is missing", "\n"),
        (["trace", "gpt1", "a", "--html", ""], "lab: Invalid value for '--html': the name is missing", "\n"),
        (["export", "latest", ""], "lab: Invalid value for 'DIR': the name is missing", "\n"),
    ],
)
def test_what_the_parser_refuses_is_one_line(
    in_process: InProcess, arguments: list[str], said: str, ending: str
) -> None:
    code, stdout, stderr = in_process(*arguments)
    assert (code, stdout) == (USAGE, "")
    assert one_line(stderr).startswith(said)
    assert stderr.endswith(ending)


@pytest.mark.parametrize("arguments", [[], ["kernels"]])
def test_no_argument_asks_for_help(in_process: InProcess, arguments: list[str]) -> None:
    code, stdout, stderr = in_process(*arguments)
    assert code == USAGE
    assert (stdout + stderr).startswith("Usage: lab")
    assert "Commands:" in stdout + stderr


@pytest.mark.parametrize("command", ["runs", "report", "resume"])
def test_runs_are_looked_for_in_a_folder(in_process: InProcess, tmp_path: Path, command: str) -> None:
    file = tmp_path / "file"
    file.touch()
    code, _, stderr = in_process(command, "--out", file)
    assert code == USAGE
    assert one_line(stderr) == f"lab: '{file}' is a file; name the folder that runs are in"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"name = ", "not valid TOML"),
        (b"name = 'x'\ntitle = 'x'\n", "arms: "),
        (b"\xff\xfe\x00", "not a text file"),
        (b"name='x'\ntitle='x'\n[arms.a]\nmodel='mamba-tiny'\nlearning_rat=1\n", "did you mean 'learning_rate'?"),
        (b"name='x'\ntitle='x'\narms=3\n", "arms"),
        (b"name='x'\ntitle='x'\nprofiles=3\n[arms.a]\nmodel='mamba-tiny'\nlearning_rate=1\n", "profiles"),
        (b"name='x'\ntitle='x'\ndata=3\n[arms.a]\nmodel='mamba-tiny'\nlearning_rate=1\n", "data: "),
    ],
)
def test_bad_specification(in_process: InProcess, tmp_path: Path, text: bytes, said: str) -> None:
    file = tmp_path / "spec.toml"
    file.write_bytes(text)
    code, _, stderr = in_process("run", file, "--out", tmp_path / "runs")
    assert code == USAGE
    assert said in one_line(stderr)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file or folder"),
        (b"", "is empty"),
        (b"\n \n\n", "holds no text"),
        (b"some\x00thing", "binary, not UTF-8 text (NUL at byte 4)"),
        (b"caf\xe9 au lait", "not UTF-8 (0xe9 at byte 3)"),
        (b"one document only", "has 1 distinct document within data.max_bytes = "),
        (b"a\n\nb\n\nc\n\nd", "supports"),
    ],
)
def test_unusable_corpus(in_process: InProcess, tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "corpus.txt"
    if content is not None:
        file.write_bytes(content)
    settings = ["data.corpus=text", f"data.path={file}", "data.vocabulary=300"]
    sets = [word for setting in settings for word in ("--set", setting)]
    code, _, stderr = in_process("run", "compare", "--profile", "smoke", *sets, "--out", tmp_path / "runs")
    assert code == USAGE
    assert said in one_line(stderr)


HERE = os.getcwd()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["corpus=text"], "data.path is empty; corpus 'text' needs a file, a folder or a glob there"),
        (["corpus=txt"], "data.corpus: unknown corpus 'txt': did you mean 'text'?"),
        (["corpus=text", "path=nowhere.txt"], f"data.path: no such file or folder: {HERE}/nowhere.txt"),
        (["corpus=text", "path=no*where"], f"data.path: no file matches {HERE}/no*where"),
        (["path=a.txt"], f"data.path = '{HERE}/a.txt' means nothing to corpus 'stdlib'; set data.corpus = text"),
        (["tokenizer=nowhere.json"], f"data.tokenizer: no such file: {HERE}/nowhere.json"),
    ],
)
def test_data_that_is_not_there_is_refused_before_any_work(
    in_process: InProcess, tmp_path: Path, settings: list[str], said: str, dry: list[str]
) -> None:
    sets = [word for setting in settings for word in ("--set", f"data.{setting}")]
    code, stdout, stderr = in_process("run", "compare", *sets, "--device", "cpu", "--out", tmp_path / "runs", *dry)
    assert (code, stdout, stderr) == (USAGE, "", f"lab: {said}\n")
    assert not (tmp_path / "runs").exists()


def test_corpus_shorter_than_a_window(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    code, _, stderr = in_process("run", *small, "--set", "training.context=5000", "--out", tmp_path / "runs")
    assert code == USAGE
    assert "context = 5000 needs 5001" in one_line(stderr)


def test_vocabulary_larger_than_the_corpus_supports(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    code, _, stderr = in_process("run", *small, "--set", "data.vocabulary=50000", "--out", tmp_path / "runs")
    assert code == USAGE
    assert "data.vocabulary = 50000: the train split supports" in one_line(stderr)


def test_cuda_without_cuda(in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, stderr = in_process("run", "compare", "--device", "cuda", "--out", tmp_path / "runs")
    assert code == LACKING
    assert "torch sees no CUDA GPU; use --device cpu" in one_line(stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "measurement.decode_mode=graph"], "CUDA graphs need a GPU, and torch sees no GPU here"),
        (["--profile", "cuda"], "lab: profile 'cuda' is for a GPU, and torch sees none here"),
    ],
)
def test_cuda_graphs_without_cuda(
    in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, stderr = in_process("run", "compare", *arguments, "--out", tmp_path / "runs")
    assert code == LACKING
    assert said in one_line(stderr) == stderr.strip()


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_more_threads_than_cores(in_process: InProcess, tmp_path: Path, how: list[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    asked = "run", "compare", "--set", f"threads={cores + 1}", "--out", tmp_path / "runs", *how
    code, stdout, stderr = in_process(*asked)
    assert (code, stdout) == (LACKING, "")
    assert one_line(stderr) == f"lab: threads = {cores + 1}, but this process may use {cores} cores only"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_more_than_the_memory_there_is(in_process: InProcess, tmp_path: Path, how: list[str]) -> None:
    """Nothing is made."""
    length = "memory.contexts=[100000000]"
    code, _, stderr = in_process("run", "memory", "--device", "cpu", "--set", length, "--out", tmp_path / "runs", *how)
    assert code == LACKING
    said = one_line(stderr)
    assert "reading a prompt of 4 x 100,000,000 tokens takes 'transformer' about 25,400 GB" in said
    assert "of memory are free here, swap included: choose fewer tokens or a smaller batch" in said
    assert not (tmp_path / "runs").exists()


def test_backend_that_is_not_here(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    demand = "arms.mamba.overrides.mixer.backend=cuda"
    code, _, stderr = in_process("run", *small, "--device", "cpu", "--set", demand, "--out", tmp_path / "runs")
    assert code == LACKING
    assert "backend 'cuda' is not available on cpu" in one_line(stderr)


def test_output_folder_below_a_file(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, stderr = in_process("run", *small, "--out", tmp_path / "file" / "runs")
    assert code == USAGE
    assert one_line(stderr) == stderr.strip()  # before any work: nothing was read
    assert f"'{tmp_path / 'file'}' is a file, runs need a folder; choose another with --out" in stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that takes no folders")
def test_output_folder_that_cannot_be_made(in_process: InProcess, small: list[str]) -> None:
    code, _, stderr = in_process("run", *small, "--out", "/proc/runs")
    assert code == LACKING
    assert "--out" in one_line(stderr)


def test_output_folder_that_is_not_ours(
    in_process: InProcess, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    code, _, stderr = in_process("run", *small, "--out", tmp_path / "runs")
    assert code == LACKING
    assert f"cannot write '{tmp_path}': Permission denied" in one_line(stderr) == stderr.strip()
    found = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=found.f_flag | os.ST_RDONLY))
    code, _, stderr = in_process("run", *small, "--out", tmp_path / "runs")
    assert (code, f"cannot write '{tmp_path}': Read-only file system" in stderr) == (LACKING, True)


@pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_full_or_read_only_disk(
    in_process, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, word: str
) -> None:
    def refuse(path: Path, value: object) -> None:
        raise OSError(number, word, str(path))

    monkeypatch.setattr(runner, "write_json", refuse)
    monkeypatch.setattr(runner, "run_fresh", lambda *_, **__: {})
    code, _, stderr = in_process("run", *small, "--out", tmp_path / "runs")
    assert code == LACKING
    assert word in one_line(stderr)
    assert "choose another folder with --out" in one_line(stderr)
    assert ("make room there, and the same command goes on" in stderr) == (number == errno.ENOSPC)


def test_no_cell_is_tried_once_the_disk_is_full(
    in_process: InProcess, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a cell's process may see first; and the same command then goes on where this one stopped."""
    full = CellFailedError("SafetensorError: I/O error: No space left on device (os error 28)")
    tried: list[object] = []

    def take_turns(jobs: dict[Any, Any], **_: Any) -> Iterator[tuple[Any, Any]]:
        for cells in jobs:
            tried.append(cells)
            yield cells, full

    with monkeypatch.context() as patched:
        patched.setattr(runner, "take_turns", take_turns)
        patched.setattr(runner, "run_fresh", lambda *_, **__: {})
        code, _, stderr = in_process("run", *small, "--out", tmp_path)
    (run,) = tmp_path.iterdir()
    assert (code, len(tried)) == (LACKING, 1)
    assert one_line(stderr).startswith(f"lab: cannot write '{run}': No space left on device; make room there, and the")
    assert not list(run.rglob("failed/*.json"))
    assert not (run / "result.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("command", [["models"], ["run", "compare", "--dry-run", "--device", "cpu"]])
def test_output_to_a_full_disk(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        call = [sys.executable, "-c", "from cli.main import app; app()", *command]
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (LACKING, "lab: cannot write the output: No space left on device\n")


@pytest.fixture(scope="module")
def diverged(
    in_process: InProcess, small: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[int, str, str]]:
    out = tmp_path_factory.mktemp("diverged") / "runs"
    settings = ("arms.mamba.learning_rate=1e30", "measurement.contexts=[8]", "training.steps=8")
    words = [word for setting in settings for word in ("--set", setting)]
    return out, in_process("run", *small, "--seeds", 1, "--out", out, *words)


def test_an_arm_that_diverges_stops_alone(diverged: tuple[Path, tuple[int, str, str]]) -> None:
    out, (code, _, stderr) = diverged
    assert code == SOME_FAILED, stderr
    one_line(stderr)
    (directory,) = out.iterdir()
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    assert result["status"] == "partial"
    assert result["missing"] == []
    failed = {failure["cell"]: failure["message"] for failure in result["failures"]}
    assert set(failed) == {f"mamba/seed0/{part}" for part in ("train", "load", "prefill-8", "decode-8")}
    assert "at step " in failed["mamba/seed0/train"]
    assert "learning rate 9.55e+29" in failed["mamba/seed0/train"]
    assert failed["mamba/seed0/load"] == "the model was not trained"
    done = {row["phase"] for row in result["rows"] if row["arm"] == "transformer"}
    assert done == {"quality", "train", "load", "prefill", "decode"}
    assert not [row for row in result["rows"] if row["arm"] == "mamba"]
    report = (directory / "report.md").read_text(encoding="utf-8")
    assert failed["mamba/seed0/train"] in report


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["latest", ""], "the prompt is empty"),
        (["latest", "the", "--temperature", "-1"], "temperature must be 0 (greedy) or a finite number above, got -1.0"),
        (["latest", "the", "--temperature", "inf"], "temperature must be 0 (greedy) or a finite number above, got inf"),
        (["latest", "the", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["latest", "the", "--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["latest", "the", "--top-k", "0"], "top_k must be at least 1, got 0"),
        (["latest", "the", "--top-k", "5"], "top_k changes nothing at temperature 0"),
        (["latest", "the", "--seed", "0"], "--seed changes nothing at temperature 0"),
        (["latest", "the \udcff"], "the prompt is not text: no character at place 5"),
        (["latest", "the"], "arm 'mamba', seed 0 of "),
        (["latest", "the", "--arms", ""], "no arm ''"),
        (["latest", "the", "--arms", "transformer,mmba"], "did you mean 'mamba'?"),
        (["latest", "the", "--arms", "transformr"], "did you mean 'transformer'?"),
        (["latest", "the", "--arms", "mamba"], "trained to the end; trained are: transformer"),
        (["latest", "the", "--trained-seed", "7"], "no seed 7"),
        (["nonsense", "the"], "no run named 'nonsense'"),
    ],
)
def test_generate(
    diverged: tuple[Path, tuple[int, str, str]],
    in_process: InProcess,
    arguments: list[str],
    said: str,
) -> None:
    code, stdout, stderr = in_process("generate", *arguments, "--out", diverged[0])
    assert (code, stdout) == (USAGE, "")
    assert said in one_line(stderr)


def test_generate_from_a_run_that_trained_nothing(
    diverged: tuple[Path, tuple[int, str, str]], in_process: InProcess, tmp_path: Path
) -> None:
    (directory,) = diverged[0].iterdir()
    shutil.copytree(directory, tmp_path / directory.name, ignore=shutil.ignore_patterns("cells", "result.json"))
    code, stdout, stderr = in_process("generate", "latest", "the", "--out", tmp_path)
    assert (code, stdout) == (USAGE, "")
    resumed = tmp_path / directory.name
    assert f"was never trained to the end; no arm of it was; lab resume {resumed} goes on" in one_line(stderr)


def test_no_runs(in_process: InProcess, tmp_path: Path) -> None:
    code, _, stderr = in_process("report", "--out", tmp_path)
    assert code == USAGE
    assert "make one with: lab run compare" in one_line(stderr)


def test_the_small_settings_are_settings(in_process: InProcess, small: list[str], tmp_path: Path) -> None:
    code, _, _ = in_process("run", *small, "--dry-run", "--out", tmp_path / "runs")
    assert code == OK
