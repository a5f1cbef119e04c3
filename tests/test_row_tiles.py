"""The backward of float32 rows adds up in float32 tiles: what float32 cannot hold has to be noticed, tile by tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn

UNIT = 2.0**-24
SHAPES = [(13, 100), (8, 64), (5, 515), (21, 17), (7, 1300), (23, 128), (39, 30), (12, 257), (130, 16)]


def _plain(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    return rng.standard_normal(shape), rng.standard_normal(shape), rng.uniform(0.5, 1.5, shape[1])


def _offset(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    return x + 1e5, dy, weight


def _scaled_dy(factor: float) -> Any:
    def make(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
        x, dy, weight = _plain(rng, shape)
        return x, dy * factor, weight

    return make


def _padding(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    dy[::3] = 0
    dy[:, shape[1] // 2 :] = 0
    return x, dy, weight


def _zero_weights(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    weight[::2] = 0
    return x, dy, weight


def _small_x(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    return x * 1e-30, dy, weight


def _underflowing_column(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    x[:, 3] = 1e-41 * rng.integers(1, 9, shape[0])
    x -= x.mean(axis=1, keepdims=True) if shape[0] % 2 else 0
    dy[:, 3] *= 1e-5
    return x, dy, weight


def _overflowing_column(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    dy[:, 2] = 2e38
    dy[1::2, 2] *= -1
    return x, dy, weight


def _overflow_in_the_second_group(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    dy[4:8, 1] = 1.5e38
    dy[5:7, 1] *= -1
    return x, dy, weight


def _periodic_rows(period: int) -> Any:
    """Every tree over rows, or most, rounds the same way."""

    def make(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
        x, dy, weight = _plain(rng, shape)
        row = np.arange(shape[0]) % period
        return x[row], dy[row], weight

    return make


def _periodic_columns(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Every chain along a row has equal terms."""
    x, dy, weight = _plain(rng, shape)
    column = np.arange(shape[1]) % 16
    return x[:, column], dy[:, column], weight[column]


