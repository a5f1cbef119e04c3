"""Dropout and DropConnect: masks bit for bit, their statistics, scaling, shared axes, layouts, caches and errors.

The statistics use fixed seeds, so they cannot fail by chance; the limits are those that a fair generator exceeds once
in a million tests.
"""

from __future__ import annotations

import math
import pickle
import runpy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core, reference
from operations import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
FLOATS = [np.float32, np.float64]
PROBABILITIES = [0.0, 1e-12, 1e-6, 0.001, 0.1, 0.25, 0.3, 0.5, 0.9, 1 - 1e-6, 1 - 2.0**-32, 1.0]
SHAPES = [(), (1,), (7,), (513,), (3, 5), (17, 129), (4, 3, 37), (2, 3, 5, 7), (2, 3, 1, 5, 4)]
Z_LIMIT = 4.9  # two-sided, one in a million


def sample(shape: tuple[int, ...], dtype: type = np.float64, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def threshold(p: float) -> int:
    return round((1 - p) * 2.0**32)


# ---------------------------------------------------------------------------------------------------------------------
# The mask


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("p", PROBABILITIES)
def test_mask_is_the_reference_s(level: str, p: float) -> None:
    _core.set_isa(level)
    for shape in SHAPES:
        for rng in (fn.Philox(2**63 + 12345, 2**40 + 1), fn.Philox(3)):
            keep = fn.dropout_mask(shape, p, rng=rng.copy())
            assert keep.shape == shape
            assert keep.dtype == np.bool_
            np.testing.assert_array_equal(keep, reference.dropout_mask(shape, p, rng=rng.copy()))


@pytest.mark.parametrize("level", _core.isa_levels())
def test_ties_of_the_high_bits_are_decided_by_the_low_ones(level: str) -> None:
    """About 15 of a million elements tie; with the thresholds around one of them, its draw is found exactly."""
    _core.set_isa(level)
    n, rng = 1_000_003, 77
    at_half = fn.dropout_mask(n, 0.5 - 2.0**-17, rng=rng)  # K = 2^31 + 2^15: half of the ties are kept
    coarse = fn.dropout_mask(n, 0.5, rng=rng)  # K = 2^31: a tie is never kept
    upper = fn.dropout_mask(n, 0.5 - 2.0**-16, rng=rng)  # K = 2^31 + 2^16: always
    assert np.all(coarse <= at_half)
    assert np.all(at_half <= upper)
    ties = np.flatnonzero(coarse != upper)
    assert 5 <= ties.size <= 35
    for i in ties.tolist():
        part = reference.dropout_mask(n, 0.5 - 2.0**-17, rng=rng, index_range=(i, i + 1))
        assert at_half[i] == part[0]
    assert 0 < np.count_nonzero(at_half[ties]) < ties.size


def test_threshold_decides_exactly() -> None:
    """The smallest K that keeps an element is its draw + 1, found by bisection over all 2^32 thresholds."""
    for i in (0, 1, 9, 1000):
        low, high = 0, 2**32  # dropped at low, kept at high
        while high - low > 1:
            middle = (low + high) // 2
            kept = fn.dropout_mask(2**20, 1 - middle / 2**32, rng=5, index_range=(i, i + 1))[0]
            low, high = (low, middle) if kept else (middle, high)
        for k in (high - 1, high):
            expected = reference.dropout_mask(2**20, 1 - k / 2**32, rng=5, index_range=(i, i + 1))[0]
            assert expected == (k == high)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_mask_does_not_depend_on_threads(threads: int) -> None:
    n = 16384 * 9 + 517
    expected = reference.dropout_mask(n, 0.3, rng=8)
    x = sample((n,))
    with fn.num_threads(threads):
        np.testing.assert_array_equal(fn.dropout_mask(n, 0.3, rng=8), expected)
        np.testing.assert_array_equal(fn.dropout(x, 0.3, rng=8) != 0, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(67,), (33, 65), (5, 6, 77), (3, 8, 9, 11), (2, 3, 2, 5, 7)])
