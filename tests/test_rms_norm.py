"""rms_norm: the accuracy contract, and what is RMS norm's own. Refuses what all functions share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import contract
import fastnorm as fn
from ulps import assert_close, expected


@pytest.mark.parametrize(("function", "dtype", "shape"), contract.CASES["rms_norm"])
def test_contract(function: str, dtype: Any, shape: tuple[int, ...]) -> None:
    contract.check(function, dtype, shape)


def test_is_layer_norm_where_every_row_has_mean_zero() -> None:
    half = np.random.default_rng(1).normal(size=(3, 5, 17))
    x = np.concatenate([half, -half], axis=-1)
    assert_close({"y": fn.rms_norm(x, axis=1)}, expected("layer_norm", x=x, axis=1))


def test_the_mean_is_not_subtracted() -> None:
    x = np.full((2, 33), 7.0, np.float32)
    np.testing.assert_array_equal(fn.rms_norm(x, eps=0), np.ones_like(x))


def test_cache_has_no_mean_and_gradients_have_no_dbias() -> None:
    rng = np.random.default_rng(2)
    x, weight, dy = rng.normal(size=(4, 9)), rng.normal(size=9), rng.normal(size=(4, 9))
    _, cache = fn.rms_norm_forward(x, weight)
    assert cache.mean is None
    assert cache.bias is None
    assert cache.rstd.shape == (4,)
    dx, dweight, dbias = fn.rms_norm_backward(dy, cache)
    assert dbias is None
    assert dx.shape == x.shape
    assert dweight is not None
    assert dweight.shape == weight.shape
