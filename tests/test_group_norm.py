"""group_norm: the accuracy contract, and what is group norm's own. Refuses what all functions share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import contract
import fastnorm as fn
from ulps import assert_close, expected


@pytest.mark.parametrize(("function", "dtype", "shape"), contract.CASES["group_norm"])
def test_contract(function: str, dtype: Any, shape: tuple[int, ...]) -> None:
    contract.check(function, dtype, shape)


@pytest.mark.parametrize("channel_axis", [0, 1, 2, 3, -1, -2])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 6, 12])
def test_every_number_of_groups_on_every_channel_axis(num_groups: int, channel_axis: int) -> None:
    rng = np.random.default_rng(num_groups)
    shape = [3, 5, 2, 4]
    shape[channel_axis] = 12
    x, dy = rng.normal(5, 2, (2, *shape)).astype(np.float32)
    weight, bias = rng.normal(size=(2, 12)).astype(np.float32)
    arguments = {"num_groups": num_groups, "weight": weight, "bias": bias, "channel_axis": channel_axis}
    y, cache = fn.group_norm_forward(x, **arguments)
    exact = expected("group_norm_forward", x=x, **arguments)
    assert_close({"y": y, "mean": cache.mean, "rstd": cache.rstd}, exact)
    batch = shape[1 if channel_axis % 4 == 0 else 0]
    assert cache.mean.shape == (batch * num_groups,)
    assert (cache.num_groups, cache.channel_axis) == (num_groups, channel_axis % 4)
    grads = fn.group_norm_backward(dy, cache)
    assert_close(grads._asdict(), expected("group_norm_backward", dy=dy, cache=cache))


# Groups of a few neighbouring columns have loops over groups made for their width.
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_groups", [1, 7, 17, 33])
@pytest.mark.parametrize("width", range(2, 10))
def test_channels_last_groups_of_every_width(width: int, num_groups: int, dtype: Any) -> None:
    rng = np.random.default_rng(width)
    channels = width * num_groups
    x, dy = rng.normal(2, 3, (2, 5, 13, channels)).astype(dtype)
    weight, bias = rng.normal(size=(2, channels)).astype(dtype)
    odd = num_groups // 2
    x[1, :, odd * width : (odd + 1) * width] = 7  # its statistics are made with care, those beside it are not
    arguments = {"num_groups": num_groups, "weight": weight, "bias": bias, "channel_axis": -1}
    y, cache = fn.group_norm_forward(x, **arguments)
    exact = expected("group_norm_forward", x=x, **arguments)
    assert_close({"y": y, "mean": cache.mean, "rstd": cache.rstd}, exact)
    grads = fn.group_norm_backward(dy, cache)
    assert_close(grads._asdict(), expected("group_norm_backward", dy=dy, cache=cache))

    x[2, 3, odd * width] = np.nan
    spoilt, cache = fn.group_norm_forward(x, **arguments)
    grads_of_spoilt = fn.group_norm_backward(dy, cache)
    inside = np.zeros(x.shape, dtype=bool)
    inside[2, :, odd * width : (odd + 1) * width] = True
    for result, before in ((spoilt, y), (grads_of_spoilt.dx, grads.dx)):
        assert np.isnan(result[inside]).all()
        np.testing.assert_array_equal(result[~inside], before[~inside])


@pytest.mark.parametrize("module", [fn, fn.reference])
def test_nothing_may_have_no_channels(module: Any) -> None:
    """A batch of size 0 gives an empty result; examples without a channel have nothing to normalise."""
    none = np.zeros(0, np.float32)
    for shape, axis in (((0, 0), 1), ((0, 0, 5), 1), ((0, 4, 0), 2), ((0, 0), 0)):
        x = np.zeros(shape, np.float32)
        y, cache = module.group_norm_forward(x, 2, none, none, channel_axis=axis)
        assert y.shape == module.group_norm(x, 2, channel_axis=axis).shape == shape
        grads = module.group_norm_backward(y, cache)
        assert (grads.dx.shape, grads.dweight.shape, grads.dbias.shape) == (shape, (0,), (0,))
    with pytest.raises(ValueError, match=r"num_groups is 9223372036854775808[;,] expected less than 2\*\*31"):
        module.group_norm(np.zeros((0, 0), np.float32), 2**63)
    for shape in ((3, 0), (3, 0, 4), (3, 4, 0)):
        with pytest.raises(ValueError, match="nothing to normalise"):
            module.group_norm(np.zeros(shape, np.float32), 2)


def test_is_instance_norm_with_a_group_for_each_channel() -> None:
    x = np.random.default_rng(1).normal(size=(4, 6, 9, 2)).astype(np.float32)
    assert_close({"y": fn.group_norm(x, 6)}, expected("instance_norm", x=x))
