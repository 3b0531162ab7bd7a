"""How numba is used here: one compile decorator, one way to run tasks on threads, the vector mathematics.

Kernels are single-threaded functions over a range of independent tasks; they release the GIL, and `run_tasks`
gives each thread one contiguous range. That is deterministic, costs microseconds, survives `fork`, and brings no
second OpenMP pool that would spin against torch's.

`exp2`, `exp`, `sigmoid` and `softplus` compile to vector instructions in float32 (numba has no vector exponential of
its own); in float64 they are the C library's, since float64 is for checking, not for speed.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding as llvm
from llvmlite import ir
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

# contract: fused multiply-add. nsz, reassoc: sums in vector order. NaN and infinity keep their meaning.
_FASTMATH = {"contract", "nsz", "reassoc"}
_OPTIONS: Any = {"fastmath": _FASTMATH, "error_model": "numpy"}
_IN_ORDER: Any = _OPTIONS | {"fastmath": _FASTMATH - {"reassoc"}}  # for sums whose order is their point

_config: Any = config


def _use_whole_vectors() -> None:
    """Where a CPU has vectors of 512 bits, LLVM keeps to halves of them on Intel's, of which the first ones lowered
    their clock for whole ones. The libraries that multiply matrices, most of a transformer's work, take whole ones: so
    do all arms. Left alone where a person has chosen (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, NUMBA_ENABLE_AVX)."""
    features = get_host_cpu_features()
    if "+avx512f" in features.split(",") and _config.CPU_NAME is _config.CPU_FEATURES is None:
        _config.CPU_NAME = llvm.get_host_cpu_name()
        _config.CPU_FEATURES = f"{features},-prefer-256-bit"


_use_whole_vectors()


def version_of(folder: Path) -> str:
    """Of the files in it that have compiled kernels."""
    contents = hashlib.sha256()
    for file in sorted(folder.glob("numba_*.py")):
        contents.update(hashlib.sha256(file.read_bytes()).digest())
    return contents.hexdigest()[:12]


def _cache_folder() -> Path:
    """Where compiled kernels are kept: a folder named after the contents of all of them.

    numba recompiles a kernel when the kernel's own file changes, but not when a function of another file that is
    compiled into it does, and would go on running the old one.
    """
    version = version_of(Path(__file__).parent)
    beside = Path(__file__).parent / "__pycache__"
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sequence-lab"
    for base in [Path(_config.CACHE_DIR)] if _config.CACHE_DIR else [beside, home]:
        with suppress(OSError):
            folder = base / f"numba-{version}"
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="sequence-lab-numba-"))  # for this process alone


_CACHE = _cache_folder()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call with arguments of a kind, or load what an earlier process compiled."""
    before, _config.CACHE_DIR = _config.CACHE_DIR, str(_CACHE)
    try:
        return numba.njit(nogil=True, cache=True, boundscheck=False, **_OPTIONS)(function)
    finally:
        _config.CACHE_DIR = before


def get_ready() -> None:
    """What numba does once in a process, at the first call of any kernel: most of a short cell's time. Processes that
    are forked afterwards have it."""
    numba.njit(_nothing)()


def _nothing() -> None:
    return None


LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# 2^r = 1 + r q(r) on [-1/2, 1/2], q of degree 4 fitted at Chebyshev nodes: within 3e-7 relative, and 1 at 0 exactly,
# so that a state that does not decay does not grow either.
_NODES = np.cos(np.pi * (np.arange(40) + 0.5) / 40) / 2
_C1, _C2, _C3, _C4, _C5 = (
    np.float32(c)
    for c in np.polynomial.Chebyshev.fit(_NODES, np.expm1(_NODES * LN_2) / _NODES, 4, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
_LOG2_E32 = np.float32(LOG2_E)

# ln 2 in two parts. The high one has 16 significant bits, so that its product with a whole power is exact.
_LN_2_HIGH = np.float32(math.floor(LN_2 * 2**16) / 2**16)
_LN_2_LOW = np.float32(LN_2 - float(_LN_2_HIGH))
_LN_OF_LEAST, _LN_OF_MOST = np.float32(-125 * LN_2), np.float32(127 * LN_2)


@intrinsic
def _bits_to_float32(typingctx: Any, bits: Any = None) -> Any:
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _bits_of_float32(typingctx: Any, x: Any = None) -> Any:
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _nearest(typingctx: Any, x: Any = None) -> Any:
    """The nearest whole number as a float32: one vector instruction, where `round` and `floor` go through int64."""

    def codegen(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), args)

    return types.float32(types.float32), codegen


@register_jitable(**_OPTIONS)
def _two_to_the(k, r):
    """2^(k + r), k whole and within [-125, 127], r within [-1/2, 1/2]."""
    p = _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _C1
    p = p * r + np.float32(1.0)
    # times 2^k: k is added to the exponent of p
    return _bits_to_float32(_bits_of_float32(p) + (np.int32(k) << np.int32(23)))


def exp2(x: float) -> float:
    """2^x, in compiled code only. float32: to about 3e-7 relative, saturating at 2^-125 and 2^127."""
    raise AssertionError("compiled code only")


@overload(exp2, jit_options=_OPTIONS)
def _exp2(x):
    if x == types.float32:

        def fast(x):
            # comparisons ordered so that NaN passes through the clamps
            x = np.float32(-125.0) if x < np.float32(-125.0) else x
            x = np.float32(127.0) if x > np.float32(127.0) else x
            k = _nearest(x)
            return _two_to_the(k, x - k)

        return fast
    return lambda x: math.exp(x * LN_2)


def exp(x: float) -> float:
    """e^x, in compiled code only. float32: to about 3e-7 relative, saturating at 2^-125 and 2^127.

    As `exp2(x log2 e)` it would be off by the rounding of the product too, which is |x| times as large.
    """
    raise AssertionError("compiled code only")


@overload(exp, jit_options=_IN_ORDER)
def _exp(x):
    if x == types.float32:

        def fast(x):
            x = _LN_OF_LEAST if x < _LN_OF_LEAST else x
            x = _LN_OF_MOST if x > _LN_OF_MOST else x
            k = _nearest(x * _LOG2_E32)
            # what is left after k ln 2 (Cody and Waite, Software Manual for the Elementary Functions, 1980)
            r = (x - k * _LN_2_HIGH) - k * _LN_2_LOW
            return _two_to_the(k, r * _LOG2_E32)

        return fast
    return lambda x: math.exp(x)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), in compiled code only."""
    raise AssertionError("compiled code only")


@overload(sigmoid, jit_options=_OPTIONS)
def _sigmoid(x):
    if x == types.float32:
        return lambda x: np.float32(1.0) / (np.float32(1.0) + exp(-x))
    return lambda x: 1.0 / (1.0 + math.exp(-x))


def softplus(x: float) -> float:
    """log(1 + exp(x)), in compiled code only."""
    raise AssertionError("compiled code only")


@overload(softplus, jit_options=_OPTIONS)
def _softplus(x):
    if x == types.float32:

        def fast(x):
            # max(x, 0) + log1p(w), w = exp(-|x|); log1p(w) = 2 atanh(s), s = w / (2 + w) <= 1/3
            w = exp(-abs(x))
            s = w / (np.float32(2.0) + w)
            q = s * s
            p = np.float32(1.0 / 15.0)
            p = p * q + np.float32(1.0 / 13.0)
            p = p * q + np.float32(1.0 / 11.0)
            p = p * q + np.float32(1.0 / 9.0)
            p = p * q + np.float32(1.0 / 7.0)
            p = p * q + np.float32(1.0 / 5.0)
            p = p * q + np.float32(1.0 / 3.0)
            p = p * q + np.float32(1.0)
            # not 0 itself: with a choice between two values in it, a loop's rounding came to depend on where arrays lie
            positive = x if x > np.float32(0.0) else x * np.float32(0.0)
            return positive + np.float32(2.0) * s * p

        return fast
    return lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@intrinsic
def _address(typingctx: Any, array: Any, i: Any = None, j: Any = None) -> Any:
    def codegen(context, builder, signature, args):
        view = context.make_array(signature.args[0])(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, view.strides)
        offset = builder.add(builder.mul(args[1], strides[0]), builder.mul(args[2], strides[1]))
        base = builder.bitcast(view.data, cgutils.voidptr_t)
        return builder.bitcast(builder.gep(base, [offset]), view.data.type)

    return types.CPointer(array.dtype)(array, types.intp, types.intp), codegen


@compiled
def row(array, i, j):
    """`array[i, j]`, known to be contiguous: numba would step through a slice of a larger array one by one."""
    return carray(_address(array, i, j), array.shape[2])


def with_rows(x: Tensor) -> np.ndarray:
    """x (.., .., E) for `row`: a view where its last axis is contiguous, else a copy."""
    return (x if x.stride(-1) == 1 else x.contiguous()).detach().numpy()


@intrinsic
def _pointer(typingctx: Any, address: Any, kind: Any = None) -> Any:
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(address, kind), codegen


@compiled
def at(address, kind, shape):
    """The array of `shape`, in C order, of numbers of the type of `kind`, that begins at `address`.

    Kernels that run for microseconds take addresses: handing over a tensor as an array costs as much as its arithmetic.
    The caller keeps the tensors alive; `addresses` sees to their order and type.
    """
    return carray(_pointer(address, kind), shape)


_KIND = {torch.float32: np.float32(0), torch.float64: np.float64(0)}


def addresses(*tensors: Tensor) -> tuple[Any, ...]:
    """A zero of the tensors' type, the `kind` for `at`, then the address of each. Raises ValueError unless they are
    contiguous and all float32 or all float64."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype is not dtype or dtype not in _KIND or not tensor.is_contiguous():
            raise ValueError("a compiled kernel takes contiguous tensors, all float32 or all float64")
    return (_KIND[dtype], *[tensor.data_ptr() for tensor in tensors])


WORK_PER_THREAD = 1 << 16  # tens of microseconds, as long as waking a thread takes


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="numba-task")


def run_tasks(
    kernel: Callable[..., None], tasks: int, *arguments: object, work: int | None = None,
    per_thread: int = WORK_PER_THREAD,
) -> None:  # fmt: skip
    """Run `kernel(*arguments, first, last)` so that the ranges [first, last) cover `tasks` tasks.

    As many threads as torch uses, or fewer where `work`, the numbers touched in all, would not repay waking them at
    `per_thread` each; the calling thread takes the first range.
    """
    threads = min(torch.get_num_threads(), tasks)
    if work is not None:
        threads = min(threads, work // per_thread)
    if threads <= 1:
        kernel(*arguments, 0, tasks)
        return
    bounds = [tasks * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(kernel, *arguments, first, last) for first, last in pairwise(bounds[1:])]
    kernel(*arguments, bounds[0], bounds[1])
    for other in others:
        other.result()
