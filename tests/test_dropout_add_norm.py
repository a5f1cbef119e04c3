"""The residual step: the bits of the separate calls, gradients against numeric ones, caches and errors."""

from __future__ import annotations

import math
import tracemalloc
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core, reference
from operations import LAYOUTS

FLOATS = [np.float32, np.float64]
NORMS = ["layer_norm", "rms_norm"]
SHAPES = [((7,), -1), ((5, 33), -1), ((3, 4, 17), -1), ((3, 4, 17), 1), ((2, 3, 5, 7), -2), ((2, 513), 1)]


def sample(shape: tuple[int, ...], dtype: type = np.float64, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def function(norm: str, suffix: str = "", module: Any = fn) -> Any:
    """One of dropout_add_layer_norm, dropout_add_layer_norm_forward, dropout_add_layer_norm_backward,
    dropout_add_rms_norm, dropout_add_rms_norm_forward, dropout_add_rms_norm_backward.
    """
    return getattr(module, f"dropout_add_{norm}{suffix}")


def parameters(norm: str, shape: tuple[int, ...], dtype: type) -> dict[str, np.ndarray]:
    names = ("weight", "bias") if norm == "layer_norm" else ("weight",)
    return {name: sample(shape, dtype, 10 + i) for i, name in enumerate(names)}


def separate(norm: str, x: Any, residual: Any, p: float, rng: Any, **settings: Any) -> tuple[Any, Any, Any, Any]:
    """The same step by the package's own calls."""
    dropped, dropout_cache = fn.dropout_forward(x, p, rng=rng)
    s = dropped if residual is None else residual + dropped
    y, norm_cache = getattr(fn, f"{norm}_forward")(s, **settings)
    return y, s, dropout_cache, norm_cache


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_of_the_separate_calls(level: str, norm: str, shape: tuple[int, ...], axis: int, dtype: type) -> None:
    _core.set_isa(level)
    x, residual, dy, ds = (sample(shape, dtype, i) for i in range(4))
    for with_residual in (True, False):
        for p in (0.0, 0.3, 1.0):
            for given in ({}, parameters(norm, shape[axis:], dtype)):
                settings = {**given, "axis": axis, "eps": 1e-3}
                r = residual if with_residual else None
                y, s, dropout_cache, norm_cache = separate(norm, x, r, p, fn.Philox(7, 8), **settings)
                plain = function(norm)(x, r, p=p, rng=fn.Philox(7, 8), **settings)
                rng = fn.Philox(7, 8)
                cached, cache = function(norm, "_forward")(x, r, p=p, rng=rng, **settings)
                assert rng.offset == 9
                for found in (plain, cached):
                    assert_same_bits(found[0], y)
                    assert_same_bits(found[1], s)

                for from_above in (None, ds):
                    grads = function(norm, "_backward")(dy, cache, ds=from_above)
                    g, dweight, dbias = getattr(fn, f"{norm}_backward")(dy, norm_cache)
                    g = g if from_above is None else g + from_above
                    assert grads._fields == ("dx", "dresidual", "dweight", "dbias")
                    assert_same_bits(grads.dx, fn.dropout_backward(g, dropout_cache))
                    if with_residual:
                        assert_same_bits(grads.dresidual, g)
                        assert not np.shares_memory(grads.dx, grads.dresidual)
                    else:
                        assert grads.dresidual is None
                    for found, expected in ((grads.dweight, dweight), (grads.dbias, dbias)):
                        if expected is None:
                            assert found is None
                        else:
                            assert_same_bits(found, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_p_0_needs_no_rng(norm: str) -> None:
    x, residual = sample((4, 9)), sample((4, 9), seed=1)
    (y, s), cache = function(norm, "_forward")(x, residual)
    assert_same_bits(s, residual + x)
    assert_same_bits(y, getattr(fn, norm)(s))
    assert cache.dropout is None
    y, s = function(norm)(x)
    assert_same_bits(s, x)
    assert not np.shares_memory(s, x)
    dy = sample((4, 9), seed=2)
    dx, dresidual, _, _ = function(norm, "_backward")(dy, cache)
    assert_same_bits(dx, dresidual)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(norm: str, layout: str) -> None:
    x, residual, dy, ds = (sample((3, 5, 37), seed=i) for i in range(4))
    change = LAYOUTS[layout]
    settings = {"p": 0.4, "axis": -1, **parameters(norm, (37,), np.float64)}
    (y, s), cache = function(norm, "_forward")(x, residual, rng=5, **settings)
    grads = function(norm, "_backward")(dy, cache, ds=ds)
    out = change(np.full_like(x, np.nan))
    (y2, s2), cache2 = function(norm, "_forward")(change(x), residual.copy(order="F"), rng=5, out=out, **settings)
    assert y2 is out
    assert s2.strides == np.empty_like(change(x), order="K").strides
    assert_same_bits(s2, s)
    # The norm may cut its sums another way for another layout of s.
    assert np.all(np.abs(y2 - y) <= 8 * 2.0**-53 * np.maximum(4, np.abs(y)))
    for found, expected in zip(function(norm, "_backward")(change(dy), cache2, ds=change(ds)), grads, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=0, atol=64 * 2.0**-53 * np.abs(expected).max())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("axis", [-1, 1])
def test_numeric_gradients(norm: str, axis: int) -> None:
    """Central differences of a random linear form of y and s, in float64."""
    shape = (2, 3, 5)
    arrays = {"x": sample(shape), "residual": sample(shape, seed=1), **parameters(norm, shape[axis:], np.float64)}
    cy, cs = sample(shape, seed=5), sample(shape, seed=6)

    def loss() -> float:
        y, s = function(norm)(**arrays, p=0.3, rng=11, axis=axis)
        return math.fsum((cy * y + cs * s).ravel())

    _, cache = function(norm, "_forward")(**arrays, p=0.3, rng=11, axis=axis)
    grads = function(norm, "_backward")(cy, cache, ds=cs)
    step = 1e-5
    for name, a in arrays.items():
        numeric = np.empty_like(a)
        for i in np.ndindex(a.shape):
            kept = a[i]
            a[i] = kept + step
            above = loss()
            a[i] = kept - step
            numeric[i] = (above - loss()) / (2 * step)
            a[i] = kept
        np.testing.assert_allclose(getattr(grads, f"d{name}"), numeric, rtol=2e-7, atol=2e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_reference_agrees(norm: str, dtype: type) -> None:
    shape = (6, 5, 43)
    x, residual, dy, ds = (sample(shape, dtype, i) for i in range(4))
    given = {"p": 0.25, "axis": -1, **parameters(norm, (43,), dtype)}
    u = np.finfo(dtype).eps / 2
    plain = function(norm, module=reference)(x, residual, rng=3, **given)
    (y, s), cache = function(norm, "_forward")(x, residual, rng=3, **given)
    (ry, rs), rcache = function(norm, "_forward", reference)(x, residual, rng=3, **given)
    assert_same_bits(plain[0], ry)
    assert_same_bits(s, rs)
    assert_same_bits(s, plain[1])
    assert np.all(np.abs(y - ry) <= 8 * u * np.maximum(4, np.abs(ry)))
    ours = function(norm, "_backward")(dy, cache, ds=ds)
    theirs = function(norm, "_backward", reference)(dy, rcache, ds=ds)
    assert ours._fields == theirs._fields
    for found, expected in zip(ours, theirs, strict=True):
        if expected is None:
            assert found is None
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=64 * u * np.abs(expected).max())


@pytest.mark.parametrize("norm", NORMS)
def test_in_place_empty_and_verified(norm: str) -> None:
    x, residual = sample((4, 9)), sample((4, 9), seed=1)
    expected, _ = function(norm)(x, residual, p=0.5, rng=1)
    rng = fn.Philox(1)
    with fn.verify():
        out = x.copy()
        y, _ = function(norm)(out, residual, p=0.5, rng=rng, out=out)
        assert y is out
        (_, s), cache = function(norm, "_forward")(x, residual, p=0.5, rng=rng)
        function(norm, "_backward")(residual, cache, ds=x)
    assert rng.offset == 2
    assert_same_bits(y, expected)
    assert cache.s is s
    (y, s), cache = function(norm, "_forward")(np.empty((0, 9)), p=0.5, rng=1)
    assert y.shape == s.shape == function(norm, "_backward")(y, cache).dx.shape == (0, 9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("suffix", ["", "_forward"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"p": 1.5}, ValueError, "p is 1.5"),
        ({"p": math.nan}, ValueError, "p is nan"),
        ({"rng": None}, TypeError, "rng is None.*since p is 0.5"),
        ({"rng": True}, TypeError, "rng is True"),
        ({"rng": -1}, ValueError, "rng is -1"),
        ({"eps": -1.0}, ValueError, "eps is -1"),
        ({"axis": 2}, ValueError, "axis is 2"),
        ({"weight": np.ones(4)}, ValueError, r"weight has shape \(4,\)"),
        ({"weight": np.ones(5, np.float32)}, TypeError, "weight has dtype float32"),
        ({"residual": np.ones((5, 3))}, ValueError, r"residual has shape \(5, 3\); expected \(3, 5\)"),
        ({"residual": np.ones((3, 5), np.float32)}, TypeError, "residual has dtype float32"),
        ({"x": np.ones((3, 5), int)}, TypeError, "x has dtype int64"),
        ({"x": np.ones((3, 0)), "residual": None, "out": None, "weight": None}, ValueError, "nothing to normalise"),
        ({"out": np.ones((5, 3))}, ValueError, "out has shape"),
        ({"out": np.ones((3, 5), np.float32)}, TypeError, "out has dtype"),
    ],
)
def test_bad_arguments_change_nothing(norm: str, suffix: str, changes: dict, error: type, message: str) -> None:
    rng, out = fn.Philox(3, 4), np.full((3, 5), 7.0)
    arguments = {
        "x": np.ones((3, 5)), "residual": np.ones((3, 5)), "weight": np.ones(5), "p": 0.5, "rng": rng, "out": out
    }  # fmt: skip
    with pytest.raises(error, match=message):
        function(norm, suffix)(**{**arguments, **changes})
    assert rng.offset == 4
    assert np.all(out == 7.0)


@pytest.mark.parametrize("norm", NORMS)
def test_overlaps(norm: str) -> None:
    x, residual, rng = sample((4, 9)), sample((4, 9), seed=1), fn.Philox(1)
    with pytest.raises(ValueError, match="out shares memory with x"):
        function(norm, "_forward")(x, residual, p=0.5, rng=rng, out=x)
    with pytest.raises(ValueError, match="out shares memory with residual"):
        function(norm)(x, residual, p=0.5, rng=rng, out=residual)
    with pytest.raises(ValueError, match="out overlaps x in part"):
        function(norm)(x, residual, p=0.5, rng=rng, out=x[::-1])
    assert rng.offset == 0


@pytest.mark.parametrize("norm", NORMS)
def test_backward_refuses_what_does_not_fit(norm: str) -> None:
    x = sample((4, 9))
    cache = function(norm, "_forward")(x, p=0.5, rng=1)[1]
    other = function("rms_norm" if norm == "layer_norm" else "layer_norm", "_forward")(x)[1]
    backward = function(norm, "_backward")
    with pytest.raises(ValueError, match=r"cache comes from dropout_add_.*; expected one from"):
        backward(x, other)
    with pytest.raises(ValueError, match=f"cache comes from layer_norm_forward; expected one from dropout_add_{norm}"):
        backward(x, fn.layer_norm_forward(x)[1])
    with pytest.raises(TypeError, match=f"cache is None; expected the cache that dropout_add_{norm}_forward returned"):
        backward(x, None)
    with pytest.raises(ValueError, match="dy has shape"):
        backward(x[:3], cache)
    with pytest.raises(TypeError, match="ds has dtype float32"):
        backward(x, cache, ds=x.astype(np.float32))
    with pytest.raises(ValueError, match="ds has shape"):
        backward(x, cache, ds=x[:, :8])


def test_cache_is_read_only() -> None:
    (_, s), cache = fn.dropout_add_layer_norm_forward(sample((4, 9)), p=0.5, rng=fn.Philox(6, 7))
    assert cache.function == "dropout_add_layer_norm"
    assert cache.norm.x is s
    assert (cache.dropout.seed, cache.dropout.offset, cache.dropout.p) == (6, 7, 0.5)
    with pytest.raises(AttributeError):
        cache.norm = None  # type: ignore[misc]


@pytest.mark.unverified("compares the kernels with themselves")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_pass_has_the_bits_of_the_separate_calls(dtype: type, norm: str, threads: int) -> None:
    """Many blocks of rows, a shorter last one, groups of rows whose gradients are summed, rows that are split."""
    for shape in [(1031, 97), (259, 768), (5, 12_000), (3, 30_001), (2, 140, 65)]:
        x, residual, dy, ds = (sample(shape, dtype, i) for i in range(4))
        settings = parameters(norm, shape[-1:], dtype)
        for with_residual, with_ds, p in [
            (True, True, 0.3),
            (False, True, 0.3),
            (True, False, 0.0),
            (False, False, 0.9),
        ]:
            r = residual if with_residual else None
            with fn.num_threads(threads):
                (y, s), cache = function(norm, "_forward")(x, r, p=p, rng=fn.Philox(5, 6), **settings)
                grads = function(norm, "_backward")(dy, cache, ds=ds if with_ds else None)
            wanted_y, wanted_s, dropout_cache, norm_cache = separate(norm, x, r, p, fn.Philox(5, 6), **settings)
            assert_same_bits(s, wanted_s)
            assert_same_bits(y, wanted_y)
            g, dweight, dbias = getattr(fn, f"{norm}_backward")(dy, norm_cache)
            g = g + ds if with_ds else g
            assert_same_bits(grads.dx, fn.dropout_backward(g, dropout_cache))
            assert (grads.dresidual is None) == (r is None)
            if grads.dresidual is not None:
                assert_same_bits(grads.dresidual, g)
                assert not np.shares_memory(grads.dresidual, grads.dx)
            assert_same_bits(grads.dweight, dweight)
            if norm == "layer_norm":
                assert_same_bits(grads.dbias, dbias)


@pytest.mark.unverified("the compiled entries leave every call while verification is on")
def test_the_compiled_step_takes_rows_in_one_piece_and_leaves_the_rest() -> None:
    x, w, rng = sample((4, 9), np.float32), sample((9,), np.float32), fn.Philox(1, 2)

    def step(**changes: Any) -> Any:
        call: dict[str, Any] = {"rms": False, "x": x, "residual": x, "weight": w, "bias": w, "p": 0.5, "rng": rng}
        call |= {"axis": -1, "eps": 1e-5, "out": None, "cached": False}
        return _core.dropout_add_norm(*(call | changes).values())

    assert step() is not None
    assert step(axis=1, eps=0, p=0, rng=None, residual=None, out=x.copy()) is not None
    assert rng.offset == 3
    for odd in (
        {"x": x[:, ::-1]}, {"x": np.asfortranarray(x)}, {"x": x.tolist()}, {"residual": x[:3]},
        {"residual": x.astype(np.float64)}, {"residual": np.asfortranarray(x)}, {"weight": w[:8]}, {"weight": w[::-1]},
        {"bias": np.ones(9)}, {"rms": True}, {"p": 2.0}, {"p": True}, {"p": math.nan}, {"rng": None}, {"rng": -1},
        {"rng": np.random.default_rng(1)}, {"axis": 2}, {"axis": 1.0}, {"eps": -1.0}, {"eps": math.nan},
        {"out": x[::-1]}, {"out": x, "cached": True}, {"out": ()}, {"out": (x.copy(), x[::-1])},
        {"out": np.empty((4, 9))}, {"x": x[:0], "residual": x[:0]},
        {"x": x[:, :0].copy()},
    ):  # fmt: skip
        assert step(**odd) is None, odd
    assert rng.offset == 3
    (_, _), cache = fn.dropout_add_layer_norm_forward(x, x, w, w, p=0.5, rng=7)
    good = (x, cache.norm, None, 0.5, 7, 0, True, None)
    assert _core.dropout_add_norm_backward(*good) is not None
    for i, value in [(0, x[:3]), (0, x.T), (1, None), (1, cache), (2, x[:3]), (3, 2.0), (4, -1), (5, 2**64), (7, x.T)]:
        assert _core.dropout_add_norm_backward(*good[:i], value, *good[i + 1 :]) is None, (i, value)


def calls_into(
    norm: str, arrays: dict[str, np.ndarray], p: float, out: Any, gradients: Any, settings: dict[str, Any]
) -> tuple[Any, Any, Any]:
    x, residual, dy, ds = (arrays[name] for name in ("x", "residual", "dy", "ds"))
    (y, s), cache = function(norm, "_forward")(x, residual, p=p, rng=fn.Philox(5, 6), out=out, **settings)
    return y, s, function(norm, "_backward")(dy, cache, ds=ds, out=gradients)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [
        (5, 33),
        (300, 131),
        # Past the caches, with blocks of rows that do not fit the groups of the parameters' sums.
        pytest.param((2051, 1031), marks=pytest.mark.unverified("compares the kernels with themselves")),
    ],
)
def test_results_into_given_arrays(shape: tuple[int, ...], dtype: type, norm: str, threads: int) -> None:
    arrays = {name: sample(shape, dtype, i) for i, name in enumerate(("x", "residual", "dy", "ds"))}
    settings = parameters(norm, shape[-1:], dtype)
    y, s, grads = calls_into(norm, arrays, 0.3, None, None, settings)
    y_out, s_out, dx_out, dresidual_out = (np.full(shape, np.nan, dtype) for _ in range(4))
    for out, gradients in [
        ((y_out, s_out), (dx_out, dresidual_out)),
        ((None, s_out), (None, dresidual_out)),
        ((y_out, None), dx_out),
    ]:
        for a in (y_out, s_out, dx_out, dresidual_out):
            a.fill(np.nan)
        with fn.num_threads(threads):
            got_y, got_s, got = calls_into(norm, arrays, 0.3, out, gradients, settings)
        assert (got_y is y_out) == (out[0] is not None)
        assert (got_s is s_out) == (out[1] is not None)
        assert (got.dx is dx_out) == (gradients is dx_out or gradients[0] is not None)
        assert (got.dresidual is dresidual_out) == (isinstance(gradients, tuple))
        assert_same_bits(got_y, y)
        assert_same_bits(got_s, s)
        for found, expected in zip(got, grads, strict=True):
            assert (found is None) == (expected is None)
            if expected is not None:
                assert_same_bits(found, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "verified", "layout"),
    [
        ((7, 33), False, "contiguous"),
        ((7, 33), True, "contiguous"),
        ((2051, 1031), False, "contiguous"),
        ((7, 33), False, "sliced"),
        ((7, 33), False, "padded_rows"),
    ],
)
def test_in_place(shape: tuple[int, ...], verified: bool, layout: str, norm: str) -> None:
    """s may be the residual, or x where no cache is made; dx may be dy; without a residual too."""
    placed = LAYOUTS[layout]
    arrays = {name: placed(sample(shape, np.float32, i)) for i, name in enumerate(("x", "residual", "dy", "ds"))}
    for residual in (arrays["residual"], None):
        for p in (0.3, 0.0):
            wanted = calls_into(norm, {**arrays, "residual": residual}, p, None, None, {})
            with fn.verify() if verified else nullcontext():
                x, dy, y = (placed(arrays[name].copy()) for name in ("x", "dy", "x"))
                found = function(norm)(x, residual, p=p, rng=fn.Philox(5, 6), out=(y, x))
                assert found[0] is y
                assert found[1] is x
                assert_same_bits(y, wanted[0])
                assert_same_bits(x, wanted[1])
                changed = None if residual is None else placed(residual.copy())
                own = {**arrays, "residual": changed, "dy": dy}
                got = calls_into(norm, own, p, (None, changed), (dy, None), {})
                assert residual is None or got[1] is changed
                assert got[2].dx is dy
                assert_same_bits(got[1], wanted[1])
                assert_same_bits(dy, wanted[2].dx)
                if residual is not None:
                    assert_same_bits(got[2].dresidual, wanted[2].dresidual)


