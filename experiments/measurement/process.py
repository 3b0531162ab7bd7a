"""Each cell of an experiment in a fresh process, so that none inherits another's memory or dies with it.

Processes are forked from a server that has imported what cells need and done nothing else (on systems without
fork they are spawned). The server's import of torch is paid once.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from experiments.errors import LabError
from experiments.training import NonFiniteLossError
from models.errors import BackendUnavailableError, ConfigError

# torch._dynamo: a custom operator's first call imports it, which takes longer than most cells
_PRELOAD = ["experiments.cells", "models.ops.kernels.numba_form", "torch._dynamo"]
_EXPECTED = (LabError, NonFiniteLossError, ConfigError, BackendUnavailableError, MemoryError)


class CellFailedError(Exception):
    """A cell that gave no result. `detail` is its traceback where the failure was not foreseen, else empty."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


def quiet_thread_pools() -> None:
    """Let torch's idle OpenMP threads sleep after tens of microseconds of spinning: longer, and they hold the cores
    that numba's threads want; shorter, and every small operation pays for waking them. Has an effect only before torch
    is imported, here and in processes started from here."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def run_fresh(
    function: Callable[..., Any], *arguments: Any, on_message: Callable[[Any], None] = lambda message: None,
    timeout_s: float | None = None,
) -> Any:  # fmt: skip
    """`function(send, *arguments)` in a fresh process; `send` hands messages to `on_message` here.

    Raises CellFailedError when it raises, dies, or takes more than `timeout_s` seconds. Function, arguments, messages
    and result must be picklable.
    """
    quiet_thread_pools()
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    end = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while True:
            if end is not None and not ours.poll(max(0.0, end - time.monotonic())):
                raise CellFailedError(f"stopped after {timeout_s:g} s (cell_timeout_s)")
            try:
                kind, content = ours.recv()
            except EOFError:
                process.join()
                raise CellFailedError(_death(process.exitcode)) from None
            if kind == "message":
                on_message(content)
            elif kind == "result":
                process.join()
                return content
            else:
                process.join()
                raise CellFailedError(*content)
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
        ours.close()  # after that: a child that finds its pipe closed would complain


def _context() -> Any:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    return context


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    try:
        result = function(lambda message: pipe.send(("message", message)), *arguments)
        pipe.send(("result", result))
    except _EXPECTED as error:
        pipe.send(("error", (str(error) or type(error).__name__, "")))
    except RuntimeError as error:
        lacking = _lacking_memory(error)
        pipe.send(("error", (lacking, "") if lacking else _unforeseen(error)))
    except Exception as error:
        pipe.send(("error", _unforeseen(error)))


def _unforeseen(error: Exception) -> tuple[str, str]:
    return f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc()


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
