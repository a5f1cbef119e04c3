"""How fast the arrays of a case can be moved at all: copies, and sums of two arrays, over the very same memory.

NumPy's own loops always take part, in as many parts as there are threads; where numba is installed, loops that it
compiles do too, through the caches and past them. The fastest of them is the ceiling of the case.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from fastnorm.cli import peers
from fastnorm.cli.calls import Array

PREFIX = "ceiling: "
# Below this, what is written past the caches has to come back from memory at once: never the fastest.
_STREAMING_BYTES = 4 << 20

Call = Callable[[], Any]


def flat(a: Array) -> Array:
    """The elements in the order in which they lie in memory; a view, so a must be dense in some order of its axes."""
    order = sorted(range(a.ndim), key=lambda axis: -a.strides[axis])
    view: Array = a.transpose(order).reshape(-1)
    assert np.shares_memory(view, a) or not a.size
    return view


def ceilings(reads: list[Array], write: Array, threads: int, pool: ThreadPoolExecutor) -> dict[str, Call]:
    """Calls by name that read these one or two arrays once and write the other one once."""
    arrays = [flat(array) for array in (write, *reads)]
    calls = {PREFIX + "NumPy": _numpy(arrays, threads, pool)}
    if "numba" in peers.installed():
        calls |= _numba(arrays, threads)
    return calls


def _numpy(arrays: list[Array], threads: int, pool: ThreadPoolExecutor) -> Call:
    def moving(to: Array, *of: Array) -> Call:
        return partial(np.copyto, to, *of) if len(of) == 1 else partial(np.add, *of, out=to)

    whole = moving(*arrays)
    if threads == 1:
        return whole
    parts = [moving(*part) for part in zip(*(np.array_split(array, threads) for array in arrays), strict=True)]

    def split() -> None:
        for done in [pool.submit(part) for part in parts]:
            done.result()

    return min((whole, split), key=lambda call: min(_once(call) for _ in range(5)))


def _once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _numba(arrays: list[Array], threads: int) -> dict[str, Call]:
    kernels = peers.load("numba").streams(threads)
    name = "copy" if len(arrays) == 2 else "add"
    calls: dict[str, Call] = {PREFIX + "cached stores": partial(getattr(kernels, name), *arrays)}
    start = -arrays[0].ctypes.data % 64 // arrays[0].itemsize
    if sum(array.nbytes for array in arrays) >= _STREAMING_BYTES and arrays[0].ctypes.data % arrays[0].itemsize == 0:
        calls[PREFIX + "streaming stores"] = partial(getattr(kernels, "stream_" + name), *arrays, start)
    return calls
