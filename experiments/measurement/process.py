"""Each cell of an experiment in a fresh process, so that none inherits another's memory or dies with it.

Processes are forked from a server that has imported what cells need and done nothing else (experiments/preload.py; on
systems without fork they are spawned). The server's import of torch is paid once.

A cell's function may be a generator: each `yield` ends a turn, and cells that are compared run their turns one at a
time, round after round, so that a machine that grows slower in between grows slower for all of them.
"""

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from experiments.errors import LabError
from experiments.threads import quiet_thread_pools
from experiments.training import NonFiniteLossError
from models.errors import BackendUnavailableError, ConfigError
from models.ops.kernels.tuning import keep_choices

_OURS = Path(__file__).resolve().parents[2]
_PRELOAD = ["experiments.uninterrupted", "experiments.preload"]
_EXPECTED = (LabError, NonFiniteLossError, ConfigError, BackendUnavailableError, MemoryError)


class CellFailedError(Exception):
    """A cell that gave no result. `detail` is its traceback where the failure was not foreseen, else empty."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.detail)


Key = TypeVar("Key")
Result = TypeVar("Result")
Job = tuple[Callable[..., Any], tuple]  # a cell's function and its arguments after `send`


def run_fresh(
    function: Callable[..., Any], *arguments: Any, on_message: Callable[[Any], None] = lambda message: None,
    timeout_s: float | None = None,
) -> Any:  # fmt: skip
    """`function(send, *arguments)` in a fresh process; `send` hands messages to `on_message` here. A generator has all
    its turns, and gives what it returns.

    Raises CellFailedError when it raises, dies, or takes more than `timeout_s` seconds. Function, arguments, messages
    and result must be picklable.
    """
    jobs = {None: (function, arguments)}
    ((_, outcome),) = take_turns(jobs, on_message=lambda _, message: on_message(message), timeout_s=timeout_s)
    if isinstance(outcome, CellFailedError):
        raise outcome
    return outcome


def take_turns(
    jobs: Mapping[Key, Job], *, on_message: Callable[[Key, Any], None] = lambda key, message: None,
    timeout_s: float | None = None,
) -> Generator[tuple[Key, Any], None, None]:  # fmt: skip
    """Each job in a fresh process of its own, all alive until they end, one running at a time: first each to the end of
    its first turn, in which it makes ready, then turn by turn, every other round in reverse order. Yields each job's
    key with its result, or with the CellFailedError of a job that failed, as soon as it has ended.

    timeout_s: for the turns of one job together.
    """
    alive: dict[Key, _Worker] = {}
    try:
        for key, (function, arguments) in jobs.items():
            alive[key] = _Worker(function, arguments, timeout_s)
            yield from _turn(alive, key, on_message)
        backwards = False
        while alive:
            for key in list(alive)[:: -1 if backwards else 1]:
                alive[key].go_on()
                yield from _turn(alive, key, on_message)
            backwards = not backwards
    finally:
        for worker in alive.values():
            worker.close()


def _turn(alive: "dict[Key, _Worker]", key: Key, on_message: Callable[[Key, Any], None]) -> Iterator[tuple[Key, Any]]:
    """Wait for the end of the turn that `key` is in; where that is its last, yield what came of it."""
    try:
        ended, outcome = alive[key].wait(lambda message: on_message(key, message))
    except CellFailedError as error:
        ended, outcome = True, error
    if ended:
        alive.pop(key).close()
        yield key, outcome


class _Worker:
    """A job's process, seen from here."""

    def __init__(self, function: Callable[..., Any], arguments: tuple, timeout_s: float | None) -> None:
        quiet_thread_pools()
        keep_choices()
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, function, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._timeout_s, self._spent = timeout_s, 0.0

    def go_on(self) -> None:
        with suppress(OSError):  # it died while it waited: `wait` says how
            self._pipe.send(None)

    def wait(self, on_message: Callable[[Any], None]) -> tuple[bool, Any]:
        """Until a turn ends: whether it was the last one, and its result. Raises CellFailedError."""
        begun = time.monotonic()
        while True:
            if self._timeout_s is not None:
                left = self._timeout_s - self._spent - (time.monotonic() - begun)
                if not self._pipe.poll(max(0.0, left)):
                    raise CellFailedError(f"stopped after {self._timeout_s:g} s (cell_timeout_s)")
            try:
                kind, content = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                raise CellFailedError(_death(self._process.exitcode)) from None
            if kind == "message":
                on_message(content)
            elif kind == "turn":
                self._spent += time.monotonic() - begun
                return False, None
            else:
                self._process.join()
                if kind == "error":
                    raise CellFailedError(*content)
                return True, content

    def close(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._pipe.close()  # after that: a child that finds its pipe closed would complain


def _context() -> Any:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    return context


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    try:
        result = function(lambda message: _tell(pipe, "message", message), *arguments)
        if isinstance(result, Generator):
            result = all_turns(result, between=lambda: _hand_over(pipe))
        _tell(pipe, "result", result)
    except Exception as error:
        _tell(pipe, "error", _told(error))


def _tell(pipe: Connection, kind: str, content: Any) -> None:
    try:
        pipe.send((kind, content))
    except (BrokenPipeError, ConnectionResetError):  # whoever waited for it is gone
        raise SystemExit from None


def _told(error: Exception) -> tuple[str, str]:
    """What a cell ended with, in a line behind the notes of who it happened to, and its traceback where that was not
    foreseen."""
    lacking = _lacking_memory(error) if isinstance(error, RuntimeError) else None
    if isinstance(error, _EXPECTED):
        text, detail = str(error) or type(error).__name__, ""
    else:
        text, detail = (lacking, "") if lacking else _unforeseen(error)
    return ": ".join([*getattr(error, "__notes__", ()), text]), detail


def side_by_side(works: list[Generator[None, None, Any]]) -> Generator[None, None, list[Any]]:
    """Cells that share a process: in each turn all of them have theirs, in every other turn in reverse order. Returns
    their results; in the place of one that failed a CellFailedError, and the others go on."""
    results: list[Any] = [None] * len(works)
    alive = list(range(len(works)))
    while alive:
        for at in list(alive):
            try:
                next(works[at])
            except StopIteration as end:
                results[at] = end.value
                alive.remove(at)
            except Exception as error:
                results[at] = CellFailedError(*_told(error))
                alive.remove(at)
        alive.reverse()
        if alive:
            yield
    return results


def all_turns(work: Generator[None, None, Result], between: Callable[[], object] = lambda: None) -> Result:
    """Every turn of `work`, with `between` after each but the last; what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
        between()


def _hand_over(pipe: Connection) -> None:
    """End a turn, and wait for the next."""
    _tell(pipe, "turn", None)
    try:
        pipe.recv()
    except (EOFError, ConnectionResetError):
        raise SystemExit from None


def _unforeseen(error: Exception) -> tuple[str, str]:
    """With the last line of our own that led to it."""
    calls = traceback.extract_tb(error.__traceback__)
    ours = [call for call in calls if _is_ours(Path(call.filename))]
    last = (ours or calls)[-1]
    where = f"{Path(last.filename).name}, line {last.lineno}, in {last.name}"
    what = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
    return f"{what} ({where})", traceback.format_exc()


def _is_ours(file: Path) -> bool:
    return file.is_relative_to(_OURS) and "site-packages" not in file.parts  # an environment may lie in the project


def _lacking_memory(error: RuntimeError) -> str | None:
    """What torch says of a failed allocation, in a line; None for any other error."""
    text = str(error)
    if "can't allocate memory" in text:  # of the CPU's allocator, which has no type of its own
        return f"out of memory: {text[text.index('you tried') :].splitlines()[0]}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported in this module
        return f"out of memory: {text.splitlines()[0]}"
    return None


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process ended with exit code {exit_code} and no result"
