"""Long sets are normalised one by one, each while the next is measured: none may leave a trace in another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core

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
    for kind, ordinary in zip(kinds, plain[2:], strict=True):
        rows += [kind, ordinary]
    x = np.array(rows).astype(dtype)
    nan = x[::2].copy()
    nan[1, n // 2] = np.nan
    nan[3, 0] = np.inf
    return np.concatenate([x, nan, x[1:2]])


def _calls(weight: Any, bias: Any) -> list[tuple[str, Any]]:
    """By name, for every norm whose sets can be such rows: a function of (rows, out)."""

    def instance_norm(rows: Any, out: Any = None) -> Any:
        return fn.instance_norm(rows[:, None], out=None if out is None else out[:, None])[:, 0]

    def group_norm(rows: Any, out: Any = None) -> Any:
        """Two channels to a group; an odd value that is left over is passed on."""
        y = rows.copy() if out is None else out
        shape = (len(rows), 2, len(weight) // 2)
        x_cut, y_cut = (
            np.lib.stride_tricks.as_strided(a, shape, (a.strides[0], shape[2] * a.itemsize, a.itemsize))
            for a in (rows, y)
        )
        fn.group_norm(x_cut, 1, weight[:2], bias[:2], out=y_cut)
        return y

    return [
        ("layer_norm", lambda rows, out=None: fn.layer_norm(rows, out=out)),
        ("layer_norm weight", lambda rows, out=None: fn.layer_norm(rows, weight, out=out)),
        ("layer_norm weight bias", lambda rows, out=None: fn.layer_norm(rows, weight, bias, out=out)),
        ("layer_norm bias", lambda rows, out=None: fn.layer_norm(rows, bias=bias, out=out)),
        ("rms_norm", lambda rows, out=None: fn.rms_norm(rows, out=out)),
        ("rms_norm weight", lambda rows, out=None: fn.rms_norm(rows, weight, out=out)),
        ("instance_norm", instance_norm),
        ("group_norm", group_norm),
    ]


def _same(found: Any, wanted: Any, what: str) -> None:
    """To the last bit, signs of zero included."""
    found, wanted = np.ascontiguousarray(found), np.ascontiguousarray(wanted)
    bits = np.uint32 if found.dtype == np.float32 else np.uint64
    np.testing.assert_array_equal(found.view(bits), wanted.view(bits), what)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_every_set_has_the_bits_it_has_alone(n: int, dtype: Any) -> None:
    rng = np.random.default_rng(n)
    x = _sets(rng, n, dtype)
    weight, bias = rng.standard_normal(n).astype(dtype), rng.standard_normal(n).astype(dtype)
    order = rng.permutation(len(x))
    with np.errstate(all="ignore"):
        for name, call in _calls(weight, bias):
            together = call(x)
            for i in range(len(x)):
                _same(call(x[i : i + 1])[0], together[i], f"{name}: set {i} alone")
            for count in (1, 2, 3, len(x) - 1):
                _same(call(x[-count:]), together[-count:], f"{name}: the last {count}")
            _same(call(x[order]), together[order], f"{name}: in another order")
            in_place = x.copy()
            call(in_place, in_place)
            _same(in_place, together, f"{name}: in place")
            wide = np.full((len(x), n + 3), 7, dtype)
            wide[:, 1 : n + 1] = x
            call(x, wide[:, 1 : n + 1])
            _same(wide[:, 1 : n + 1], together, f"{name}: to rows apart")
            assert (wide[:, [0, n + 1, n + 2]] == 7).all(), name
            # Arrays that the caches do not hold take other ways: here that cache is taken to have no bytes at all.
            size = _core.cache_bytes()
            try:
                _core.set_cache_bytes(0)
                _same(call(x), together, f"{name}: from memory")
                call(x, in_place)
                _same(in_place, together, f"{name}: past the cache")
            finally:
                _core.set_cache_bytes(size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_statistics_have_the_bits_they_have_alone(n: int, dtype: Any) -> None:
    x = _sets(np.random.default_rng(n), n, dtype)
    turned = np.ascontiguousarray(x[:20].reshape(4, 5, n).swapaxes(0, 1)).swapaxes(0, 1)  # sets not in memory's order
    with np.errstate(all="ignore"):
        for forward in (fn.layer_norm_forward, fn.rms_norm_forward):
            _, cache = forward(x)
            for name in ("mean", "rstd"):
                together = getattr(cache, name)
                if together is None:
                    continue
                alone = [getattr(forward(x[i : i + 1])[1], name)[0] for i in range(len(x))]
                _same(np.array(alone), together, f"{forward.__name__} {name}")
                _same(getattr(forward(turned)[1], name), together[:20], f"{forward.__name__} {name}, turned")


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no longdouble to judge float64 by")
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
        np.testing.assert_allclose(
            cache.rstd[held], rstd[held, 0].astype(np.float64), rtol=2**-27 if dtype == np.float32 else 2**-51
        )
