"""The loops that `bench` hands to numba, sets by channel, channels before space: batch norm and group norm.

Fast in every way a good user knows, and not exact: one pass for the statistics, sums in x's own dtype and in any order,
so that data with a large mean loses its small variance. Results and workspace (`parts`: one piece for each thread) are
the caller's. `prange` cuts the work for threads; compiled without `parallel` it is a plain `range`.
x is (batch, channels, spatial), for group norm (batch, groups, channels of a group, spatial). Outputs come first.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

_numba: Any = import_module("numba")
_prange: Any = _numba.prange


# Batch norm: channel by channel, so that the second read comes from cache.


def plane_norm(y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, eps: Any) -> None:
    batch, channels, spatial = x.shape
    one = x.dtype.type(1)
    count = x.dtype.type(batch * spatial)
    for c in _prange(channels):
        total = x.dtype.type(0)
        squares = x.dtype.type(0)
        for n in range(0, batch - 3, 4):
            for s in range(spatial):
                v0, v1, v2, v3 = x[n, c, s], x[n + 1, c, s], x[n + 2, c, s], x[n + 3, c, s]
                total += (v0 + v1) + (v2 + v3)
                squares += (v0 * v0 + v1 * v1) + (v2 * v2 + v3 * v3)
        for n in range(batch - batch % 4, batch):
            for s in range(spatial):
                total += x[n, c, s]
                squares += x[n, c, s] * x[n, c, s]
        m = total / count
        r = one / np.sqrt(squares / count - m * m + eps)
        mean[c] = m
        rstd[c] = r
        scale = weight[c] * r
        shift = bias[c] - m * scale
        for n in range(batch):
            for s in range(spatial):
                y[n, c, s] = x[n, c, s] * scale + shift


def plane_apply(y: Any, x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any) -> None:
    batch, channels, spatial = x.shape
    for row in _prange(batch * channels):
        n = row // channels
        c = row % channels
        scale = weight[c] / np.sqrt(var[c] + eps)
        shift = bias[c] - mean[c] * scale
        for s in range(spatial):
            y[n, c, s] = x[n, c, s] * scale + shift


def plane_norm_backward(dx: Any, dweight: Any, dbias: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any) -> None:
    batch, channels, spatial = x.shape
    count = x.dtype.type(batch * spatial)
    for c in _prange(channels):
        sum_dy = x.dtype.type(0)
        sum_dyx = x.dtype.type(0)
        m = mean[c]
        for n in range(batch):
            for s in range(spatial):
                sum_dy += dy[n, c, s]
                sum_dyx += dy[n, c, s] * (x[n, c, s] - m)
        dbias[c] = sum_dy
        dweight[c] = sum_dyx * rstd[c]
        a = weight[c] * rstd[c]
        b = -a * rstd[c] * rstd[c] * sum_dyx / count
        d = -a * sum_dy / count - b * m
        for n in range(batch):
            for s in range(spatial):
                dx[n, c, s] = dy[n, c, s] * a + x[n, c, s] * b + d


# Short planes: a run of channels is one row of `wide` values for every sample. Sums of all of them over the batch, four
# samples at a time, then over space; `sums` is (2 or 3, channels * spatial).


def short_plane_norm(
    y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, eps: Any, sums: Any, run: Any
) -> None:
    batch, channels, spatial = x.shape
    zero = x.dtype.type(0)
    one = x.dtype.type(1)
    count = x.dtype.type(batch * spatial)
    source = x.reshape(batch, channels * spatial)
    target = y.reshape(batch, channels * spatial)
    for block in _prange((channels + run - 1) // run):
        begin = block * run
        end = min(begin + run, channels)
        low, high = begin * spatial, end * spatial
        wide = high - low
        first = sums[0, low:high]
        second = sums[1, low:high]
        for j in range(wide):
            first[j] = zero
            second[j] = zero
        for n in range(0, batch - 3, 4):
            row0, row1, row2, row3 = (
                source[n, low:high],
                source[n + 1, low:high],
                source[n + 2, low:high],
                source[n + 3, low:high],
            )
            for j in range(wide):
                a, b, c, d = row0[j], row1[j], row2[j], row3[j]
                first[j] += (a + b) + (c + d)
                second[j] += (a * a + b * b) + (c * c + d * d)
        for n in range(batch - batch % 4, batch):
            row = source[n, low:high]
            for j in range(wide):
                first[j] += row[j]
                second[j] += row[j] * row[j]
        for k in range(begin, end):
            total, squares = zero, zero
            for s in range(spatial):
                total += first[(k - begin) * spatial + s]
                squares += second[(k - begin) * spatial + s]
            m = total / count
            r = one / np.sqrt(squares / count - m * m + eps)
            mean[k] = m
            rstd[k] = r
            scale = weight[k] * r
            for s in range(spatial):
                first[(k - begin) * spatial + s] = scale
                second[(k - begin) * spatial + s] = bias[k] - m * scale
        for n in range(batch):
            row, to = source[n, low:high], target[n, low:high]
            for j in range(wide):
                to[j] = row[j] * first[j] + second[j]


def short_plane_norm_backward(
    dx: Any, dweight: Any, dbias: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, sums: Any, run: Any
) -> None:
    batch, channels, spatial = x.shape
    zero = x.dtype.type(0)
    count = x.dtype.type(batch * spatial)
    source = x.reshape(batch, channels * spatial)
    slope = dy.reshape(batch, channels * spatial)
    target = dx.reshape(batch, channels * spatial)
    for block in _prange((channels + run - 1) // run):
        begin = block * run
        end = min(begin + run, channels)
        low, high = begin * spatial, end * spatial
        wide = high - low
        first = sums[0, low:high]
        second = sums[1, low:high]
        third = sums[2, low:high]
        for k in range(begin, end):
            for s in range(spatial):
                first[(k - begin) * spatial + s] = zero
                second[(k - begin) * spatial + s] = zero
                third[(k - begin) * spatial + s] = mean[k]
        for n in range(0, batch - 1, 2):
            slope0, slope1 = slope[n, low:high], slope[n + 1, low:high]
            row0, row1 = source[n, low:high], source[n + 1, low:high]
            for j in range(wide):
                first[j] += slope0[j] + slope1[j]
                second[j] += slope0[j] * (row0[j] - third[j]) + slope1[j] * (row1[j] - third[j])
        for n in range(batch - batch % 2, batch):
            slope0, row0 = slope[n, low:high], source[n, low:high]
            for j in range(wide):
                first[j] += slope0[j]
                second[j] += slope0[j] * (row0[j] - third[j])
        for k in range(begin, end):
            sum_dy, sum_dyx = zero, zero
            for s in range(spatial):
                sum_dy += first[(k - begin) * spatial + s]
                sum_dyx += second[(k - begin) * spatial + s]
            dbias[k] = sum_dy
            dweight[k] = sum_dyx * rstd[k]
            a = weight[k] * rstd[k]
            b = -a * rstd[k] * rstd[k] * sum_dyx / count
            for s in range(spatial):
                first[(k - begin) * spatial + s] = a
                second[(k - begin) * spatial + s] = b
                third[(k - begin) * spatial + s] = -a * sum_dy / count - b * mean[k]
        for n in range(batch):
            slope0, row0, to = slope[n, low:high], source[n, low:high], target[n, low:high]
            for j in range(wide):
                to[j] = slope0[j] * first[j] + row0[j] * second[j] + third[j]


# Group norm: a group of one sample is one run of memory.


def group_norm(y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, eps: Any) -> None:
    batch, groups, channels, spatial = x.shape
    one = x.dtype.type(1)
    size = channels * spatial
    count = x.dtype.type(size)
    flat = x.reshape(batch * groups, size)
    for row in _prange(batch * groups):
        n = row // groups
        g = row % groups
        total = x.dtype.type(0)
        squares = x.dtype.type(0)
        for j in range(size):
            total += flat[row, j]
            squares += flat[row, j] * flat[row, j]
        m = total / count
        r = one / np.sqrt(squares / count - m * m + eps)
        mean[row] = m
        rstd[row] = r
        for k in range(channels):
            scale = weight[g, k] * r
            shift = bias[g, k] - m * scale
            for s in range(spatial):
                y[n, g, k, s] = x[n, g, k, s] * scale + shift


# Loops over a few dozen values are mostly beginning and end. With weight and bias repeated over space a group is one
# loop; what repeats is (groups, channels of a group * spatial).


def group_norm_short(
    y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, eps: Any, weights: Any, biases: Any
) -> None:
    batch, groups, channels, spatial = x.shape
    one = x.dtype.type(1)
    size = channels * spatial
    count = x.dtype.type(size)
    source = x.reshape(batch * groups, size)
    target = y.reshape(batch * groups, size)
    for g in range(groups):
        for k in range(channels):
            for s in range(spatial):
                weights[g, k * spatial + s] = weight[g, k]
                biases[g, k * spatial + s] = bias[g, k]
    for row in _prange(batch * groups):
        g = row % groups
        total = x.dtype.type(0)
        squares = x.dtype.type(0)
        for j in range(size):
            total += source[row, j]
            squares += source[row, j] * source[row, j]
        m = total / count
        r = one / np.sqrt(squares / count - m * m + eps)
        mean[row] = m
        rstd[row] = r
        for j in range(size):
            target[row, j] = (source[row, j] - m) * r * weights[g, j] + biases[g, j]


# A thread owns whole groups of channels, so that the parameters' gradients need no merge.


def group_norm_backward(dx: Any, dweight: Any, dbias: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any) -> None:
    batch, groups, channels, spatial = x.shape
    zero = x.dtype.type(0)
    count = x.dtype.type(channels * spatial)
    for g in _prange(groups):
        for k in range(channels):
            dweight[g, k] = zero
            dbias[g, k] = zero
        for n in range(batch):
            m = mean[n * groups + g]
            r = rstd[n * groups + g]
            sum_g = zero
            sum_gx = zero
            for k in range(channels):
                sum_dy = zero
                sum_dyx = zero
                for s in range(spatial):
                    sum_dy += dy[n, g, k, s]
                    sum_dyx += dy[n, g, k, s] * (x[n, g, k, s] - m)
                dbias[g, k] += sum_dy
                dweight[g, k] += sum_dyx * r
                sum_g += sum_dy * weight[g, k]
                sum_gx += sum_dyx * weight[g, k]
            b = -r * r * r * sum_gx / count
            d = -r * sum_g / count - b * m
            for k in range(channels):
                a = weight[g, k] * r
                for s in range(spatial):
                    dx[n, g, k, s] = dy[n, g, k, s] * a + x[n, g, k, s] * b + d
