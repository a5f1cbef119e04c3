"""What must hold to the last bit: constants, single values, NaN and Inf in their own set, empty batches, sets alone.

Refuses tolerances.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from contract import MODULES, SHAPES
from operations import LAYOUTS, OPERATIONS, results

STEMS = list(SHAPES)
CENTRED = [stem for stem in STEMS if stem != "rms_norm"]
CONSTANTS = [0.0, 1.0, -3.3, 0.1, 16_777_213.0, 1e-30, -1e30, 3e38, 1e-44]


def training(stem: str) -> str:
    return f"{stem}_forward"


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("stem", CENTRED)
def test_a_constant_set_gives_exactly_the_bias(stem: str, module: Any, dtype: Any, eps: float) -> None:
    for shape in ((3, 4, 5), (2, 6, 33), (2, 3, 517), (2, 2, 2049), (5, 34, 7)):
        for constant in CONSTANTS:
            x = np.full(shape, constant, dtype)
            for layout in ("contiguous", "channels_last", "fortran"):
                make = OPERATIONS[training(stem)].make
                call = make(module, shape, dtype, x=LAYOUTS[layout](x), eps=eps)
                y, cache = call()
                bias = call.arguments["bias"]
                expected = bias if stem == "layer_norm" else bias.reshape(-1, *(1,) * (x.ndim - 2))
                np.testing.assert_array_equal(y, np.broadcast_to(expected, shape), f"{shape} {constant} {layout}")
                assert np.all(cache.mean == dtype(constant))
                dy = np.random.default_rng(1).normal(size=shape).astype(dtype)
                gradients = getattr(module, f"{stem}_backward")(dy, cache)
                assert np.all(gradients.dweight == 0)
                if eps == 0:
                    assert np.all(gradients.dx == 0)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("stem", "shape"), [("layer_norm", (5, 1)), ("group_norm", (3, 2)), ("instance_norm", (3, 2, 1))]
)
def test_one_value_in_a_set(stem: str, shape: tuple[int, ...], module: Any, dtype: Any, eps: float) -> None:
    """y is bias, dx and dweight are 0, to the last bit."""
    x = np.resize(np.array([3e38, -7, 1e-40, 0.1, -0.0], dtype), shape)
    call = OPERATIONS[training(stem)].make(module, shape, dtype, x=x, eps=eps)
    if stem == "group_norm":
        call.arguments["num_groups"] = 2
    y, cache = call()
    bias = call.arguments["bias"].reshape(-1, *(1,) * (len(shape) - 2))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, shape))
    dy = np.random.default_rng(2).normal(size=shape).astype(dtype)
    dx, dweight, dbias = getattr(module, f"{stem}_backward")(dy, cache)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dweight, 0)
    assert np.all(dbias != 0)


@pytest.mark.parametrize("stem", STEMS)
def test_variance_is_never_negative(stem: str) -> None:
    """Sets that differ in the last bit alone."""
    x = np.full((4, 6, 37), 16_777_213.0, np.float32)
    x[..., 11] = np.nextafter(x[..., 11], np.float32(0))
    _, cache = OPERATIONS[training(stem)].make(fn, x.shape, np.float32, x=x, eps=0)()
    assert np.all(cache.rstd > 0)
    assert np.all(np.isfinite(cache.rstd))
    assert np.all(fn.moments(x, axis=2).m2 > 0)


def own_set(stem: str, shape: tuple[int, ...], index: tuple[int, ...], groups: int) -> np.ndarray:
    """True for the elements in the set of ``index``."""
    number = np.indices(shape)
    if stem in ("layer_norm", "rms_norm"):
        return np.all(number[:-1] == np.reshape(index[:-1], (-1, *(1,) * len(shape))), axis=0)
    if stem == "batch_norm":
        return number[1] == index[1]
    size = shape[1] // groups if stem == "group_norm" else 1
    return (number[0] == index[0]) & (number[1] // size == index[1] // size)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "fortran"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stem", STEMS)
def test_nan_and_inf_stay_in_their_own_set(stem: str, dtype: Any, value: float, layout: str) -> None:
    for shape in ((3, 6, 7), (2, 34, 5), (4, 6, 517)):
        call = OPERATIONS[training(stem)].make(fn, shape, dtype)
        x, index = call.arguments["x"], (1, 3, 4)
        poisoned = x.copy()
        poisoned[index] = value
        dy = LAYOUTS[layout](np.random.default_rng(3).normal(size=shape).astype(dtype))
        (y, cache), (y_bad, cache_bad) = call(x=LAYOUTS[layout](x)), call(x=LAYOUTS[layout](poisoned))
        mine = own_set(stem, shape, index, call.arguments.get("num_groups", 1))
        backward = getattr(fn, f"{stem}_backward")
        grads, grads_bad = backward(dy, cache), backward(dy, cache_bad)
        np.testing.assert_array_equal(y_bad[~mine], y[~mine])
        np.testing.assert_array_equal(grads_bad.dx[~mine], grads.dx[~mine])
        assert np.isnan(y_bad[index])
        assert np.isnan(grads_bad.dx[index])
        if np.isnan(value):
            assert np.all(np.isnan(y_bad[mine]))
        # Of the parameter gradients only those of the poisoned set's parameters are touched.
        touched = mine.any(axis=(0, 1)) if stem in ("layer_norm", "rms_norm") else mine.any(axis=(0, 2))
        np.testing.assert_array_equal(grads_bad.dweight[~touched], grads.dweight[~touched])
        if grads.dbias is not None:
            np.testing.assert_array_equal(grads_bad.dbias, grads.dbias)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("stem", STEMS)
def test_an_empty_batch(stem: str, module: Any) -> None:
    for shape in ((0, 3, 5), (0, 4, 1, 2)):
        call = OPERATIONS[training(stem)].make(module, shape, np.float32)
        before = {k: v.copy() for k, v in call.arguments.items() if k.startswith("running")}
        y, cache = call()
        assert y.shape == shape
        assert y.dtype == np.float32
        for name, value in before.items():
            np.testing.assert_array_equal(call.arguments[name], value)
        dx, dweight, dbias = getattr(module, f"{stem}_backward")(np.empty(shape, np.float32), cache)
        assert dx.shape == shape
        np.testing.assert_array_equal(dweight, np.zeros_like(call.arguments["weight"]))
        if dbias is not None:
            np.testing.assert_array_equal(dbias, np.zeros_like(call.arguments["bias"]))
        assert OPERATIONS[stem].make(module, shape, np.float64).run()["y"].shape == shape


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("stem", ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"])
def test_nothing_to_normalise_in_a_set_is_an_error(stem: str, module: Any) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 0\)"):
        OPERATIONS[training(stem)].make(module, (2, 3, 0), np.float32)()


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stem", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_a_set_alone_has_the_bits_it_has_in_a_batch(stem: str, dtype: Any, layout: str, copied: bool) -> None:
    for shape in ((5, 6, 7), (9, 4, 33), (7, 2, 2, 513), (3, 2, 4099), (5, 34, 3, 3)):
        call = OPERATIONS[training(stem)].make(fn, shape, dtype)
        x = LAYOUTS[layout](call.arguments["x"])
        dy = LAYOUTS[layout](np.random.default_rng(4).normal(size=shape).astype(dtype))
        y, cache = call(x=x)
        dx = getattr(fn, f"{stem}_backward")(dy, cache).dx
        for i in range(shape[0]):
            one, one_dy = x[i : i + 1], dy[i : i + 1]
            if copied:
                one, one_dy = LAYOUTS[layout](one), LAYOUTS[layout](one_dy)
            alone, alone_cache = call(x=one)
            np.testing.assert_array_equal(alone, y[i : i + 1], f"{shape} {i}")
            alone_dx = getattr(fn, f"{stem}_backward")(one_dy, alone_cache).dx
            np.testing.assert_array_equal(alone_dx, dx[i : i + 1], f"{shape} {i}")


@pytest.mark.parametrize("stem", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(stem: str, dtype: Any) -> None:
    forward, backward = getattr(fn, f"{stem}_forward"), getattr(fn, f"{stem}_backward")
    for n in (1, 2, 7, 16, 33, 255, 513, 2049, 5000):
        x, dy = np.random.default_rng(n).normal(5, 2, (2, 11, n)).astype(dtype)
        weight = np.random.default_rng(n).normal(size=n).astype(dtype)
        whole, cache = forward(x, weight)
        dx = backward(dy, cache).dx
        for i in range(11):
            for at in (i, slice(i, i + 1)):
                y, one = forward(x[at], weight)
                np.testing.assert_array_equal(y, whole[at], f"{n} {i}")
                np.testing.assert_array_equal(backward(dy[at], one).dx, dx[at], f"{n} {i}")


@pytest.mark.parametrize("n", [5, 30, 49, 100, 515, 1024])
@pytest.mark.parametrize("stem", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_a_set_has_the_same_bits_beside_any_other(stem: str, n: int) -> None:
    """Sets that float32 cannot normalise must not change how their neighbours are normalised."""
    rng = np.random.default_rng(n)
    shape = (70, 6, n)  # group norm: two groups of three channels
    hard = {1: np.nan, 12: np.inf, 20: 3e38, 33: 1e-38, 40: 0.0, 41: 7.7, 69: -1e30}
    x = rng.normal(2, 3, shape).astype(np.float32)
    call = OPERATIONS[training(stem)].make(fn, shape, np.float32)
    expected, _ = call(x=x)
    beside = x.copy()
    for i, value in hard.items():
        beside[i] = value
    with np.errstate(all="ignore"):
        y, _ = call(x=beside)
    for i in range(shape[0]):
        alone = call(x=beside[i : i + 1])[0][0] if i in hard else expected[i]
        np.testing.assert_array_equal(y[i], alone, f"{i}")


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3, 70, 5), (2, 33, 15, 17), (1, 70, 200), (5, 65, 1), (2, 3, 300, 301)])
def test_a_channel_has_the_same_bits_beside_any_other_in_evaluation(shape: tuple[int, ...], threads: int) -> None:
    rng = np.random.default_rng(len(shape))
    channels = shape[1]
    x = rng.normal(2, 3, shape).astype(np.float32)
    mean, weight, bias = rng.normal(size=(3, channels)).astype(np.float32)
    var = rng.uniform(0.5, 2, channels).astype(np.float32)
    for channel, (m, v, w) in enumerate(
        [(0, 1, 0), (1e31, 1, 1), (0, 1e-38, 1), (0, 3e38, 1), (np.nan, 1, 1), (0, 1, 1e-30)]
    ):
        if 10 * channel + 1 < channels:
            mean[10 * channel + 1], var[10 * channel + 1], weight[10 * channel + 1] = m, v, w
    with fn.num_threads(threads):
        y = fn.batch_norm(x, mean, var, weight, bias, eps=0.0)
        in_place = x.copy()
        fn.batch_norm(in_place, mean, var, weight, bias, eps=0.0, out=in_place)
    np.testing.assert_array_equal(in_place, y)
    for channel in range(channels):
        one = slice(channel, channel + 1)
        alone = fn.batch_norm(x[:, one], mean[one], var[one], weight[one], bias[one], eps=0.0)
        np.testing.assert_array_equal(y[:, one], alone, f"{channel}")


@pytest.mark.parametrize("stem", STEMS)
def test_two_runs_have_the_same_bits(stem: str) -> None:
    for suffix in ("", "_forward", "_backward"):
        call = OPERATIONS[stem + suffix].make(fn, (8, 6, 1031), np.float32)
        first, second = call.run(), call.run()
        assert first.keys() == second.keys() == results(call()).keys() | set(call.updated)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
