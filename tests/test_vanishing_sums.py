"""Float32 gradients whose sums are 0, or next to it, while dy is not: the backward of channels judges by its sums
whether float32 has lost anything on the way to them, and whether dx can be made in it. What they do not show is dy next
to float32's largest number that an opposite one takes away.
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
CHANNELS, GROUP = 21, 3
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


def _some_of_each(rng: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Columns without dy beside those whose products vanish, and others."""
    x, dy = _products_vanish(rng, shape)
    dy[::3] = 0
    dy[1::6] = 1e-40 * rng.standard_normal(dy[1::6].shape)
    return x, dy


def _large_beside_cancelling(_: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """2^60 beside a pair near 2^97 and -2^97: with weights far apart their mean is more than float32 holds."""
    x = np.tile(1.2 * 2.0**-39 * np.array([1, 1, -1, -1]), (shape[0], shape[1] // 4 + 1))[:, : shape[1]]
    dy = np.full(shape, 2.0**60)
    dy[::3], dy[2::3] = 0, 0
    dy[::3, :2] = np.array([1, -1]) * 2.0**99 / GROUP  # the mean of weighted ones
    return x, dy


KINDS: dict[str, Callable[[Any, tuple[int, int]], tuple[Any, Any]]] = {
    "no dy for some": _nothing_for_some,
    "opposite pairs": _pairs(1.0),
    "largest opposite pairs": _pairs(3e38),
    "least opposite pairs": _pairs(1e-41),
    "largest opposite pairs beside ordinary ones": _pairs_and_some,
    "products that vanish": _products_vanish,
    "a factor that vanishes": _least_factors,
    "some of each": _some_of_each,
    "large beside cancelling": _large_beside_cancelling,
    "any size": _any_size,
}


def _batch_norm(x: Any, dy: Any, weight: Any, in_place: bool = False) -> Any:
    """Channels last: a set is a column."""
    columns, zeros, dy = np.ascontiguousarray(x.T), np.zeros_like(weight), np.array(dy.T, order="C")
    _, cache = fn.batch_norm_forward(columns, weight, zeros, eps=EPS)
    grads = fn.batch_norm_backward(dy, cache, out=dy if in_place else None)
    return grads.dx.T, grads.dweight, grads.dbias


def _planes(x: Any, dy: Any, weight: Any, in_place: bool = False) -> Any:
    """Channels first: a set is a plane."""
    dy = dy[None].copy()
    _, cache = fn.instance_norm_forward(x[None], weight, np.zeros_like(weight), eps=EPS)
    grads = fn.instance_norm_backward(dy, cache, out=dy if in_place else None)
    return grads.dx[0], grads.dweight, grads.dbias


def _split_planes(x: Any, dy: Any, weight: Any, in_place: bool = False) -> Any:
    """Channels first: a set is two planes of an array with more channels."""

    def samples(values: Any) -> Any:
        array = np.zeros((2, CHANNELS + 1, values.shape[1] // 2), np.float32)
        array[0, :-1], array[1, :-1] = np.split(values, 2, axis=1)
        return array[:, :-1]

    dy = samples(dy)
    _, cache = fn.batch_norm_forward(samples(x), weight, np.zeros_like(weight), eps=EPS)
    grads = fn.batch_norm_backward(dy, cache, out=dy if in_place else None)
    return np.concatenate(grads.dx, axis=1), grads.dweight, grads.dbias


def _group_norm(x: Any, dy: Any, weight: Any, in_place: bool = False) -> Any:
    """Channels last: a set is GROUP columns."""

    def sample(values: Any) -> Any:
        return np.array(values.T, order="C")[None]

    dy, zeros, options = sample(dy), np.zeros_like(weight), {"channel_axis": -1, "eps": EPS}
    _, cache = fn.group_norm_forward(sample(x), len(x) // GROUP, weight, zeros, **options)
    grads = fn.group_norm_backward(dy, cache, out=dy if in_place else None)
    return grads.dx[0].T, grads.dweight, grads.dbias


def _exact(x: Any, dy: Any, weight: Any, group: int) -> list[tuple[Any, Any]]:
    """The gradients, each with the sum of its terms' magnitudes."""
    x, dy, weight = (values.astype(np.longdouble) for values in (x, dy, weight[:, None]))

    def mean(values: Any) -> Any:
        of_sets = values.reshape(len(x) // group, -1).mean(axis=1)
        return np.repeat(of_sets, group)[:, None]

    centred = x - mean(x)
    rstd = 1 / np.sqrt(mean(centred * centred) + np.longdouble(EPS))
    xhat, g = centred * rstd, dy * weight
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    terms = rstd * (np.abs(g) + mean(np.abs(g)) + np.abs(xhat) * mean(np.abs(g * xhat)))
    return [
        (dx, terms),
        ((dy * xhat).sum(axis=1), np.abs(dy * xhat).sum(axis=1)),
        (dy.sum(axis=1), np.abs(dy).sum(axis=1)),
    ]


def _weights(rng: Any) -> list[Any]:
    near = rng.uniform(0.5, 1, CHANNELS)
    far = 2.0 ** rng.integers(-39, 40, CHANNELS) * (rng.random(CHANNELS) > 0.2)
    far[:GROUP] = 1, 2.0**39, 1
    return [weight.astype(np.float32) for weight in (near, 4 * near, far)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("norm", "group"),
    [(_batch_norm, 1), (_planes, 1), (_group_norm, GROUP)],
    ids=("channels last", "channels first", "groups, channels last"),
)
def test_gradients(norm: Callable[[Any, Any, Any], Any], group: int, kind: str) -> None:
    rng = np.random.default_rng(7)
    worst = {}
    for size in SIZES:
        for weight in _weights(rng):
            with np.errstate(over="ignore"):
                x, dy = (values.astype(np.float32) for values in KINDS[kind](rng, (CHANNELS, size)))
            for name, got, (exact, terms) in zip(
                ("dx", "dweight", "dbias"), norm(x, dy, weight), _exact(x, dy, weight, group), strict=True
            ):
                there = np.abs(exact) < np.finfo(np.float32).max
                assert np.isfinite(got[there]).all(), (name, size, weight)
                error = (np.abs(got - exact) / (UNIT * terms + 2 * LEAST))[there]
                worst[name, size, float(weight[1])] = float(error.max()) if error.size else 0
    print("worst, in u of the terms:", max(worst.items(), key=lambda item: item[1]))
    assert max(worst.values()) <= ALLOWED, worst


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("norm", "group"),
    [(_batch_norm, 1), (_planes, 1), (_split_planes, 1), (_group_norm, GROUP)],
    ids=("channels last", "channels first", "two planes", "groups, channels last"),
)
def test_next_to_the_largest(norm: Callable[..., Any], group: int, in_place: bool) -> None:
    """dx is float32's largest number less a little, of dy that adds up to nothing; other channels are ordinary."""
    rng = np.random.default_rng(11)
    largest = float(np.finfo(np.float32).max)
    worst, extreme = 0.0, 0
    for size in SIZES:
        pattern = np.resize((1, 1, -1, -1), size // 4 * 4)
        for _ in range(20):
            x, dy = rng.standard_normal((2, CHANNELS, pattern.size))
            weight = np.repeat(rng.uniform(2, 4, CHANNELS // GROUP), GROUP).astype(np.float32)
            some = np.repeat(rng.random(CHANNELS // GROUP) < 0.5, GROUP)
            std = np.repeat(rng.uniform(1, 2, CHANNELS // GROUP), GROUP)[some, None]
            x[some] = pattern * std
            dy[some] = np.resize((1, -1), pattern.size) * std / weight[some, None]
            dy[some] *= largest * (1 - 3e-7 * rng.random((int(some.sum()), 1)))
            x, dy = x.astype(np.float32), dy.astype(np.float32)
            got = norm(x, dy, weight, in_place)[0]
            exact, terms = _exact(x, dy, weight, group)[0]
            there = np.abs(exact) <= largest
            extreme += int((np.abs(exact[there]) > largest * (1 - 2e-7)).sum())
            assert np.isfinite(got[there]).all(), (size, weight)
            worst = max(worst, float((np.abs(got - exact) / (UNIT * terms))[there].max()))
    print("worst, in u of the terms:", worst, "values next to the largest:", extreme)
    assert extreme > 1000
    assert worst <= ALLOWED
