"""The accuracy contract where it is hardest: mean/std up to 1/u, the ends of the exponent range, up to 2^26 values.

Refuses layouts beyond channels first and channels last: those are test_strides.py's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from operations import LAYOUTS, OPERATIONS, results
from ulps import assert_close, errors, expected, unit

pytestmark = pytest.mark.unverified("compares every result with the references itself")


def with_outlier(place: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    def values(rng: np.random.Generator, n: int) -> np.ndarray:
        v = rng.normal(size=n)
        v[place] = 1e4
        return v

    return values


VALUES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "outlier first": with_outlier(0),
    "outlier last": with_outlier(-1),
    "alternating": lambda rng, n: np.where(np.arange(n) % 2, 1.0, -1.0) * (1 + rng.random(n) / 64),
    "ramp": lambda rng, n: np.arange(n) / max(n - 1, 1),
    "steps by blocks": lambda rng, n: np.arange(n) // 512 + rng.normal(size=n) / 8,
    "many magnitudes": lambda rng, n: np.exp(4 * rng.normal(size=n)),
    "one of two values": lambda rng, n: (np.arange(n) == n // 3).astype(float),
}
SCALES = {np.float32: (1.0, 1e-37, 1e19, 1e37, 3e38), np.float64: (1.0, 1e-300, 1e150, 1e300, 1.7e308)}


def rows(dtype: Any, offset: float, scale: float, m: int, kind: str, seed: int) -> np.ndarray:
    """(3, m): sets of one kind, each with a mean of about offset * std, together with magnitudes up to scale."""
    rng = np.random.default_rng(seed)
    v = np.stack([VALUES[kind](rng, m) for _ in range(3)]) + offset
    return (v / (np.abs(v).max() or 1) * scale).astype(dtype)


def extremes(dtype: Any, m: int) -> Iterator[tuple[str, np.ndarray, float]]:
    """label, rows, eps: all combinations for small sets, a tenth of them, taking turns, for large ones."""
    every = itertools.product(VALUES, (0.0, 1e3, -1e6, 1 / unit(dtype)), SCALES[dtype], (0.0, 1e-5))
    for i, (kind, offset, scale, eps) in enumerate(every):
        if m < 50 or (i + m) % 11 == 0:
            yield (
                f"{kind}, offset {offset:g}, scale {scale:g}, eps {eps:g}",
                rows(dtype, offset, scale, m, kind, i),
                eps,
            )


# A function, how three sets of m values become its x, and its options.
def _by_row(v: np.ndarray) -> np.ndarray:
    return v


def _by_channel(v: np.ndarray) -> np.ndarray:
    return v[:, :, None].transpose(1, 0, 2) if v.shape[1] % 2 else v.reshape(3, 2, -1).transpose(1, 0, 2).copy()


FAMILIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], dict[str, Any]]] = {
    "layer_norm": ("layer_norm", _by_row, {}),
    "rms_norm": ("rms_norm", _by_row, {}),
    "instance_norm": ("instance_norm", lambda v: v[None], {}),
    "instance_norm, channels last": ("instance_norm", lambda v: np.ascontiguousarray(v.T)[None], {"channel_axis": -1}),
    "group_norm": ("group_norm", lambda v: v.reshape(3, -1, 1 if v.shape[1] % 3 else 3), {"num_groups": 1}),
    "batch_norm": ("batch_norm", _by_channel, {}),
    "batch_norm, columns": ("batch_norm", lambda v: np.ascontiguousarray(v.T), {}),
}


@pytest.mark.parametrize("m", [1, 2, 3, 7, 16, 33, 100, 513, 2049, 10_007])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_extremes(family: str, dtype: Any, m: int) -> None:
    stem, make_x, options = FAMILIES[family]
    if stem == "batch_norm" and m == 1:
        pytest.skip("one value per channel cannot be trained on")
    for label, v, eps in extremes(dtype, m):
        x = make_x(v)
        plain = OPERATIONS[f"{stem}_forward"].make(fn, x.shape, dtype, x=x, eps=eps, weight=None, bias=None, **options)
        y, cache = plain()
        assert_close(
            {"y": y, **results(cache)},
            {k: v for k, v in expected(f"{stem}_forward", **plain.arguments).items() if "running" not in k},
            f"{stem} {label}",
        )
        if not np.isfinite(cache.rstd).all():
            # 1 / sigma is beyond float64, in which the cache holds it; with a small dy the gradients are not.
            dy = 1e-20 * np.random.default_rng(m).standard_normal(x.shape)
            options = {**options, "dy": dy.astype(dtype)}
        full = OPERATIONS[f"{stem}_backward"].make(fn, x.shape, dtype, x=x, eps=eps, **options)
        assert_close(full.run(), expected(f"{stem}_backward", **full.arguments), f"{stem}_backward {label}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["normal", "outlier first", "steps by blocks"])
@pytest.mark.parametrize("offset", [0.0, 1e6, None], ids=["0", "1e6", "1/u"])
def test_a_million_values(kind: str, dtype: Any, offset: float | None) -> None:
    v = rows(dtype, 1 / unit(dtype) if offset is None else offset, 1.0, 2**20 + 1, kind, 7)[:1]
    dy = np.random.default_rng(8).normal(size=v.shape).astype(dtype)
    for family in ("layer_norm", "batch_norm, columns"):
        stem, make_x, _ = FAMILIES[family]
        x = make_x(v)
        y, cache = getattr(fn, f"{stem}_forward")(x)
        assert_close({"y": y, **results(cache)}, expected(f"{stem}_forward", x=x), family)
        dx = getattr(fn, f"{stem}_backward")(make_x(dy), cache).dx
        assert_close({"dx": dx}, {"dx": expected(f"{stem}_backward", dy=make_x(dy), cache=cache)["dx"]}, family)


def test_sixty_four_million_values() -> None:
    """2^26 values: a pattern of odd length repeated, which has the exact mean and variance of the pattern."""
    pattern = (3.0 + np.random.default_rng(9).normal(size=4099)).astype(np.float32)
    repeats = 2**26 // 4099
    x = np.tile(pattern, repeats)
    y, cache = fn.layer_norm_forward(x)
    exact = expected("layer_norm_forward", x=pattern)
    assert_close({"mean": cache.mean, "rstd": cache.rstd}, {k: exact[k] for k in ("mean", "rstd")})
    low, high = (f(y.reshape(repeats, 4099), axis=0) for f in (np.min, np.max))
    assert_close({"y": low}, {"y": exact["y"]})
    np.testing.assert_array_equal(low, high)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_long_sum_of_gradients(layout: str) -> None:
    """dweight and dbias over two million values of one sign, where a plain float32 sum has lost its digits."""
    shape = (32, 3, 16_411)
    rng = np.random.default_rng(10)
    x, dy = (LAYOUTS[layout](a.astype(np.float32)) for a in (rng.normal(size=shape), rng.random(shape)))
    weight, bias = np.ones(3, np.float32), np.zeros(3, np.float32)
    _, cache = fn.batch_norm_forward(x, weight, bias)
    exact = expected("batch_norm_backward", dy=dy, cache=cache)
    assert_close(fn.batch_norm_backward(dy, cache)._asdict(), exact)


def test_the_measure_finds_an_error_of_its_own_size() -> None:
    """A result off by 5 u is reported as 5 u: the tolerances above mean what they say."""
    x = np.random.default_rng(11).normal(size=(3, 50))
    exact = expected("layer_norm", x=x)["y"]
    off = exact.value + 5 * unit(np.float64) * exact.scale
    assert 4 < errors(off.astype(np.float64), exact).max() < 6.1
    with pytest.raises(AssertionError, match="worst error"):
        assert_close({"y": off.astype(np.float64)}, {"y": exact})
