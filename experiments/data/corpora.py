"""Where text comes from. A corpus is a stream of documents, read one at a time and always in the same order.

`stdlib`:           the running Python's standard library and `pydoc` topics; on every machine, no download.
`installed-python`: the standard library, tests included, and the Python source of every package installed for the
                    running Python and for the system's; much larger, no download, another corpus on every machine.
`text`:             a file, a folder or a glob of your own.

Every document is Unicode that UTF-8 can hold, unchanged but for a byte order mark at the start of a file.
"""

import glob
import json
import os
import site
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from experiments.errors import CorpusError, EnvironmentLacksError, SpecError
from experiments.spec import Data
from models.errors import nearest

# What a folder is searched for. A file or a glob names its files itself, so there any suffix will do.
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".adoc", ".tex", ".html", ".htm", ".log")
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg")
CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts")
MORE_CODE = (".rb", ".lua", ".jl", ".r", ".sh", ".sql", ".css")
SUFFIXES = PROSE + TABLES + CODE + MORE_CODE

# Where the packages of the system's Python lie (Debian and its descendants)
SYSTEM_PACKAGES = ("/usr/lib/python3*/dist-packages", "/usr/local/lib/python3*/dist-packages")


class NotTextError(CorpusError):
    """Bytes that UTF-8 cannot read, or with a NUL among them."""


@dataclass(frozen=True)
class Document:
    """The unit that is split, deduplicated and put behind one end-of-text token. skipped: why its text was left out,
    and `text` is empty; empty for all others."""

    name: str
    text: str
    skipped: str = ""


def read(data: Data) -> Iterable[Document]:
    """The documents of `data.corpus`. Raises SpecError for an unknown corpus, else as that corpus does."""
    if data.corpus not in CORPORA:
        raise SpecError(f"data.corpus: unknown corpus '{data.corpus}': {nearest(data.corpus, CORPORA)}")
    return CORPORA[data.corpus](data)


def stdlib(data: Data) -> Iterable[Document]:
    """Every module of the standard library, then every `pydoc` topic, each sorted by name.

    Left out: tests, installed packages, and what the installation wrote about this machine. The topics come
    from `pydoc_data.topics`, whose own file is therefore left out too.
    Raises SpecError where `data.path` is given, EnvironmentLacksError where this Python came without sources.
    """
    _take_no_path(data)
    root = Path(sysconfig.get_path("stdlib"))
    names = _walk(root, enter=_is_library_folder, keep=_is_library_module) if root.is_dir() else []
    if not names:  # an embedded Python may have them in an archive
        raise EnvironmentLacksError(f"this Python has no library sources in {root}; set data.corpus = text")
    return _library(root, names)


def installed_python(data: Data) -> Iterable[Document]:
    """Every `.py` file of the standard library, then of each folder of installed packages, each sorted by name.

    Tests are included. Left out: what the installation wrote about this machine, and packages that were installed from
    a folder of this machine, editable or not, which are somebody's own work. Skipped, each with its reason: files that
    are not UTF-8.
    Raises SpecError where `data.path` is given, EnvironmentLacksError where there are no sources.
    """
    _take_no_path(data)
    files = _installed_files()
    if not files:
        raise EnvironmentLacksError("no Python source is installed on this machine; set data.corpus = text")
    return (_read_or_skipped(name, path) for name, path in files)


def packages(data: Data) -> list[str]:
    """Name and version of every installed package that `data.corpus` reads, sorted; none for other corpora."""
    if data.corpus != "installed-python":
        return []
    return sorted({f"{one.name} {one.version}" for one in _distributions() if not _from_a_folder(one)})


def text(data: Data) -> Iterable[Document]:
    """The text at `data.path`: a file, a folder (searched for `SUFFIXES`, hidden files skipped) or a glob.

    One document per file. Where there is only one file, one per block of lines between blank lines, without
    the blank lines. In `.jsonl` files always one per line: its string field "text".
    Raises CorpusError for a path that leads to no text and, while reading, for what is not UTF-8 text.
    """
    if not data.path.strip():
        raise CorpusError("data.path is empty; corpus 'text' needs a file, a folder or a glob there")
    files = _files(data.path)
    return _texts(files)