def test_results_do_not_depend_on_the_layout(shape: tuple[int, ...], layout: str, dtype: type) -> None:
    x = sample(shape, dtype)
    view = LAYOUTS[layout](x)
    y = fn.dropout(view, 0.4, rng=21)
    assert_same_bits(y, reference.dropout(x, 0.4, rng=21))
    np.testing.assert_array_equal(y != 0, fn.dropout_mask(shape, 0.4, rng=21))
    assert y.strides == np.empty_like(view, order="K", subok=False).strides


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_of_any_layout_is_filled_and_returned(layout: str) -> None:
    x = sample((5, 6, 77), np.float32)
    out = LAYOUTS[layout](np.full_like(x, np.nan))
    assert fn.dropout(x, 0.4, rng=21, out=out) is out
    assert_same_bits(out, reference.dropout(x, 0.4, rng=21))
    cache = fn.dropout_forward(x, 0.4, rng=21)[1]
    out[...] = np.nan
    assert fn.dropout_backward(x, cache, out=out) is out
    assert_same_bits(out, reference.dropout(x, 0.4, rng=21))


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_begin_anywhere_in_a_chunk_of_draws(level: str, dtype: type) -> None:
    """Rows of every length around the chunks of 64, 128 and 256 draws, at every phase of a block."""
    _core.set_isa(level)
    wide = sample((40, 1400), dtype)
    for n in (1, 7, 63, 65, 127, 130, 255, 257, 511, 513, 769, 1029, 1303):
        x = wide[:9, 3 : 3 + n]  # rows apart in memory: row r begins at draw r * n
        assert_same_bits(fn.dropout(x, 0.4, rng=2), reference.dropout(x, 0.4, rng=2))
        flat = np.ascontiguousarray(x)
        out = np.full(flat.size + 1, np.nan, dtype)[1:].reshape(flat.shape)
        assert_same_bits(fn.dropout(flat, 0.4, rng=2, out=out), reference.dropout(flat, 0.4, rng=2))


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(300, 130), (130, 513), (9, 70_000), (70_000, 9), (8, 3, 5, 67), (3, 65, 4, 9), (2, 9, 33, 31), (5, 249, 11)],
)
def test_memory_that_runs_along_another_axis_than_the_draws(shape: tuple[int, ...], dtype: type, level: str) -> None:
    """Tiles: rows and columns around 8, 64 and 248, draws whose phase differs from row to row, rows in one."""
    _core.set_isa(level)
    x = sample(shape, dtype)
    expected, noise = reference.dropout(x, 0.3, rng=fn.Philox(9, 3)), reference.gaussian_noise(x, 0.5, rng=4)
    for layout in ("fortran", "channels_last"):
        view = LAYOUTS[layout](x)
        assert_same_bits(fn.dropout(view, 0.3, rng=fn.Philox(9, 3)), expected)
        wide = np.repeat(view, 2, axis=0)[::2]
        assert_same_bits(fn.dropout(wide, 0.3, rng=fn.Philox(9, 3)), expected)
    if x.size < 50_000:
        assert_same_bits(fn.gaussian_noise(np.asfortranarray(x), 0.5, rng=4), fn.gaussian_noise(x, 0.5, rng=4))
        np.testing.assert_allclose(fn.gaussian_noise(np.asfortranarray(x), 0.5, rng=4), noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("skip", [0, 1, 13])
@pytest.mark.unverified("compares every value with the formula itself")
def test_arrays_larger_than_the_caches(level: str, skip: int) -> None:
    """From 16 MB on results are streamed, in lines of 64 bytes whatever the array's address: nothing is left out."""
    _core.set_isa(level)
    n = 2**21 + 8197
    x, memory = sample((n,), np.float32), np.full(n + skip + 16, 7, np.float32)
    out = memory[skip : skip + n]
    for threads in (1, 2):
        out[:] = np.nan
        with fn.num_threads(threads):
            assert fn.dropout(x, 0.25, rng=fn.Philox(5, 6), out=out) is out
        np.testing.assert_array_equal(out != 0, fn.dropout_mask(n, 0.25, rng=fn.Philox(5, 6)))
        np.testing.assert_array_equal(out[out != 0], (x * np.float32(4 / 3))[out != 0])
        assert np.all(memory[:skip] == 7)
        assert np.all(memory[skip + n :] == 7)


def test_draws_beyond_32_bits_of_blocks() -> None:
    """x of 2^36 elements that are all one in memory: rows on both sides of block 2^32, and one that crosses it."""
    x = np.broadcast_to(np.float32(1.0), (2**27, 1, 512))
    for row in (2**26 - 2, 2**26 - 1, 2**26):
        part = fn.dropout_mask(x.shape, 0.25, rng=6, index_range=(row * 512 + 300, row * 512 + 1300))
        wanted = (row * 512 + 300, row * 512 + 1300)
        np.testing.assert_array_equal(part, reference.dropout_mask(x.shape, 0.25, rng=6, index_range=wanted))


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9, 113), (3, 5, 4096), (70_001,)])
@pytest.mark.parametrize("level", _core.isa_levels())
def test_packed_mask_is_packbits_of_the_mask(shape: tuple[int, ...], level: str) -> None:
    _core.set_isa(level)
    for shared in ((), (0,)):
        keep = fn.dropout_mask(shape, 0.3, rng=8, shared_axes=shared)
        bits = fn.dropout_mask(shape, 0.3, rng=8, shared_axes=shared, packed=True)
        assert bits.dtype == np.uint8
        np.testing.assert_array_equal(bits, np.packbits(keep))
        np.testing.assert_array_equal(np.unpackbits(bits, count=keep.size).astype(bool), keep.reshape(-1))
        np.testing.assert_array_equal(bits, reference.dropout_mask(shape, 0.3, rng=8, shared_axes=shared, packed=True))
        if keep.size > 100:
            part = fn.dropout_mask(shape, 0.3, rng=8, shared_axes=shared, index_range=(3, 94), packed=True)
            np.testing.assert_array_equal(part, np.packbits(keep.reshape(-1)[3:94]))
    with pytest.raises(TypeError, match="packed is 1 of type int; expected True or False"):
        fn.dropout_mask(shape, 0.3, rng=8, packed=1)  # type: ignore[arg-type]


def test_broadcast_and_read_only_inputs() -> None:
    x = np.broadcast_to(sample((1, 7), np.float32), (50, 7))
    assert_same_bits(fn.dropout(x, 0.5, rng=3), reference.dropout(np.ascontiguousarray(x), 0.5, rng=3))


