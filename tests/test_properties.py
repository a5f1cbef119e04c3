"""Hypothesis: any shape, any strides (negative, zero, unaligned, misordered), any arguments, against the references.

Refuses special values, which would mostly test themselves: test_accuracy.py and test_invariants.py have those.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastnorm as fn
from contract import SHAPES
from ulps import assert_close, expected

pytestmark = pytest.mark.unverified("compares every result with the references itself")

STEMS = list(SHAPES)
# The same examples on every run, and nothing kept on disk.
SETTINGS = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
LENGTHS = st.one_of(st.integers(1, 7), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 65]))


@st.composite
def memory(draw: st.DrawFn, shape: tuple[int, ...], dtype: Any, *, writeable: bool = False) -> np.ndarray:
    """An array of zeros of this shape: axes in any order, steps of any sign, gaps, any alignment; strides of 0."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, -1, -3])) for _ in shape]
    padding = [draw(st.integers(0, 2)) for _ in shape]
    extents = [n * abs(step) + pad for n, step, pad in zip(shape, steps, padding, strict=True)]
    itemsize = np.dtype(dtype).itemsize
    shift = draw(st.sampled_from([0, 0, 0, 1, itemsize // 2, itemsize]))
    raw = np.zeros(math.prod(extents) * itemsize + shift, np.uint8)[shift:]
    whole = raw.view(dtype).reshape([extents[i] for i in order]).transpose(np.argsort(order))
    a = whole[tuple(slice(pad, None, abs(step)) for step, pad in zip(steps, padding, strict=True))]
    a = a[tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)][tuple(slice(n) for n in shape)]
    assert a.shape == shape
    if not writeable and shape and draw(st.integers(0, 4)) == 0:
        axis = draw(st.integers(0, len(shape) - 1))
        a = np.broadcast_to(a.take([0], axis), shape) if shape[axis] else a
    return a


@st.composite
def filled(draw: st.DrawFn, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Values around an offset, in any memory; broadcast memory holds one value along its axis of stride 0."""
    a = draw(memory(shape, dtype))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.normal(draw(st.sampled_from([0.0, 3.0, -1e4])), draw(st.sampled_from([1.0, 0.1, 30.0])), shape)
    if a.flags.writeable:
        a[...] = values
    else:
        axis = next(i for i, (n, s) in enumerate(zip(a.shape, a.strides, strict=True)) if s == 0 or n == 1)
        a = np.broadcast_to(values.take([0], axis).astype(dtype), shape)
    return a


@st.composite
def calls(draw: st.DrawFn, stem: str) -> tuple[dict[str, Any], Any]:
    """The arguments of a forward, and the dtype."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    least = {"layer_norm": 1, "rms_norm": 1, "instance_norm": 3}.get(stem, 2)
    shape = list(draw(st.lists(LENGTHS, min_size=least, max_size=5).filter(lambda s: math.prod(s) <= 20_000)))
    arguments: dict[str, Any] = {"eps": draw(st.sampled_from([0.0, 1e-5, 0.1]))}
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    if stem in ("layer_norm", "rms_norm"):
        arguments["axis"], parameters = axis, tuple(shape[axis:])
    else:
        if stem == "group_norm":
            arguments["num_groups"] = draw(st.integers(1, 4))
            shape[axis] = arguments["num_groups"] * draw(st.integers(1, 4))
        arguments["channel_axis"], parameters = axis, (shape[axis],)
    if stem == "batch_norm":
        arguments["momentum"] = draw(st.sampled_from([0.0, 0.1, 1.0, None]))
        if math.prod(shape) == shape[axis]:
            shape[(axis + 1) % len(shape)] += 1
            if math.prod(shape) == shape[axis]:
                shape.append(2)
                arguments["channel_axis"] = axis % (len(shape) - 1)
        parameters = (shape[arguments["channel_axis"]],)
        for name in ("running_mean", "running_var"):
            if draw(st.booleans()):
                arguments[name] = draw(memory(parameters, draw(st.sampled_from([dtype, np.float64])), writeable=True))
                arguments[name][...] = draw(st.sampled_from([0.0, 1.0, 2.5]))
    arguments["x"] = draw(filled(tuple(shape), dtype))
    for name in ("weight", "bias"):
        if draw(st.booleans()) and not (stem == "rms_norm" and name == "bias"):
            arguments[name] = draw(filled(parameters, dtype))
    if draw(st.booleans()):
        arguments["out"] = draw(memory(tuple(shape), dtype, writeable=True))
    return arguments, dtype


@pytest.mark.parametrize("stem", STEMS)
def test_forward_and_backward_of_anything(stem: str) -> None:
    @SETTINGS
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        arguments, dtype = data.draw(calls(stem))
        x = arguments["x"]
        before = x.copy()
        exact = expected(f"{stem}_forward", **arguments)
        y, cache = getattr(fn, f"{stem}_forward")(**arguments)
        statistics = {k: getattr(cache, k) for k in ("mean", "rstd", "batch_var") if getattr(cache, k) is not None}
        assert_close({"y": y, **statistics, **arguments}, exact)
        np.testing.assert_array_equal(x, before)
        if "out" in arguments:
            assert y is arguments["out"]
        dy = data.draw(filled(x.shape, dtype))
        out = data.draw(memory(x.shape, dtype, writeable=True)) if data.draw(st.booleans()) else None
        gradients = getattr(fn, f"{stem}_backward")(dy, cache, out=out)
        got = {name: gradient for name, gradient in gradients._asdict().items() if gradient is not None}
        assert_close(got, expected(f"{stem}_backward", dy=dy, cache=cache))

    check()


@SETTINGS
@given(data=st.data())
def test_moments_of_anything(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    shape = tuple(data.draw(st.lists(LENGTHS, min_size=1, max_size=4).filter(lambda s: math.prod(s) <= 20_000)))
    x = data.draw(filled(shape, dtype))
    axes = data.draw(st.one_of(st.none(), st.sets(st.integers(0, len(shape) - 1)).map(tuple)))
    m = fn.moments(x, axis=axes)
    assert_close({"mean": np.asarray(m.mean), "m2": np.asarray(m.m2)}, expected("moments", x=x, axis=axes))
