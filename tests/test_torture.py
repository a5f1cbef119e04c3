"""The accuracy contract on data made to hurt: systematic roundings, few distinct values, sizes around every boundary.

Each call holds one set of every kind, so that hard sets have easy neighbours. Refuses the ends of the exponent range
and offsets up to 1/u, which are test_accuracy.py's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from operations import results
from ulps import assert_close, expected

pytestmark = pytest.mark.unverified("compares every result with the references itself")

Values = Callable[[np.random.Generator, int], np.ndarray]

# Around packs (16), trees (4 and 8 packs), leaves (128), blocks and what fits a cache line; the planes of small images.
SIZES = (2, 3, 4, 5, 7, 8, 15, 16, 17, 30, 31, 33, 48, 49, 63, 64, 65, 79, 96, 100, 127, 128, 129)
LONG_SIZES = (191, 196, 221, 255, 257, 515, 768, 1023, 1025, 2051)


def _few(count: int) -> Values:
    return lambda rng, n: rng.choice(rng.normal(size=count), n)


def _periodic(period: int) -> Values:
    """What every lane of a vector sees is the same again and again: its roundings add up instead of cancelling."""
    return lambda rng, n: np.resize(rng.normal(size=period), n)


def _outlier(size: float) -> Values:
    def values(rng: np.random.Generator, n: int) -> np.ndarray:
        v = rng.normal(size=n)
        v[rng.integers(n)] = size
        return v

    return values


def _first_pack_apart(rng: np.random.Generator, n: int) -> np.ndarray:
    """The first values say nothing of the rest, for whoever takes them for the mean."""
    v = rng.normal(size=n)
    v[:16] += 50
    return v


def _just_above_powers_of_two(rng: np.random.Generator, n: int) -> np.ndarray:
    """Where a unit in the last place is largest beside the value."""
    return np.ldexp(1 + rng.random(n) / 512, rng.integers(-3, 3, n)) * rng.choice([-1.0, 1.0], n)


X: dict[str, Values] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.random(n),
    "after a relu": lambda rng, n: np.maximum(rng.normal(size=n), 0),
    "pixels": lambda rng, n: rng.integers(0, 256, n) / 255,
    "one of two values": _few(2),
    "one of three values": _few(3),
    "one of nine values": _few(9),
    "period of 2": _periodic(2),
    "period of 16": _periodic(16),
    "period of 32": _periodic(32),
    "period of 64": _periodic(64),
    "period of 3": _periodic(3),
    "outlier of 30": _outlier(30.0),
    "outlier of 1e4": _outlier(1e4),
    "outlier of 1e12": _outlier(1e12),
    "first pack apart": _first_pack_apart,
    "just above powers of two": _just_above_powers_of_two,
    "mean of one deviation": lambda rng, n: 1 + rng.normal(size=n),
    "mean of two deviations": lambda rng, n: 2 + rng.normal(size=n),
    "mean of twenty deviations": lambda rng, n: rng.normal(size=n) - 20,
    "mean of 1e3 deviations": lambda rng, n: rng.normal(size=n) + 1e3,
    "mean of 1e5 deviations": lambda rng, n: rng.normal(size=n) - 1e5,
    "mostly zeros": lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.1),
    "two clouds": lambda rng, n: rng.normal(size=n) / 1e3 + rng.choice([-1.0, 1.0], n),
    "many magnitudes": lambda rng, n: np.exp(4 * rng.normal(size=n)),
    "trend": lambda rng, n: np.linspace(-3, 3, n) + rng.normal(size=n) / 100,
    "constant": lambda rng, n: np.full(n, rng.normal()),
}
DY: dict[str, Values] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "of one sign": lambda rng, n: rng.random(n) + 0.5,
    "one large": _outlier(1e15),
    "one of two values": _few(2),
    "tiny": lambda rng, n: 1e-33 * rng.normal(size=n),
    "mostly zeros": lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.1),
    "zeros": lambda rng, n: np.zeros(n),
    "many magnitudes": lambda rng, n: np.exp(4 * rng.normal(size=n)),
    "large": lambda rng, n: 1e25 * rng.normal(size=n),
}


def sets(dtype: Any, m: int, seed: int) -> np.ndarray:
    """(kinds, m): a set of every kind, each of a magnitude of its own."""
    rng = np.random.default_rng([seed, m])
    return np.stack([values(rng, m) * 2.0 ** rng.integers(-8, 9) for values in X.values()]).astype(dtype)


# A function, and how (sets, m) becomes its x.
FAMILIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], dict[str, Any]]] = {
    "layer_norm": ("layer_norm", lambda v: v, {}),
    "rms_norm": ("rms_norm", lambda v: v, {}),
    "batch_norm, columns": ("batch_norm", lambda v: np.ascontiguousarray(v.T), {}),
    "batch_norm, planes": ("batch_norm", lambda v: np.stack([v, v[:, ::-1]]), {}),
    "instance_norm": ("instance_norm", lambda v: np.stack([v, v[::-1]]), {}),
    "instance_norm, channels last": (
        "instance_norm",
        lambda v: np.ascontiguousarray(np.stack([v.T, v.T[::-1]])),
        {"channel_axis": -1},
    ),
    "group_norm": ("group_norm", lambda v: np.stack([v, v[:, ::-1]], axis=1).reshape(1, -1, v.shape[1]), {}),
    "group_norm, channels last": (
        "group_norm",
        lambda v: np.ascontiguousarray(np.stack([v, v[:, ::-1]], axis=1).reshape(1, -1, v.shape[1]).transpose(0, 2, 1)),
        {"channel_axis": -1},
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [SIZES, LONG_SIZES], ids=["short", "long"])
def test_results_and_gradients(family: str, dtype: Any, sizes: tuple[int, ...]) -> None:
    stem, make_x, options = FAMILIES[family]
    options = {**options, "num_groups": len(X)} if stem == "group_norm" else options
    forward, backward = getattr(fn, f"{stem}_forward"), getattr(fn, f"{stem}_backward")
    turns = itertools.cycle(DY)
    for m in sizes:
        x = make_x(sets(dtype, m, seed=1))
        for eps in (1e-5, 0.0):
            label = f"{family}, {m} values, eps {eps:g}"
            y, cache = forward(x, eps=eps, **options)
            exact = expected(f"{stem}_forward", x=x, eps=eps, **options)
            assert_close({"y": y, **results(cache)}, {k: v for k, v in exact.items() if "running" not in k}, label)
            rng = np.random.default_rng(m)
            kind = next(turns)
            parameters = (x.shape[-1],) if stem in ("layer_norm", "rms_norm") or "last" in family else (x.shape[1],)
            weight = rng.normal(size=parameters).astype(dtype)
            if m % 3 == 0:
                weight[:: 2 + m % 5] = 0
            with_bias = {} if stem == "rms_norm" else {"bias": rng.normal(size=parameters).astype(dtype)}
            _, cache = forward(x, weight=weight, eps=eps, **with_bias, **options)
            dy = DY[kind](rng, x.size).reshape(x.shape).astype(dtype)
            got = {k: v for k, v in backward(dy, cache)._asdict().items() if v is not None}
            assert_close(got, expected(f"{stem}_backward", dy=dy, cache=cache), f"{label}, dy {kind}")


@pytest.mark.parametrize("m", [3, 7, 12, 20, 40, 64, 65, 300])
def test_many_small_sets_of_float64(m: int) -> None:
    """Roundings of a handful of terms do not cancel, and float64 results have no digits to spare."""
    rng = np.random.default_rng(m)
    for offset in (0.0, 0.3, 1.0, 3.0, 100.0):
        x = rng.standard_normal((600, m)) + offset
        assert_close({"y": fn.layer_norm(x, eps=0.0)}, expected("layer_norm", x=x, eps=0.0), f"rows + {offset}")
        columns = np.ascontiguousarray(x.T)
        y, _ = fn.batch_norm_forward(columns, eps=0.0)
        exact = expected("batch_norm_forward", x=columns, eps=0.0)["y"]
        assert_close({"y": y}, {"y": exact}, f"columns + {offset}")


def test_columns_of_few_values_in_a_period() -> None:
    """Rows that come again every seven or eight: samples of them say nothing of the rest, and all roundings repeat."""
    rng = np.random.default_rng(0)
    columns = [np.resize(rng.standard_normal((p, 256)), (n, 256)) for p, n in ((8, 64), (7, 56), (2, 200), (16, 200))]
    odd_one_out = np.full((200, 16), 1.5521175861358643)
    odd_one_out[77] = 0.506162703037262
    edge = np.full((64, 16), -0.12017095)
    edge[::8] = -1.3068626
    for x in (*columns, odd_one_out, edge):
        x = x.astype(np.float32)
        y, cache = fn.batch_norm_forward(x)
        exact = {k: v for k, v in expected("batch_norm_forward", x=x).items() if "running" not in k}
        assert_close({"y": y, **results(cache)}, exact, f"{x.shape}")


@pytest.mark.parametrize("n", [16, 512])
def test_gradients_of_weights_whose_terms_round_alike(n: int) -> None:
    """One term of about 1, seven just under half a unit of it: a chain of float32 additions loses them one by one."""
    x = np.random.default_rng(253).standard_normal((8, n)).astype(np.float32)
    weight = np.ones(n, np.float32)
    y, cache = fn.layer_norm_forward(x, weight, np.zeros_like(weight))
    dy = np.concatenate([1.0005 / y[:1], 0.498 * 2.0**-23 / y[1:]]).astype(np.float32)
    assert_close(fn.layer_norm_backward(dy, cache)._asdict(), expected("layer_norm_backward", dy=dy, cache=cache))
    _, cache = fn.rms_norm_forward(x, weight)
    grads = {k: v for k, v in fn.rms_norm_backward(dy, cache)._asdict().items() if v is not None}
    assert_close(grads, expected("rms_norm_backward", dy=dy, cache=cache))