CORPORA: dict[str, Callable[[Data], Iterable[Document]]] = {
    "stdlib": stdlib, "installed-python": installed_python, "text": text,
}  # fmt: skip


def _take_no_path(data: Data) -> None:
    if data.path:
        raise SpecError(f"data.path = '{data.path}' means nothing to corpus '{data.corpus}'; set data.corpus = text")


def _library(root: Path, names: list[str]) -> Iterator[Document]:
    for name in names:
        yield Document(name, _read(root / name))
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise EnvironmentLacksError("this Python lacks pydoc_data.topics; set data.corpus = text") from None
    for topic, body in sorted(topics.items()):
        yield Document(f"pydoc_data/topics/{topic}", body)


def _is_library_folder(name: str) -> bool:
    return _is_source_folder(name) and name not in {"test", "tests"} and not name.endswith("_test")


def _is_library_module(name: str) -> bool:
    return _is_module(name) and not name.rpartition("/")[2].startswith("test_") and name != "pydoc_data/topics.py"


def _is_source_folder(name: str) -> bool:
    """Of the standard library, tests included."""
    return name not in {"site-packages", "dist-packages", "__pycache__"} and not name.startswith("config-")


def _is_module(name: str) -> bool:
    """Python source that is not about this machine."""
    module = name.rpartition("/")[2]
    of_this_machine = module.startswith(("_sysconfigdata", "_sysconfig_vars"))
    of_this_machine |= module in {"sitecustomize.py", "usercustomize.py"}
    return module.endswith(".py") and not of_this_machine


def _installed_files() -> list[tuple[str, Path]]:
    """(document name, file) of `installed_python` in the order of reading."""
    left_out = {
        os.path.realpath(str(one.locate_file(file)))
        for one in _distributions() if _from_a_folder(one) for file in one.files or ()
    }  # fmt: skip
    library = Path(sysconfig.get_path("stdlib"))
    found = [(f"stdlib/{name}", library / name) for name in _walk(library, enter=_is_source_folder, keep=_is_module)]
    for folder in _package_folders():
        names = _walk(folder, enter=lambda name: name != "__pycache__", keep=_is_module)
        found += [(f"{folder.name}/{name}", folder / name) for name in names]
    return [(name, path) for name, path in found if os.path.realpath(path) not in left_out]


def _package_folders() -> list[Path]:
    """Where packages of the running Python and of the system's are installed, each folder once."""
    named = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    named += [folder for pattern in SYSTEM_PACKAGES for folder in sorted(glob.glob(pattern))]
    distinct: dict[str, Path] = {}
    for folder in filter(os.path.isdir, named):
        distinct.setdefault(os.path.realpath(folder), Path(folder))
    return list(distinct.values())


def _distributions() -> list[metadata.Distribution]:
    """Those with a name: an interrupted installation leaves remains without one."""
    every = metadata.distributions(path=[str(folder) for folder in _package_folders()])
    return [one for one in every if one.metadata["Name"]]


def _from_a_folder(package: metadata.Distribution) -> bool:
    """Whether it was installed from a folder of this machine, which is in its `direct_url.json` (PEP 610)."""
    origin = package.read_text("direct_url.json")
    return origin is not None and "dir_info" in json.loads(origin)