@pytest.mark.parametrize("shared", [(0,), (1,), (2,), (3,), (2, 3), (0, 1), (1, 3), (0, 2), (0, 1, 2, 3), ()])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
def test_shared_axes(shared: tuple[int, ...], layout: str) -> None:
    shape = (3, 67, 5, 9)
    x = LAYOUTS[layout](sample(shape))
    keep = fn.dropout_mask(shape, 0.4, rng=31, shared_axes=shared)
    small = tuple(1 if axis in shared else n for axis, n in enumerate(shape))
    np.testing.assert_array_equal(keep, np.broadcast_to(fn.dropout_mask(small, 0.4, rng=31), shape))
    np.testing.assert_array_equal(keep, reference.dropout_mask(shape, 0.4, rng=31, shared_axes=shared))
    y, cache = fn.dropout_forward(x, 0.4, rng=31, shared_axes=tuple(a - 4 for a in shared))
    assert_same_bits(y, reference.dropout(x, 0.4, rng=31, shared_axes=shared))
    assert cache.shared_axes == shared
    dy = sample(shape, seed=1)
    assert_same_bits(fn.dropout_backward(dy, cache), reference.dropout(dy, 0.4, rng=31, shared_axes=shared))


def test_one_shared_axis_may_be_an_int() -> None:
    np.testing.assert_array_equal(
        fn.dropout_mask((5, 9), rng=1, shared_axes=-1), fn.dropout_mask((5, 9), rng=1, shared_axes=(1,))
    )


@pytest.mark.parametrize("shared", [(), (0,), (1,), (0, 2), (2,)])
def test_part_of_a_mask(shared: tuple[int, ...]) -> None:
    shape = (11, 130, 23)
    whole = fn.dropout_mask(shape, 0.3, rng=fn.Philox(4, 9), shared_axes=shared).reshape(-1)
    for start, stop in [(0, 0), (0, 1), (0, 512), (7, 9), (511, 514), (1000, 20011), (whole.size - 3, whole.size)]:
        part = fn.dropout_mask(shape, 0.3, rng=fn.Philox(4, 9), shared_axes=shared, index_range=(start, stop))
        np.testing.assert_array_equal(part, whole[start:stop])


def test_part_of_a_mask_too_large_to_hold() -> None:
    """Blocks from 2^32 on, whose counter has a carry into its second word."""
    shape = (2**40, 5)
    for start in (2**35 - 3, 2**35 + 513, 2**42 + 1):
        part = fn.dropout_mask(shape, 0.25, rng=6, index_range=(start, start + 1500))
        np.testing.assert_array_equal(
            part, reference.dropout_mask(shape, 0.25, rng=6, index_range=(start, start + 1500))
        )


def test_mask_from_the_specification_alone() -> None:
    if not (ROOT / "examples").is_dir():
        pytest.skip("the repository is not around the tests")
    from_spec = runpy.run_path(str(ROOT / "examples" / "mask_from_spec.py"))["mask"]
    for p, seed, offset, start in [(0.5, 0, 0, 0), (0.1, 2**64 - 1, 2**64 - 1, 2**35 - 7), (0.7, 9, 2**33, 10**12)]:
        part = fn.dropout_mask(2**50, p, rng=fn.Philox(seed, offset), index_range=(start, start + 100))
        assert part.tolist() == from_spec(start, start + 100, p, seed, offset)
    whole = fn.dropout_mask((3, 5, 4), 0.4, rng=17, shared_axes=(0, 2))
    assert whole.reshape(-1).tolist() == from_spec(0, 60, 0.4, 17, shape=(3, 5, 4), shared_axes=(0, 2))


