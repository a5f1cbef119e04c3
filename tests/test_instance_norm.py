"""instance_norm: the accuracy contract, and what is instance norm's own. Refuses what all functions share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import contract
import fastnorm as fn
from ulps import assert_close, expected


@pytest.mark.parametrize(("function", "dtype", "shape"), contract.CASES["instance_norm"])
def test_contract(function: str, dtype: Any, shape: tuple[int, ...]) -> None:
    contract.check(function, dtype, shape)


def test_is_batch_norm_of_a_batch_of_one() -> None:
    x = np.random.default_rng(1).normal(2, 3, (1, 6, 9, 5))
    y, _ = fn.batch_norm_forward(x)
    assert_close({"y": y}, expected("instance_norm", x=x))


def test_statistics_are_those_of_each_channel_of_each_example() -> None:
    x = np.random.default_rng(2).normal(2, 3, (3, 4, 5, 6))
    _, cache = fn.instance_norm_forward(x, eps=0.5)
    np.testing.assert_allclose(cache.mean, x.mean((2, 3)).ravel(), rtol=1e-14)
    np.testing.assert_allclose(cache.rstd, 1 / np.sqrt(x.var((2, 3)).ravel() + 0.5), rtol=1e-14)


def test_backward_is_that_of_group_norm_with_a_group_for_each_channel() -> None:
    rng = np.random.default_rng(3)
    x, dy, weight = rng.normal(2, 3, (3, 4, 5, 6)), rng.normal(size=(3, 4, 5, 6)), rng.normal(size=4)
    _, cache = fn.instance_norm_forward(x, weight, weight)
    _, group_cache = fn.group_norm_forward(x, 4, weight, weight)
    for got, wanted in zip(fn.instance_norm_backward(dy, cache), fn.group_norm_backward(dy, group_cache), strict=True):
        np.testing.assert_array_equal(got, wanted, strict=True)
