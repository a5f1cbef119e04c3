"""Normal noise: the variates against the formula in longdouble, their statistics, layouts, streams, errors.

The statistics use fixed seeds, so they cannot fail by chance; the limits are those that a fair generator exceeds once
in a million tests.
"""

from __future__ import annotations

import importlib
import math
import statistics

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core, reference
from operations import LAYOUTS

dropout_reference = importlib.import_module("fastnorm.reference._dropout")

Z_LIMIT = 4.9  # two-sided, one in a million
FLOATS = [np.float32, np.float64]
PINNED = ["-0x1.9b0d85d84ba27p-1", "-0x1.32de7fc75c89ep+0", "0x1.0e9355fa56225p+0", "-0x1.f093d28e70821p-1"]


def sample(shape: tuple[int, ...], dtype: type = np.float64) -> np.ndarray:
    return np.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


def noise(n: int, seed: int = 1, offset: int = 0) -> np.ndarray:
    return fn.gaussian_noise(np.zeros(n), 1.0, rng=fn.Philox(seed, offset))


@pytest.mark.parametrize("level", _core.isa_levels())
def test_variates_are_within_four_units_of_the_formula(level: str) -> None:
    _core.set_isa(level)
    n = 200_003
    for seed in (0, 2**64 - 1):
        expected, radius = dropout_reference.normals(n, seed, 3)
        error = np.abs(noise(n, seed, 3) - expected) / radius / 2.0**-53
        assert float(error.max()) <= 4.0


def test_levels_threads_and_cuts_give_one_set_of_bits() -> None:
    n = 16384 * 5 + 77
    expected = noise(n)
    for level in _core.isa_levels():
        _core.set_isa(level)
        for threads in (1, 2, 5):
            with fn.num_threads(threads):
                np.testing.assert_array_equal(noise(n), expected)
        for part in (1, 2, 3, 127, 128, 129, 130, 16384, 16385):
            np.testing.assert_array_equal(noise(part), expected[:part])


def test_bits_are_pinned() -> None:
    """The same on every platform: a change here breaks what users have stored."""
    assert [float(v).hex() for v in noise(4, seed=2026, offset=5)] == PINNED


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (257,), (33, 65), (5, 6, 77), (3, 4, 5, 7)])
def test_result_is_x_plus_std_times_variate(shape: tuple[int, ...], layout: str, dtype: type) -> None:
    x = LAYOUTS[layout](sample(shape, dtype)).reshape(shape)
    y = fn.gaussian_noise(x, 0.3, rng=fn.Philox(4, 5))
    z = fn.gaussian_noise(np.zeros(shape), 1.0, rng=fn.Philox(4, 5))
    np.testing.assert_array_equal(y, (x.astype(np.float64) + 0.3 * z).astype(dtype))
    assert y.dtype == dtype
    out = LAYOUTS[layout](np.full(shape, np.nan, dtype)).reshape(shape)
    assert fn.gaussian_noise(x, 0.3, rng=fn.Philox(4, 5), out=out) is out
    np.testing.assert_array_equal(out, y)
    u = np.finfo(dtype).eps / 2
    radius = dropout_reference.normals(x.size, 4, 5)[1].reshape(shape)
    difference = np.abs(y - reference.gaussian_noise(x, 0.3, rng=fn.Philox(4, 5)))
    assert np.all(difference <= 6 * u * (np.abs(x) + 0.3 * radius))


@pytest.mark.parametrize("dtype", FLOATS)
def test_std_0_returns_x_and_nan_stays_in_its_place(dtype: type) -> None:
    x = np.array([1.5, -0.25, np.inf, np.nan, -np.inf, np.finfo(dtype).max], dtype)
    np.testing.assert_array_equal(fn.gaussian_noise(x, 0, rng=1), x)
    y = fn.gaussian_noise(x, 0.5, rng=1)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(x))