def test_examples_of_the_specification() -> None:
    page = ROOT / "docs" / "dropout.md"
    if not page.is_file():
        pytest.skip("the repository is not around the tests")
    first, second = (line.strip() for line in page.read_text("utf-8").splitlines() if set(line.strip()) == {"0", "1"})
    for text, p, start in [(first, 0.5, 0), (second, 0.1, 10**12)]:
        part = fn.dropout_mask(2**41, p, rng=fn.Philox(2026, 5), index_range=(start, start + 16))
        assert "".join(map(str, part.astype(int))) == text


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("seed", [1, 2**40 + 3])
@pytest.mark.parametrize("p", [1e-6, 0.001, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_keep_rate(p: float, seed: int) -> None:
    n = 2_000_000
    kept = np.count_nonzero(fn.dropout_mask(n, p, rng=seed))
    q = threshold(p) / 2**32
    assert abs(kept - n * q) <= Z_LIMIT * math.sqrt(n * q * (1 - q)) + 1  # + 1: p = 1e-6 is Poisson's, not normal


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """z score of the correlation of two masks of fair coins."""
    return float(np.mean(np.where(a == b, 1.0, -1.0)) * math.sqrt(a.size))


def test_elements_are_not_correlated() -> None:
    keep = fn.dropout_mask(2**20, 0.5, rng=1234)
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16, 63, 64, 512, 1024):
        assert abs(correlation(keep[:-lag], keep[lag:])) < Z_LIMIT, lag


def test_seeds_and_offsets_are_not_correlated() -> None:
    keep = fn.dropout_mask(2**20, 0.5, rng=fn.Philox(50, 7))
    others = [fn.Philox(51, 7), fn.Philox(50, 8), fn.Philox(50, 7 + 2**32), fn.Philox(50 + 2**32, 7), fn.Philox(7, 50)]
    for other in others:
        z = correlation(keep, fn.dropout_mask(2**20, 0.5, rng=other))
        assert abs(z) < Z_LIMIT, other


def test_groups_of_eight_are_uniform() -> None:
    """The eight elements of one block take all 256 patterns equally often: chi squared of 255 degrees of freedom."""
    patterns = np.packbits(fn.dropout_mask(8 * 2**18, 0.5, rng=99))
    counts = np.bincount(patterns, minlength=256)
    expected = patterns.size / 256
    chi_squared = float(np.sum((counts - expected) ** 2) / expected)
    # Wilson and Hilferty's cube root makes it nearly normal.
    z = ((chi_squared / 255) ** (1 / 3) - (1 - 2 / (9 * 255))) / math.sqrt(2 / (9 * 255))
    assert abs(z) < Z_LIMIT


def test_pairs_at_small_p_are_independent() -> None:
    """Joint drops of neighbours: Binomial(n, p^2)."""
    p, n = 0.01, 1_500_000
    drop = ~fn.dropout_mask(n, p, rng=4321)
    for lag in (1, 8):
        both = np.count_nonzero(drop[:-lag] & drop[lag:])
        assert abs(both - n * p * p) < Z_LIMIT * math.sqrt(n * p * p)


# ---------------------------------------------------------------------------------------------------------------------
# Scaling


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_kept_values_are_multiplied_by_the_inverse_of_their_probability(p: float, dtype: type) -> None:
    k = threshold(p)
    y = fn.dropout(np.ones(20_000, dtype), p, rng=12)
    keep = fn.dropout_mask(20_000, p, rng=12)
    assert not np.any(y[~keep])
    if k == 0:
        assert not keep.any()
        return
    if p < 1 - 1e-3:
        scale = y[keep][0]
        assert np.all(y[keep] == scale)
        error = abs(Fraction(float(scale)) - Fraction(2**32, k))
        assert error <= Fraction(float(np.spacing(scale))) / 2  # rounded once


def test_scale_is_rounded_once_to_float32() -> None:
    """Some of these 2^32 / K lie so near to the middle of two float32 that rounding to float64 first goes wrong."""
    rng = np.random.default_rng(0)
    found = 0
    for k in [*rng.integers(2**31, 2**32, 1000).tolist(), *hard_thresholds()]:
        p = 1 - k / 2**32
        assert threshold(p) == k
        x = np.ones(1, np.float32)
        y = fn.apply_dropout_mask(x, np.ones(1, bool), p)
        exact = Fraction(2**32, k)
        error = abs(Fraction(float(y[0])) - exact)
        assert all(error <= abs(Fraction(float(np.nextafter(y[0], np.float32(to)))) - exact) for to in (0, 4)), k
        found += np.float32(2**32 / k) != y[0]
        assert y[0] == reference.apply_dropout_mask(x, np.ones(1, bool), p)[0]
    assert found >= 3, "no threshold was hard: the test shows nothing"


def hard_thresholds() -> list[int]:
    """K for which 2^32 / K = (m + r / K) / 2^24 with m odd, the middle of two float32, and |r| small."""
    m = np.arange(2**24 + 1, 2**25, 2, dtype=np.int64)
    rest = 2**56 % m
    k = 2**56 // m + (rest > m // 2)
    return k[(np.minimum(rest, m - rest) <= 7) & (k < 2**32)].tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_p_0_returns_x_and_p_1_zeros(dtype: type) -> None:
    x = np.array([1.5, -0.0, np.nan, np.inf, -np.inf, np.finfo(dtype).smallest_subnormal, -3.25], dtype)
    for function in (fn.dropout, fn.drop_connect, lambda *a, **k: fn.dropout(*a, scale="classic", **k)):
        y = function(x, 0.0, rng=1)
        assert_same_bits(y, x)
        assert not np.shares_memory(x, y)
        assert_same_bits(function(x, 1.0, rng=1), np.zeros_like(x))
    assert_same_bits(fn.dropout_inference(x, 0.0), x)
    assert_same_bits(fn.dropout_inference(x, 1.0), np.zeros_like(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, -0.0])
@pytest.mark.parametrize("n", [5, 1000])
def test_dropped_values_are_plus_zero(value: float, n: int, dtype: type) -> None:
    x = np.full(2 * n, value, dtype)
    for view in (x[:n], x[::2]):
        for y in (
            fn.dropout(view, 0.5, rng=1),
            fn.dropout(view, 0.5, rng=1, scale="classic"),
            fn.apply_dropout_mask(view, fn.dropout_mask(n, 0.5, rng=1), 0.5),
        ):
            dropped = y[~fn.dropout_mask(n, 0.5, rng=1)]
            assert 0 < dropped.size < n
            assert_same_bits(dropped, np.zeros_like(dropped))


@pytest.mark.parametrize("dtype", FLOATS)
def test_classic_scale_and_its_inference(dtype: type) -> None:
    x = sample((37, 53), dtype)
    y, cache = fn.dropout_forward(x, 0.3, rng=5, scale="classic")
    assert cache.scale == "classic"
    assert_same_bits(y, np.where(fn.dropout_mask(x.shape, 0.3, rng=5), x, dtype(0)))
    dy = sample(x.shape, dtype, 1)
    assert_same_bits(fn.dropout_backward(dy, cache), np.where(y != 0, dy, dtype(0)))
    assert_same_bits(fn.dropout_inference(x, 0.3), x * dtype(1 - 0.3))
    assert_same_bits(fn.dropout_inference(x.T, 0.3), reference.dropout_inference(x.T, 0.3))


def test_mean_is_kept() -> None:
    x = np.full(1_000_000, 2.0, np.float32)
    for p in (0.1, 0.5, 0.9):
        y = fn.dropout(x, p, rng=64)
        assert abs(np.mean(y, dtype=np.float64) - 2.0) < Z_LIMIT * 2 * math.sqrt(p / (1 - p) / x.size)


# ---------------------------------------------------------------------------------------------------------------------
# Forward, backward, caches


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_use_one_mask(shape: tuple[int, ...], dtype: type) -> None:
    x, dy = sample(shape, dtype), sample(shape, dtype, 1)
    rng = fn.Philox(10, 20)
    y, cache = fn.dropout_forward(x, 0.35, rng=rng)
    assert rng.offset == 21
    assert_same_bits(y, fn.dropout(x, 0.35, rng=fn.Philox(10, 20)))
    dx = fn.dropout_backward(dy, cache)
    assert_same_bits(dx, fn.dropout(dy, 0.35, rng=fn.Philox(10, 20)))
    assert_same_bits(dx, reference.dropout_backward(dy, cache))
    assert_same_bits(fn.dropout_backward(np.array(dy, order="F"), cache), dx)


def test_backward_is_the_adjoint_in_float64() -> None:
    """<dy, dropout(x)> = <dropout_backward(dy), x>: the forward is linear for a given mask."""
    x, dy = sample((101,)), sample((101,), seed=1)
    y, cache = fn.dropout_forward(x, 0.3, rng=2)
    a, b = math.fsum(dy * y), math.fsum(fn.dropout_backward(dy, cache) * x)
    assert abs(a - b) <= 4 * 2.0**-53 * math.fsum(np.abs(dy * y))


def test_cache_is_small_and_read_only() -> None:
    x = sample((100, 200), np.float32)
    cache = fn.dropout_forward(x, 0.3, rng=fn.Philox(4, 5), shared_axes=-1)[1]
    assert (cache.function, cache.seed, cache.offset, cache.p) == ("dropout", 4, 5, 0.3)
    assert (cache.shape, cache.dtype, cache.shared_axes, cache.scale) == ((100, 200), np.float32, (1,), "inverted")
    assert cache.keep_probability == threshold(0.3) / 2**32
    assert len(pickle.dumps(cache)) < 500
    assert pickle.loads(pickle.dumps(cache)) == cache
    with pytest.raises(AttributeError):
        cache.seed = 5  # type: ignore[misc]


def test_in_place() -> None:
    x = sample((40, 50))
    expected = fn.dropout(x, 0.5, rng=3)
    cache = fn.dropout_forward(x, 0.5, rng=3)[1]
    dy = x.copy()
    assert fn.dropout_backward(dy, cache, out=dy) is dy
    assert_same_bits(dy, expected)
    assert fn.dropout(x, 0.5, rng=3, out=x) is x
    assert_same_bits(x, expected)


def test_shapes_and_axes_may_be_arrays() -> None:
    keep = fn.dropout_mask((2, 3), 0.5, rng=1, shared_axes=1)
    for module in (fn, reference):
        np.testing.assert_array_equal(module.dropout_mask(np.array([2, 3]), 0.5, rng=1, shared_axes=1), keep)
        np.testing.assert_array_equal(module.dropout_mask([2, 3], 0.5, rng=1, shared_axes=(1,)), keep)
    axis = np.array(1)
    np.testing.assert_array_equal(fn.dropout_mask((2, 3), 0.5, rng=1, shared_axes=axis), keep)  # type: ignore[arg-type]
    np.testing.assert_array_equal(fn.dropout_mask(np.array(7), 0.5, rng=1), fn.dropout_mask(7, 0.5, rng=1))
    with pytest.raises(TypeError, match="expected an integer"):
        fn.dropout_mask(np.array([2.5, 3]), 0.5, rng=1)


def test_empty() -> None:
    for shape in [(0,), (3, 0), (0, 4, 5)]:
        x = np.empty(shape, np.float32)
        y, cache = fn.dropout_forward(x, 0.5, rng=1, shared_axes=0)
        assert y.shape == fn.dropout_backward(x, cache).shape == fn.dropout_mask(shape, rng=1).shape == shape
        assert fn.apply_dropout_mask(x, np.empty(shape, bool), 0.5).shape == shape
        assert fn.dropout_inference(x, 0.5).shape == shape
        out = np.empty_like(x)
        assert fn.dropout(x, 0.5, rng=1, out=out) is out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_of_the_user_s(layout: str, dtype: type) -> None:
    x = LAYOUTS[layout](sample((5, 6, 77), dtype))
    keep = fn.dropout_mask(x.shape, 0.3, rng=8)
    expected = reference.apply_dropout_mask(np.ascontiguousarray(x), keep, 0.3)
    assert_same_bits(expected, reference.dropout(np.ascontiguousarray(x), 0.3, rng=8))
    for mask in (keep, np.asfortranarray(keep), keep[::-1].copy()[::-1], np.repeat(keep, 3, axis=2)[..., ::3]):
        assert_same_bits(fn.apply_dropout_mask(x, mask, 0.3), expected)
    y = x.copy(order="K")
    assert fn.apply_dropout_mask(y, keep, 0.3, out=y) is y
    assert_same_bits(y, expected)
    broadcast = np.broadcast_to(keep[:, :1, :1], x.shape)
    assert_same_bits(fn.apply_dropout_mask(x, broadcast, 0.3), reference.apply_dropout_mask(x, broadcast.copy(), 0.3))
    assert_same_bits(fn.apply_dropout_mask(x, keep.tolist(), 1.0), np.zeros_like(x))


def test_drop_connect_is_dropout_of_a_weight() -> None:
    weight, dy = sample((31, 17), np.float32), sample((31, 17), np.float32, 1)
    y, cache = fn.drop_connect_forward(weight, 0.4, rng=fn.Philox(3, 4))
    assert cache.function == "drop_connect"
    assert_same_bits(y, fn.drop_connect(weight, 0.4, rng=fn.Philox(3, 4)))
    assert_same_bits(y, fn.dropout(weight, 0.4, rng=fn.Philox(3, 4)))
    assert_same_bits(y, reference.drop_connect(weight, 0.4, rng=fn.Philox(3, 4)))
    dweight = fn.drop_connect_backward(dy, cache)
    assert_same_bits(dweight, fn.dropout(dy, 0.4, rng=fn.Philox(3, 4)))
    assert_same_bits(dweight, reference.drop_connect_backward(dy, cache))
    assert reference.drop_connect_forward(weight, 0.4, rng=3)[1].function == "drop_connect"


# ---------------------------------------------------------------------------------------------------------------------
# rng


def test_generator_gives_one_seed() -> None:
    x = sample((50,))
    seed = int(np.random.default_rng(5).integers(0, 2**64, dtype=np.uint64))
    rng = np.random.default_rng(5)
    assert_same_bits(fn.dropout(x, rng=rng), fn.dropout(x, rng=seed))
    other = np.random.default_rng(5)
    other.integers(0, 2**64, dtype=np.uint64)
    assert rng.integers(2**63) == other.integers(2**63)


def test_ints_are_streams_at_offset_0() -> None:
    mask = fn.dropout_mask(100, rng=fn.Philox(2**64 - 1))
    np.testing.assert_array_equal(fn.dropout_mask(100, rng=2**64 - 1), mask)
    np.testing.assert_array_equal(fn.dropout_mask(100, rng=np.uint64(2**64 - 1)), mask)


def test_p_0_and_1_advance_a_stream_as_well() -> None:
    rng = fn.Philox(1)
    for p in (0.0, 0.5, 1.0):
        fn.dropout(np.ones(3), p, rng=rng)
    assert rng.offset == 3


@pytest.mark.unverified("the compiled entries leave every call while verification is on")
def test_the_compiled_entries_take_the_common_call_and_leave_the_rest() -> None:
    x, rng = sample((3, 5), np.float32), fn.Philox(3, 4)
    for common in [(x, 0.5, 7, (), "inverted", None), (x, 0, rng, (0, 1), "classic", np.empty_like(x))]:
        assert _core.dropout(*common) is not None
    assert rng.offset == 5
    odd: list[tuple[object, ...]] = [
        ([1.0], 0.5, 7, (), "inverted", None),
        (np.ma.array(x), 0.5, 7, (), "inverted", None),
        (x.astype(np.float16), 0.5, 7, (), "inverted", None),
        (x, np.float64(1.5), rng, (), "inverted", None),
        (x, True, rng, (), "inverted", None),
        (x, "0.5", rng, (), "inverted", None),
        (x, 0.5, True, (), "inverted", None),
        (x, 0.5, -1, (), "inverted", None),
        (x, 0.5, 2**64, (), "inverted", None),
        (x, 0.5, np.random.default_rng(1), (), "inverted", None),
        (x, 0.5, rng, [0], "inverted", None),
        (x, 0.5, rng, (1, 0), "inverted", None),
        (x, 0.5, rng, (-1,), "inverted", None),
        (x, 0.5, rng, (2,), "inverted", None),
        (x, 0.5, rng, (), None, None),
        (x, 0.5, rng, (), "inverted", x[::-1]),
        (x, 0.5, rng, (), "inverted", np.empty((3, 5))),
    ]
    for call in odd:
        assert _core.dropout(*call) is None, call
        assert _core.dropout_forward(*call, "dropout") is None, call
    assert _core.dropout_forward(x, 0.5, rng, (), "inverted", x, "dropout") is None
    assert rng.offset == 5
    with pytest.raises(TypeError, match="arguments"):
        _core.dropout(x)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_ways_into_the_kernels_give_the_same_cache_and_bits(dtype: type) -> None:
    x = sample((6, 7), dtype)
    y, cache = fn.dropout_forward(x, 0.25, rng=fn.Philox(1, 2), shared_axes=(1,), scale="classic")
    with fn.verify():  # declined by the compiled entry
        slow_y, slow = fn.dropout_forward(x, 0.25, rng=fn.Philox(1, 2), shared_axes=[-1], scale="classic")
    assert cache == slow
    assert repr(cache) == repr(slow)
    assert [type(getattr(cache, n)) for n in cache.__slots__] == [type(getattr(slow, n)) for n in slow.__slots__]
    assert_same_bits(y, slow_y)
    dy = sample((6, 7), dtype, 1)
    assert_same_bits(fn.dropout_backward(dy, cache), fn.dropout_backward(dy, pickle.loads(pickle.dumps(slow))))


CALLS = {
    "dropout": lambda x, **k: fn.dropout(x, k.pop("p", 0.5), **k),
    "dropout_forward": lambda x, **k: fn.dropout_forward(x, k.pop("p", 0.5), **k),
    "drop_connect": lambda x, **k: fn.drop_connect(x, k.pop("p", 0.5), **k),
    "drop_connect_forward": lambda x, **k: fn.drop_connect_forward(x, k.pop("p", 0.5), **k),
    "dropout_mask": lambda x, **k: fn.dropout_mask(x.shape, k.pop("p", 0.5), **k),
}


BAD_ARGUMENTS = [
    ({"p": -0.1}, ValueError, r"p is -0.1; expected 0 <= p <= 1"),
    ({"p": 1.0000001}, ValueError, r"p is 1.0000001; expected"),
    ({"p": math.nan}, ValueError, r"p is nan; expected"),
    ({"p": math.inf}, ValueError, r"p is inf; expected"),
    ({"p": None}, TypeError, r"p is None"),
    ({"p": True}, TypeError, r"p is True"),
    ({"p": "0.5"}, TypeError, r"p is '0.5'"),
    ({"rng": None}, TypeError, r"rng is None.*Philox"),
    ({"rng": True}, TypeError, r"rng is True.*Generator"),
    ({"rng": 1.0}, TypeError, r"rng is 1.0"),
    ({"rng": np.random.RandomState(1)}, TypeError, r"rng is RandomState"),
    ({"rng": -1}, ValueError, r"rng is -1; expected 0 <= rng < 2\*\*64"),
    ({"rng": 2**64}, ValueError, r"rng is 18446744073709551616"),
    ({"shared_axes": (2,)}, ValueError, r"shared_axes is \(2,\); expected -2 <= axis < 2"),
    ({"shared_axes": (-3,)}, ValueError, r"shared_axes is \(-3,\)"),
    ({"shared_axes": (1, -1)}, ValueError, r"shared_axes is \(1, -1\); expected every axis at most once"),
    ({"shared_axes": (1.0,)}, TypeError, r"shared_axes is \(1.0,\)"),
    ({"shared_axes": None}, TypeError, r"shared_axes is None"),
    ({"shared_axes": "01"}, TypeError, r"shared_axes is '01'"),
    ({"shared_axes": (True,)}, TypeError, r"shared_axes is \(True,\)"),
    ({"scale": "other"}, ValueError, r"scale is 'other'; expected 'inverted' or 'classic'"),
    ({"scale": None}, TypeError, r"scale is None"),
    ({"out": np.zeros((3, 4))}, ValueError, r"out has shape"),
    ({"out": np.zeros((3, 5), np.float32)}, TypeError, r"out has dtype"),
    ({"out": [1.0]}, TypeError, r"out is a list"),
    ({"out": np.broadcast_to(0.0, (3, 5))}, ValueError, r"out is read-only"),
]
ONLY = {"drop_connect": {"p", "rng", "out"}, "dropout_mask": {"p", "rng", "shared_axes"}}


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        (name, *row)
        for name in CALLS
        for row in BAD_ARGUMENTS
        if set(row[0]) <= ONLY.get(name.removesuffix("_forward"), set(row[0]))
    ],
)
def test_bad_arguments_change_nothing(name: str, changes: dict, error: type, message: str) -> None:
    out, rng = np.full((3, 5), 7.0), fn.Philox(3, 4)
    arguments = {"rng": rng, **({} if name == "dropout_mask" else {"out": out}), **changes}
    with pytest.raises(error, match=message):
        CALLS[name](np.ones((3, 5)), **arguments)
    assert rng.offset == 4
    assert np.all(out == 7.0)


