"""docs/taking-apart.md, run from the top to the bottom: every block of Python, every command, and what they print."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from cli.main import app
from experiments.data import tokenizer
from models import checkpoint
from models.language_model import LanguageModel
from models.presets import preset
from models.trace import LONGEST_TEXT

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "taking-apart.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(match["language"], match["text"]) for match in BLOCK.finditer(PAGE)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the page is followed: my-model lies there."""
    monkeypatch.chdir(tmp_path)
    learned = tokenizer.train(["def f(x): return x\n"] * 9, 260)
    checkpoint.save(LanguageModel(preset("mamba-tiny").with_overrides({"vocabulary": 260}), seed=0), Path("my-model"))
    learned.save("my-model/tokenizer.json")
    return tmp_path


def test_python_prints_what_the_page_says(folder):
    names: dict = {}
    printed = None
    for language, text in BLOCKS:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, "docs/taking-apart.md", "exec"), names)
            printed = out.getvalue()
        elif language == "text":
            assert printed == text
    assert 0 <= int(names["chosen"]) < 300
    # the last block: what the folder's model says, by its own tokenizer
    given = Tokenizer.from_file("my-model/tokenizer.json")
    model = checkpoint.load(Path("my-model"))
    assert names["tokens"].tolist() == [given.encode("def ").ids]
    assert printed == repr(given.decode([int(model(names["tokens"])[0, -1].argmax(-1))])) + "\n"


def test_commands_print_what_the_page_says(folder):
    shown = [text for language, text in BLOCKS if language == "console"]
    assert shown
    for text in shown:
        command, *lines = text.splitlines()
        done = CliRunner().invoke(app, shlex.split(command)[2:])
        assert done.exit_code == 0, done.stderr
        at = -1
        for line in lines:
            at = done.stdout.splitlines().index(line, at + 1)


def test_the_page_says_how_long_a_prompt_may_be():
    assert f"at most {LONGEST_TEXT} of them" in PAGE
