"""The loops that `bench` hands to numba, channels innermost: batch norm of (N, C) and NHWC, group norm of NHWC.

Fast in every way a good user knows, and not exact: one pass for the statistics, sums in x's own dtype and in any order,
so that data with a large mean loses its small variance. Results and workspace (`parts`: one piece for each thread) are
the caller's. `prange` cuts the work for threads; compiled without `parallel` it is a plain `range`.
x is (rows, channels), for group norm (batch, spatial, groups, channels of a group). Outputs come first.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

_numba: Any = import_module("numba")
_prange: Any = _numba.prange


# x may come with several of its rows side by side (`channels` then repeat), which makes the inner loop long enough.
# Several rows at a time: the sums of all channels are loaded and stored once for all of them.


def column_norm(y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, eps: Any, parts: Any) -> None:
    rows, wide = x.shape
    channels = weight.size
    zero = x.dtype.type(0)
    one = x.dtype.type(1)
    count = x.dtype.type(rows * (wide // channels))
    pieces = parts.shape[0]
    for piece in _prange(pieces):
        last = rows * (piece + 1) // pieces
        i = rows * piece // pieces
        for j in range(wide):
            parts[piece, 0, j] = zero
            parts[piece, 1, j] = zero
        while i + 7 < last:
            for j in range(wide):
                a, b, c, d = x[i, j], x[i + 1, j], x[i + 2, j], x[i + 3, j]
                e, f, g, h = x[i + 4, j], x[i + 5, j], x[i + 6, j], x[i + 7, j]
                parts[piece, 0, j] += ((a + b) + (c + d)) + ((e + f) + (g + h))
                parts[piece, 1, j] += ((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (g * g + h * h))
            i += 8
        while i < last:
            for j in range(wide):
                parts[piece, 0, j] += x[i, j]
                parts[piece, 1, j] += x[i, j] * x[i, j]
            i += 1
    for piece in range(1, pieces):
        for j in range(wide):
            parts[0, 0, j] += parts[piece, 0, j]
            parts[0, 1, j] += parts[piece, 1, j]
    for j in range(channels, wide):
        parts[0, 0, j % channels] += parts[0, 0, j]
        parts[0, 1, j % channels] += parts[0, 1, j]
    for j in range(channels):
        m = parts[0, 0, j] / count
        mean[j] = m
        rstd[j] = one / np.sqrt(parts[0, 1, j] / count - m * m + eps)
        parts[0, 0, j] = weight[j] * rstd[j]
        parts[0, 1, j] = bias[j] - m * parts[0, 0, j]
    for j in range(channels, wide):
        parts[0, 0, j] = parts[0, 0, j - channels]
        parts[0, 1, j] = parts[0, 1, j - channels]
    for i in _prange(rows):
        for j in range(wide):
            y[i, j] = x[i, j] * parts[0, 0, j] + parts[0, 1, j]


def column_apply(y: Any, x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, parts: Any) -> None:
    rows, wide = x.shape
    channels = weight.size
    for j in range(channels):
        parts[0, 0, j] = weight[j] / np.sqrt(var[j] + eps)
        parts[0, 1, j] = bias[j] - mean[j] * parts[0, 0, j]
    for j in range(channels, wide):
        parts[0, 0, j] = parts[0, 0, j - channels]
        parts[0, 1, j] = parts[0, 1, j - channels]
    for i in _prange(rows):
        for j in range(wide):
            y[i, j] = x[i, j] * parts[0, 0, j] + parts[0, 1, j]


def column_norm_backward(
    dx: Any, dweight: Any, dbias: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, parts: Any
) -> None:
    rows, wide = x.shape
    channels = weight.size
    zero = x.dtype.type(0)
    count = x.dtype.type(rows * (wide // channels))
    pieces = parts.shape[0]
    for piece in _prange(pieces):
        last = rows * (piece + 1) // pieces
        i = rows * piece // pieces
        for j in range(wide):
            parts[piece, 0, j] = zero
            parts[piece, 1, j] = zero
            parts[piece, 2, j] = mean[j % channels]
        while i + 3 < last:
            for j in range(wide):
                a, b, c, d = dy[i, j], dy[i + 1, j], dy[i + 2, j], dy[i + 3, j]
                m = parts[piece, 2, j]
                parts[piece, 0, j] += (a + b) + (c + d)
                parts[piece, 1, j] += (a * (x[i, j] - m) + b * (x[i + 1, j] - m)) + (
                    c * (x[i + 2, j] - m) + d * (x[i + 3, j] - m)
                )
            i += 4
        while i < last:
            for j in range(wide):
                parts[piece, 0, j] += dy[i, j]
                parts[piece, 1, j] += dy[i, j] * (x[i, j] - parts[piece, 2, j])
            i += 1
    for piece in range(1, pieces):
        for j in range(wide):
            parts[0, 0, j] += parts[piece, 0, j]
            parts[0, 1, j] += parts[piece, 1, j]
    for j in range(channels, wide):
        parts[0, 0, j % channels] += parts[0, 0, j]
        parts[0, 1, j % channels] += parts[0, 1, j]
    for j in range(channels):
        dbias[j] = parts[0, 0, j]
        dweight[j] = parts[0, 1, j] * rstd[j]
        a = weight[j] * rstd[j]
        b = -a * rstd[j] * dweight[j] / count
        parts[0, 0, j] = a
        parts[0, 1, j] = b
        parts[0, 2, j] = -a * dbias[j] / count - b * mean[j]
    for j in range(channels, wide):
        parts[0, 0, j] = parts[0, 0, j - channels]
        parts[0, 1, j] = parts[0, 1, j - channels]
        parts[0, 2, j] = parts[0, 2, j - channels]
    for i in _prange(rows):
        for j in range(wide):
            dx[i, j] = dy[i, j] * parts[0, 0, j] + x[i, j] * parts[0, 1, j] + parts[0, 2, j]


def group_norm_last(y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, eps: Any, parts: Any) -> None:
    batch, spatial, groups, channels = x.shape
    zero = x.dtype.type(0)
    one = x.dtype.type(1)
    count = x.dtype.type(channels * spatial)
    for n in _prange(batch):
        for g in range(groups):
            for k in range(channels):
                parts[n, 0, g, k] = zero
                parts[n, 1, g, k] = zero
        total = parts[n, 0].reshape(-1)
        squares = parts[n, 1].reshape(-1)
        source = x[n].reshape(spatial, groups * channels)
        target = y[n].reshape(spatial, groups * channels)
        for s in range(0, spatial - 3, 4):
            for j in range(groups * channels):
                a, b, c, d = source[s, j], source[s + 1, j], source[s + 2, j], source[s + 3, j]
                total[j] += (a + b) + (c + d)
                squares[j] += (a * a + b * b) + (c * c + d * d)
        for s in range(spatial - spatial % 4, spatial):
            for j in range(groups * channels):
                total[j] += source[s, j]
                squares[j] += source[s, j] * source[s, j]
        for g in range(groups):
            sum_x = zero
            sum_xx = zero
            for k in range(channels):
                sum_x += parts[n, 0, g, k]
                sum_xx += parts[n, 1, g, k]
            m = sum_x / count
            r = one / np.sqrt(sum_xx / count - m * m + eps)
            mean[n * groups + g] = m
            rstd[n * groups + g] = r
            for k in range(channels):
                parts[n, 0, g, k] = weight[g, k] * r
                parts[n, 1, g, k] = bias[g, k] - m * weight[g, k] * r
        for s in range(spatial):
            for j in range(groups * channels):
                target[s, j] = source[s, j] * total[j] + squares[j]


def group_norm_last_backward(
    dx: Any, dweight: Any, dbias: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, parts: Any
) -> None:
    batch, spatial, groups, channels = x.shape
    zero = x.dtype.type(0)
    count = x.dtype.type(channels * spatial)
    for n in _prange(batch):
        for g in range(groups):
            for k in range(channels):
                parts[n, 0, g, k] = zero
                parts[n, 1, g, k] = zero
                parts[n, 2, g, k] = mean[n * groups + g]
        sum_dy = parts[n, 0].reshape(-1)
        sum_dyx = parts[n, 1].reshape(-1)
        centre = parts[n, 2].reshape(-1)
        a, b, d = parts[n, 3].reshape(-1), parts[n, 4].reshape(-1), parts[n, 5].reshape(-1)
        source = x[n].reshape(spatial, groups * channels)
        slope = dy[n].reshape(spatial, groups * channels)
        target = dx[n].reshape(spatial, groups * channels)
        for s in range(0, spatial - 3, 4):
            for j in range(groups * channels):
                d0, d1, d2, d3 = slope[s, j], slope[s + 1, j], slope[s + 2, j], slope[s + 3, j]
                m = centre[j]
                sum_dy[j] += (d0 + d1) + (d2 + d3)
                sum_dyx[j] += (d0 * (source[s, j] - m) + d1 * (source[s + 1, j] - m)) + (
                    d2 * (source[s + 2, j] - m) + d3 * (source[s + 3, j] - m)
                )
        for s in range(spatial - spatial % 4, spatial):
            for j in range(groups * channels):
                sum_dy[j] += slope[s, j]
                sum_dyx[j] += slope[s, j] * (source[s, j] - centre[j])
        for g in range(groups):
            m = mean[n * groups + g]
            r = rstd[n * groups + g]
            sum_g = zero
            sum_gx = zero
            for k in range(channels):
                sum_g += parts[n, 0, g, k] * weight[g, k]
                sum_gx += parts[n, 1, g, k] * weight[g, k]
                parts[n, 1, g, k] *= r
            for k in range(channels):
                parts[n, 3, g, k] = weight[g, k] * r
                parts[n, 4, g, k] = -r * r * r * sum_gx / count
                parts[n, 5, g, k] = -r * sum_g / count - parts[n, 4, g, k] * m
        for s in range(spatial):
            for j in range(groups * channels):
                target[s, j] = slope[s, j] * a[j] + source[s, j] * b[j] + d[j]
    for g in range(groups):
        for k in range(channels):
            dbias[g, k] = parts[0, 0, g, k]
            dweight[g, k] = parts[0, 1, g, k]
            for n in range(1, batch):
                dbias[g, k] += parts[n, 0, g, k]
                dweight[g, k] += parts[n, 1, g, k]
