"""Gradients of channels-first norms where sums in short trees would overflow, underflow or lose the mean, set by set.

Segments are summed in trees of their own dtype about a rounded mean, several segments folded together; a sum that does
not vouch for itself is taken again with care, and so are float64 sets whose statistics are out of the ordinary. Each
kind below breaks one thing that the trees rely on, in some channels of a batch of good ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastnorm as fn
from ulps import assert_close, expected

NORMS = {
    "instance_norm": {},
    "group_norm": {"num_groups": 4},
    "batch_norm": {},
}
DTYPES = (np.float32, np.float64)


class Data(NamedTuple):
    x: np.ndarray  # (samples, 16 channels, values)
    dy: np.ndarray
    weight: np.ndarray

    def of(self, float32: float, float64: float) -> float:
        return float32 if self.x.dtype == np.float32 else float64


Change = Callable[[Data], None]


def _kinds() -> dict[str, Change]:
    def plain(d: Data) -> None:
        pass

    def offset(d: Data) -> None:
        d.x[:, 1] += d.of(1e6, 1e14)

    def two_valued(d: Data) -> None:
        low = d.of(1e7, 1e15)
        d.x[:, 2] = np.where(d.x[:, 2] > 1, d.x.dtype.type(low), d.x.dtype.type(low + 1))

    def equal_terms(d: Data) -> None:
        d.x[:, 2], d.dy[:, 2] = np.where(d.x[:, 2] > 1, d.x.dtype.type(0.1), d.x.dtype.type(0.7)), 1 / 3

    def outlier(d: Data) -> None:
        d.x[:, 3, 0], d.dy[:, 3, 0] = d.of(1e18, 1e28), 1e-9

    def constant(d: Data) -> None:
        d.x[:, 4:8] = 0.1

    def cancelling(d: Data) -> None:
        half = d.x.shape[2] // 2
        d.x[:, 5, half : 2 * half], d.dy[:, 5, half : 2 * half] = d.x[:, 5, :half], -d.dy[:, 5, :half]

    def huge_x(d: Data) -> None:
        d.x[:, 6] *= d.of(1e37, 1e300)

    def largest_x(d: Data) -> None:
        largest = d.x.dtype.type(d.of(3.3e38, 1.79e308))
        d.x[:, 6] = np.where(d.x[:, 6] > 2.2, -largest, largest)

    def large_x(d: Data) -> None:
        d.x[:, 6] *= d.of(1e20, 1e200)
        d.dy[:, 6] *= d.of(1e20, 1e200)

    def tiny_x(d: Data) -> None:
        d.x[:, 6] *= d.of(1e-30, 1e-200)

    def huge_dy(d: Data) -> None:
        largest = d.of(3e38, 1e302)
        d.dy[:, 7] = np.where(d.dy[:, 7] > 0, largest, -largest)

    def tiny_dy(d: Data) -> None:
        d.dy[:, 8:12] *= d.of(1e-33, 1e-292)

    def tiny_product(d: Data) -> None:
        d.x[:, 9] *= d.of(1e-9, 1e-29)
        d.dy[:, 9] *= d.of(1e-31, 1e-285)

    def no_dy(d: Data) -> None:
        d.dy[:, 10] = 0

    def not_a_number(d: Data) -> None:
        d.x[1, 11, 0], d.dy[2, 12, 0] = np.nan, np.inf

    def weights(d: Data) -> None:
        d.weight[:12] = [0, 1, 1e-30, 1, 0, 0, 0, 0, 1e-42, 1e-41, 0, d.of(1e-40, 1e-310)]

    def large_weights(d: Data) -> None:
        d.weight[3:6] = [d.of(3e38, 1e300), d.of(1e20, 1e150), 1]

    return {name: change for name, change in locals().items() if callable(change)}


KINDS = _kinds()


def _call(norm: str, kind: str, n: int, dtype: Any, samples: int = 5) -> tuple[np.ndarray, Any]:
    rng = np.random.default_rng(n)
    x, dy = (rng.normal(size=(samples, 16, n)).astype(dtype) + dtype(shift) for shift in (1.5, 0))
    weight = rng.normal(size=16).astype(dtype)
    KINDS[kind](Data(x, dy, weight))
    eps = 1e-5 if kind != "tiny_x" else 1e-45 if dtype == np.float32 else 0.0
    return dy, getattr(fn, f"{norm}_forward")(x, weight=weight, bias=weight, eps=eps, **NORMS[norm])[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 16, 49, 196, 221])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_within_the_contract(norm: str, kind: str, n: int, dtype: Any) -> None:
    dy, cache = _call(norm, kind, n, dtype)
    got = getattr(fn, f"{norm}_backward")(dy, cache)
    assert_close(got._asdict(), expected(f"{norm}_backward", dy=dy, cache=cache), f"{norm} {kind} {n}")


# Around the ends of packs (16), trees (64), chains of trees (512) and blocks (1024), and planes of several blocks.
@pytest.mark.parametrize("n", [1, 2, 15, 17, 48, 63, 64, 65, 80, 127, 129, 511, 512, 513, 577, 1024, 1025, 3136, 4160])
@pytest.mark.parametrize("kind", ["plain", "offset", "two_valued", "equal_terms"])
@pytest.mark.parametrize("norm", NORMS)
def test_float64_planes_of_any_size(norm: str, kind: str, n: int) -> None:
    dy, cache = _call(norm, kind, n, np.float64, samples=3)
    got = getattr(fn, f"{norm}_backward")(dy, cache)
    assert_close(got._asdict(), expected(f"{norm}_backward", dy=dy, cache=cache), f"{norm} {kind} {n}")


@pytest.mark.parametrize("n", [5, 49])
@pytest.mark.parametrize("kind", ["plain", "two_valued", "equal_terms"])
@pytest.mark.parametrize("norm", NORMS)
def test_float64_sums_over_many_samples(norm: str, kind: str, n: int) -> None:
    dy, cache = _call(norm, kind, n, np.float64, samples=2000)
    got = getattr(fn, f"{norm}_backward")(dy, cache)
    assert_close(got._asdict(), expected(f"{norm}_backward", dy=dy, cache=cache), f"{norm} {kind} {n}")


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_groups_of_many_channels(groups: int) -> None:
    rng = np.random.default_rng(groups)
    x, dy = rng.normal(size=(2, 3, 230, 21))
    for weight in (None, rng.normal(size=230), np.full(230, 1 / 3)):
        _, cache = fn.group_norm_forward(x, groups, weight=weight)
        for g in (dy, np.where(dy > 0, 0.1, 0.7)):
            got = fn.group_norm_backward(g, cache)
            exact = expected("group_norm_backward", dy=g, cache=cache)
            assert_close({k: v for k, v in got._asdict().items() if v is not None}, exact, f"{groups} groups")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_strided_float64_arrays_have_the_bits_of_contiguous_ones(norm: str, kind: str) -> None:
    for n in (49, 600):
        dy, cache = _call(norm, kind, n, np.float64)
        forward, backward = getattr(fn, f"{norm}_forward"), getattr(fn, f"{norm}_backward")
        x, g = (np.repeat(array, 2, axis=2)[:, :, ::2] for array in (cache.x, dy))
        _, strided = forward(x, weight=cache.weight, bias=cache.weight, eps=cache.eps, **NORMS[norm])
        for a, b in zip(backward(dy, cache), backward(g, strided), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_sets_out_of_the_ordinary_leave_the_others_alone(norm: str) -> None:
    for kind in ("huge_x", "large_x", "tiny_dy", "tiny_product", "constant", "not_a_number"):
        good, bad = ([_call(norm, k, 49, np.float64)] for k in ("plain", kind))
        a, b = (getattr(fn, f"{norm}_backward")(*call[0]) for call in (good, bad))
        # Groups of four channels: those of channels 0 to 3 are as they were.
        np.testing.assert_array_equal(a.dx[:, :4], b.dx[:, :4])
        np.testing.assert_array_equal(a.dweight[:4], b.dweight[:4])
        np.testing.assert_array_equal(a.dbias[:4], b.dbias[:4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_set_gives_the_weight_nothing(dtype: Any) -> None:
    for norm in NORMS:
        dy, cache = _call(norm, "constant", 49, dtype)
        assert np.all(getattr(fn, f"{norm}_backward")(dy, cache).dweight[4:8] == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 49, 196, 600])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(kind: str, n: int, dtype: Any) -> None:
    for norm in ("instance_norm", "group_norm"):
        dy, cache = _call(norm, kind, n, dtype)
        backward, forward = getattr(fn, f"{norm}_backward"), getattr(fn, f"{norm}_forward")
        together = backward(dy, cache).dx
        for i in range(len(dy)):
            _, alone = forward(cache.x[i : i + 1], weight=cache.weight, bias=cache.weight, eps=cache.eps, **NORMS[norm])
            np.testing.assert_array_equal(backward(dy[i : i + 1], alone).dx, together[i : i + 1])
