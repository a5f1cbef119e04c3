"""Long sets are normalised one by one, each while the next is measured: none may leave a trace in another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn

LENGTHS = [199, 200, 511, 512, 515, 768, 1023, 1024, 1030, 2062]


def _sets(rng: Any, n: int, dtype: Any) -> Any:
    """A set of each kind that takes another way, and plain ones between them."""
    huge, tiny = (3e38, 1e-38) if dtype == np.float32 else (1e308, 1e-308)
    plain = rng.standard_normal((9, n))
    ends = np.where(np.arange(n) % 2, huge, -huge)
    kinds = [
        plain[1] * tiny,
        ends,
        np.full(n, 1.5),
        plain[2] + 1e6,
        plain[3] * 1e-3 + 1e5,
        np.zeros(n),
        plain[4] * 1e30,
    ]
    rows = [plain[0]]
    for kind, ordinary in zip(kinds, plain[2:], strict=False):
        rows += [kind, ordinary]
    x = np.array(rows).astype(dtype)
    nan = x[::2].copy()
    nan[1, n // 2] = np.nan
    nan[3, 0] = np.inf
    return np.concatenate([x, nan, x[1:2]])


def _calls(x: Any, weight: Any, bias: Any) -> list[tuple[str, Any]]:
    """By name, a function of (sets, out) for every norm whose sets can be such rows."""
    shape = x.shape[1:]

    def instance_norm(sets: Any, out: Any = None) -> Any:
        return fn.instance_norm(sets[:, None], out=None if out is None else out[:, None])[:, 0]

    def group_norm(sets: Any, out: Any = None) -> Any:
        n = sets.shape[1] // 2  # two channels to a group, and perhaps a value left over
        y = sets.copy()
        y[:, : 2 * n] = fn.group_norm(sets[:, : 2 * n].reshape(-1, 2, n), 1, weight[:2], bias[:2]).reshape(-1, 2 * n)
        if out is None:
            return y
        out[...] = y
        return out

    calls: list[tuple[str, Any]] = [
        ("layer_norm", lambda sets, out=None: fn.layer_norm(sets, out=out)),
        ("layer_norm weight", lambda sets, out=None: fn.layer_norm(sets, weight, out=out)),
        ("layer_norm weight bias", lambda sets, out=None: fn.layer_norm(sets, weight, bias, out=out)),
        ("layer_norm bias", lambda sets, out=None: fn.layer_norm(sets, bias=bias, out=out)),
        ("rms_norm", lambda sets, out=None: fn.rms_norm(sets, out=out)),
        ("rms_norm weight", lambda sets, out=None: fn.rms_norm(sets, weight, out=out)),
        ("instance_norm", instance_norm),
        ("group_norm", group_norm),
    ]
    assert weight.shape == shape
    return calls


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_every_set_has_the_bits_it_has_alone(n: int, dtype: Any) -> None:
    rng = np.random.default_rng(n)
    x = _sets(rng, n, dtype)
    weight, bias = rng.standard_normal(n).astype(dtype), rng.standard_normal(n).astype(dtype)
    wide = np.full((len(x), n + 3), np.nan, dtype)
    with np.errstate(all="ignore"):
        for name, call in _calls(x, weight, bias):
            together = call(x)
            for i in range(len(x)):
                np.testing.assert_array_equal(call(x[i : i + 1])[0], together[i], f"{name}: set {i} alone")
            for count in (1, 2, 3, len(x) - 1):
                np.testing.assert_array_equal(call(x[-count:]), together[-count:], f"{name}: the last {count}")
            order = rng.permutation(len(x))
            np.testing.assert_array_equal(call(x[order]), together[order], f"{name}: in another order")
            np.testing.assert_array_equal(call(x[::-1]), together[::-1], f"{name}: backwards")
            in_place = x.copy()
            np.testing.assert_array_equal(call(in_place, in_place), together, f"{name}: in place")
            call(x, wide[:, 1 : n + 1])
            np.testing.assert_array_equal(wide[:, 1 : n + 1], together, f"{name}: to rows apart")
            assert np.isnan(wide[:, [0, n + 1, n + 2]]).all(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_results_and_statistics_are_within_the_contract(n: int, dtype: Any) -> None:
    rng = np.random.default_rng(n)
    x = _sets(rng, n, dtype)
    x = x[np.isfinite(x).all(axis=1)]
    unit = np.finfo(dtype).eps / 2
    wide = x.astype(np.longdouble)  # whose exponents hold the squares
    for centred in (True, False):
        deviations = wide - wide[:, :1] if centred else wide  # from a value of the set: no offset takes digits
        if centred:
            deviations -= deviations.mean(axis=1, keepdims=True)
        rstd = 1 / np.sqrt(np.mean(deviations**2, axis=1, keepdims=True) + np.longdouble(1e-5))
        exact = deviations * rstd
        y, cache = fn.layer_norm_forward(x) if centred else fn.rms_norm_forward(x)
        error = np.abs(y - exact) / (unit * np.maximum(1, np.abs(exact)))
        assert error.max() <= 4, (centred, np.unravel_index(error.argmax(), error.shape), error.max())
        held = rstd[:, 0] > np.finfo(np.float64).tiny
        np.testing.assert_allclose(cache.rstd[held], rstd[held, 0].astype(np.float64), rtol=2**-27)
