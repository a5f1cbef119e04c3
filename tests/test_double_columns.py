"""Float64 columns: sums about 0 or about a sample, gradients about the rounded mean, and what has to be done again."""

from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from operations import OPERATIONS
from test_column_sums import placed
from ulps import assert_close, expected

LAYOUTS: dict[str, dict[str, Any]] = {
    "batch_norm": {},
    "instance_norm": {"channel_axis": -1},
    "group_norm": {"channel_axis": -1, "num_groups": 7},
}
# Around a tree of eight lines, a panel, the few terms whose roundings are kept, and rows enough for a sample.
ROWS = [2, 3, 5, 8, 9, 17, 63, 64, 65, 129, 520, 1023, 1024, 1100]


def columns(rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal, row = rng.normal(size=rows), np.arange(rows)
    return {
        "ordinary": normal,
        "just near 0": normal + 0.69,
        "just not near 0": normal + 0.73,
        "far away": normal + 1e3,
        "at float64's last digits": 1 + normal * 1e-15,
        "one step apart": 1 + (rng.random(rows) < 0.3) * 2.0**-52,
        "two values about 0": np.where(rng.random(rows) < 0.5, -1 / 3, 0.31),
        "two values": np.where(rng.random(rows) < 0.5, 1 / 3, 2 / 3),
        "signs": np.where(row % 2, 0.7, -0.7),
        "few values": rng.integers(-2, 3, rows) / 7,
        "zeros": np.zeros(rows),
        "constant": np.full(rows, 0.7),
        "tiny constant": np.full(rows, 1e-200),
        "squares vanish": normal * 1e-200,
        "squares vanish, offset": (3 + normal) * 1e-200,
        "squares are subnormal": normal * 1e-157,
        "squares overflow": normal * 1e200,
        "sums overflow": np.where(row % 3, 1.7e308, -1.7e308),
        "subnormal": normal * 1e-310,
        "huge constant": np.full(rows, 1.6e308),
        "one outlier": normal + 1e12 * (row == rows // 2),
        "ramp": row / 7,
        "every 32nd row unlike the others": normal + 1e3 * (row % (rows // 32 or 1) == 0),
        "one value": (row == rows // 3).astype(float),
        **{f"normal {i}": rng.normal(size=rows) for i in range(11)},
    }


def make(rows: int, seed: int, layout: str) -> np.ndarray:
    x = np.stack(list(columns(rows, seed).values()), axis=1)
    if layout == "group_norm":
        x[:, :20] = x[:, [i // 5 for i in range(20)]] * 2.0 ** (np.arange(20) % 3)  # sets of five columns alike
    return x if layout == "batch_norm" else np.stack([x, x[::-1] * 0.5])


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(layout: str, rows: int, eps: float) -> None:
    for seed in range(2):
        x = make(rows, seed, layout)
        call = OPERATIONS[f"{layout}_forward"].make(
            fn, x.shape, np.float64, x=x, eps=eps, weight=None, bias=None, **LAYOUTS[layout]
        )
        y, cache = call()
        exact = {k: v for k, v in expected(f"{layout}_forward", **call.arguments).items() if "running" not in k}
        got = {"y": y, **{k: getattr(cache, k) for k in ("mean", "rstd", "batch_var") if k in exact}}
        assert_close(got, exact, f"{layout} {rows}")


@pytest.mark.parametrize("kind", ["normal", "tiny", "huge", "offset", "zeros", "two values"])
@pytest.mark.parametrize("rows", [3, 8, 65, 520, 1100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(layout: str, rows: int, kind: str) -> None:
    x = make(rows, 3, layout)
    dy = np.random.default_rng(rows).normal(size=x.shape)
    dy = {
        "normal": dy,
        "tiny": dy * 1e-305,
        "huge": dy * 1e250,
        "offset": dy + 1e6,
        "zeros": dy * (np.arange(x.shape[-1]) % 3 == 0),
        "two values": np.where(dy > 0, 1 / 3, 2 / 3),
    }[kind]
    call = OPERATIONS[f"{layout}_backward"].make(fn, x.shape, np.float64, x=x, dy=dy, eps=1e-5, **LAYOUTS[layout])
    assert_close(call.run(), expected(f"{layout}_backward", **call.arguments), f"{layout} {rows} {kind}")


@pytest.mark.parametrize("rows", [17, 64, 1023, 1024])
def test_constant_columns_give_nothing_but_the_bias(rows: int) -> None:
    values = np.array([0.0, 0.7, 1e-200, 1e-160, 1e-310, 1.6e308, -5e6, 1 / 3, 1 / 49])
    x, bias = np.broadcast_to(values, (rows, len(values))).copy(), np.arange(float(len(values)))
    y, cache = fn.batch_norm_forward(x, weight=np.ones(len(values)), bias=bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    dy = np.random.default_rng(0).normal(size=x.shape)
    np.testing.assert_array_equal(fn.batch_norm_backward(dy, cache).dweight, np.zeros(len(values)))


@pytest.mark.parametrize("rows", [64, 300, 1100])
@pytest.mark.parametrize("layout", ["batch_norm", "instance_norm"])
def test_neighbours_leave_no_trace(layout: str, rows: int) -> None:
    """Columns get the same bits alone, beside others that are done again, and wherever they lie."""
    rng = np.random.default_rng(1)
    nasty = make(rows, 2, layout)
    nasty[..., 3, 5] = np.nan
    nasty[..., 1, 9] = np.inf
    among, dy = rng.normal(size=nasty.shape), rng.normal(size=nasty.shape)
    plain = among.copy()
    odd = np.arange(nasty.shape[-1]) % 2 == 1
    among[..., odd] = nasty[..., odd]
    dy[..., 8] = 0
    options = LAYOUTS[layout]

    def run(x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        y, cache = getattr(fn, f"{layout}_forward")(x, **options)
        gradients = getattr(fn, f"{layout}_backward")(dy, cache)
        return [y, gradients.dx]

    wanted = [a[..., ~odd] for a in run(plain, dy)]
    gaps = np.zeros((2, *x_shape(nasty)))[..., ::3]
    gaps[0], gaps[1] = among, dy
    cases = [run(among, dy), run(placed(among, 3), placed(dy, 6)), run(gaps[0], gaps[1])]
    for found in cases:
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a[..., ~odd], b)
    alone = run(np.ascontiguousarray(plain[..., 10:11]), np.ascontiguousarray(dy[..., 10:11]))
    if layout == "instance_norm":  # a column of its own is another shape, with another order of sums
        return
    for a, b in zip(alone, wanted, strict=True):
        np.testing.assert_allclose(a[..., 0], b[..., 5], rtol=1e-13, atol=1e-15)


def x_shape(x: np.ndarray) -> tuple[int, ...]:
    return (*x.shape[:-1], 3 * x.shape[-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 5), (301, 40), (4, 6, 5, 33)], ids=str)
def test_gradients_through_given_statistics_do_not_ask_for_x(shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(2)
    x, dy = (np.moveaxis(rng.normal(size=shape).astype(dtype), -1, 1) for _ in range(2))
    channels = shape[-1]
    mean, var, weight = (rng.random(channels).astype(dtype) + 0.5 for _ in range(3))
    var[::4] *= 1e30  # beyond what float32 is computed in
    _, cache = fn.batch_norm_forward(x, weight, None, running_mean=mean, running_var=var, training=False)
    gradients = fn.batch_norm_backward(dy, cache)
    wide = np.longdouble
    rstd = 1 / np.sqrt(var.astype(wide) + wide(1e-5))
    scale = (weight.astype(wide) * rstd).reshape(1, -1, *[1] * (x.ndim - 2))
    off = np.abs(gradients.dx.astype(wide) - dy.astype(wide) * scale)
    assert np.max(off / np.abs(dy.astype(wide) * scale)) <= 4 * np.finfo(dtype).eps / 2
    wild = x.copy()
    wild[0] = np.nan
    wild[1] = np.inf
    _, cache = fn.batch_norm_forward(wild, weight, None, running_mean=mean, running_var=var, training=False)
    np.testing.assert_array_equal(fn.batch_norm_backward(dy, cache).dx, gradients.dx)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no longdouble to judge float64 by")
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 7, 8, 10, 12, 16, 17, 20, 33])
def test_few_rows(rows: int) -> None:
    """Of few terms the roundings do not cancel: tens of thousands of columns find what a handful does not."""
    rng = np.random.default_rng(rows)
    worst = {}
    for by in (0.0, 0.3, 0.5, 0.7, 1.0):
        x = rng.standard_normal((rows, 20_000)) + by
        wide = x.astype(np.longdouble)
        wide = wide - wide.mean(0)
        wide = wide - wide.mean(0)
        exact = wide / np.sqrt(np.mean(wide * wide, 0) + np.longdouble(1e-5))
        y = fn.batch_norm_forward(x, eps=1e-5)[0]
        worst[by] = float(np.max(np.abs(y.astype(np.longdouble) - exact) / np.maximum(1, np.abs(exact)))) * 2.0**53
    print({by: round(error, 2) for by, error in worst.items()})
    assert max(worst.values()) <= 4, worst