@pytest.mark.parametrize("name", CALLS)
def test_rng_cannot_be_left_out(name: str) -> None:
    with pytest.raises(TypeError, match="rng"):
        CALLS[name](np.ones((3, 5)))


@pytest.mark.parametrize("dtype", ["i4", "?", "c16", "f2", "O", ">f4", ">f8"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    x, rng = np.ones(5).astype(dtype), fn.Philox(1)
    for call in (
        lambda: fn.dropout(x, rng=rng),
        lambda: fn.apply_dropout_mask(x, np.ones(5, bool), 0.5),
        lambda: fn.dropout_inference(x, 0.5),
    ):
        with pytest.raises(TypeError, match="x has dtype"):
            call()
    with pytest.raises(TypeError, match="weight has dtype"):
        fn.drop_connect(x, 0.5, rng=rng)
    assert rng.offset == 0


def test_overlapping_out_is_refused() -> None:
    memory, rng = sample((100,)), fn.Philox(1)
    before = memory.copy()
    x = memory[:50]
    for call, message in (
        (lambda: fn.dropout_forward(x, rng=rng, out=x), "out shares memory with x.*cache"),
        (lambda: fn.drop_connect_forward(x, 0.5, rng=rng, out=x), "out shares memory with weight.*cache"),
        (lambda: fn.dropout(x, rng=rng, out=memory[1:51]), "out overlaps x in part"),
        (lambda: fn.dropout(x, rng=rng, out=x[::-1]), "out overlaps x in part"),
        (lambda: fn.dropout_inference(x, 0.5, out=memory[10:60]), "out overlaps x in part"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert rng.offset == 0
    np.testing.assert_array_equal(memory, before)


def test_backward_refuses_what_does_not_fit() -> None:
    x = sample((3, 5))
    cache, out = fn.dropout_forward(x, rng=1)[1], np.full((3, 5), 7.0)
    connect = fn.drop_connect_forward(x, 0.5, rng=1)[1]
    norm = fn.layer_norm_forward(x)[1]
    for dy, used, error, message in [
        (x[:2], cache, ValueError, r"dy has shape \(2, 5\); expected \(3, 5\)"),
        (x.astype(np.float32), cache, TypeError, "dy has dtype float32; expected float64"),
        (x.astype(int), cache, TypeError, "dy has dtype int64"),
        (x, connect, ValueError, "cache comes from drop_connect_forward; expected one from dropout_forward"),
        (x, norm, ValueError, "cache comes from layer_norm_forward; expected one from dropout_forward"),
        (x, None, TypeError, "cache is None; expected the cache that dropout_forward returned"),
        (x, (1, 2), TypeError, "cache is a tuple"),
    ]:
        with pytest.raises(error, match=message):
            fn.dropout_backward(dy, used, out=out)
    with pytest.raises(ValueError, match="expected one from drop_connect_forward"):
        fn.drop_connect_backward(x, cache, out=out)
    with pytest.raises(ValueError, match="out overlaps dy in part"):
        fn.dropout_backward(x, cache, out=x[::-1])
    assert np.all(out == 7.0)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (np.ones((5, 3), bool), ValueError, r"keep has shape \(5, 3\); expected \(3, 5\)"),
        (np.ones((1, 5), bool), ValueError, r"keep has shape \(1, 5\)"),
        (np.ones((3, 5), np.uint8), TypeError, r"keep has dtype uint8; expected bool.*keep.astype\(bool\)"),
        (np.ones((3, 5)), TypeError, "keep has dtype float64"),
        (None, TypeError, "keep is None"),
    ],
)
def test_masks_that_do_not_fit(keep: object, error: type, message: str) -> None:
    out = np.full((3, 5), 7.0)
    with pytest.raises(error, match=message):
        fn.apply_dropout_mask(np.ones((3, 5)), keep, 0.5, out=out)
    assert np.all(out == 7.0)


@pytest.mark.parametrize(
    ("shape", "changes", "error", "message"),
    [
        ((3, -1), {}, ValueError, r"shape is \(3, -1\)"),
        ((2**40, 2**40), {}, ValueError, r"expected fewer than 2\*\*63"),
        ((2**40, 2**40, 0), {}, ValueError, r"expected fewer than 2\*\*63"),
        ((1,) * 33, {}, ValueError, "at most 32"),
        ((2.0,), {}, TypeError, "shape is 2.0"),
        (None, {}, TypeError, "shape is None"),
        ((3, 5), {"index_range": (0, 16)}, ValueError, r"index_range is \(0, 16\); expected 0 <= start <= stop <= 15"),
        ((3, 5), {"index_range": (3, 2)}, ValueError, "index_range"),
        ((3, 5), {"index_range": (-1, 2)}, ValueError, "index_range"),
        ((3, 5), {"index_range": 3}, TypeError, "index_range is 3; expected two integers"),
        ((3, 5), {"index_range": (1, 2, 3)}, TypeError, "index_range is"),
        ((3, 5), {"index_range": (1.0, 2)}, TypeError, "index_range is"),
    ],
)
def test_shapes_and_ranges_that_do_not_fit(shape: object, changes: dict, error: type, message: str) -> None:
    rng = fn.Philox(1)
    with pytest.raises(error, match=message):
        fn.dropout_mask(shape, rng=rng, **changes)
    assert rng.offset == 0


def test_core_is_safe_on_its_own() -> None:
    x, y = np.ones((3, 5)), np.zeros((3, 5))
    frozen = np.zeros((3, 5))
    frozen.flags.writeable = False
    for arguments in (
        (np.zeros(3), x, 0.5, 1, 0, ()),
        (frozen, x, 0.5, 1, 0, ()),
        (y, x, 1.5, 1, 0, ()),
        (y, x, math.nan, 1, 0, ()),
        (y, x, 0.5, 1, 0, (2,)),
    ):
        with pytest.raises(ValueError, match=r"shapes|read-only|p must|shared_axes"):
            _core.drop(*arguments, True)
    with pytest.raises(TypeError, match="dtype"):
        _core.drop(y, x.astype(np.float32), 0.5, 1, 0, (), True)
    with pytest.raises(ValueError, match="shapes"):
        _core.apply_mask(y, x, np.ones((5, 3), bool), 0.5)
    with pytest.raises(ValueError, match="range"):
        _core.keep_mask(np.empty(4, bool), (3,), 0, 4, 0.5, 1, 0, (), False)
    for size, packed in [(4, False), (2, True), (0, True)]:
        with pytest.raises(ValueError, match="size"):
            _core.keep_mask(np.empty(size, np.uint8), (3,), 0, 3, 0.5, 1, 0, (), packed)
    assert not y.any()


# ---------------------------------------------------------------------------------------------------------------------
# Verify mode


def test_verify_accepts_every_function_and_leaves_the_stream_alone() -> None:
    x, rng = sample((13, 29), np.float32), fn.Philox(8)
    with fn.verify():
        y, cache = fn.dropout_forward(x, 0.3, rng=rng, shared_axes=(1,), scale="classic")
        fn.dropout_backward(x, cache)
        fn.dropout(x, rng=rng, out=x)
        w, cache = fn.drop_connect_forward(x, 0.3, rng=rng)
        fn.drop_connect_backward(w, cache)
        keep = fn.dropout_mask((7, 9), rng=rng, index_range=(3, 40))
        fn.apply_dropout_mask(y, y != 0, 0.3, out=y)
        fn.dropout_inference(x, 0.3)
    assert rng.offset == 4
    np.testing.assert_array_equal(keep, fn.dropout_mask((7, 9), rng=fn.Philox(8, 3)).reshape(-1)[3:40])


def test_verify_notices_one_wrong_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _core.drop

    def drop(y: np.ndarray, *arguments: object) -> None:
        real(y, *arguments)
        y[2, 3] = 0.0 if y[2, 3] else 1.0

    monkeypatch.setattr(_core, "drop", drop)
    with fn.verify(), pytest.raises(fn.VerificationError, match=r"dropout: y\[2, 3\]"):
        fn.dropout(np.ones((4, 5)), rng=1)
