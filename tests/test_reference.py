"""The references against arithmetic of 100 decimal digits, and the plumbing that they share with the kernels.

Refuses to use the kernels: what judges them is judged here on its own.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest

from fastnorm import reference
from operations import LAYOUTS, OPERATIONS
from ulps import WIDE, errors, expected, unit

NORMS = [name for name in OPERATIONS if "norm" in name and "dropout" not in name]
wide_only = pytest.mark.skipif(np.finfo(WIDE).eps > 2.0**-60, reason="longdouble is float64 on this platform")


def decimals(a: Any) -> list[Decimal]:
    return [Decimal(float(v)) for v in np.ravel(a)]


def wide(d: Decimal) -> Any:
    """A decimal as a longdouble: two float64 hold more digits than it has."""
    scale = 2.0 ** max(-1000, min(1000, math.frexp(float(d))[1])) if d else 1.0
    d = d / Decimal(scale)
    high = float(d)
    return (WIDE(high) + WIDE(float(d - Decimal(high)))) * WIDE(scale)


def by_decimals(
    x: list[Decimal], g: list[Decimal], eps: float, centred: bool
) -> tuple[list[Decimal], list[Decimal], Decimal]:
    """xhat, dx and sigma of one set, by the textbook formulas. g is dy * weight."""
    n = len(x)
    mean = sum(x) / n if centred else Decimal(0)
    sigma = (sum((v - mean) ** 2 for v in x) / n + Decimal(eps)).sqrt()
    xhat = [(v - mean) / sigma for v in x]
    g1 = sum(g) / n if centred else Decimal(0)
    g2 = sum(a * b for a, b in zip(g, xhat, strict=True)) / n
    return xhat, [(a - g1 - h * g2) / sigma for a, h in zip(g, xhat, strict=True)], sigma


EXTREMES = [
    (np.float32, 0.0, 1.0),
    (np.float32, 2.0**24, 1e-37),
    (np.float32, 1e3, 1e35),
    (np.float64, 0.0, 1.0),
    (np.float64, 1e6, 1e-300),
    (np.float64, 2.0**53, 1.0),
    (np.float64, -(2.0**53), 1e280),
    (np.float64, 1e3, 1e304),
]


@wide_only
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize(("dtype", "offset", "scale"), EXTREMES)
@pytest.mark.parametrize("stem", ["layer_norm", "rms_norm"])
def test_a_row_against_a_hundred_digits(stem: str, dtype: Any, offset: float, scale: float, eps: float) -> None:
    rng = np.random.default_rng(1)
    x = ((offset + 3 * rng.normal(size=37)) * scale).astype(dtype)
    weight, dy = rng.normal(size=(2, 37)).astype(dtype)
    with np.errstate(over="ignore"):
        _, cache = getattr(reference, f"{stem}_forward")(x, weight, eps=eps)
    y = expected(f"{stem}_forward", x=x, eps=eps)
    gradients = expected(f"{stem}_backward", dy=dy, cache=cache)
    with localcontext() as context:
        context.prec = 100
        g = [a * b for a, b in zip(decimals(dy), decimals(weight), strict=True)]
        xhat, dx, sigma = by_decimals(decimals(x), g, eps, stem == "layer_norm")
        dweight = [a * b for a, b in zip(decimals(dy), xhat, strict=True)]
        for exact, want in (
            (y["y"], xhat),
            (y["rstd"], [1 / sigma]),
            (gradients["dx"], dx),
            (gradients["dweight"], dweight),
        ):
            want_wide = np.array([wide(d) for d in want]).reshape(exact.value.shape)
            error = np.abs(exact.value - want_wide) / (unit(np.float64) * exact.scale)
            assert error.max() < 2.0**-5, "the references must be far more exact than what they judge"


@pytest.mark.parametrize("name", NORMS)
def test_plain_forward_and_exact_agree(name: str) -> None:
    """A reference returns its exact result rounded once."""
    for options in OPERATIONS[name].variants:
        for dtype in (np.float32, np.float64):
            call = OPERATIONS[name].make(reference, (3, 6, 5), dtype, layout=LAYOUTS["reversed"], **options)
            exact = expected(name, **call.arguments)
            for key, array in call.run().items():
                np.testing.assert_array_equal(array, exact[key].value.astype(array.dtype), f"{key} {options}")
                assert np.all(errors(array, exact[key]) <= 1)


@pytest.mark.parametrize("name", [n for n in NORMS if OPERATIONS[n].out])
def test_out_is_filled_and_returned(name: str) -> None:
    operation = OPERATIONS[name]
    call = operation.make(reference, (3, 6, 5), np.float32)
    want = call.run()["dx" if name.endswith("_backward") else "y"]
    out = LAYOUTS["sliced"](call.empty_out())
    result = call(out=out)
    assert (result[0] if isinstance(result, tuple) else result) is out
    np.testing.assert_array_equal(out, want)
    with pytest.raises(ValueError, match="out"):
        call(out=np.empty((3, 6, 4), np.float32))
    with pytest.raises(ValueError, match="out"):
        call(out=np.empty((3, 6, 5), np.float64))
    main = call.arguments[call.main]
    if operation.in_place is None:
        with pytest.raises(ValueError, match="overlaps x"):
            call(out=main)
    else:
        np.testing.assert_array_equal(call(out=main)[0] if name.endswith("_backward") else call(out=main), want)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("layer_norm", {"x": np.arange(4)}, "x has dtype int"),
        ("layer_norm", {"x": np.ones((2, 3)), "weight": np.ones(1)}, r"weight has shape \(1,\), expected \(3,\)"),
        ("layer_norm", {"x": np.ones((2, 3)), "axis": 2}, "axis is 2"),
        ("rms_norm", {"x": np.ones((2, 3)), "weight": np.ones((2, 3))}, "weight has shape"),
        ("group_norm", {"x": np.ones((2, 6)), "num_groups": 4}, "num_groups is 4"),
        ("group_norm", {"x": np.ones(6), "num_groups": 1}, "rank 1"),
        ("instance_norm", {"x": np.ones((2, 3))}, "rank 2"),
        ("instance_norm", {"x": np.ones((2, 3, 4)), "channel_axis": 3}, "channel_axis is 3"),
        ("batch_norm", {"x": np.ones((2, 3)), "mean": np.ones(2), "var": np.ones(3)}, "mean has shape"),
        ("batch_norm", {"x": np.ones((2, 3)), "mean": np.ones(3), "var": -np.ones(3)}, "var holds -1"),
        ("batch_norm_forward", {"x": np.ones((1, 3))}, "one value per channel"),
        ("batch_norm_forward", {"x": np.ones((2, 3)), "training": False}, "running_mean"),
        ("batch_norm_forward", {"x": np.ones((2, 3)), "running_var": np.ones(2)}, "running_var has shape"),
    ],
)
def test_refusals(function: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(reference, function)(**arguments)


def test_a_backward_takes_the_cache_of_its_own_forward() -> None:
    _, cache = reference.layer_norm_forward(np.ones((2, 3)))
    with pytest.raises(ValueError, match="cache comes from layer_norm_forward"):
        reference.rms_norm_backward(np.ones((2, 3)), cache)
    with pytest.raises(ValueError, match="dy has shape"):
        reference.layer_norm_backward(np.ones((3, 2)), cache)


def test_every_public_norm_has_its_exact_form() -> None:
    assert {name for name in reference.__all__ if "norm" in name and "dropout" not in name} <= set(reference._EXACT)


def test_a_long_column_is_added_as_exactly_as_a_row() -> None:
    """Two values, whose roundings go the same way wherever one term is added after the other."""
    rng = np.random.default_rng(2)
    rows = np.where(rng.random((2, 65_537)) < 0.3, 1 / 3, 0.7)
    along, across = reference.layer_norm(rows, eps=0.0), reference.batch_norm_forward(rows.T.copy(), eps=0.0)[0].T
    assert np.max(np.abs(along - across)) <= 2 * unit(np.float64) * np.max(np.abs(along))
