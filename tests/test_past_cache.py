"""Results that are written past the caches: the same bits, everywhere they belong, nothing beside them.

The kernels do so with a given `out=` once a call's arrays take half of the last-level cache (the forward on several
threads: two thirds). Here that cache is taken to have no bytes at all, so that small and odd shapes go the way that the
largest arrays go. New results are written into the cache, but what is read is asked for ahead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core
from operations import LAYOUTS, OPERATIONS, results

pytestmark = pytest.mark.unverified("compares the kernels with themselves")

HUGE = 1 << 60
SHAPES = [
    (3, 4, 7),
    (5, 16, 3, 11),
    (2, 6, 1, 131),
    (9, 30),
    (37, 515),
    (64, 8, 28, 28),
    (257, 48),
    (513, 4),
    (130, 1040),
]
FUNCTIONS = [name for name, operation in OPERATIONS.items() if operation.out]


@pytest.fixture(autouse=True)
def _cache_restored() -> Iterator[None]:
    size = _core.cache_bytes()
    yield
    _core.set_cache_bytes(size)


def _strip_of(shape: tuple[int, ...], dtype: type, skip: int) -> tuple[np.ndarray, np.ndarray]:
    """An array `skip` values behind the start of a line of the cache, and all the memory that it lies in."""
    size = int(np.prod(shape))
    memory = np.full(size + skip + 64, 7, dtype)
    start = -memory.ctypes.data % 64 // memory.itemsize + skip
    return memory[start : start + size].reshape(shape), memory


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_bits_and_nothing_beside_them(function: str, level: str) -> None:
    _core.set_isa(level)
    operation = OPERATIONS[function]
    for shape in SHAPES:
        if len(shape) < operation.min_rank:
            continue
        for dtype, skip, threads in ((np.float32, 0, 1), (np.float32, 3, 2), (np.float32, 4, 1), (np.float64, 5, 2)):
            call = operation.make(fn, shape, dtype)
            like = call.arguments[call.main]
            out, memory = _strip_of(like.shape, like.dtype, skip)
            found = {}
            for size in (HUGE, 0):
                memory[:] = 7
                _core.set_cache_bytes(size)
                with fn.num_threads(threads):
                    found[size] = {name: a.copy() for name, a in results(call(out=out)).items()}
                inside = (out.ctypes.data - memory.ctypes.data) // memory.itemsize
                assert np.all(memory[:inside] == 7)
                assert np.all(memory[inside + out.size :] == 7)
            for name, near in found[HUGE].items():
                np.testing.assert_array_equal(found[0][name], near, err_msg=f"{name}, {shape}, {dtype}, {skip}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_of_any_layout(function: str, layout: str) -> None:
    for shape, dtype in (((3, 6, 5, 21), np.float32), ((4, 6, 130), np.float32), ((3, 4, 19), np.float64)):
        call = OPERATIONS[function].make(fn, shape, dtype, layout=LAYOUTS[layout])
        like = call.arguments[call.main]
        found = {}
        for size in (HUGE, 0):
            _core.set_cache_bytes(size)
            out = LAYOUTS[layout](np.full(like.shape, np.nan, like.dtype))
            found[size] = results(call(out=out))
        for name, near in found[HUGE].items():
            np.testing.assert_array_equal(found[0][name], near, err_msg=f"{name}, {shape}, {dtype}")


@pytest.mark.parametrize("function", OPERATIONS)
def test_new_results_of_what_is_asked_for_ahead(function: str) -> None:
    operation = OPERATIONS[function]
    for shape in SHAPES:
        if len(shape) < operation.min_rank:
            continue
        for dtype, threads in ((np.float32, 1), (np.float64, 1), (np.float64, 2)):
            call = operation.make(fn, shape, dtype)
            found = {}
            for size in (HUGE, 0):
                _core.set_cache_bytes(size)
                with fn.num_threads(threads):
                    found[size] = results(call())
            for name, near in found[HUGE].items():
                np.testing.assert_array_equal(found[0][name], near, err_msg=f"{name}, {shape}, {dtype}, {threads}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(5, 33), (300, 131), (64, 16)])
def test_both_results_of_the_residual_step(shape: tuple[int, ...], norm: str, threads: int) -> None:
    rng = np.random.default_rng(len(norm) + threads)
    x, residual, dy, ds = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    forward, backward = (getattr(fn, f"dropout_add_{norm}_{way}") for way in ("forward", "backward"))
    found = {}
    for size in (HUGE, 0):
        _core.set_cache_bytes(size)
        y, s, dx, dresidual = (_strip_of(shape, np.float32, skip)[0] for skip in (4, 1, 0, 7))
        with fn.num_threads(threads):
            _, cache = forward(x, residual, p=0.3, rng=5, out=(y, s))
            gradients = backward(dy, cache, ds=ds, out=(dx, dresidual))
        found[size] = (y, s, *(a for a in gradients if a is not None))
    for near, far in zip(found[HUGE], found[0], strict=True):
        np.testing.assert_array_equal(far, near)


@pytest.mark.parametrize(("columns", "groups"), [(30, 0), (131, 0), (300, 0), (33, 3), (100, 2)])
def test_float64_sets_at_unequal_distances(columns: int, groups: int) -> None:
    """Several batches of sets whose offsets are no multiples of one number: in the cache, past it, and each alone."""
    rng = np.random.default_rng(columns)
    whole = rng.standard_normal((14, 11, columns)) + 0.3
    weight, bias = rng.standard_normal((2, 6 if groups else columns))
    x = whole[:, :6] if groups else whole[:, :9]
    turned = np.empty((x.shape[1], x.shape[0], columns)).swapaxes(0, 1)

    def calls(x: np.ndarray, **out: np.ndarray) -> list[np.ndarray]:
        if groups:
            both = fn.group_norm(x, groups, weight, bias, **out).copy()
            return [both, fn.group_norm(x, groups, **out).copy(), fn.group_norm(x, groups, None, bias, **out).copy()]
        both = fn.layer_norm(x, weight, bias, **out).copy()
        return [both, fn.layer_norm(x, **out).copy(), fn.rms_norm(x, weight, **out).copy()]

    _core.set_cache_bytes(HUGE)
    want = calls(x)
    alone = [calls(sample[None].copy()) for sample in x]
    for k, y in enumerate(want):
        np.testing.assert_array_equal(y, np.concatenate([results[k] for results in alone]))
    for size in (HUGE, 0):
        _core.set_cache_bytes(size)
        for out in (np.empty(x.shape), turned):
            for y, expected in zip(calls(x, out=out), want, strict=True):
                np.testing.assert_array_equal(y, expected)
