"""What is read, in which order, and what each bad path or file is answered with."""

import json
import os
import sysconfig
from pathlib import Path

import pytest

from experiments.data.corpora import SUFFIXES, Document, read
from experiments.errors import CorpusError, SpecError
from experiments.spec import Data


def documents(path: object) -> list[Document]:
    return list(read(Data(corpus="text", path=str(path))))


def texts(path: object) -> list[str]:
    return [document.text for document in documents(path)]


def problem(path: object) -> str:
    """The message of the CorpusError that reading `path` must raise: one line."""
    with pytest.raises(CorpusError) as caught:
        documents(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_stdlib_is_the_library_without_tests_installed_packages_and_machine_specifics():
    names = [document.name for document in read(Data())]
    assert len(names) == len(set(names))
    assert {"json/decoder.py", "unittest/case.py", "typing.py", "pydoc_data/topics/if"} <= set(names)
    modules = [name for name in names if not name.startswith("pydoc_data/topics/")]
    assert modules == sorted(modules) == names[: len(modules)]
    assert names[len(modules) :] == sorted(names[len(modules) :])
    for name in modules:
        parts = set(Path(name).parts)
        assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}, name
        assert not Path(name).name.startswith(("test_", "_sysconfigdata")), name
        assert not name.startswith("config-"), name
    assert "pydoc_data/topics.py" not in names
    assert len(modules) > 500


def test_stdlib_text_is_the_files_text_and_is_read_alike_twice():
    first = {document.name: document.text for document in read(Data())}
    assert first == {document.name: document.text for document in read(Data())}
    source = Path(sysconfig.get_path("stdlib"), "heapq.py").read_bytes().decode()
    assert first["heapq.py"] == source


def test_stdlib_takes_no_path():
    with pytest.raises(SpecError, match="means nothing to corpus 'stdlib'"):
        read(Data(path="notes.txt"))


def test_an_unknown_corpus_is_answered_with_the_nearest():
    with pytest.raises(SpecError, match="unknown corpus 'stdlb': did you mean 'stdlib'"):
        read(Data(corpus="stdlb"))


def test_a_folder_gives_one_document_per_visible_text_file(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "b/A.MD", "b/n.py", ".hidden.txt", ".git/x.txt", "photo.png"):
        (tmp_path / name).write_text(f"one\n\ntwo {name}\r\n", newline="")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    assert documents(tmp_path) == [Document(name, f"one\n\ntwo {name}\r\n") for name in ("b/A.MD", "b/n.py", "z.txt")]


def test_a_folder_without_text_names_the_suffixes(tmp_path: Path):
    (tmp_path / "photo.png").write_bytes(b"x")
    message = problem(tmp_path)
    assert all(suffix in message for suffix in SUFFIXES)


def test_a_single_file_is_split_at_blank_lines(tmp_path: Path):
    file = tmp_path / "play"
    file.write_bytes("\ufeff\n  first\r\nline \r\n \t\r\n\n\nsecond\n\nthird, no end".encode())
    assert documents(file) == [
        Document(f"{file}:2", "  first\r\nline "),
        Document(f"{file}:7", "second"),
        Document(f"{file}:9", "third, no end"),
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / "play.txt")
    assert texts(folder) == ["  first\r\nline ", "second", "third, no end"]


def test_a_glob_takes_any_suffix_and_only_files(tmp_path: Path):
    for name in ("a/1.data", "a/b/2.data", "a/3.txt", "c.data/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "**" / "*.data") == ["a/1.data", "a/b/2.data"]
    assert "no file matches" in problem(tmp_path / "*.tex")


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("a\n\nb")
    assert texts("~/notes.txt") == ["a", "b"]


def test_jsonl_gives_one_document_per_line_even_beside_other_files(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    lines = ["one\n\ntwo", "\u2028 three \x00 \U0001f600", ""]
    file.write_text("\n\n".join(json.dumps({"text": line, "id": 1}) for line in lines) + "\n")
    assert documents(file) == [Document(f"{file}:{2 * n + 1}", line) for n, line in enumerate(lines)]
    (tmp_path / "b.txt").write_text("x\n\ny")
    assert texts(tmp_path) == [*lines, "x\n\ny"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "x"', "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ('{"txt": "x"}', 'line 2: needs an object with a string field "text"'),
        ('{"text": 1}', 'line 2: needs an object with a string field "text"'),
        ('["text"]', 'line 2: needs an object with a string field "text"'),
        ('{"text": "\\ud800"}', "line 2:.*half of a surrogate pair"),
    ],
)
def test_bad_jsonl_is_answered_with_file_and_line(tmp_path: Path, line: str, expected: str):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=expected) as caught:
        documents(file)
    assert str(file) in str(caught.value)


def test_bytes_that_are_not_text_are_answered_with_file_and_place(tmp_path: Path):
    file = tmp_path / "a.txt"
    for raw, expected in [
        (b"abc\nd\xe9f\n", f"{file}: not UTF-8 (0xe9 at byte 5)"),
        (b"abc\nde\x00f\n", f"{file}: binary, not UTF-8 text (NUL at byte 6)"),
    ]:
        file.write_bytes(raw)
        assert expected in problem(file)
        (tmp_path / "b.txt").write_text("another, so that files are read whole")
        assert expected in problem(tmp_path)
        (tmp_path / "b.txt").unlink()


def test_paths_that_lead_nowhere(tmp_path: Path):
    assert "data.path is empty" in problem("")
    assert "data.path is empty" in problem("  ")
    assert "no such file or folder" in problem(tmp_path / "missing.txt")
    assert "no such file or folder" in problem("a\0b")
    (tmp_path / "empty.txt").touch()
    assert f"{tmp_path / 'empty.txt'} is empty" in problem(tmp_path / "empty.txt")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a regular file nor a folder" in problem(tmp_path / "pipe")


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert f"{tmp_path / 'a.txt'}: cannot be read: Permission denied" in problem(tmp_path)


def test_documents_are_streamed(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"good\n\n" + b"bad \xff")
    stream = iter(read(Data(corpus="text", path=str(file))))
    assert next(stream).text == "good"
    with pytest.raises(CorpusError):
        next(stream)
