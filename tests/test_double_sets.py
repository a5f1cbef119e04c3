"""The forward of float64 sets, judged by longdouble: most are measured in one reading, about zero, and the others about
their mean, or block by block. What decides is the data's distance from zero, so that is what these tests go through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core

UNIT = 2.0**-53
EPS = 1e-5
# About every boundary of a pack, of a leaf, of what counts as few terms, of a block and of a chunk.
SIZES = (2, 3, 8, 15, 16, 17, 30, 49, 64, 65, 70, 97, 100, 127, 128, 129, 255, 384, 515, 1024, 1025, 2048, 5000, 65537)

pytestmark = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no longdouble to judge float64 by")


def _two_valued(rng: Any, shape: tuple[int, int]) -> Any:
    low, high = rng.standard_normal((2, shape[0], 1))
    return np.where(rng.random(shape) < 0.5, low, high)


def _in_two_parts(rng: Any, shape: tuple[int, int]) -> Any:
    """One value after the other: in every lane the roundings of equal terms go the same way."""
    first, other = -(10.0 ** rng.uniform(0, 6, (shape[0], 1))), rng.uniform(0.1, 1, (shape[0], 1))
    return np.where(np.arange(shape[1]) < shape[1] // rng.integers(2, 9, (shape[0], 1)), first, other)


def _periodic(rng: Any, shape: tuple[int, int]) -> Any:
    period = rng.integers(2, 17, (shape[0], 1))
    few = rng.standard_normal((shape[0], 16)) * 10.0 ** rng.uniform(-3, 3, (shape[0], 16))
    return np.take_along_axis(few, np.arange(shape[1]) % period, axis=1)


def _two_values_and_an_outlier(rng: Any, shape: tuple[int, int]) -> Any:
    x = np.where(rng.random(shape) < rng.random((shape[0], 1)), *rng.uniform(0.1, 1, (2, shape[0], 1)))
    x[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = 10.0 ** rng.uniform(0.3, 8, shape[0])
    return x


KINDS: dict[str, Callable[[Any, tuple[int, int]], Any]] = {
    **{
        f"mean {by:g}": lambda rng, shape, by=by: rng.standard_normal(shape) + by
        for by in (0, 0.3, 0.5, 0.7, 1, 1.4, 3, 1e3, 1e9, 1e15)
    },
    "uniform": lambda rng, shape: rng.random(shape),
    "relu": lambda rng, shape: np.maximum(rng.standard_normal(shape), 0),
    "lognormal": lambda rng, shape: np.exp(rng.standard_normal(shape)),
    "trend": lambda rng, shape: rng.standard_normal(shape) * 0.01 + np.linspace(-1, 1, shape[1]),
    "outliers": lambda rng, shape: np.where(rng.random(shape) < 0.02, 100, 1) * rng.standard_normal(shape),
    "two values": _two_valued,
    "two parts": _in_two_parts,
    "periodic": _periodic,
    "two values and an outlier": _two_values_and_an_outlier,
    "three values": lambda rng, shape: rng.choice([-1 / 3, 0.1, 0.7], shape),
    "tiny": lambda rng, shape: (rng.standard_normal(shape) + 1) * 1e-290,
    "huge": lambda rng, shape: (rng.standard_normal(shape) + 1) * 1e290,
}
PLANES = ("mean 0", "mean 0.7", "two parts", "periodic", "two values and an outlier", "three values", "outliers")


def _exact(x: Any, eps: float) -> Any:
    """xhat along the last axis. Distances from the first value lose nothing of an offset, nor overflow."""
    wide = x.astype(np.longdouble)
    wide = wide - wide[..., :1]
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide - wide.mean(-1, keepdims=True)
    return wide / np.sqrt(np.mean(wide * wide, -1, keepdims=True) + np.longdouble(eps))


def _worst(y: Any, exact: Any) -> float:
    return float(np.max(np.abs(y.astype(np.longdouble) - exact) / np.maximum(1, np.abs(exact)))) / UNIT


@pytest.mark.parametrize("kind", KINDS)
def test_within_four_units(kind: str) -> None:
    rng = np.random.default_rng(7)
    eps = 0.0 if kind in ("tiny", "huge") else EPS
    worst = {}
    for size in SIZES:
        x = KINDS[kind](rng, (max(2, min(2000, 100_000 // size)), size))
        x = x[np.ptp(x, axis=1) > 0]  # a constant set under eps = 0 has no exact result
        worst[size] = _worst(fn.layer_norm(x, eps=eps), _exact(x, eps))
        if kind in PLANES:  # runs of a channel, and columns
            exact = _exact(x[:48], eps)
            batch = next(parts for parts in (4, 3, 5, 1) if size % parts == 0)
            planes = np.ascontiguousarray(x[:48].reshape(len(exact), batch, -1).transpose(1, 0, 2))
            y = fn.batch_norm_forward(planes, eps=eps)[0].transpose(1, 0, 2).reshape(exact.shape)
            columns = fn.batch_norm_forward(np.ascontiguousarray(x[:48].T), eps=eps)[0].T
            worst[size] = max(worst[size], _worst(y, exact), _worst(columns, exact))
    print(f"{kind}: {max(worst.values()):.2f} u at {max(worst, key=worst.__getitem__)} values")
    assert max(worst.values()) <= 4, worst


@pytest.mark.parametrize(("by", "limit"), [(0, 1.8), (1e3, 1.6)])
def test_rstd_costs_ordinary_results_no_unit(by: float, limit: float) -> None:
    """x - mean is exact or nearly so, rstd comes in two parts: what is left is the last rounding, and the sums'."""
    rng = np.random.default_rng(12)
    worst = {}
    for size in (100, 196, 515, 1024):
        x = rng.standard_normal((400_000 // size, size)) + by
        exact = _exact(x, EPS)
        worst[size] = max(
            _worst(fn.layer_norm(x, eps=EPS), exact),
            _worst(fn.batch_norm_forward(np.ascontiguousarray(x.T), eps=EPS)[0].T, exact),
            _worst(fn.instance_norm(x[None], eps=EPS)[0], exact),
        )
    print({size: round(error, 2) for size, error in worst.items()})
    assert max(worst.values()) <= limit, worst


@pytest.mark.parametrize("size", [30, 64, 100, 515, 1024, 2048])
def test_a_set_has_the_same_bits_in_any_company(size: int) -> None:
    """Near zero, far from it, with a scale, NaN, constant: side by side and alone, strided, in place, on threads."""
    rng = np.random.default_rng(8)
    offsets = rng.choice([0, 0.5, 0.7, 1.4, 3, 1e6, 1e12], 67)
    x = rng.standard_normal((67, size)) + offsets[:, None]
    x[11], x[12], x[13, 3], x[14] = 0, 1 / 3, np.nan, x[14] * 1e300
    weight, bias = rng.standard_normal((2, size))
    with np.errstate(all="ignore"):
        y = fn.layer_norm(x, weight, bias)
        for row in range(67):
            np.testing.assert_array_equal(fn.layer_norm(x[row : row + 1], weight, bias)[0], y[row], err_msg=str(row))
        far_apart = np.empty((67, 2 * size))[:, ::2]
        np.testing.assert_array_equal(fn.layer_norm(x, weight, bias, out=far_apart), y)
        in_place = x.copy()
        np.testing.assert_array_equal(fn.layer_norm(in_place, weight, bias, out=in_place), y)
        for threads in (1, 2, 7):
            with fn.num_threads(threads):
                np.testing.assert_array_equal(fn.layer_norm(x, weight, bias), y)
    np.testing.assert_array_equal(y[11], bias)
    np.testing.assert_array_equal(y[12], bias)


@pytest.mark.parametrize("shape", [(3, 16, 7, 7), (2, 8, 8, 8), (5, 8, 14, 14), (2, 16, 3, 5), (40, 8, 1, 33)])
@pytest.mark.parametrize("by", [0.0, 0.6, 2.0, 1e5])
def test_planes_and_groups(shape: tuple[int, ...], by: float) -> None:
    rng = np.random.default_rng(9)
    x = rng.standard_normal(shape) + by * rng.standard_normal((1, shape[1], 1, 1))
    planes = x.reshape(shape[0], shape[1], -1)
    worst = {
        "instance": _worst(fn.instance_norm(x, eps=EPS).reshape(planes.shape), _exact(planes, EPS)),
        "group": _worst(fn.group_norm(x, 4, eps=EPS).reshape(shape[0], 4, -1), _exact(x.reshape(shape[0], 4, -1), EPS)),
        "batch": _worst(
            fn.batch_norm_forward(x, eps=EPS)[0].swapaxes(0, 1).reshape(shape[1], -1),
            _exact(x.swapaxes(0, 1).reshape(shape[1], -1), EPS),
        ),
    }
    print({name: round(error, 2) for name, error in worst.items()})
    assert max(worst.values()) <= 4, worst


@pytest.mark.parametrize("value", [1e-170 / 3, 1e-200 / 3, 1e-300 / 3, 1 / 3, 1e200 / 3])
@pytest.mark.parametrize("size", [3, 30, 100, 515, 3000])
def test_a_constant_set_gives_exactly_its_bias(value: float, size: int) -> None:
    """However small: its squares vanish, and with them what they say of the mean."""
    x = np.full((9, size), value)
    x[4] = np.linspace(-1, 1, size)
    y = fn.layer_norm(x, eps=EPS)
    assert np.count_nonzero(np.delete(y, 4, axis=0)) == 0
    assert np.count_nonzero(fn.batch_norm_forward(np.full((size, 4), value), eps=EPS)[0]) == 0
    assert np.count_nonzero(fn.instance_norm(np.full((2, 3, size), value), eps=EPS)) == 0


@pytest.mark.parametrize("distance", [0.0, 1e-17, 1e-12, 0.999999, 1.0, 1.000001])
@pytest.mark.parametrize("size", [2, 16, 49, 100, 1000])
def test_about_one_standard_deviation_from_zero(distance: float, size: int) -> None:
    """Up to there results are taken about zero, from there on about the mean."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((200, size))
    x -= x.mean(-1, keepdims=True)
    x += distance * rng.choice([-1, 1], (200, 1)) * x.std(-1, keepdims=True)
    worst = _worst(fn.layer_norm(x, eps=0.0), _exact(x, 0.0))
    print(f"{worst:.2f} u")
    assert worst <= 4
    np.testing.assert_array_equal(fn.layer_norm(x[::-1], eps=0.0)[::-1], fn.layer_norm(x, eps=0.0))


@pytest.mark.parametrize("weight", [0.0, -2.0, 1e-80, -1e80, 1e-95, 1e95, 1e-200, 1e250])
@pytest.mark.parametrize("scale", [1.0, 1e120, 1e-120, 1e300])
def test_weights_of_any_size(weight: float, scale: float) -> None:
    """As one factor with rstd, or one after the other where that would leave the range. 1 u more for the weight."""
    rng = np.random.default_rng(12)
    x = (rng.standard_normal((4, 6, 3, 11)) + rng.choice([0, 0.5, 3], (4, 6, 1, 1))) * scale
    weights = np.array([1.0, weight, 1.5, weight, weight, 2.0])
    xhat = _exact(x.reshape(4, 6, -1), 0.0).reshape(x.shape)
    exact = xhat * weights.astype(np.longdouble)[:, None, None]
    y = fn.instance_norm(x, weights, eps=0.0)
    bound = 5 * UNIT * np.maximum(1, np.abs(xhat)) * np.abs(weights)[:, None, None]
    assert np.all(np.abs(y.astype(np.longdouble) - exact) <= bound)
    level = _core.isa()
    try:
        for other in _core.isa_levels():
            _core.set_isa(other)
            np.testing.assert_array_equal(fn.instance_norm(x, weights, eps=0.0), y, err_msg=other)
    finally:
        _core.set_isa(level)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", range(0, 64, 8))
def test_bits_do_not_depend_on_where_arrays_begin(dtype: type, offset: int) -> None:
    """Rows may be written in whole lines of the cache, and their parameters are copied to where lines begin."""
    rng = np.random.default_rng(13)
    for shape in ((40, 384), (17, 768), (16, 515), (33, 1032), (3, 2048)):
        x = rng.standard_normal(shape).astype(dtype)
        weight, bias = rng.standard_normal((2, shape[1])).astype(dtype)
        plain = fn.layer_norm(x, weight, bias), fn.rms_norm(x, weight), fn.layer_norm(x, bias=bias)
        room = np.full(x.size + 64, 7, dtype)
        place = (-room.ctypes.data % 64 + offset) // room.itemsize
        out = room[place : place + x.size].reshape(shape)
        for make, expected in zip(
            (
                lambda out, x=x, w=weight, b=bias: fn.layer_norm(x, w, b, out=out),
                lambda out, x=x, w=weight: fn.rms_norm(x, w, out=out),
                lambda out, x=x, b=bias: fn.layer_norm(x, bias=b, out=out),
            ),
            plain,
            strict=True,
        ):
            make(out)
            np.testing.assert_array_equal(out, expected)
            assert np.all(room[:place] == 7)
            assert np.all(room[place + x.size :] == 7)
        np.testing.assert_array_equal(fn.layer_norm(x.copy(), weight, bias, out=x), plain[0])


@pytest.mark.parametrize("columns", [40, 65, 100, 250])
def test_sets_whose_squares_vanish_have_the_same_bits_wherever_they_lie(columns: int) -> None:
    """A sum whose two parts cancel is 0: sets that are read in place and from a copy were told apart by that."""
    x = (
        np.random.default_rng(columns).standard_normal((44, 64, columns))
        * 10.0 ** -np.arange(165, 297, 3.0)[:, None, None]
    )
    wide, odd = np.empty((*x.shape[:2], 2 * columns)), np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype)
    for layout in (wide[..., ::2], np.empty(x.shape, order="F"), odd.reshape(x.shape)):
        layout[...] = x
        for y, want in zip(fn.layer_norm_forward(layout, eps=EPS), fn.layer_norm_forward(x, eps=EPS), strict=True):
            if isinstance(y, np.ndarray):
                np.testing.assert_array_equal(y, want)
            else:
                np.testing.assert_array_equal(y.mean, want.mean)
