"""batch_norm: the accuracy contract, running statistics, and inference. Refuses what all functions share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import contract
import fastnorm as fn
from fastnorm import _core
from ulps import assert_close, expected


@pytest.mark.parametrize(("function", "dtype", "shape"), contract.CASES["batch_norm"])
def test_contract(function: str, dtype: Any, shape: tuple[int, ...]) -> None:
    contract.check(function, dtype, shape)


def running(dtype: Any) -> dict[str, np.ndarray]:
    return {"running_mean": np.array([1, 2, 3], dtype), "running_var": np.array([4, 0.5, 6], dtype)}


@pytest.mark.parametrize("x_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("running_float64", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
def test_running_statistics_take_the_unbiased_variance(x_dtype: Any, running_float64: bool, momentum: float) -> None:
    x = np.random.default_rng(1).normal(2, 3, (5, 3, 7)).astype(x_dtype)
    statistics = running(np.float64 if running_float64 else x_dtype)
    exact = expected("batch_norm_forward", x=x, momentum=momentum, **statistics)
    y, cache = fn.batch_norm_forward(x, momentum=momentum, **statistics)
    got = {"y": y, "mean": cache.mean, "rstd": cache.rstd, "batch_var": cache.batch_var, **statistics}
    assert_close(got, exact)
    wide = x.astype(np.float64)
    want = (1 - momentum) * running(np.float64)["running_var"] + momentum * wide.var((0, 2), ddof=1)
    np.testing.assert_allclose(statistics["running_var"], want, rtol=1e-6)
    np.testing.assert_allclose(cache.batch_var, wide.var((0, 2)), rtol=1e-6)
    assert cache.count == 35


def test_running_statistics_may_be_given_one_at_a_time() -> None:
    x = np.random.default_rng(2).normal(size=(5, 3))
    both, one = running(np.float64), running(np.float64)
    fn.batch_norm_forward(x, **both)
    for name, statistic in one.items():
        fn.batch_norm_forward(x, **{name: statistic})
        np.testing.assert_array_equal(statistic, both[name])


@pytest.mark.parametrize("arguments", [{"momentum": None}, {"training": False}, {"momentum": 0.0}])
def test_running_statistics_stay_as_they_are(arguments: dict[str, Any]) -> None:
    statistics = running(np.float64)
    fn.batch_norm_forward(np.random.default_rng(3).normal(size=(5, 3)), **statistics, **arguments)
    for name, statistic in running(np.float64).items():
        np.testing.assert_array_equal(statistics[name], statistic)


def test_running_statistics_may_be_strided_views() -> None:
    x = np.random.default_rng(4).normal(size=(5, 3))
    plain, strided = running(np.float64), {k: np.repeat(v, 2)[::-2][::-1] for k, v in running(np.float64).items()}
    fn.batch_norm_forward(x, **plain)
    fn.batch_norm_forward(x, **strided)
    for name in plain:
        np.testing.assert_array_equal(plain[name], strided[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inference_with_the_running_statistics(dtype: Any) -> None:
    rng = np.random.default_rng(5)
    x, weight, bias = rng.normal(size=(5, 3, 4)).astype(dtype), *rng.normal(size=(2, 3)).astype(dtype)
    statistics = running(dtype)
    y = fn.batch_norm(x, statistics["running_mean"], statistics["running_var"], weight, bias, eps=1e-3)
    evaluated, cache = fn.batch_norm_forward(x, weight, bias, **statistics, eps=1e-3, training=False)
    np.testing.assert_array_equal(y, evaluated)
    assert cache.training is False
    assert cache.batch_var is None
    dy = rng.normal(size=x.shape).astype(dtype)
    grads = fn.batch_norm_backward(dy, cache)
    assert_close(grads._asdict(), expected("batch_norm_backward", dy=dy, cache=cache))
    # The statistics are constants: dx of one value depends on its own dy alone.
    rstd = 1 / np.sqrt(statistics["running_var"].astype(np.float64) + 1e-3)
    np.testing.assert_allclose(grads.dx, dy * (weight * rstd)[:, None], rtol=4 * np.finfo(dtype).eps)


def test_training_on_two_values_per_channel() -> None:
    y, _ = fn.batch_norm_forward(np.array([[1.0, -5.0], [3.0, 5.0]]), eps=0)
    np.testing.assert_array_equal(y, [[-1, -1], [1, 1]])


@pytest.mark.parametrize("var", [5e-324, 1e-323, 1e-308, 1e300, 1.7e308])
def test_given_variances_of_any_size(var: float) -> None:
    x = np.array([[np.sqrt(var)]])
    y = fn.batch_norm(x, np.zeros(1), np.array([var]), eps=0.0)
    assert abs(y[0, 0] - 1) < 4 * 2.0**-53
    assert fn.batch_norm(np.ones((1, 1), np.float32), np.ones(1), np.array([var]), eps=0.0) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (33, 4), (3, 4, 65)])
def test_what_is_infinite_of_given_statistics_and_of_x(shape: tuple[int, ...], dtype: Any) -> None:
    """A difference with infinity is infinite; NaN is what is left of two infinities alone."""
    x = np.random.default_rng(5).standard_normal(shape).astype(dtype)
    x[1, 3], x[2, 2] = np.inf, -np.inf
    weight, bias = np.array([[2, -3, 1.1, -0.7], [0.5, 1, 0, 2]], dtype)
    mean, var = np.array([[np.inf, -np.inf, 1, 2], [1, 2, 3, 0.3]])
    for given in ({}, {"weight": weight}, {"weight": weight, "bias": bias}):
        by_hand = (x - mean.reshape(4, *[1] * (x.ndim - 2))) / np.sqrt(var + 1e-5).reshape(4, *[1] * (x.ndim - 2))
        for name, use in (("weight", np.multiply), ("bias", np.add)):
            if name in given:
                by_hand = use(by_hand, given[name].reshape(4, *[1] * (x.ndim - 2)))
        for order in ("C", "F"):
            y = fn.batch_norm(np.asarray(x, order=order), mean.astype(dtype), var.astype(dtype), eps=1e-5, **given)
            infinite = ~np.isfinite(by_hand)
            np.testing.assert_array_equal(y[infinite], by_hand[infinite].astype(dtype))
            assert np.all(np.isfinite(y[~infinite]))


def _rstd(var: float, eps: float) -> float:
    total = var + eps
    if total == 0:
        return 0.0
    return float(0.5 / np.sqrt(0.25 * var + 0.25 * eps) if np.isinf(total) else 1 / np.sqrt(total))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.unverified("compares the kernels with one formula in float64")
@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 33, 257, 300])
def test_rstd_of_given_variances(channels: int, level: str) -> None:
    """Bit for bit, whatever stands in the lanes beside; dtypes and strides of the statistics are their own."""
    _core.set_isa(level)
    kinds = np.array([0, 1, 5e-324, 1e-308, 1.7e308, np.inf, np.nan, -0.0, 3.7])
    var, x = kinds[np.arange(channels) % len(kinds)], np.ones((2, channels))
    apart = np.repeat(var, 3)[::3]
    for eps in (0.0, 1e-5, 1.7e308):
        want = [_rstd(v, eps) for v in var]
        for given in (var, apart):
            _, cache = fn.batch_norm_forward(
                x, running_mean=np.zeros(channels), running_var=given, training=False, eps=eps
            )
            np.testing.assert_array_equal(cache.rstd, want)
    single = var.astype(np.float32)
    for given in (single, np.repeat(single, 2)[::2]):
        _, cache = fn.batch_norm_forward(
            x.astype(np.float32), running_mean=np.zeros(channels), running_var=given, training=False
        )
        np.testing.assert_array_equal(cache.rstd, [_rstd(float(v), 1e-5) for v in single])


@pytest.mark.parametrize("var", [-1e-300, -np.inf])
@pytest.mark.parametrize("place", [0, 256, 299])
def test_a_negative_variance_is_refused_wherever_it_stands(place: int, var: float) -> None:
    given, out = np.ones(300), np.full((2, 300), 7.0)
    given[place] = var
    with pytest.raises(ValueError, match="var"):
        fn.batch_norm(np.ones((2, 300)), np.zeros(300), given, out=out)
    np.testing.assert_array_equal(out, 7.0)
