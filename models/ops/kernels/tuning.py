"""How Triton chooses among the configurations of a kernel: it compiles them all, times each on what it is first given,
and keeps to the fastest wherever the kernel's key comes back.

The keys of mamba_ssm's kernels have sizes of the model in them, but neither length nor batch. So a check on eight
tokens must not be what is timed: its choice would serve thousands. And compiling ten configurations of a dozen kernels
takes minutes on one core, which work whose speed does not count should not wait for.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch


def keep_choices() -> None:
    """Let processes that start from here share what Triton chose, beside the kernels that it compiled, instead of
    timing all again in each. Has an effect only before kernels are imported."""
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")


def _autotuner() -> Any:
    """The class of Triton's kernels that have a choice; None where there is no Triton, and so no choice."""
    try:
        from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return Autotuner


def compile_side_by_side() -> None:
    """From here on, compile the configurations of a kernel on all cores before the first of them is timed, instead of
    each by itself between two timings."""
    Autotuner = _autotuner()
    if Autotuner is None:
        return
    timing = Autotuner._bench

    @wraps(timing)
    def compiled_first(autotuner: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        chosen = len(autotuner.cache)  # so far: one more when all configurations are timed
        if getattr(autotuner, "compiled_after", None) != chosen:
            autotuner.compiled_after = chosen
            _compile_all(autotuner, *args, **kwargs)
        return timing(autotuner, *args, config=config, **kwargs)

    Autotuner._bench = compiled_first


def look_names_up() -> None:
    """From here on, a kernel that has a choice finds the names of what it is given in a table. At every launch Triton
    looks for each of them in a list of all: with 40 that takes longer than the rest of finding the choice again."""
    Autotuner = _autotuner()
    if Autotuner is None:
        return
    choosing = Autotuner.run

    @wraps(choosing)
    def run(autotuner: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(autotuner.arg_names, list):
            autotuner.arg_names = dict.fromkeys(autotuner.arg_names)  # in the same order
        return choosing(autotuner, *args, **kwargs)

    Autotuner.run = run


def _compile_all(autotuner: Any, *args: Any, **kwargs: Any) -> None:
    """Every configuration, for these arguments. One that does not compile is left to the timing, which passes it over
    or raises."""
    from triton import AsyncCompileMode  # pyright: ignore[reportMissingImports]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for config in autotuner.prune_configs(kwargs):
            autotuner.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})


@contextmanager
def untimed(device: torch.device | str) -> Iterator[None]:
    """Where Triton kernels take their smallest configuration, and no choice is made or kept: for what is not timed."""
    Autotuner = _autotuner() if torch.device(device).type == "cuda" else None
    if Autotuner is None:
        yield
        return
    choosing = Autotuner.run
    Autotuner.run = run_smallest
    try:
        yield
    finally:
        Autotuner.run = choosing


def run_smallest(autotuner: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `Autotuner.run`: the configuration that computes least beyond what is asked for."""
    config = autotuner.best_config = min(autotuner.configs, key=_size)  # some kernels ask for it afterwards
    settings = config.all_kwargs()
    if config.pre_hook is not None:
        config.pre_hook({**dict(zip(autotuner.arg_names, args, strict=False)), **kwargs, **settings})
    return autotuner.fn.run(*args, **kwargs, **settings)


def _size(config: Any) -> int:
    return math.prod(v for v in config.kwargs.values() if v)