def test_in_place_and_empty() -> None:
    x = sample((31, 9))
    expected = fn.gaussian_noise(x, 0.5, rng=2)
    assert fn.gaussian_noise(x, 0.5, rng=2, out=x) is x
    np.testing.assert_array_equal(x, expected)
    assert fn.gaussian_noise(np.empty((3, 0)), 0.5, rng=2).shape == (3, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("seed", [3, 2**50])
def test_moments_and_tails(seed: int) -> None:
    n = 2_000_000
    z = noise(n, seed)
    # Variances of the sample means of z, z^2, z^3 and z^4: 1, 2, 15 and 96.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(z**power) - mean) < Z_LIMIT * math.sqrt(variance / n)
    for limit in (1.0, 2.0, 3.0, 4.0, 4.5):
        q = math.erfc(limit / math.sqrt(2))
        beyond = np.count_nonzero(np.abs(z) > limit)
        assert abs(beyond - n * q) < Z_LIMIT * math.sqrt(n * q)


def test_kolmogorov_smirnov() -> None:
    n = 500_000
    z = np.sort(noise(n, seed=77))
    cdf = np.array([statistics.NormalDist().cdf(v) for v in z[::50]])
    # Every 50th order statistic; leaving some out can only lower the distance.
    distance = np.max(np.abs(cdf - np.arange(0, n, 50) / n))
    assert distance * math.sqrt(n) < 2.7  # exceeded with probability 2 exp(-2 * 2.7^2) = 1e-6


def test_no_correlations() -> None:
    n = 1_000_000
    z = noise(n, seed=5)
    bound = Z_LIMIT / math.sqrt(n)
    for lag in (1, 2, 3, 4, 127, 128, 129):
        assert abs(np.mean(z[:-lag] * z[lag:])) < 1.01 * bound
        assert abs(np.mean((z[:-lag] ** 2 - 1) * (z[lag:] ** 2 - 1))) < 2.02 * bound
    for other in (noise(n, 6), noise(n, 5, 1), noise(n, 5, 2**32)):
        assert abs(np.mean(z * other)) < bound
    keep = fn.dropout_mask(n, 0.5, rng=5)
    assert abs(np.mean(np.where(keep, z, -z))) < bound


# ---------------------------------------------------------------------------------------------------------------------
# Streams and errors


def test_stream_moves_by_one() -> None:
    rng = fn.Philox(9, 2)
    first, second = fn.gaussian_noise(np.zeros(5), 1, rng=rng), fn.gaussian_noise(np.zeros(5), 1, rng=rng)
    assert rng.offset == 4
    np.testing.assert_array_equal(first, noise(5, 9, 2))
    np.testing.assert_array_equal(second, noise(5, 9, 3))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"std": -0.1}, ValueError, r"std is -0.1; expected std >= 0"),
        ({"std": math.nan}, ValueError, "std is nan"),
        ({"std": math.inf}, ValueError, "std is inf; expected a finite number"),
        ({"std": None}, TypeError, "std is None"),
        ({"rng": None}, TypeError, "rng is None"),
        ({"rng": -1}, ValueError, "rng is -1"),
        ({"x": np.ones(5, int)}, TypeError, "x has dtype int64"),
        ({"x": np.ones(4)}, ValueError, "out has shape"),
        ({"out": np.ones(5, np.float32)}, TypeError, "out has dtype"),
    ],
)
def test_bad_arguments_change_nothing(changes: dict, error: type, message: str) -> None:
    rng, out = fn.Philox(3, 4), np.full(5, 7.0)
    with pytest.raises(error, match=message):
        fn.gaussian_noise(**{"x": np.ones(5), "std": 0.5, "rng": rng, "out": out, **changes})
    assert rng.offset == 4
    assert np.all(out == 7.0)


def test_rng_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match="rng"):
        fn.gaussian_noise(np.ones(5), 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_verify_accepts_it_and_notices_a_wrong_variate(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample((41, 43), dtype)
    with fn.verify():
        for std in (0.0, 1e-3, 0.7, 1e3):
            fn.gaussian_noise(x, std, rng=np.random.default_rng(1), out=x.copy())
    real = _core.gaussian_noise

    def wrong(y: np.ndarray, *arguments: object) -> None:
        real(y, *arguments)
        y[3, 4] *= dtype(1 + 20 * np.finfo(dtype).eps)

    monkeypatch.setattr(_core, "gaussian_noise", wrong)
    with fn.verify(), pytest.raises(fn.VerificationError, match=r"gaussian_noise: y\[3, 4\]"):
        fn.gaussian_noise(np.ones((5, 5), dtype), 1e-9, rng=1)
