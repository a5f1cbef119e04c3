"""Errors in u (unit round-off): the comparison behind every tolerance of the tests.

`expected` asks the references for the exact result and for the scale S of the accuracy contract,
``|got - exact| <= units * u * S``; `assert_close` holds a result to it and prints the worst error, pass or fail.
Refuses relative tolerances of any other kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastnorm import reference

WIDE = np.longdouble
CACHED = ("mean", "rstd", "batch_var", "m2")


def unit(dtype: Any) -> float:
    return float(np.finfo(dtype).eps) / 2


def expected(function: str, **arguments: Any) -> dict[str, Any]:
    """name -> Exact, for every array that the function returns or updates; None for the gradient of a None."""
    outputs = reference._EXACT[function](**{k: v for k, v in arguments.items() if k != "out"})
    plain = not function.endswith(("_forward", "_backward", "moments"))
    return {k: v for k, v in outputs.items() if k != "count" and not (plain and k in CACHED)}


def errors(got: np.ndarray, exact: Any) -> np.ndarray:
    """The error of each element in units of u * S; inf where only one of the two is finite, 0 where neither is."""
    got = np.asarray(got)
    assert got.shape == exact.value.shape
    with np.errstate(all="ignore"):
        finite = np.isfinite(exact.value.astype(got.dtype)), np.isfinite(got)
        off = np.abs(got.astype(WIDE) - exact.value)
        # Below the normal range every rounding is to a multiple of the smallest subnormal, whatever the scale.
        off = np.maximum(off - exact.units * np.finfo(got.dtype).smallest_subnormal.astype(WIDE), 0)
        error = np.where(off == 0, WIDE(0), off / (exact.u * exact.scale)) if exact.u else np.where(off == 0, 0, np.inf)
        error = np.where(finite[0] & finite[1], error, np.where(finite[0] | finite[1], np.inf, 0))
    return error.astype(np.float64)


def assert_close(got: dict[str, np.ndarray], exact: dict[str, Any], label: str = "") -> None:
    """Every output of ``exact`` is in ``got`` and within the contract."""
    for name, value in exact.items():
        if value is None:
            assert name not in got, f"{label} {name}: expected None, got an array"
            continue
        assert name in got, f"{label} {name}: missing"
        error = errors(got[name], value)
        worst = np.unravel_index(np.argmax(error), error.shape) if error.size else ()
        report = f"{label} {name}: worst error {error[worst] if error.size else 0:.3g} u, allowed {value.units:g} u"
        print(report)
        if error.size and not error[worst] <= value.units:
            at = tuple(map(int, worst))
            raise AssertionError(f"{report}, at {at}: got {got[name][at]!r}, exact {value.value[at]!r}")