@pytest.mark.unverified("measures memory, of which the references need more")
@pytest.mark.parametrize("norm", NORMS)
def test_given_arrays_save_the_memory(norm: str) -> None:
    arrays = {name: sample((512, 768), np.float32, i) for i, name in enumerate(("x", "residual", "dy", "ds"))}
    out, gradients = (tuple(np.empty((512, 768), np.float32) for _ in range(2)) for _ in range(2))
    tracemalloc.start()
    try:
        calls_into(norm, arrays, 0.3, out, gradients, {})
        assert tracemalloc.get_traced_memory()[1] < arrays["x"].nbytes // 8
        calls_into(norm, arrays, 0.3, out, None, {})
        assert tracemalloc.get_traced_memory()[1] > arrays["x"].nbytes  # so such memory is seen
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strided", [False, True])
def test_given_arrays_that_do_not_fit(norm: str, strided: bool) -> None:
    """Every refusal comes before anything is drawn or written."""
    shape = (4, 18)
    x, residual, dy, ds = (sample(shape, np.float64, i) for i in range(4))
    if strided:
        x, residual, dy, ds = (np.asfortranarray(a) for a in (x, residual, dy, ds))
    weight = np.ones((4, 18))
    rng, y, s = fn.Philox(3, 4), np.full(shape, 7.0), np.full(shape, 7.0)
    read_only = np.full(shape, 7.0)
    read_only.flags.writeable = False
    call = {"p": 0.5, "rng": rng, "weight": weight, "axis": 0}
    step, forward = function(norm), function(norm, "_forward")
    for out, error, message in [
        ((y,), ValueError, r"out is a tuple of 1; expected an array or a tuple of two, \(y, s\)"),
        ((y, s, s), ValueError, "out is a tuple of 3"),
        ((y, s[:3]), ValueError, r"out\[1\] has shape \(3, 18\); expected \(4, 18\)"),
        ((y[:3], s), ValueError, r"out\[0\] has shape \(3, 18\)"),
        ((y, s.astype(np.float32)), TypeError, r"out\[1\] has dtype float32"),
        ((y, [1.0]), TypeError, r"out\[1\] is a list"),
        ((y, read_only), ValueError, r"out\[1\] is read-only"),
        ((y, np.broadcast_to(s[:1], shape)), ValueError, r"out\[1\] is read-only"),
        ((y, y), ValueError, r"out\[1\] shares memory with out\[0\]"),
        ((y, y[::-1]), ValueError, r"out\[1\] shares memory with out\[0\]"),
        ((y, weight), ValueError, r"out\[1\] shares memory with weight"),
        ((residual, s), ValueError, r"out\[0\] shares memory with residual"),
        ((y, residual[::-1]), ValueError, r"out\[1\] shares memory with residual"),
        ((y, x[::-1]), ValueError, r"out\[1\] (overlaps x in part|shares memory with x)"),
    ]:
        for f in (step, forward):
            with pytest.raises(error, match=message):
                f(x, residual, out=out, **call)
    for out in ((y, x), (x, s)):
        with pytest.raises(ValueError, match=r"out\[[01]\] shares memory with x; expected separate memory: a forward"):
            forward(x, residual, out=out, **call)
    assert rng.offset == 4
    _, cache = forward(x, residual, **call)
    _, without = forward(x, **call)
    for out, error, message in [
        ((y,), ValueError, r"out is a tuple of 1; expected an array or a tuple of two, \(dx, dresidual\)"),
        (y[:3], ValueError, r"out has shape \(3, 18\)"),
        ((y, y), ValueError, r"out\[1\] shares memory with out\[0\]"),
        (cache.s, ValueError, "out shares memory with the cache's s"),
        ((None, cache.s), ValueError, r"out\[1\] shares memory with the cache's s"),
        ((y, weight), ValueError, r"out\[1\] shares memory with the cache's weight"),
        (ds, ValueError, "out shares memory with ds"),
        ((y, ds), ValueError, r"out\[1\] shares memory with ds"),
        ((y, dy), ValueError, r"out\[1\] shares memory with dy"),
        (dy[::-1], ValueError, "out overlaps dy in part"),
        ((y, s.astype(np.float32)), TypeError, r"out\[1\] has dtype float32"),
        ((y, read_only), ValueError, r"out\[1\] is read-only"),
    ]:
        with pytest.raises(error, match=message):
            function(norm, "_backward")(dy, cache, ds=ds, out=out)
    with pytest.raises(
        ValueError, match=r"out\[1\] is for dresidual; expected None, since the forward had no residual"
    ):
        function(norm, "_backward")(dy, without, out=(y, s))
    assert np.all(y == 7.0)
    assert np.all(s == 7.0)
    assert np.all(weight == 1.0)
    for i, a in enumerate((x, residual, dy, ds)):
        assert np.array_equal(a, sample(shape, np.float64, i))
