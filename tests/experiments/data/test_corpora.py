"""What is read, in which order, and what each bad path or file is answered with."""

import json
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.data import corpora
from experiments.data.corpora import SUFFIXES, Document, read
from experiments.errors import CorpusError, EnvironmentLacksError, SpecError
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
    for wrong, right in {"stdlb": "stdlib", "installed_python": "installed-python"}.items():
        with pytest.raises(SpecError, match=f"unknown corpus '{wrong}': did you mean '{right}'"):
            read(Data(corpus=wrong))


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


def test_of_several_files_that_are_no_text_the_first_is_named_and_all_are_counted(tmp_path: Path):
    for name, body in {"a": b"good", "b": b"bad \xff", "c": b"good", "d": b"a\nb\n\0", "e": b"\xfe"}.items():
        (tmp_path / f"{name}.txt").write_bytes(body)
    said = f"{tmp_path / 'b.txt'}: not UTF-8 (0xff at byte 4); convert it to UTF-8"
    assert problem(tmp_path) == f"{said}; 3 of the 5 files are not UTF-8 text, this is the first"
    for name in "de":
        (tmp_path / f"{name}.txt").unlink()
    assert problem(tmp_path) == said


def test_documents_are_streamed(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"good\n\n" + b"bad \xff")
    stream = iter(read(Data(corpus="text", path=str(file))))
    assert next(stream).text == "good"
    with pytest.raises(CorpusError):
        next(stream)


# --- installed-python


INSTALLED = Data(corpus="installed-python")


@dataclass(frozen=True)
class Installation:
    """A made-up Python: its folders, and a way to put files into them."""

    library: Path
    packages: Path
    system: Path

    def write(self, folder: Path, files: dict[str, bytes | str]) -> None:
        for name, body in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body if isinstance(body, bytes) else body.encode())

    def install(self, folder: Path, name: str, version: str, files: dict[str, bytes | str], origin: object) -> None:
        """`origin`: of direct_url.json; None: from an index."""
        info = f"{name}-{version}.dist-info"
        self.write(folder, files)
        self.write(folder, {f"{info}/METADATA": f"Name: {name}\nVersion: {version}\n"})
        self.write(folder, {f"{info}/RECORD": "".join(f"{file},,\n" for file in files)})
        if origin is not None:
            self.write(folder, {f"{info}/direct_url.json": json.dumps(origin)})


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    made = Installation(*(tmp_path / name for name in ("lib", "lib/site-packages", "system/python3/dist-packages")))
    made.packages.mkdir(parents=True)
    made.system.mkdir(parents=True)
    paths = {"stdlib": made.library, "purelib": made.packages, "platlib": tmp_path / "lib64"}
    (tmp_path / "lib64").symlink_to(made.packages)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(paths[name]))
    monkeypatch.setattr(corpora.site, "getsitepackages", lambda: [str(made.packages), str(tmp_path / "missing")])
    monkeypatch.setattr(corpora, "SYSTEM_PACKAGES", (str(tmp_path / "system/python3*/dist-packages"),))
    return made


def test_installed_python_is_the_library_and_every_package_with_tests_each_folder_once(installation: Installation):
    installation.write(installation.library, {
        "os.py": "import sys", "test/test_os.py": "import os", "os.txt": "no", "__pycache__/os.py": "no",
        "config-3.11-x/made.py": "no", "_sysconfigdata_linux.py": "no", "sitecustomize.py": "no",
    })  # fmt: skip
    installation.install(installation.packages, "zeta", "1.0", {"zeta/tests/t.py": "z", "zeta/data.json": "{}"}, None)
    installation.install(installation.packages, "alpha", "2.1", {"alpha.py": "a"}, {"url": "x", "vcs_info": {}})
    installation.install(installation.system, "alpha", "2.0", {"alpha.py": "old a"}, None)
    assert list(read(INSTALLED)) == [
        Document("stdlib/os.py", "import sys"),
        Document("stdlib/test/test_os.py", "import os"),
        Document("site-packages/alpha.py", "a"),
        Document("site-packages/zeta/tests/t.py", "z"),
        Document("dist-packages/alpha.py", "old a"),
    ]
    assert corpora.packages(INSTALLED) == ["alpha 2.0", "alpha 2.1", "zeta 1.0"]


def test_installed_python_does_not_hang_on_the_file_system(installation: Installation, monkeypatch: pytest.MonkeyPatch):
    installation.write(installation.packages, {f"p{n % 3}/m{n}.py": f"x = {n}" for n in range(9)})
    before = list(read(INSTALLED))
    walk = os.walk

    def backwards(*arguments, **options):
        for folder, folders, files in walk(*arguments, **options):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(corpora.os, "walk", backwards)
    assert list(read(INSTALLED)) == before
    assert len(before) == 9


@pytest.mark.parametrize("editable", [True, False])
def test_installed_python_leaves_out_what_was_installed_from_a_folder(installation: Installation, editable: bool):
    origin = {"url": "file:///home/somebody/mine", "dir_info": {"editable": True} if editable else {}}
    installation.install(installation.packages, "mine", "1.0", {"mine/a.py": "s", "__editable__mine.py": "e"}, origin)
    installation.install(installation.packages, "theirs", "1.0", {"theirs.py": "t"}, {"url": "x", "archive_info": {}})
    assert [document.name for document in read(INSTALLED)] == ["site-packages/theirs.py"]
    assert corpora.packages(INSTALLED) == ["theirs 1.0"]


def test_remains_of_an_interrupted_installation_are_no_package(installation: Installation):
    installation.write(installation.packages, {"~heirs-1.0.dist-info/RECORD": "", "theirs.py": "t"})
    assert corpora.packages(INSTALLED) == []
    assert [document.name for document in read(INSTALLED)] == ["site-packages/theirs.py"]


def test_installed_files_that_are_not_text_are_skipped_with_the_reason(installation: Installation):
    files = {"a.py": b"x = '\xe9'", "b.py": b"x\0", "c.py": "\ufeffx = 'é'", "d.py": "y" * 100_000}
    installation.write(installation.packages, files)
    assert list(read(INSTALLED)) == [
        Document("site-packages/a.py", "", skipped="not UTF-8 text"),
        Document("site-packages/b.py", "", skipped="not UTF-8 text"),
        Document("site-packages/c.py", "x = 'é'"),
        Document("site-packages/d.py", "y" * 100_000),
    ]


def test_installed_python_takes_no_path_and_needs_sources(installation: Installation):
    with pytest.raises(SpecError, match="means nothing to corpus 'installed-python'"):
        read(INSTALLED.model_copy(update={"path": "x"}))
    with pytest.raises(EnvironmentLacksError, match="no Python source is installed"):
        read(INSTALLED)


def test_only_installed_python_has_packages():
    assert corpora.packages(Data()) == corpora.packages(Data(corpus="text", path="x")) == []


def test_a_python_whose_library_is_no_folder_is_told_as_one_without_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(EnvironmentLacksError, match=r"no library sources in .*python311\.zip; set data.corpus = text"):
        read(Data())
