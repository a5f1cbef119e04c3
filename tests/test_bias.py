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
                found = {}
                for level in LEVELS:
                    _core.set_isa(level)
                    result = getattr(fn, name)(**arguments)
                    found[level] = result[0] if isinstance(result, tuple) else result
                _core.set_isa(LEVELS[0])
                bits = {level: np.ascontiguousarray(y).tobytes() for level, y in found.items()}
                assert len(set(bits.values())) == 1, (name, offset)
                exact = {"y": expected(name, **arguments)["y"]}
                assert_close({"y": found[LEVELS[0]]}, exact, f"{name} {layout} {offset}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 12), *SHAPES])
def test_constant_sets_are_exactly_their_bias(shape: tuple[int, ...], dtype: Any) -> None:
    bias = np.resize(np.array(BIASES[dtype], dtype), shape[1])
    weight = np.random.default_rng(1).standard_normal(shape[1]).astype(dtype)
    x = np.full(shape, 1234.567, dtype)
    want = np.broadcast_to(bias.reshape(-1, *[1] * (len(shape) - 2)), shape)
    for name, arguments in _calls(x, weight, bias):
        if name == "instance_norm" and len(shape) < 3:
            continue
        if name == "batch_norm":
            arguments["mean"] = x[0].reshape(shape[1], -1)[:, 0]
        result = getattr(fn, name)(**arguments)
        np.testing.assert_array_equal(result[0] if isinstance(result, tuple) else result, want, name)
