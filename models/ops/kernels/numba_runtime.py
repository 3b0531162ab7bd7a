"""How numba is used here: one compile decorator, one way to run tasks on threads, the vector mathematics.

Kernels are single-threaded functions over a range of independent tasks; they release the GIL, and `run_tasks`
gives each thread one contiguous range. That is deterministic, costs microseconds, survives `fork`, and brings no
second OpenMP pool that would spin against torch's.

`exp2`, `sigmoid` and `softplus` compile to vector instructions in float32 (numba has no vector exponential of its
own); in float64 they are the C library's, since float64 is for checking, not for speed.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

# contract: fused multiply-add. nsz, reassoc: sums in vector order. NaN and infinity keep their meaning.
_FASTMATH = {"contract", "nsz", "reassoc"}
_OPTIONS: Any = {"fastmath": _FASTMATH, "error_model": "numpy"}
compiled: Any = numba.njit(nogil=True, cache=True, boundscheck=False, **_OPTIONS)

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# 2^r on [-1/2, 1/2], degree 6: the polynomial through the Chebyshev nodes, within 2e-8 of 2^r relative.
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (
    np.float32(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
_LOG2_E32 = np.float32(LOG2_E)


@intrinsic
def _bits_to_float32(typingctx: Any, bits: Any = None) -> Any:
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def exp2(x: float) -> float:
    """2^x, in compiled code only. float32: to about 1e-7 relative, saturating at 2^-126 and 2^127."""
    raise AssertionError("compiled code only")


@overload(exp2, jit_options=_OPTIONS)
def _exp2(x):
    if x == types.float32:

        def fast(x):
            # comparisons ordered so that NaN passes through the clamps
            x = np.float32(-126.0) if x < np.float32(-126.0) else x
            x = np.float32(127.0) if x > np.float32(127.0) else x
            k = np.float32(math.floor(x + np.float32(0.5)))
            r = x - k
            p = _C6
            p = p * r + _C5
            p = p * r + _C4
            p = p * r + _C3
            p = p * r + _C2
            p = p * r + _C1
            p = p * r + _C0
            return p * _bits_to_float32((np.int32(k) + np.int32(127)) << np.int32(23))

        return fast
    return lambda x: math.exp(x * LN_2)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), in compiled code only."""
    raise AssertionError("compiled code only")


@overload(sigmoid, jit_options=_OPTIONS)
def _sigmoid(x):
    if x == types.float32:
        return lambda x: np.float32(1.0) / (np.float32(1.0) + exp2(-x * _LOG2_E32))
    return lambda x: 1.0 / (1.0 + math.exp(-x))


def softplus(x: float) -> float:
    """log(1 + exp(x)), in compiled code only."""
    raise AssertionError("compiled code only")


@overload(softplus, jit_options=_OPTIONS)
def _softplus(x):
    if x == types.float32:

        def fast(x):
            # max(x, 0) + log1p(w), w = exp(-|x|); log1p(w) = 2 atanh(s), s = w / (2 + w) <= 1/3
            w = exp2(-abs(x) * _LOG2_E32)
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
            positive = x if x > np.float32(0.0) else x * np.float32(0.0)
            return positive + np.float32(2.0) * s * p

        return fast
    return lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="numba-task")


def run_tasks(kernel: Callable[..., None], tasks: int, *arguments: object) -> None:
    """Run `kernel(*arguments, first, last)` so that the ranges [first, last) cover `tasks` tasks.

    As many threads as torch uses; the calling thread takes the first range.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads == 1:
        kernel(*arguments, 0, tasks)
        return
    bounds = [tasks * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(kernel, *arguments, first, last) for first, last in pairwise(bounds[1:])]
    kernel(*arguments, bounds[0], bounds[1])
    for other in others:
        other.result()