def _files(pattern: str) -> dict[str, Path]:
    """Document name -> file, sorted by name."""
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):
        if not os.path.getsize(path):
            raise CorpusError(f"data.path: {path} is empty")
        return {path: Path(path)}
    if os.path.isdir(path):
        names = _walk(Path(path), enter=_is_visible, keep=_is_visible_text)
        if not names:
            raise CorpusError(f"data.path: no text in folder {path}; looked for {' '.join(SUFFIXES)}")
        return {name: Path(path, name) for name in names}
    if os.path.exists(path):
        raise CorpusError(f"data.path: {path} is neither a regular file nor a folder")
    if not any(wildcard in path for wildcard in "*?["):
        raise CorpusError(f"data.path: no such file or folder: {path}")
    matches = sorted(match for match in glob.iglob(path, recursive=True) if os.path.isfile(match))
    if not matches:
        raise CorpusError(f"data.path: no file matches {path}")
    return {match: Path(match) for match in matches}


def _is_visible(name: str) -> bool:
    return not name.rpartition("/")[2].startswith(".")


def _is_visible_text(name: str) -> bool:
    return _is_visible(name) and name.lower().endswith(SUFFIXES)


def _walk(root: Path, *, enter: Callable[[str], bool], keep: Callable[[str], bool]) -> list[str]:
    """Regular files under `root` as sorted '/'-paths relative to it. Links to folders are not followed.

    enter: may a folder of this name be entered? keep: is the file at this relative path wanted?
    """
    found = []
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = filter(enter, folders)
        for path in (Path(folder, file) for file in files):
            name = path.relative_to(root).as_posix()
            if keep(name) and path.is_file():
                found.append(name)
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise CorpusError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _texts(files: dict[str, Path]) -> Iterator[Document]:
    paths = list(files.values())
    for at, (name, path) in enumerate(files.items()):
        try:
            if path.suffix.lower() == ".jsonl":
                yield from _records(name, path)
            elif len(files) == 1:
                yield from _blocks(name, path)
            else:
                yield Document(name, _read(path))
        except NotTextError as error:
            if others := sum(map(_is_no_text, paths[at + 1 :])):
                count = f"{1 + others} of the {len(files)} files are not UTF-8 text, this is the first"
                raise NotTextError(f"{error}; {count}") from None
            raise


def _is_no_text(path: Path) -> bool:
    try:
        for _ in _lines(path):
            pass
    except CorpusError as error:
        return isinstance(error, NotTextError)
    return False


def _records(name: str, path: Path) -> Iterator[Document]:
    for number, line in _lines(path):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not valid JSON: {error}") from None
        body = record.get("text") if isinstance(record, dict) else None
        if not isinstance(body, str):
            raise CorpusError(f'{where}: needs an object with a string field "text"')
        try:
            body.encode()
        except UnicodeEncodeError:
            raise CorpusError(f'{where}: "text" holds half of a surrogate pair, which is no text') from None
        yield Document(f"{name}:{number}", body)


def _blocks(name: str, path: Path) -> Iterator[Document]:
    start, block = 0, []
    for number, line in _lines(path):
        if not line.isspace():
            start = start if block else number
            block.append(line)
        elif block:
            yield Document(f"{name}:{start}", "".join(block).rstrip("\r\n"))
            block = []
    if block:
        yield Document(f"{name}:{start}", "".join(block).rstrip("\r\n"))


def _read(path: Path) -> str:
    with _reading(path):
        raw = path.read_bytes()
    return _decode(raw, path, offset=0)


def _read_or_skipped(name: str, path: Path) -> Document:
    try:
        return Document(name, _read(path))
    except NotTextError:
        return Document(name, "", skipped="not UTF-8 text")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its line end)."""
    with _reading(path), path.open("rb") as file:
        offset = 0
        for number, raw in enumerate(file, start=1):
            yield number, _decode(raw, path, offset)
            offset += len(raw)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """The text of `raw`, which starts at byte `offset` of the file."""
    nul = raw.find(0)
    if nul >= 0:
        raise NotTextError(f"{path}: binary, not UTF-8 text (NUL at byte {offset + nul})")
    try:
        decoded = raw.decode()
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x} at byte {offset + error.start}"
        raise NotTextError(f"{path}: not UTF-8 ({byte}); convert it to UTF-8") from None
    return decoded if offset else decoded.removeprefix("\ufeff")
