"""out= that shares memory with an argument: in place where the contract allows, else correct or refused, never garbage.

The expected values come from the same call without out=, made before anything is overwritten.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from operations import OPERATIONS, Call

WITH_OUT = [name for name, operation in OPERATIONS.items() if operation.out]
IN_PLACE = [name for name, operation in OPERATIONS.items() if operation.in_place]
# The cache of dropout holds a seed and that of the residual steps holds s: neither needs x.
FORWARD = [name for name in WITH_OUT if name.endswith("_forward") and "drop" not in name]
SHAPES = [(5, 6, 7), (3, 6, 130), (2, 6, 2051), (9, 6, 33, 40)]


def first(results: dict[str, np.ndarray]) -> np.ndarray:
    """The result that out= receives."""
    return next(iter(results.values()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_gives_the_same_bits(name: str, dtype: type) -> None:
    operation = OPERATIONS[name]
    for shape in SHAPES:
        for options in operation.variants:
            if "residual" in options:
                continue
            call = operation.make(fn, shape, dtype, **options)
            expected = call.run()
            target = call.arguments[operation.in_place]
            found = call.run(out=target)
            assert first(found) is target or np.shares_memory(first(found), target)
            for key, value in expected.items():
                np.testing.assert_array_equal(found[key], value, strict=True, err_msg=f"{shape} {options} {key}")


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_is_filled_and_returned(name: str) -> None:
    operation = OPERATIONS[name]
    for layout in ("C", "F", "strided", "reversed"):
        call = operation.make(fn, (3, 6, 35))
        expected = first(call.run())
        out = {
            "C": np.full(expected.shape, np.nan, expected.dtype),
            "F": np.full(expected.shape, np.nan, expected.dtype, order="F"),
            "strided": np.full((3, 6, 80), np.nan, expected.dtype)[..., 3:73:2],
            "reversed": np.full(expected.shape, np.nan, expected.dtype)[::-1, :, ::-1],
        }[layout]
        result = call(out=out)
        while isinstance(result, tuple):
            result = result[0]
        assert result is out
        np.testing.assert_array_equal(out, expected, strict=True)


def test_out_does_not_touch_the_memory_between_its_elements() -> None:
    for name in WITH_OUT:
        wide = np.full((3, 6, 80), 77.0, np.float32)
        call = OPERATIONS[name].make(fn, (3, 6, 35))
        call(out=wide[..., 3:73:2])
        untouched = np.ones(80, bool)
        untouched[3:73:2] = False
        assert (wide[..., untouched] == 77.0).all(), name


@pytest.mark.parametrize("name", FORWARD)
def test_forward_refuses_to_overwrite_its_x(name: str) -> None:
    call = OPERATIONS[name].make(fn, (4, 6, 35))
    x = call.arguments["x"]
    before = x.copy()
    running = {n: call.arguments[n].copy() for n in call.updated}
    for out in (x, x[::-1]):
        with pytest.raises(ValueError, match=r"\bout\b.*\bx\b"):
            call(out=out)
    np.testing.assert_array_equal(x, before)
    for key, value in running.items():
        np.testing.assert_array_equal(call.arguments[key], value, err_msg=key)


def correct_or_refused(call: Call, out: np.ndarray, what: Any) -> None:
    """The call writes what it should into out, or raises a ValueError that names out and writes nothing."""
    expected = first(call.run()).copy()
    inputs = {name: a.copy() for name, a in call.arguments.items() if isinstance(a, np.ndarray)}
    before = out.copy()
    refusal = None
    try:
        call(out=out)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        np.testing.assert_array_equal(out, expected, strict=True, err_msg=str(what))
        return
    assert "out" in refusal, what
    np.testing.assert_array_equal(out, before, err_msg=f"written before the refusal: {what}")
    for name, value in inputs.items():
        np.testing.assert_array_equal(call.arguments[name], value, err_msg=f"{name} changed by a refused call: {what}")


@pytest.mark.parametrize("shape", [(4, 6, 35), (3, 6, 700), (2, 6, 2049)])
@pytest.mark.parametrize("name", WITH_OUT)
def test_partial_overlap_with_the_main_argument(name: str, shape: tuple[int, ...]) -> None:
    operation = OPERATIONS[name]
    size = int(np.prod(shape))
    for shift in (1, -1, 7, shape[-1], -shape[-1], size // 2):
        call = operation.make(fn, shape)
        memory = np.zeros(2 * size, np.float32)
        start = size // 2
        values = memory[start : start + size].reshape(shape)
        values[...] = call.arguments[call.main]
        out = memory[start + shift : start + shift + size].reshape(shape)
        moved = Call(call.function, {**call.arguments, call.main: values}, call.main, call.updated)
        correct_or_refused(moved, out, (name, shift))


@pytest.mark.parametrize("view", ["reversed", "transposed", "rolled_rows"])
@pytest.mark.parametrize("name", WITH_OUT)
def test_the_same_memory_in_another_order(name: str, view: str) -> None:
    shape = (33, 6, 33)
    call = OPERATIONS[name].make(fn, shape)
    memory = np.array(call.arguments[call.main])
    out = {
        "reversed": memory[::-1, ::-1, ::-1],
        "transposed": memory.transpose(2, 1, 0),
        "rolled_rows": memory[::-1],
    }[view]
    same = Call(call.function, {**call.arguments, call.main: memory}, call.main, call.updated)
    correct_or_refused(same, out, (name, view))


@pytest.mark.parametrize("name", WITH_OUT)
def test_any_other_overlap(name: str) -> None:
    """out over a parameter, a statistic, a mask, the residual, or the x and the weight that a cache holds."""
    operation = OPERATIONS[name]
    shape = (4, 6, 6)
    size = int(np.prod(shape))
    names = [n for n, a in operation.make(fn, shape).arguments.items() if isinstance(a, np.ndarray)]
    for victim in names:
        call = operation.make(fn, shape)
        values = call.arguments[victim]
        if victim == call.main:
            continue
        memory = np.zeros(size, np.float32)
        shared = memory.view(values.dtype)[: values.size].reshape(values.shape)
        shared[...] = values
        changed = Call(call.function, {**call.arguments, victim: shared}, call.main)
        correct_or_refused(changed, memory.reshape(shape), (name, victim))


@pytest.mark.parametrize("name", [n for n in WITH_OUT if n.endswith("_backward") and "drop" not in n])
def test_backward_into_the_x_of_its_cache(name: str) -> None:
    call = OPERATIONS[name].make(fn, (4, 6, 35))
    x = call.arguments["cache"].x
    x.flags.writeable = True
    correct_or_refused(call, x, name)
