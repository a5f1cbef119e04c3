"""layer_norm: the accuracy contract, and what is layer norm's own. Refuses what all functions share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import contract
import fastnorm as fn
from ulps import assert_close, expected


@pytest.mark.parametrize(("function", "dtype", "shape"), contract.CASES["layer_norm"])
def test_contract(function: str, dtype: Any, shape: tuple[int, ...]) -> None:
    contract.check(function, dtype, shape)


@pytest.mark.parametrize("axis", range(-4, 4))
def test_every_axis_from_the_first_normalised_one(axis: int) -> None:
    rng = np.random.default_rng(axis + 4)
    x = rng.normal(3, 2, (3, 4, 5, 7)).astype(np.float32)
    weight, bias = rng.normal(size=(2, *x.shape[axis:])).astype(np.float32)
    y, cache = fn.layer_norm_forward(x, weight, bias, axis=axis, eps=1e-3)
    exact = expected("layer_norm_forward", x=x, weight=weight, bias=bias, axis=axis, eps=1e-3)
    assert_close({"y": y, "mean": cache.mean, "rstd": cache.rstd}, exact)
    assert cache.axis == axis % 4
    assert cache.mean.shape == cache.rstd.shape == (np.prod(x.shape[: axis % 4], dtype=int),)
    grads = fn.layer_norm_backward(rng.normal(size=x.shape).astype(np.float32), cache)
    assert grads.dweight.shape == grads.dbias.shape == x.shape[axis:]


def test_is_group_norm_with_one_group() -> None:
    x = np.random.default_rng(1).normal(size=(4, 6, 9))
    rows, groups = (expected("layer_norm", x=x, axis=1), fn.group_norm(x, 1))
    assert_close({"y": groups}, rows)


def test_cache_refers_to_the_arguments() -> None:
    rng = np.random.default_rng(2)
    x, weight, bias = rng.normal(size=(3, 8)), rng.normal(size=8), rng.normal(size=8)
    _, cache = fn.layer_norm_forward(x, weight, bias)
    assert cache.x is x
    assert cache.weight is weight
    assert cache.bias is bias
    assert cache.mean.dtype == cache.rstd.dtype == np.float64
    assert cache.function == "layer_norm"
    with pytest.raises(AttributeError):
        cache.eps = 1.0
