"""Float32 gradients whose sums are 0, or next to it, while dy is not: the backward of channels judges by its sums
whether float32 has lost anything on the way to them, and whether dx can be made in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

UNIT, LEAST = 2.0**-24, 2.0**-149
ALLOWED = 8  # u of the sum of the terms' magnitudes
SIZES = (8, 30, 64, 98, 128, 200, 514)
CHANNELS = 21
EPS = 1e-30


def _nothing_for_some(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    x, dy = rng.standard_normal((2, *shape))
    dy[:: rng.integers(2, 4)] = 0
    return x, dy


def _pairs(of: float) -> Callable[[Any, tuple[int, int]], tuple[Any, Any]]:
    """Values two and two alike, dy of which is opposite: all sums are 0, dx is a product with dy alone."""

    def kind(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
        x = np.repeat(10 * rng.standard_normal((shape[0], shape[1] // 2)), 2, axis=1)
        return x, of * np.tile((1.0, -1.0), (shape[0], shape[1] // 2))

    return kind


def _pairs_and_some(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Float32's largest numbers beside ordinary ones, of which alone the sums are."""
    x, dy = _pairs(1.0)(rng, shape)
    dy = rng.standard_normal(shape)
    dy[:, :2] = 3e38, -3e38
    return x, dy


def _products_vanish(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """dy * (x - mean) is below all numbers, dy * xhat is not; dy adds up to 0."""
    x = 1e-10 * rng.standard_normal(shape)
    return x, 1e-40 * rng.permuted(np.tile((1.0, -1.0), (shape[0], shape[1] // 2)), axis=1)


def _any_size(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    x, dy = rng.standard_normal((2, *shape))
    return 10.0 ** rng.uniform(-15, 15) * x, 10.0 ** rng.uniform(-40, 30) * dy


def _least_factors(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """What multiplies x in dx is below float32's ordinary numbers, dx itself is not."""
    x, dy = rng.standard_normal((2, *shape))
    return 1e9 * x, 1e-25 * dy


KINDS: dict[str, Callable[[Any, tuple[int, int]], tuple[Any, Any]]] = {
    "no dy for some": _nothing_for_some,
    "opposite pairs": _pairs(1.0),
    "largest opposite pairs": _pairs(3e38),
    "least opposite pairs": _pairs(1e-41),
    "largest opposite pairs beside ordinary ones": _pairs_and_some,
    "products that vanish": _products_vanish,
    "a factor that vanishes": _least_factors,
    "any size": _any_size,
}


def _batch_norm(x: Any, dy: Any, weight: Any) -> Any:
    """Channels last: a set is a column."""
    columns, zeros = np.ascontiguousarray(x.T), np.zeros_like(weight)
    grads = fn.batch_norm_backward(
        np.ascontiguousarray(dy.T), fn.batch_norm_forward(columns, weight, zeros, eps=EPS)[1]
    )
    return grads.dx.T, grads.dweight, grads.dbias


def _planes(x: Any, dy: Any, weight: Any) -> Any:
    """Channels first: a set is a plane."""
    _, cache = fn.instance_norm_forward(x[None], weight, np.zeros_like(weight), eps=EPS)
    grads = fn.instance_norm_backward(dy[None], cache)
    return grads.dx[0], grads.dweight, grads.dbias


def _exact(x: Any, dy: Any, weight: Any) -> list[tuple[Any, Any]]:
    """The gradients, each with the sum of its terms' magnitudes."""
    x, dy, weight = (values.astype(np.longdouble) for values in (x, dy, weight[:, None]))
    centred = x - x.mean(axis=1, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + np.longdouble(EPS))
    xhat, g = centred * rstd, dy * weight

    def mean(values: Any) -> Any:
        return values.mean(axis=1, keepdims=True)

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    terms = rstd * (np.abs(g) + mean(np.abs(g)) + np.abs(xhat) * mean(np.abs(g * xhat)))
    return [
        (dx, terms),
        ((dy * xhat).sum(axis=1), np.abs(dy * xhat).sum(axis=1)),
        (dy.sum(axis=1), np.abs(dy).sum(axis=1)),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [_batch_norm, _planes], ids=("channels last", "channels first"))
def test_gradients(norm: Callable[[Any, Any, Any], Any], kind: str) -> None:
    rng = np.random.default_rng(7)
    worst = {}
    for size in SIZES:
        for factor in (1.0, 4.0):
            with np.errstate(over="ignore"):
                x, dy = (values.astype(np.float32) for values in KINDS[kind](rng, (CHANNELS, size)))
            weight = (factor * rng.uniform(0.5, 1, CHANNELS)).astype(np.float32)
            for name, got, (exact, terms) in zip(
                ("dx", "dweight", "dbias"), norm(x, dy, weight), _exact(x, dy, weight), strict=True
            ):
                there = np.abs(exact) < np.finfo(np.float32).max
                assert np.isfinite(got[there]).all(), (name, size)
                error = (np.abs(got - exact) / (UNIT * terms + 2 * LEAST))[there]
                worst[name, size, factor] = float(error.max()) if error.size else 0
    print("worst, in u of the terms:", max(worst.items(), key=lambda item: item[1]))
    assert max(worst.values()) <= ALLOWED, worst
