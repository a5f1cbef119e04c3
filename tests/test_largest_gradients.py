"""Float64 gradients of dy next to the largest number there is: sums of dy and products with it are beyond float64,
while the gradients are not. (Float32 has double for that: tests/test_vanishing_sums.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from operations import LAYOUTS, OPERATIONS
from ulps import assert_close, expected

LARGEST = float(np.finfo(np.float64).max)

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).maxexp <= np.finfo(np.float64).maxexp, reason="longdouble reaches no further than float64"
)


def _any_sign(rng: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"dy": rng.choice((-1, 1), shape) * rng.uniform(0.1, 1, shape) * LARGEST}


def _one_sign(rng: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Sums of dy are infinite, dx is not."""
    return {"dy": rng.uniform(0.9, 1, shape) * LARGEST}


def _cancelling(rng: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Partial sums of dy are infinite, sums are 0."""
    dy = np.full(shape, 0.9 * LARGEST)
    dy.reshape(-1)[1::2] *= -1
    return {"dy": dy, "x": np.repeat(rng.standard_normal(dy.size), 2)[: dy.size].reshape(shape)}


def _one_of_them(rng: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    dy = rng.standard_normal(shape)
    dy[(0,) * len(shape)] = LARGEST
    return {"dy": dy}


def _weighted(rng: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """dy * weight is infinite, x as large as to make up for it."""
    return {"dy": 1e200 * rng.standard_normal(shape), "x": 1e170 * rng.standard_normal(shape), "weight": 1e150}


KINDS: dict[str, Callable[[Any, tuple[int, ...]], dict[str, Any]]] = {
    "any sign": _any_sign,
    "one sign": _one_sign,
    "cancelling": _cancelling,
    "one of them": _one_of_them,
    "weighted": _weighted,
}
FUNCTIONS = [f"{norm}_norm_backward" for norm in ("layer", "rms", "group", "instance", "batch")]
SHAPES = ((3, 4, 10), (8, 6, 70), (2, 12, 5, 7))


def _call(function: str, kind: str, shape: tuple[int, ...], layout: Any, options: dict[str, Any]) -> Any:
    rng = np.random.default_rng([3, *shape])
    arrays = KINDS[kind](rng, shape)
    weight = arrays.pop("weight", None)
    arrays = {name: layout(values) for name, values in arrays.items()}
    if weight is not None and options.get("weight", True) is not None:
        of_rows = function.startswith(("layer", "rms"))
        extent = shape[options.get("axis", -1) :] if of_rows else (shape[options.get("channel_axis", 1)],)
        arrays["weight"] = weight * rng.uniform(1, 2, extent)
    return OPERATIONS[function].make(fn, shape, np.float64, layout=layout, **{**options, **arrays})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients(function: str, kind: str, layout: str) -> None:
    for shape in SHAPES:
        for options in OPERATIONS[function].variants:
            with np.errstate(all="ignore"):
                call = _call(function, kind, shape, LAYOUTS[layout], options)
                exact = expected(function, **call.arguments)
                finite = np.isfinite(exact["dx"].value.astype(np.float64))
            assert finite.any() or "training" in options  # given statistics make up for nothing
            assert_close(call.run(), exact, f"{shape} {options}")


@pytest.mark.parametrize("offset", [1e4, 1e9, -1e14])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_far_from_zero(function: str, offset: float) -> None:
    """Not even longdouble holds such a mean in one number."""
    shape = (6, 3, 9)
    rng = np.random.default_rng(4)
    dy, x = _any_sign(rng, shape)["dy"] / 8, offset + rng.standard_normal(shape)
    call = OPERATIONS[function].make(fn, shape, np.float64, dy=dy, x=x)
    assert_close(call.run(), expected(function, **call.arguments))


@pytest.mark.parametrize("function", ["layer_norm_backward", "rms_norm_backward"])
def test_beside_sets_whose_rstd_is_beyond_float64(function: str) -> None:
    x = np.array([[1.0, 2.0, 4.0]] * 3) * 2.0**-1060
    dy = np.array([[1.0], [1.0], [-1.0]]) * np.full(3, 0.6 * LARGEST)
    for weight in (np.zeros(3), np.full(3, 1e-15)):
        call = OPERATIONS[function].make(fn, x.shape, np.float64, dy=dy, x=x, weight=weight, eps=0)
        with np.errstate(all="ignore"):
            assert_close(call.run(), expected(function, **call.arguments))


def test_a_set_by_itself_and_among_others() -> None:
    """Sets without such dy have the bits that they have without the others, at any number of threads."""
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, 4096, 65))
    _, cache = fn.layer_norm_forward(x)
    plain = fn.layer_norm_backward(dy, cache).dx
    dy[17] = _any_sign(rng, (65,))["dy"] / 4
    alone = fn.layer_norm_backward(dy[17:18], fn.layer_norm_forward(x[17:18])[1]).dx
    plain[17] = alone[0]
    assert np.isfinite(alone).all()
    for threads in (1, 2, 3):
        with fn.num_threads(threads):
            np.testing.assert_array_equal(fn.layer_norm_backward(dy, cache).dx, plain)


def test_not_a_number_stays_where_it_is() -> None:
    rng = np.random.default_rng(6)
    x, dy = rng.standard_normal((2, 4, 6, 50))
    dy[0] = LARGEST * rng.uniform(0.5, 1, (6, 50))
    dy[1, 2, 3], dy[2, 1, 1], x[3, 5, 7] = np.nan, np.inf, np.nan
    dx = fn.instance_norm_backward(dy, fn.instance_norm_forward(x)[1]).dx
    broken = np.zeros((4, 6), bool)
    broken[1, 2] = broken[2, 1] = broken[3, 5] = True
    np.testing.assert_array_equal(np.isfinite(dx).all(axis=2), ~broken)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_residual_step(norm: str) -> None:
    """The backward in one pass gives what the separate calls give, which are mended."""
    rng = np.random.default_rng(7)
    x, residual = rng.standard_normal((2, 2048, 100))
    _, cache = getattr(fn, f"dropout_add_{norm}_norm_forward")(x, residual, p=0.25, rng=9)
    dy = _any_sign(rng, x.shape)["dy"] / 4
    grads = getattr(fn, f"dropout_add_{norm}_norm_backward")(dy, cache)
    dresidual = getattr(fn, f"{norm}_norm_backward")(dy, cache.norm).dx
    assert np.isfinite(dresidual).all()
    np.testing.assert_array_equal(grads.dresidual, dresidual)
    assert np.isfinite(grads.dx).all()
