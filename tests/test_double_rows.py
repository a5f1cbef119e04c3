"""The backward of float64 rows, some side by side: longdouble says what is exact, figures are in u of the sum of the
terms' magnitudes. Rows whose statistics need a scale go their own way, and their neighbours have to be none the wiser.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn

UNIT = 2.0**-53
COLS = [2, 3, 7, 8, 9, 15, 16, 17, 30, 31, 33, 100, 127, 128, 129, 131, 143, 145, 256, 515, 1024, 1025, 2049]
SHAPES = [
    *((21, n) for n in COLS),
    *((n, 19) for n in (1, 2, 3, 4, 5, 15, 16, 17, 1024, 1025, 1100)),
    (6, 8192),
    (6, 8193),
    (1, 71_280),  # cut between threads
]

pytestmark = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no longdouble to judge float64 by")


def _plain(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    return rng.standard_normal(shape), rng.standard_normal(shape), rng.uniform(0.5, 1.5, shape[1])


def _offset(by: float) -> Any:
    def make(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
        x, dy, weight = _plain(rng, shape)
        return x + by, dy, weight

    return make


def _scaled(x_by: float, dy_by: float) -> Any:
    def make(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
        x, dy, weight = _plain(rng, shape)
        return x * x_by, dy * dy_by, weight

    return make


def _two_valued(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    low, high, one, other, weight = rng.uniform(0.1, 1.0, 5)
    x = np.where(rng.random(shape) < 0.7, low, high)
    dy = np.where(rng.random(shape) < 0.8, one, other)
    return x, dy, np.full(shape[1], weight)


def _one_row(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Every sum along a column is of equal terms."""
    x, dy, weight = _plain(rng, (1, shape[1]))
    return np.repeat(x, shape[0], axis=0), np.repeat(dy, shape[0], axis=0), weight[: shape[1]]


