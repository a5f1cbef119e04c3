"""Arrays that no cache holds, or the last one alone: the same bits, everywhere they belong, nothing beside them.

The kernels write a given `out=` past the caches once a call's arrays take half of the last-level one (the forward on
several threads: two thirds). New results are written into it, but what is read is asked for ahead. Where only a core's
own caches are too small, results are asked for too. Here the caches of the one kind or of both are taken to have no
bytes at all, so that small and odd shapes go the ways that larger arrays go.
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
PLACES = {"core": (HUGE, HUGE), "last cache": (0, HUGE), "memory": (0, 0)}
SHAPES = [
    (3, 4, 7),
    (5, 16, 3, 11),
    (2, 6, 1, 131),
    (9, 30),
    (77, 100),
    (37, 515),
    (64, 8, 28, 28),
    (257, 48),
    (513, 4),
    (130, 1040),
]
FUNCTIONS = [name for name, operation in OPERATIONS.items() if operation.out]


@pytest.fixture(autouse=True)
def _cache_restored() -> Iterator[None]:
    core, last = _core.core_bytes(), _core.cache_bytes()
    yield
    _core.set_core_bytes(core)
    _core.set_cache_bytes(last)


def _take_arrays_to_lie_in(place: str) -> None:
    core, last = PLACES[place]
    _core.set_core_bytes(core)
    _core.set_cache_bytes(last)


def _assert_same(found: dict[str, dict[str, np.ndarray]], message: str) -> None:
    for place, there in found.items():
        for name, near in found["core"].items():
            np.testing.assert_array_equal(there[name], near, err_msg=f"{name}, {place}, {message}")


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
            for place in PLACES:
                memory[:] = 7
                _take_arrays_to_lie_in(place)
                with fn.num_threads(threads):
                    found[place] = {name: a.copy() for name, a in results(call(out=out)).items()}
                inside = (out.ctypes.data - memory.ctypes.data) // memory.itemsize
                assert np.all(memory[:inside] == 7)
                assert np.all(memory[inside + out.size :] == 7)
            _assert_same(found, f"{shape}, {dtype}, {skip}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_of_any_layout(function: str, layout: str) -> None:
    for shape, dtype in (
        ((3, 6, 5, 21), np.float32),
        ((4, 6, 130), np.float32),
        ((3, 4, 19), np.float64),
        ((40, 100), np.float64),
    ):
        if len(shape) < OPERATIONS[function].min_rank:
            continue
        call = OPERATIONS[function].make(fn, shape, dtype, layout=LAYOUTS[layout])
        like = call.arguments[call.main]
        found = {}
        for place in PLACES:
            _take_arrays_to_lie_in(place)
            out = LAYOUTS[layout](np.full(like.shape, np.nan, like.dtype))
            found[place] = results(call(out=out))
        _assert_same(found, f"{shape}, {dtype}")


@pytest.mark.parametrize("function", OPERATIONS)
def test_new_results_of_what_is_asked_for_ahead(function: str) -> None:
    operation = OPERATIONS[function]
    for shape in SHAPES:
        if len(shape) < operation.min_rank:
            continue
        for dtype, threads in ((np.float32, 1), (np.float64, 1), (np.float64, 2)):
            call = operation.make(fn, shape, dtype)
            found = {}
            for place in PLACES:
                _take_arrays_to_lie_in(place)
                with fn.num_threads(threads):
                    found[place] = results(call())
            _assert_same(found, f"{shape}, {dtype}, {threads}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(5, 33), (300, 131), (64, 16)])
def test_both_results_of_the_residual_step(shape: tuple[int, ...], norm: str, threads: int, dtype: type) -> None:
    rng = np.random.default_rng(len(norm) + threads)
    x, residual, dy, ds = (rng.standard_normal(shape).astype(dtype) for _ in range(4))
    forward, backward = (getattr(fn, f"dropout_add_{norm}_{way}") for way in ("forward", "backward"))
    found = {}
    for place in PLACES:
        _take_arrays_to_lie_in(place)
        y, s, dx, dresidual = (_strip_of(shape, dtype, skip)[0] for skip in (4, 1, 0, 7))
        with fn.num_threads(threads):
            _, cache = forward(x, residual, p=0.3, rng=5, out=(y, s))
            gradients = backward(dy, cache, ds=ds, out=(dx, dresidual))
        found[place] = {str(k): a for k, a in enumerate((y, s, *gradients)) if a is not None}
    _assert_same(found, f"{shape}, {norm}, {threads}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("columns", "groups"), [(30, 0), (131, 0), (300, 0), (700, 0), (33, 3), (100, 2), (700, 3)])
def test_sets_at_unequal_distances(columns: int, groups: int, dtype: type) -> None:
    """Several batches of sets whose offsets are no multiples of one number: in the cache, past it, and each alone."""
    rng = np.random.default_rng(columns)
    whole = (rng.standard_normal((14, 11, columns)) + 0.3).astype(dtype)
    weight, bias = rng.standard_normal((2, 6 if groups else columns)).astype(dtype)
    x = whole[:, :6] if groups else whole[:, :9]
    turned = np.empty((x.shape[1], x.shape[0], columns), dtype).swapaxes(0, 1)

    def calls(x: np.ndarray, **out: np.ndarray) -> list[np.ndarray]:
        if groups:
            both = fn.group_norm(x, groups, weight, bias, **out).copy()
            return [both, fn.group_norm(x, groups, **out).copy(), fn.group_norm(x, groups, None, bias, **out).copy()]
        both = fn.layer_norm(x, weight, bias, **out).copy()
        return [both, fn.layer_norm(x, **out).copy(), fn.rms_norm(x, weight, **out).copy()]

    _take_arrays_to_lie_in("core")
    want = calls(x)
    alone = [calls(sample[None].copy()) for sample in x]
    for k, y in enumerate(want):
        np.testing.assert_array_equal(y, np.concatenate([results[k] for results in alone]))
    for place in PLACES:
        _take_arrays_to_lie_in(place)
        for out in (np.empty(x.shape, dtype), turned):
            for y, expected in zip(calls(x, out=out), want, strict=True):
                np.testing.assert_array_equal(y, expected)