def _first_of_a_chain(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """One value next to which each of the others is about a unit."""
    x, dy, weight = _plain(rng, shape)
    dy[:, 16:] *= 1e-7
    return x, dy, weight


def _constant_rows(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    x, dy, weight = _plain(rng, shape)
    x[1::2] = 0.1
    return x, dy, weight


CASES = {
    "plain": _plain,
    "offset": _offset,
    "dy of 1e-20": _scaled_dy(1e-20),
    "dy of 1e-41": _scaled_dy(1e-41),
    "dy of 1e30": _scaled_dy(1e30),
    "padding": _padding,
    "zero weights": _zero_weights,
    "x of 1e-30": _small_x,
    "a column that underflows": _underflowing_column,
    "a column that overflows": _overflowing_column,
    "the second group overflows": _overflow_in_the_second_group,
    "one row": _periodic_rows(1),
    "three rows": _periodic_rows(3),
    "columns of a period": _periodic_columns,
    "the first of a chain": _first_of_a_chain,
    "constant rows": _constant_rows,
}


def _exact(x: Any, dy: Any, weight: Any, mean: Any, rstd: Any) -> list[tuple[Any, Any]]:
    """dx, dweight, dbias, each with the sum of its terms' magnitudes."""
    x, dy, weight, mean, rstd = (np.asarray(v, np.longdouble) for v in (x, dy, weight, mean, rstd))
    xhat = (x - mean[:, None]) * rstd[:, None]
    g = dy * weight
    centred = np.any(mean != 0)
    a = g.mean(axis=1, keepdims=True) * centred
    b = (g * xhat).mean(axis=1, keepdims=True)
    size = np.abs(g) + centred * np.abs(g).mean(axis=1, keepdims=True)
    size = size + np.abs(xhat) * np.abs(g * xhat).mean(axis=1, keepdims=True)
    return [
        (rstd[:, None] * (g - a - xhat * b), rstd[:, None] * size),
        ((dy * xhat).sum(axis=0), np.abs(dy * xhat).sum(axis=0)),
        (dy.sum(axis=0), np.abs(dy).sum(axis=0)),
    ]


def _grads(x: Any, dy: Any, weight: Any, centred: bool, out: Any = None) -> tuple[Any, Any]:
    if centred:
        _, cache = fn.layer_norm_forward(x, weight, np.zeros_like(weight), eps=0.0)
        return cache, fn.layer_norm_backward(dy, cache, out=out)
    _, cache = fn.rms_norm_forward(x, weight, eps=0.0)
    return cache, fn.rms_norm_backward(dy, cache, out=out)


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_data_that_float32_sums_do_not_hold(case: str, shape: tuple[int, int], centred: bool) -> None:
    rng = np.random.default_rng(7)
    x, dy, weight = (v.astype(np.float32) for v in CASES[case](rng, shape))
    cache, grads = _grads(x, dy, weight, centred)
    mean = np.asarray(cache.mean) if centred else np.zeros(shape[0])
    limit = np.finfo(np.float32).max
    for name, got, (exact, size) in zip(grads._fields, grads, _exact(x, dy, weight, mean, cache.rstd), strict=True):
        if got is None:
            continue
        holds = np.abs(exact) <= limit
        error = np.abs(got - exact)[holds]
        allowed = np.maximum(8 * UNIT * size, np.longdouble(2.0**-149))[holds]
        worst = np.max(error / allowed) if error.size else 0
        assert worst <= 1, f"{name}: {8 * worst} u of the sum of the terms' magnitudes"

    # In place, and each row alone.
    own = dy.copy()
    _, in_place = _grads(x, own, weight, centred, out=own)
    for one, two in zip(grads, in_place, strict=True):
        np.testing.assert_array_equal(one, two)
    for row in range(shape[0]):
        _, alone = _grads(x[row : row + 1], dy[row : row + 1], weight, centred)
        np.testing.assert_array_equal(alone.dx[0], grads.dx[row])


@pytest.mark.parametrize("cols", [9, 16, 40, 131])
def test_gradients_made_of_x_alone(cols: int) -> None:
    """RMS norm, dy masked: what is left is x times one small number, and that has to keep its digits."""
    rng = np.random.default_rng(cols)
    x = np.full((5, cols), 2.0**-28, np.float32)
    x[:, -1] = (1.0 + rng.random(5)) * 2.0**-122
    dy = np.zeros((5, cols), np.float32)
    dy[:, :-1] = 1.1 * 2.0**-40 * (1 + rng.random((5, 1)))
    _, cache = fn.rms_norm_forward(x, eps=0.0)
    dx = fn.rms_norm_backward(dy, cache).dx.astype(np.longdouble)
    wide, g = x.astype(np.longdouble), dy.astype(np.longdouble)
    rstd = 1 / np.sqrt((wide**2).mean(axis=1, keepdims=True))
    xhat = wide * rstd
    mean = (g * xhat).mean(axis=1, keepdims=True)
    size = rstd * (np.abs(g) + np.abs(xhat) * np.abs(g * xhat).mean(axis=1, keepdims=True))
    error = np.abs(dx - rstd * (g - xhat * mean)) / size / UNIT
    print(f"{cols} columns: {error.max():.2f} u S")
    assert error.max() <= 8


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_whatever_the_processor_noted_before(case: str, centred: bool) -> None:
    """Lost digits are asked for where they may arise: not those of the caller, nor of what a thread did before."""
    rng = np.random.default_rng(9)
    for shape in ((131, 40), (70, 300), (45, 1300)):
        x, dy, weight = (v.astype(np.float32) for v in CASES[case](rng, shape))
        _, grads = _grads(x, dy, weight, centred)
        for threads in (1, 2, 3):
            large, small = 1e308, 1e-308
            assert large * 10 == np.inf  # in this thread: an overflow,
            assert 0 < small * 1.1e-10 < 1e-317  # and digits lost to underflow
            with fn.num_threads(threads):
                _, again = _grads(x, dy, weight, centred)
            for one, two in zip(grads, again, strict=True):
                np.testing.assert_array_equal(one, two, err_msg=f"{shape}, {threads} threads")


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_zeros_are_no_lost_digits(centred: bool) -> None:
    """A mask's zeros leave the sums of columns in float32, whose bits those of double would not have."""
    rng = np.random.default_rng(10)
    for shape in ((8, 64), (16, 700)):
        x, dy, weight = (v.astype(np.float32) for v in _plain(rng, shape))
        dy[:, 1::2] = 0
        dy[3] = 0
        cache, grads = _grads(x, dy, weight, centred)
        centre = np.asarray(cache.mean)[:, None] if centred else np.zeros((shape[0], 1))
        pivot = centre.astype(np.float32)
        centred_x = (x - pivot) - (centre - pivot).astype(np.float32)
        terms = (dy * centred_x) * np.asarray(cache.rstd).astype(np.float32)[:, None]
        sums = [(terms[i] + terms[i + 1]) + (terms[i + 2] + terms[i + 3]) for i in range(0, shape[0], 4)]
        total = np.zeros(shape[1])
        for i in range(0, len(sums), 2):
            total += (sums[i] + sums[i + 1]).astype(np.float64)
        np.testing.assert_array_equal(grads.dweight, total.astype(np.float32))


@pytest.mark.parametrize("odd", ["huge", "tiny", "nan"])
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_digits_lost_beside_a_row_that_goes_its_own_way(centred: bool, odd: str) -> None:
    """Rows are asked one by one then, and must not take away what the others have not been asked yet."""
    rng = np.random.default_rng(12)
    for cols in (16, 64, 100, 250, 256, 300, 1000, 1280, 1300):
        for row, first in ((4, 0), (9, 0), (2, 4), (13, 8), (1, 0), (2, 0), (6, 4)):
            x, dy, weight = (v.astype(np.float32) for v in _plain(rng, (16, cols)))
            # Sums overflow, no product does.
            dy[first : first + 4, 1] = [2e38, 2e38, -2e38, -2e38]
            x[first : first + 4, 1] = np.array([0.4, 0.5, 0.3, 0.2]) if centred else np.array([1.1, 1.2, 1.1, 1.0])
            weight[1] = 0.5
            if row % 2:  # else there is nothing but what overflows
                dy[:, 2] *= 1e-38
            x[row] = {"huge": x[row] * 1e20, "tiny": x[row] * 1e-15, "nan": np.nan}[odd]
            _, grads = _grads(x, dy, weight, centred)
            wide = x.astype(np.longdouble)
            wide -= wide.mean(axis=1, keepdims=True) if centred else 0
            xhat = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True))
            terms = dy.astype(np.longdouble) * xhat
            sizes = np.abs(dy).astype(np.longdouble) * np.maximum(1, np.abs(xhat))
            pairs = [(grads.dweight, terms.sum(axis=0), sizes.sum(axis=0))] if odd != "nan" else []
            if centred:
                wide_dy = dy.astype(np.longdouble)
                pairs.append((grads.dbias, wide_dy.sum(axis=0), np.abs(wide_dy).sum(axis=0)))
            for got, exact, size in pairs:
                here = np.abs(exact) < np.finfo(np.float32).max
                error = np.abs(got - exact) / np.maximum(size * UNIT, np.longdouble(2.0**-149))
                assert error[here].max() <= 8, f"{cols} columns, row {row}, group at {first}"