def _three_rows(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    row = np.arange(shape[0]) % min(3, shape[0])
    return x[row], dy[row], weight


def _periodic_columns(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Every sum along a row is of a few equal terms."""
    x, dy, weight = _plain(rng, shape)
    column = np.arange(shape[1]) % min(16, shape[1])
    return x[:, column], dy[:, column], weight[column]


def _masked_outlier(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """One term makes the sums, and where the weight is 0 nothing but their product with x is left."""
    x, dy, weight = _plain(rng, shape)
    x[np.arange(shape[0]), rng.integers(0, shape[1] // 2, shape[0]) * 2 + 1] = 1e4
    weight[::2] = 0
    return x, np.abs(dy) + 0.5, weight


def _mixed(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Ordinary rows beside rows that are constant, huge or tiny."""
    x, dy, weight = _plain(rng, shape)
    x[1::5] = 0.1
    x[2::7] *= 1e-180
    x[3::11] *= 1e200
    return x, dy, weight


CASES = {
    "plain": _plain,
    "offset of 1": _offset(1.0),
    "offset of 1e8": _offset(1e8),
    "offset of 1e15": _offset(1e15),
    "x of 1e100": _scaled(1e100, 1.0),
    "x of 1e140": _scaled(1e140, 1.0),
    "x of 1e-140": _scaled(1e-140, 1.0),
    "x of 1e-200": _scaled(1e-200, 1.0),
    "x of 3e307": _scaled(3e307, 1.0),
    "dy of 1e-250": _scaled(1.0, 1e-250),
    "dy of 1e250": _scaled(1.0, 1e250),
    "two values": _two_valued,
    "one row": _one_row,
    "three rows": _three_rows,
    "columns of a period": _periodic_columns,
    "masked but for an outlier": _masked_outlier,
    "mixed": _mixed,
}


def _grads(x: Any, dy: Any, weight: Any, centred: bool, out: Any = None) -> Any:
    if centred:
        _, cache = fn.layer_norm_forward(x, weight, np.zeros_like(weight), eps=0.0)
        return fn.layer_norm_backward(dy, cache, out=out)
    _, cache = fn.rms_norm_forward(x, weight, eps=0.0)
    return fn.rms_norm_backward(dy, cache, out=out)


def _exact(x: Any, dy: Any, weight: Any, centred: bool) -> list[tuple[Any, Any]]:
    """dx, dweight, dbias, each with the sum of its terms' magnitudes."""
    x, dy, weight = (np.asarray(v, np.longdouble) for v in (x, dy, weight))
    if centred:
        x = x - x[:, :1]
        x = x - x.mean(axis=1, keepdims=True)
    spread = np.sqrt((x**2).mean(axis=1, keepdims=True))
    constant = np.ptp(x, axis=1, keepdims=True) == 0 if centred else spread == 0
    rstd = np.where(constant, 0, 1 / np.where(constant, 1, spread))
    xhat, g = x * rstd, dy * weight
    a = g.mean(axis=1, keepdims=True) * centred
    b = (g * xhat).mean(axis=1, keepdims=True)
    size = np.abs(g) + centred * np.abs(g).mean(axis=1, keepdims=True)
    size = size + np.abs(xhat) * np.abs(g * xhat).mean(axis=1, keepdims=True)
    return [
        (rstd * (g - a - xhat * b), rstd * size),
        ((dy * xhat).sum(axis=0), (np.abs(dy) * np.maximum(1, np.abs(xhat))).sum(axis=0)),
        (dy.sum(axis=0), np.abs(dy).sum(axis=0)),
    ]


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, centred: bool) -> None:
    rng = np.random.default_rng(11)
    worst = {}
    for shape in SHAPES:
        x, dy, weight = CASES[case](rng, shape)
        grads = _grads(x, dy, weight, centred)
        for name, got, (exact, size) in zip(grads._fields, grads, _exact(x, dy, weight, centred), strict=True):
            if got is None:
                continue
            # The least number of float64 is no digit of anything.
            error = np.maximum(np.abs(got - exact) - np.longdouble(2) ** -1074, 0)[size > 0] / size[size > 0] / UNIT
            assert np.all(np.asarray(got)[size == 0] == 0)
            worst[name] = max(worst.get(name, (0.0, shape)), (float(error.max(initial=0)), shape))
    print(case, {name: (round(u, 2), shape) for name, (u, shape) in worst.items()})
    for name, (u, shape) in worst.items():
        assert u <= 8, f"{name}, {shape}: {u} u of the sum of the terms' magnitudes"


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("case", ["plain", "offset of 1e8", "mixed"])
def test_same_bits_wherever_rows_lie(case: str, centred: bool) -> None:
    rng = np.random.default_rng(5)
    for shape in [(21, n) for n in (2, 8, 9, 17, 30, 100, 129, 515, 1025)] + [(1100, 5), (6, 8193)]:
        x, dy, weight = CASES[case](rng, shape)
        grads = _grads(x, dy, weight, centred)

        def same(other: Any, shape: tuple[int, int] = shape, grads: Any = grads) -> None:
            for one, two in zip(grads, other, strict=True):
                np.testing.assert_array_equal(one, two, err_msg=str(shape))

        own = dy.copy()
        same(_grads(x, own, weight, centred, out=own))
        wide_x, wide_dy = (np.repeat(v, 2, axis=1) for v in (x, dy))
        same(_grads(wide_x[:, ::2], wide_dy[:, ::2], weight, centred))
        same(_grads(np.asfortranarray(x), dy, weight, centred, out=np.asfortranarray(dy)))
        unaligned = np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(shape)
        same(_grads(unaligned, dy, weight, centred))
        for threads in (1, 2, 3):
            with fn.num_threads(threads):
                same(_grads(x, dy, weight, centred))
                same(_grads(wide_x[:, ::2], dy, weight, centred))
        for row in range(min(shape[0], 30)):
            alone = _grads(x[row : row + 1], dy[row : row + 1], weight, centred)
            np.testing.assert_array_equal(alone.dx[0], grads.dx[row])


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e308])
def test_a_row_beyond_all_numbers_stays_alone(value: float, centred: bool) -> None:
    rng = np.random.default_rng(3)
    for shape in [(21, 16), (9, 33), (40, 130)]:
        x, dy, weight = _plain(rng, shape)
        grads = _grads(x, dy, weight, centred)
        for row in (0, 5, shape[0] - 1):
            other = x.copy()
            other[row, 1] = value
            with np.errstate(all="ignore"):
                found = _grads(other, dy, weight, centred)
            rest = np.arange(shape[0]) != row
            np.testing.assert_array_equal(found.dx[rest], grads.dx[rest])
            np.testing.assert_array_equal(found.dbias, grads.dbias)
            assert np.all(np.isfinite(found.dweight)) == (np.isfinite(value))
