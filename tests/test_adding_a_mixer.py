"""docs/adding-a-mixer.md, followed word by word in a copy of this checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "adding-a-mixer.md"
BLOCK = re.compile(r"(?:^`(?P<path>[^`\n]+)`:\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
# what the page promises of the model that it names
PROMISES = """
from models import cost
from models.language_model import LanguageModel
from models.presets import preset

config, transformer = preset("retention-1m"), preset("transformer-1m")
counted, baseline = cost.parameters(config), cost.parameters(transformer)
assert abs(counted.non_embedding / baseline.non_embedding - 1) < 0.01
model = LanguageModel(config, seed=0)
assert counted.total == sum(p.numel() for p in model.parameters())
assert cost.weight_bytes(config, 4) == sum(p.nbytes for p in model.parameters())
assert cost.state_bytes(config, 3, 17, 4) == model.make_state(3, 17).nbytes
assert (model.backend.name, model.backend.fallback) == ("torch", None)
assert model.norm.weight.max() == 0.25 and all(p.isfinite().all() and p.abs().max() > 0 for p in model.parameters())
"""


def blocks(language: str) -> list[tuple[str | None, str]]:
    """(the file that the line before it names, text) of every block of the page in this language. A block without
    such a line belongs to the file of the block before it."""
    found, path = [], None
    for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        path = match["path"] or path
        if match["language"] == language:
            found.append((match["path"] if language == "python" else path, match["text"]))
    return found


def apply(file: Path, hunk: str) -> None:
    """Add the lines with a plus between those without one, which must stand in the file exactly once."""
    lines = hunk.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in lines)
    text = file.read_text(encoding="utf-8")
    assert f"\n{text}".count(f"\n{before}") == 1, f"{file.name} has these lines not once:\n{before}"
    file.write_text(f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:], encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The checkout after the page."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("models", "experiments", "cli", "tests/models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    # retention has no form of numba's, which would compile for half a minute what stands around it
    (folder / "without").mkdir()
    (folder / "without" / "numba.py").write_text("raise ImportError('left out of this test')", encoding="utf-8")
    for path, text in blocks("python"):
        if path is not None:
            assert not (folder / path).exists(), path
            (folder / path).write_text(text, encoding="utf-8")
    for path, text in blocks("diff"):
        assert path is not None
        apply(folder / path, text)
    return folder


def python(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'without'}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands(program: str) -> list[list[str]]:
    """The arguments of every call of this program on the page."""
    lines = [line for _, text in blocks("console") for line in text.splitlines()]
    assert all(line.startswith(("$ lab ", "$ python ")) for line in lines)
    return [shlex.split(line)[2:] for line in lines if line.startswith(f"$ {program} ")]


def test_the_page_names_every_file_that_changes(copy):
    changed = {path for language in ("python", "diff") for path, _ in blocks(language) if path is not None}
    assert changed == {
        "models/mixers/retention.py", "models/mixers/__init__.py", "tests/models/test_mixer_contract.py",
        "models/presets.py", "experiments/catalog/compare.toml",
    }  # fmt: skip


def test_the_mixer_keeps_the_contract(copy):
    (arguments,) = commands("python")
    report = python(copy, *arguments, "-p", "no:cacheprovider", "-vv")
    for form in ("reference", "torch"):
        assert len(re.findall(rf"retention-{form}\S* PASSED", report)) > 20


def test_the_example_trains_and_the_preset_is_what_it_says(copy):
    (example,) = [text for path, text in blocks("python") if path is None]
    shown = python(copy, "-c", example + PROMISES)
    assert "3 blocks x 32 x 16 elements, whatever the length; 1 block x" in shown
    first, last = map(float, re.findall(r"learned by heart: ([\d.]+) nats, then ([\d.]+)", shown)[0])
    assert 3.5 < first < 4.6  # ln 64 = 4.16
    assert last < 0.5 * first


def test_the_commands_know_the_new_name(copy):
    calls = [call + (["--dry-run"] if call[0] == "run" else []) for call in commands("lab")]
    assert [call[0] for call in calls] == ["inspect", "run", "run"]
    program = "".join(f"assert not app({call!r}, standalone_mode=False)\n" for call in calls)
    shown = python(copy, "-c", f"from cli.main import app\n{program}")
    assert shown.count('model = "retention-1m"') == 2
    assert "heads = 8" in shown