def test_no_x_changes_the_gradient_of_the_bias() -> None:
    rng = np.random.default_rng(13)
    for cols in (64, 768, 1500):
        x, dy, weight = (v.astype(np.float32) for v in _plain(rng, (64, cols)))
        dy[:, 3] *= np.float32(1e-38)  # loses digits in the products with x
        dy[5, 4], dy[6, 4] = 3e38, 2e38  # and in float32 sums of its own
        _, grads = _grads(x, dy, weight, True)
        assert np.isfinite(grads.dbias[3])
        for change in ((slice(None, None, 4), slice(None), 1e-15), (slice(None), 3, 1e3), (5, slice(None), np.nan)):
            other = x.copy()
            other[change[0], change[1]] *= np.float32(change[2])
            _, found = _grads(other, dy, weight, True)
            np.testing.assert_array_equal(found.dbias, grads.dbias)


@pytest.mark.parametrize("cols", [15, 16, 48, 100, 1000, 1300, 5000])
def test_where_x_is_zero_dx_is_dy_alone(cols: int) -> None:
    """RMS norm: nothing stands beside dy * weight * rstd there, whose first product float32 need not hold."""
    rng = np.random.default_rng(cols)
    cases = ((2.0, 3.3e38, 1.12), (1e4, 1e36, 1e5), (1e-3, 1.3e-40, 1.27), (1e-6, 1.3e-42, 1.27), (1e-8, 1e-35, 2e-9))
    for x_size, dy_there, weight_there in cases:
        x, dy, weight = (v.astype(np.float32) for v in _plain(rng, (13, cols)))
        x, dy = x * np.float32(x_size), dy * np.float32(1e-3)
        row, col = 6, 5
        x[row, col], dy[row, col], weight[col] = 0, dy_there, weight_there
        cache, grads = _grads(x, dy, weight, False)
        exact = np.longdouble(dy[row, col]) * np.longdouble(weight[col]) * np.longdouble(cache.rstd[row])
        assert abs(exact) < np.finfo(np.float32).max
        assert abs(grads.dx[row, col] - exact) <= 8 * UNIT * abs(exact)
        _, alone = _grads(x[row : row + 1], dy[row : row + 1], weight, False)
        np.testing.assert_array_equal(alone.dx[0], grads.dx[row])
        rest = np.arange(13) != row
        calm = dy.copy()
        calm[row, col] = 0
        np.testing.assert_array_equal(_grads(x, calm, weight, False)[1].dx[rest], grads.dx[rest])
        own = dy.copy()
        for one, two in zip(_grads(x, own, weight, False, out=own)[1], grads, strict=True):
            np.testing.assert_array_equal(one, two)


def test_the_cut_into_pairs_is_that_of_the_rows() -> None:
    """The residual step's backward comes in pieces, beside rows that go their own way too."""
    rng = np.random.default_rng(14)
    for shape in ((259, 1200), (70, 300), (37, 64)):
        s, dy, weight = (v.astype(np.float32) for v in _plain(rng, shape))
        s[0] *= np.float32(1e-15)
        _, fused = fn.dropout_add_rms_norm_forward(s, None, weight, p=0.0, rng=0, eps=0.0)
        _, cache = fn.rms_norm_forward(s, weight, eps=0.0)
        np.testing.assert_array_equal(
            fn.dropout_add_rms_norm_backward(dy, fused).dweight, fn.rms_norm_backward(dy, cache).dweight
        )
