"""The fastest masks that are written by hand: a 32-bit hash of the element's index, in numba.

Two multiplications and three shifts, no generator: neighbouring seeds give related masks, and an array of more than
2^32 elements the same one again. It says how much of dropout's time is the generator's. Dropout and its backward only,
into a preallocated result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from fastnorm.cli.calls import Array, Arrays, Options, stem_of

_numba: Any = import_module("numba")


@cache
def _compiled(parallel: bool) -> Any:
    prange, uint32 = _numba.prange, np.uint32

    def dropout(y: Any, x: Any, seed: Any, threshold: Any, scale: Any) -> None:
        for i in prange(x.size):
            h = uint32(i) ^ seed
            h = (h ^ (h >> uint32(16))) * uint32(0x7FEB352D)
            h = (h ^ (h >> uint32(15))) * uint32(0x846CA68B)
            h ^= h >> uint32(16)
            y[i] = x[i] * scale if h < threshold else x.dtype.type(0)

    return _numba.njit(fastmath=True, error_model="numpy", parallel=parallel)(dropout)


def prepare(function: str, a: Arrays, options: Options, threads: int) -> Callable[[], Any] | None:
    if stem_of(function) != "dropout" or not a.x.flags.c_contiguous or options.get("shared_axes"):
        return None
    _numba.set_num_threads(min(threads, _numba.config.NUMBA_NUM_THREADS))
    p = options.get("p", 0.5)
    x = (a.dy if function.endswith("_backward") else a.x).ravel()
    y = np.empty_like(x)
    kernel, scale = _compiled(threads > 1), x.dtype.type(1 / (1 - p))
    seed, threshold = np.uint32(7), np.uint32((1 - p) * 2**32)

    def call() -> Array:
        kernel(y, x, seed, threshold, scale)
        return y.reshape(a.x.shape)

    return call
