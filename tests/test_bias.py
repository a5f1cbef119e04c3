"""A bias for all values of a run is a part of the offset that normalises them: of any size, at every level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core
from operations import LAYOUTS
from ulps import assert_close, expected

LEVELS = _core.isa_levels()
# For each channel: ordinary ones, ones beside which xhat is nothing, and ones that are nothing beside it or vanish.
BIASES = {
    np.float32: (0.0, -0.0, 1.0, -2.5, 1e-3, 1e-37, -1e-45, 3e6, -1e30, 3e38),
    np.float64: (0.0, -0.0, 1.0, -2.5, 1e-3, 1e-90, -1e-100, 1e-310, 3e13, -1e200, 1e271, 1.7e308),
}
SHAPES = [(5, 12, 7, 7), (3, 12, 14, 14), (4, 12, 131), (2, 12, 2051)]
OFFSETS = (0.0, 0.5, 1e3, 1e6)
# Given statistics say nothing of x.
HUGE = {np.float32: (1e30, -3e38, np.inf), np.float64: (1e152, -1.5e300, 1.7e308, -np.inf)}


def _at_every_level(name: str, arguments: dict[str, Any]) -> Any:
    """The result, which has to have the same bits at all levels."""
    found = []
    for level in LEVELS:
        _core.set_isa(level)
        result = getattr(fn, name)(**arguments)
        found.append(np.array(result[0] if isinstance(result, tuple) else result))
    _core.set_isa(LEVELS[0])
    assert len({y.tobytes() for y in found}) == 1, name
    return found[0]


def _calls(x: Any, weight: Any, bias: Any) -> list[tuple[str, dict[str, Any]]]:
    parameters = {"x": x, "weight": weight, "bias": bias}
    given = {"mean": x.mean(tuple(i for i in range(x.ndim) if i != 1)), "var": np.ones(x.shape[1], x.dtype)}
    return [
        ("instance_norm", parameters),
        ("group_norm", parameters | {"num_groups": 3}),
        ("batch_norm_forward", parameters),
        ("batch_norm", parameters | given),
    ]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_bias_is_within_the_contract_and_the_same_at_every_level(
    shape: tuple[int, ...], dtype: Any, layout: str
) -> None:
    rng = np.random.default_rng(shape)
    bias = np.resize(np.array(BIASES[dtype], dtype), shape[1])
    for offset in OFFSETS:
        x = LAYOUTS[layout]((rng.standard_normal(shape) + offset).astype(dtype))
        for weight in (None, rng.standard_normal(shape[1]).astype(dtype)):
            for name, arguments in _calls(x, weight, bias):
                exact = {"y": expected(name, **arguments)["y"]}
                assert_close({"y": _at_every_level(name, arguments)}, exact, f"{name} {layout} {offset}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_values_through_given_statistics(dtype: Any, layout: str) -> None:
    rng = np.random.default_rng(3)
    bias = np.array([1.0, -1e-3, 0.0, 1e20], dtype)
    for shape in [(6, 4), (3, 4, 50), (2, 4, 9, 9)]:
        x = rng.standard_normal(shape).astype(dtype)
        x.reshape(-1)[:: x.size // 12] = np.resize(np.array(HUGE[dtype], dtype), len(range(0, x.size, x.size // 12)))
        x = LAYOUTS[layout](x)
        for mean, var in [(0.0, 1.0), (2.0, 1e-3), (-1.0, 1e4)]:
            given = {"mean": np.full(4, mean, dtype), "var": np.full(4, var, dtype)}
            for weight in (None, np.array([1.0, -0.5, 2.0, 1e-3], dtype)):
                arguments = {"x": x, "weight": weight, "bias": bias} | given
                with np.errstate(over="ignore"):
                    exact = {"y": expected("batch_norm", **arguments)["y"]}
                y = _at_every_level("batch_norm", arguments)
                assert not np.isnan(y).any()
                assert_close({"y": y}, exact, f"{shape} {mean} {var}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_zero_keeps_its_sign_whatever_stands_beside_it(dtype: Any) -> None:
    x = np.random.default_rng(5).standard_normal((2, 3, 40)).astype(dtype)
    x[:, 1] = -0.0
    alone = fn.instance_norm(x[:, 1:2], eps=0)
    for scale in (1, dtype(np.finfo(dtype).max / 1e10)):
        x[:, 0] = np.random.default_rng(6).standard_normal((2, 40)) * scale
        beside = _at_every_level("instance_norm", {"x": x, "eps": 0})
        assert beside[:, 1:2].tobytes() == alone.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 12), *SHAPES])
@pytest.mark.parametrize("value", [1234.567, 1e-3, -1e-3, 1e-30])  # eps is 1e-5: a small mean is less than its root
def test_constant_sets_are_exactly_their_bias(shape: tuple[int, ...], dtype: Any, value: float) -> None:
    bias = np.resize(np.array(BIASES[dtype], dtype), shape[1])
    weight = np.random.default_rng(1).standard_normal(shape[1]).astype(dtype)
    x = np.full(shape, value, dtype)
    want = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1, *[1] * (len(shape) - 2)), shape))
    for name, arguments in _calls(x, weight, bias):
        if name == "instance_norm" and len(shape) < 3:
            continue
        if name == "batch_norm":
            arguments["mean"] = x[0].reshape(shape[1], -1)[:, 0]
        y = _at_every_level(name, arguments)
        np.testing.assert_array_equal(y, want, name)
        assert not np.signbit(y[(want == 0) & ~np.signbit(want)]).any(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [1e-3, 1e-30, 3.0, 1e30])
def test_a_constant_row_or_a_single_value_is_zero(value: float, dtype: Any) -> None:
    for shape in [(1, 1), (3, 1), (2, 4), (40, 100), (2, 5000), (1, 1, 1), (2, 3, 1)]:
        x = np.full(shape, value, dtype)
        assert not _at_every_level("layer_norm", {"x": x}).any(), shape
        if x.ndim == 3:
            assert not _at_every_level("instance_norm", {"x": x}).any(), shape
            assert not _at_every_level("group_norm", {"x": x, "num_groups": 1}).any(), shape


def test_a_row_of_one_value_has_the_sign_of_zero_that_it_has_alone() -> None:
    for dtype in (np.float32, np.float64):
        x, weight = np.full((3, 1), 5, dtype), np.array([-1], dtype)
        assert fn.layer_norm(x, weight, eps=0).tobytes() == fn.layer_norm(x[:1], weight, eps=0).tobytes() * 3
