"""moments and Moments: accuracy, axes as in numpy.mean, merging. Refuses timing and threads (see test_threads.py)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from contract import MODULES
from operations import LAYOUTS
from ulps import assert_close, expected


def got(m: Any) -> dict[str, np.ndarray]:
    return {"mean": m.mean, "m2": m.m2}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((7,), None),
        ((2049,), 0),
        ((5, 33), None),
        ((5, 33), 0),
        ((5, 33), -1),
        ((5, 33), (0, 1)),
        ((3, 4, 17), 1),
        ((3, 4, 17), (0, 2)),
        ((3, 4, 17), (-1, 0)),
        ((3, 4, 17), (1, 2)),
        ((2, 3, 4, 5), (1, 3)),
        ((2, 3, 2, 3, 5), (0, 2, 4)),
        ((3, 4), ()),
    ],
)
def test_axes_and_layouts(shape: tuple[int, ...], axis: Any, dtype: Any, layout: str) -> None:
    x = LAYOUTS[layout](np.random.default_rng(len(shape)).normal(30, 2, shape).astype(dtype))
    m = fn.moments(x, axis=axis)
    assert_close(got(m), expected("moments", x=x, axis=axis))
    assert np.shape(m.mean) == np.shape(m.m2) == x.mean(axis=axis).shape
    assert np.asarray(m.mean).dtype == np.asarray(m.m2).dtype == np.float64
    assert np.all(np.asarray(m.count) == x.size / max(np.size(m.mean), 1))


@pytest.mark.parametrize("module", MODULES)
def test_variance_and_standard_deviation(module: Any) -> None:
    x = np.random.default_rng(1).normal(-3, 2, (4, 50))
    m = module.moments(x, axis=1)
    for ddof in (0, 1):
        np.testing.assert_allclose(m.var(ddof=ddof), x.var(1, ddof=ddof), rtol=1e-14)
        np.testing.assert_allclose(m.std(ddof=ddof), x.std(1, ddof=ddof), rtol=1e-14)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("dtype", "offset"), [(np.float64, 0.0), (np.float32, 1e4), (np.float32, -1e6)])
def test_merging_the_parts_gives_the_moments_of_the_whole(module: Any, dtype: Any, offset: float) -> None:
    """At an offset in float32 only: the means of the parts are float64, so theirs is the accuracy that can be had."""
    x = (offset + np.random.default_rng(2).normal(size=(1000, 3))).astype(dtype)
    parts = [module.moments(part, axis=0) for part in np.split(x, [1, 10, 11, 500])]
    whole = expected("moments", x=x, axis=0)
    assert_close(got(module.Moments.merge(*parts)), whole)
    # The order changes at most the last bit.
    forth, back = module.Moments.merge(*parts), module.Moments.merge(*parts[::-1])
    np.testing.assert_array_max_ulp(forth.mean, back.mean, 1)
    np.testing.assert_array_max_ulp(forth.m2, back.m2, 1)
    assert np.all(np.asarray(forth.count) == 1000)


@pytest.mark.parametrize("module", MODULES)
def test_merging_one_or_nested(module: Any) -> None:
    x = np.random.default_rng(3).normal(size=90)
    a, b, c = (module.moments(part) for part in np.split(x, 3))
    alone = module.Moments.merge(a)
    assert (float(alone.mean), float(alone.m2)) == (float(a.mean), float(a.m2))
    nested = module.Moments.merge(module.Moments.merge(a, b), c)
    assert_close(got(nested), expected("moments", x=x))


@pytest.mark.parametrize("module", MODULES)
def test_by_rational_arithmetic(module: Any) -> None:
    values = [1e8, 1e8 + 1, 1e8 + 2, -3.5, 0.1, 1e-8]
    m = module.moments(np.array(values))
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    m2 = sum((v - mean) ** 2 for v in exact)
    assert abs(Fraction(float(m.mean)) / mean - 1) < Fraction(2, 2**53)
    assert abs(Fraction(float(m.m2)) / m2 - 1) < Fraction(8, 2**53)


@pytest.mark.parametrize("module", MODULES)
def test_one_value_has_no_spread(module: Any) -> None:
    m = module.moments(np.float32([[0.1, 3e38, -1e-40]]), axis=0)
    np.testing.assert_array_equal(m.mean, np.float32([0.1, 3e38, -1e-40]).astype(np.float64))
    np.testing.assert_array_equal(m.m2, 0)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_to_reduce(module: Any) -> None:
    with pytest.raises(ValueError, match=r"\(3, 0\)"):
        module.moments(np.empty((3, 0)), axis=1)
    with pytest.raises(ValueError, match=r"\(0,\)"):
        module.moments(np.empty(0))
    assert module.moments(np.empty((0, 3)), axis=1).mean.shape == (0,)
