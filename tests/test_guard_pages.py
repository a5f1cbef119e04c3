"""No kernel reads or writes beyond an array: inputs and outputs end, or begin, at a page that may not be touched.

Inputs lie in pages that may not be written either, unless the function's purpose is to update them. A fault ends the
process, so a failure here is a crash with this module's name in the traceback, not an assertion.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import fastnorm as fn
from operations import OPERATIONS

if not sys.platform.startswith(("linux", "darwin")):
    pytest.skip("needs mmap and mprotect", allow_module_level=True)

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
NONE, READ, WRITE = 0, 1, 2


class Guarded:
    """Arrays between two untouchable pages; `close` frees them all."""

    def __init__(self, at: str, gaps: bool, backwards: bool) -> None:
        self.at, self.gaps, self.backwards = at, gaps, backwards
        self.regions: list[tuple[int, int, mmap.mmap]] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Room for an array whose last (at="end") or first (at="start") byte is next to a guard page."""
        step = 2 if self.gaps else 1
        strides, extent = [], dtype.itemsize
        for size in reversed(shape):
            strides.append(extent * (step if not strides else 1))
            extent = strides[-1] * size if size else extent
        strides.reverse()
        # The gap after the last element is no part of the array.
        used = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize if 0 not in shape else 0
        pages = max(1, -(-used // PAGE))
        region = mmap.mmap(-1, (pages + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(region))
        self.protect(base, PAGE, NONE)
        self.protect(base + (pages + 1) * PAGE, PAGE, NONE)
        self.regions.append((base + PAGE, pages * PAGE, region))
        offset = PAGE if self.at == "start" else (pages + 1) * PAGE - used
        array = np.ndarray(shape, dtype, buffer=region, offset=offset, strides=strides)
        return array[(slice(None, None, -1),) * array.ndim] if self.backwards else array

    def __call__(self, values: np.ndarray) -> np.ndarray:
        array = self.empty(values.shape, values.dtype)
        array[...] = values
        return array

    def protect(self, address: int, size: int, what: int) -> None:
        assert _libc.mprotect(address, size, what) == 0, ctypes.get_errno()

    def freeze(self) -> None:
        """From here on, writing to an array made so far is a fault."""
        for address, size, _ in self.regions:
            self.protect(address, size, READ)

    def thaw(self) -> None:
        for address, size, _ in self.regions:
            self.protect(address, size, READ | WRITE)


ELSEWHERE = pytest.mark.unverified("makes the same calls as at the end of a page")


@pytest.fixture(params=["end", *(pytest.param(p, marks=ELSEWHERE) for p in ("start", "end, gaps", "start, backwards"))])
def guarded(request: pytest.FixtureRequest) -> Iterator[Guarded]:
    at, *how = request.param.split(", ")
    memory = Guarded(at, "gaps" in how, "backwards" in how)
    yield memory
    memory.thaw()


# Around the lanes (16, 32, 64), the short-run limit (512), the block (2048) and the column tile (64).
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 511, 512, 513, 2047, 2048, 2049]
SHAPES = [(2, n) for n in LENGTHS] + [(2, 3, n) for n in LENGTHS] + [(2, n, 3) for n in LENGTHS[:-3]]
# Groups of eight and sixteen rows; many lines.
SHAPES += [(17, 16), (21, 100), (130, 1040), (513, 4)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_beyond_the_arrays_is_touched(name: str, dtype: type, guarded: Guarded) -> None:
    operation = OPERATIONS[name]
    for shape in SHAPES:
        if len(shape) < operation.min_rank:
            continue
        ordinary = operation.make(fn, shape, dtype).run()
        call = operation.make(fn, shape, dtype, layout=guarded)
        out = {"out": guarded.empty(shape, np.dtype(dtype))} if operation.out else {}
        inputs = len(guarded.regions) - len(out)
        for address, size, _ in guarded.regions[:inputs]:
            guarded.protect(address, size, READ | WRITE if call.updated else READ)
        found = call.run(**out)
        for key, value in ordinary.items():
            np.testing.assert_array_equal(found[key], value, strict=True, err_msg=f"{shape} {key}")
        guarded.thaw()
        del call, found, out
        guarded.regions.clear()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{"channel_axis": -1}, {"channel_axis": 0}])
@pytest.mark.parametrize("name", [n for n in OPERATIONS if n.startswith(("batch", "group", "instance"))])
def test_channels_in_other_places(name: str, options: dict[str, int], dtype: type, guarded: Guarded) -> None:
    operation = OPERATIONS[name]
    for n in LENGTHS:
        shape = (3, 2, n) if options["channel_axis"] == -1 else (n, 3, 2)
        ordinary = operation.make(fn, shape, dtype, **options).run()
        call = operation.make(fn, shape, dtype, layout=guarded, **options)
        out = {"out": guarded.empty(shape, np.dtype(dtype))}
        found = call.run(**out)
        for key, value in ordinary.items():
            np.testing.assert_array_equal(found[key], value, strict=True, err_msg=f"{shape} {key}")


def test_the_guards_guard() -> None:
    """The fixture can fail: reading one element too far ends a child process."""
    from subprocess_python import run_python

    for where, index in [("end", 5), ("start", -1)]:
        done = run_python(
            f"""
            import ctypes, numpy as np
            from test_guard_pages import Guarded
            a = Guarded({where!r}, False, False)(np.zeros(5, np.float32))
            print("made", flush=True)
            ctypes.c_float.from_address(a.ctypes.data + 4 * {index}).value
            print("survived")
            """
        )
        assert done.stdout.split() == ["made"], done.stderr
        assert done.returncode < 0
