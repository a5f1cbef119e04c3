"""Columns whose float32 sums cannot be trusted, beside columns whose sums can: accuracy and bits of both."""

from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from operations import OPERATIONS
from ulps import assert_close, expected

ROWS = 200
LAYOUTS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "batch_norm": ("batch_norm", (), {}),
    "batch_norm, channels last": ("batch_norm", (5, 40), {"channel_axis": -1}),
    "instance_norm": ("instance_norm", (1, 10, 20), {"channel_axis": -1}),
    "group_norm": ("group_norm", (1, 10, 20), {"channel_axis": -1, "num_groups": 20}),
}


def nasty_columns(rng: np.random.Generator) -> dict[str, np.ndarray]:
    normal = rng.normal(size=ROWS)
    sampled = normal + 1000.0 * (np.arange(ROWS) % 25 == 0)  # the rows a pivot may be taken from are unlike the others
    return {
        "ordinary": normal,
        "far away": normal + 1e6,
        "far beyond float32's digits": normal * 1e-9 + 1,
        "first rows unlike the others": np.where(np.arange(ROWS) < 8, 1e4, 1.0) * normal + 1e4 * (np.arange(ROWS) < 8),
        "every 25th row unlike the others": sampled,
        "all rows but few alike": np.where(np.arange(ROWS) % 25 == 0, 5.0, 5.0 + 1e-6 * normal),
        "squares vanish": normal * 1e-30,
        "signs alternate, squares vanish": np.where(np.arange(ROWS) % 2, 1e-24, -1e-24),
        "squares are subnormal": normal * 1e-20,
        "squares overflow": normal * 1e25,
        "sums overflow": np.where(np.arange(ROWS) % 3, 3e38, -3e38),
        "zeros": np.zeros(ROWS),
        "constant": np.full(ROWS, 0.7),
        "tiny constant": np.full(ROWS, 1e-40),
        "huge constant": np.full(ROWS, 3e38),
        "two values": np.where(rng.random(ROWS) < 0.5, 1 / 3, 2 / 3),
        "ramp": np.arange(ROWS) / 7,
        "one outlier": normal + 1e8 * (np.arange(ROWS) == 77),
        "outlier in the first row": normal + 1e8 * (np.arange(ROWS) == 0),
        "one value": (np.arange(ROWS) == 33).astype(float),
    }


def make(seed: int) -> np.ndarray:
    return np.stack(list(nasty_columns(np.random.default_rng(seed)).values()), axis=1).astype(np.float32)


def in_layout(layout: str, x: np.ndarray) -> np.ndarray:
    shape = LAYOUTS[layout][1]
    return x.reshape(*shape, x.shape[1]) if shape else x


def gradients(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dy = rng.normal(size=shape)
    if kind == "tiny":
        dy *= 1e-25
    elif kind == "huge":
        dy *= 1e24
    elif kind == "offset":
        dy += 1000
    elif kind == "one row":
        dy.reshape(-1, shape[-1])[np.arange(dy.size // shape[-1]) != 11] = 0
    elif kind == "zeros":
        dy *= 0
    return dy.astype(np.float32)


@pytest.mark.parametrize("eps", [1e-5, 0.0, 1e-30])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(layout: str, eps: float) -> None:
    stem, _, options = LAYOUTS[layout]
    for seed in range(3):
        x = in_layout(layout, make(seed))
        call = OPERATIONS[f"{stem}_forward"].make(
            fn, x.shape, np.float32, x=x, eps=eps, weight=None, bias=None, **options
        )
        y, cache = call()
        exact = {k: v for k, v in expected(f"{stem}_forward", **call.arguments).items() if "running" not in k}
        assert_close(
            {"y": y, **{k: getattr(cache, k) for k in ("mean", "rstd", "batch_var") if k in exact}}, exact, layout
        )


@pytest.mark.parametrize("kind", ["normal", "tiny", "huge", "offset", "one row", "zeros"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(layout: str, kind: str) -> None:
    stem, _, options = LAYOUTS[layout]
    for seed in range(3):
        x = in_layout(layout, make(seed))
        dy = gradients(kind, x.shape, seed)
        call = OPERATIONS[f"{stem}_backward"].make(fn, x.shape, np.float32, x=x, dy=dy, eps=1e-5, **options)
        assert_close(call.run(), expected(f"{stem}_backward", **call.arguments), f"{layout} {kind}")


@pytest.mark.parametrize("dy_scale", [1e-11, 1.0, 1e11])
@pytest.mark.parametrize("weight_scale", [1e-11, 1.0, 1e11])
def test_products_of_extremes(weight_scale: float, dy_scale: float) -> None:
    """dx is made from products of a weight, the gradients' means and powers of rstd, each of them moderate."""
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(ROWS, 6)) * np.array([2e-12, 1e-6, 1, 1e6, 1e11, 5e11])).astype(np.float32)
    dy = (rng.normal(size=x.shape) * dy_scale).astype(np.float32)
    dy[:, 1::2] = 0
    dy[[3, 50], 1::2] = np.array([dy_scale, -dy_scale], np.float32)[:, None]  # all but nothing comes back elsewhere
    x[50, 1::2] = np.nextafter(x[3, 1::2], np.float32(np.inf))
    weight = (rng.normal(size=6) * weight_scale).astype(np.float32)
    call = OPERATIONS["batch_norm_backward"].make(fn, x.shape, np.float32, x=x, dy=dy, weight=weight, eps=0.0)
    assert_close(call.run(), expected("batch_norm_backward", **call.arguments), f"{weight_scale:g} {dy_scale:g}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_leave_no_trace(layout: str) -> None:
    """Ordinary columns get the same bits whatever the columns beside them make the kernel do again."""
    stem, _, options = LAYOUTS[layout]
    rng = np.random.default_rng(1)
    nasty = make(2)
    nasty[:, 11] = np.nan
    nasty[5, 12] = np.inf
    among = rng.normal(size=nasty.shape).astype(np.float32)
    dy = rng.normal(size=nasty.shape).astype(np.float32)
    plain = among.copy()
    odd = np.arange(nasty.shape[1]) % 2 == 1
    among[:, odd] = nasty[:, odd]
    results = []
    for x in (plain, among):
        y, cache = getattr(fn, f"{stem}_forward")(in_layout(layout, x), **options)
        dx = getattr(fn, f"{stem}_backward")(in_layout(layout, dy), cache).dx
        results.append([a.reshape(nasty.shape)[:, ~odd] for a in (y, dx)])
    for alone, beside in zip(*results, strict=True):
        np.testing.assert_array_equal(alone, beside)
        assert np.isfinite(beside).all()


def test_constant_columns_give_nothing_but_the_bias() -> None:
    x = np.broadcast_to(np.array([0.0, 0.7, 1e-40, 3e38, -5e6, 1 / 3], np.float32), (203, 6)).copy()
    bias = np.arange(6, dtype=np.float32)
    y, cache = fn.batch_norm_forward(x, weight=np.ones(6, np.float32), bias=bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    dy = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    np.testing.assert_array_equal(fn.batch_norm_backward(dy, cache).dweight, np.zeros(6, np.float32))


def placed(a: np.ndarray, offset: int) -> np.ndarray:
    """A copy whose first value is the `offset`th of a cache line."""
    room = np.empty(a.size + 32, a.dtype)
    start = -room.ctypes.data % 64 // a.itemsize + offset
    copy = room[start : start + a.size].reshape(a.shape)
    copy[...] = a
    return copy


# Lines of several rows, the last one shorter than what lines are shifted by; of two tiles; of arrays asked for ahead,
# and of arrays stored past the cache.
SHAPES = [
    *((203, 30), (77, 320), (2, 48)),  # few lines, left as they lie
    *((1027, 30), (513, 4), (211, 64), (130, 1040), (900, 1024), (2101, 1024)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_where_arrays_lie(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    rows, columns = shape
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    x[:, ::7] *= 1e25  # computed one by one
    x[:, 3 % columns] = np.arange(rows) % 2 * 1e-30
    weight, bias = (rng.normal(size=columns).astype(np.float32) for _ in range(2))

    def results(x: np.ndarray, dy: np.ndarray, y: np.ndarray, dx: np.ndarray) -> list[np.ndarray]:
        given, cache = fn.batch_norm_forward(x, weight=weight, bias=bias, out=y)
        mean, var = cache.mean, cache.batch_var
        assert mean is not None
        assert var is not None
        grads = fn.batch_norm_backward(dy, cache, out=dx)
        applied = fn.batch_norm(x, mean, var, weight, bias)
        assert given is y
        assert grads.dx is dx
        return [y.copy(), dx.copy(), applied, grads.dweight, grads.dbias]

    call = OPERATIONS["batch_norm_backward"].make(fn, shape, np.float32, x=x, dy=dy, weight=weight, eps=1e-5)
    plain = results(placed(x, 0), placed(dy, 0), placed(x, 0), placed(x, 0))
    if x.size < 50_000:
        exact = expected("batch_norm_backward", **call.arguments)
        assert_close({"dx": plain[1], "dweight": plain[3], "dbias": plain[4]}, exact, str(shape))
    wide = np.zeros((4, rows, columns + 3), np.float32)[..., :columns]  # rows apart
    wide[0], wide[1] = x, dy
    places = ((4, 4, 4, 4), (12, 0, 4, 15), (1, 2, 3, 8), (0, 12, 12, 12))
    arrays = [[placed(a, at) for a, at in zip((x, dy, x, x), offsets, strict=True)] for offsets in places]
    for other in (results(*given) for given in (wide, *arrays)):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(301, 40), (2, 48), (4, 6, 5, 7)], ids=str)
def test_weights_of_zero_are_like_any_other(shape: tuple[int, ...]) -> None:
    """A channel with the weight 0 has y = bias and dx = 0, and leaves its neighbours' bits alone."""
    rng = np.random.default_rng(len(shape))
    x, dy = (np.moveaxis(rng.normal(size=shape).astype(np.float32), -1, 1) for _ in range(2))
    channels = x.shape[1]
    weight, bias = (rng.normal(size=channels).astype(np.float32) for _ in range(2))
    y, cache = fn.batch_norm_forward(x, weight, bias)
    dx = fn.batch_norm_backward(dy, cache).dx
    some = weight.copy()
    some[::3] = 0
    y_some, cache = fn.batch_norm_forward(x, some, bias)
    gradients = fn.batch_norm_backward(dy, cache)
    for found, ordinary, wanted in ((y_some, y, bias), (gradients.dx, dx, np.zeros_like(bias))):
        for channel in range(channels):
            zero = some[channel] == 0
            expected = wanted[channel] if zero else ordinary[:, channel]
            np.testing.assert_array_equal(found[:, channel], np.broadcast_to(expected, found[:, channel].shape))
    assert gradients.dweight is not None
    assert np.all(np.isfinite(gradients.dweight))
