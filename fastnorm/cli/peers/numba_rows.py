"""The loops that `bench` hands to numba, sets in rows: layer norm and RMS norm.

Fast in every way a good user knows, and not exact: one pass for the statistics, sums in x's own dtype and in any order,
so that data with a large mean loses its small variance. Results and workspace (`parts`: one piece for each thread) are
the caller's. `prange` cuts the work for threads; compiled without `parallel` it is a plain `range`.
x is (rows, cols). Outputs come first.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

_numba: Any = import_module("numba")
_prange: Any = _numba.prange


# A sweep writes one row and sums up the next: reading and writing never wait for each other.


def layer_norm(y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, eps: Any, pieces: Any) -> None:
    rows, cols = x.shape
    zero = x.dtype.type(0)
    one = x.dtype.type(1)
    count = x.dtype.type(cols)
    for piece in _prange(pieces):
        first = rows * piece // pieces
        last = rows * (piece + 1) // pieces
        total, squares = zero, zero
        if first < last:
            for j in range(cols):
                total += x[first, j]
                squares += x[first, j] * x[first, j]
        for i in range(first, last):
            m = total / count
            r = one / np.sqrt(squares / count - m * m + eps)
            mean[i] = m
            rstd[i] = r
            total, squares = zero, zero
            ahead = min(i + 1, last - 1)
            for j in range(cols):
                v = x[ahead, j]
                y[i, j] = (x[i, j] - m) * r * weight[j] + bias[j]
                total += v
                squares += v * v


def rms_norm(y: Any, rstd: Any, x: Any, weight: Any, eps: Any, pieces: Any) -> None:
    rows, cols = x.shape
    zero = x.dtype.type(0)
    one = x.dtype.type(1)
    count = x.dtype.type(cols)
    for piece in _prange(pieces):
        first = rows * piece // pieces
        last = rows * (piece + 1) // pieces
        squares = zero
        if first < last:
            for j in range(cols):
                squares += x[first, j] * x[first, j]
        for i in range(first, last):
            r = one / np.sqrt(squares / count + eps)
            rstd[i] = r
            squares = zero
            ahead = min(i + 1, last - 1)
            for j in range(cols):
                v = x[ahead, j]
                y[i, j] = x[i, j] * r * weight[j]
                squares += v * v


# Two rows at a time halve the loads and stores of the parameters' gradients.


def layer_norm_backward(
    dx: Any, dweight: Any, dbias: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, parts: Any
) -> None:
    rows, cols = x.shape
    zero = x.dtype.type(0)
    count = x.dtype.type(cols)
    pieces = parts.shape[0]
    for piece in _prange(pieces):
        first = rows * piece // pieces
        last = rows * (piece + 1) // pieces
        for j in range(cols):
            parts[piece, 0, j] = zero
            parts[piece, 1, j] = zero
        i = first
        while i + 1 < last:
            m0, m1, r0, r1 = mean[i], mean[i + 1], rstd[i], rstd[i + 1]
            g0, g1, p0, p1 = zero, zero, zero, zero
            for j in range(cols):
                h0 = (x[i, j] - m0) * r0
                h1 = (x[i + 1, j] - m1) * r1
                d0 = dy[i, j]
                d1 = dy[i + 1, j]
                parts[piece, 0, j] += d0 * h0 + d1 * h1
                parts[piece, 1, j] += d0 + d1
                g0 += d0 * weight[j]
                p0 += d0 * weight[j] * h0
                g1 += d1 * weight[j]
                p1 += d1 * weight[j] * h1
            g0 /= count
            g1 /= count
            p0 /= count
            p1 /= count
            for j in range(cols):
                dx[i, j] = (dy[i, j] * weight[j] - g0 - (x[i, j] - m0) * r0 * p0) * r0
                dx[i + 1, j] = (dy[i + 1, j] * weight[j] - g1 - (x[i + 1, j] - m1) * r1 * p1) * r1
            i += 2
        if i < last:
            m0, r0 = mean[i], rstd[i]
            g0, p0 = zero, zero
            for j in range(cols):
                h0 = (x[i, j] - m0) * r0
                parts[piece, 0, j] += dy[i, j] * h0
                parts[piece, 1, j] += dy[i, j]
                g0 += dy[i, j] * weight[j]
                p0 += dy[i, j] * weight[j] * h0
            g0 /= count
            p0 /= count
            for j in range(cols):
                dx[i, j] = (dy[i, j] * weight[j] - g0 - (x[i, j] - m0) * r0 * p0) * r0
    for j in range(cols):
        dweight[j] = parts[0, 0, j]
        dbias[j] = parts[0, 1, j]
    for piece in range(1, pieces):
        for j in range(cols):
            dweight[j] += parts[piece, 0, j]
            dbias[j] += parts[piece, 1, j]


def rms_norm_backward(dx: Any, dweight: Any, dy: Any, x: Any, weight: Any, rstd: Any, parts: Any) -> None:
    rows, cols = x.shape
    zero = x.dtype.type(0)
    count = x.dtype.type(cols)
    pieces = parts.shape[0]
    for piece in _prange(pieces):
        first = rows * piece // pieces
        last = rows * (piece + 1) // pieces
        for j in range(cols):
            parts[piece, 0, j] = zero
        i = first
        while i + 1 < last:
            r0, r1 = rstd[i], rstd[i + 1]
            p0, p1 = zero, zero
            for j in range(cols):
                h0 = x[i, j] * r0 * dy[i, j]
                h1 = x[i + 1, j] * r1 * dy[i + 1, j]
                parts[piece, 0, j] += h0 + h1
                p0 += h0 * weight[j]
                p1 += h1 * weight[j]
            p0 = p0 / count * r0
            p1 = p1 / count * r1
            for j in range(cols):
                dx[i, j] = (dy[i, j] * weight[j] - x[i, j] * p0) * r0
                dx[i + 1, j] = (dy[i + 1, j] * weight[j] - x[i + 1, j] * p1) * r1
            i += 2
        if i < last:
            r0 = rstd[i]
            p0 = zero
            for j in range(cols):
                h0 = x[i, j] * r0 * dy[i, j]
                parts[piece, 0, j] += h0
                p0 += h0 * weight[j]
            p0 = p0 / count * r0
            for j in range(cols):
                dx[i, j] = (dy[i, j] * weight[j] - x[i, j] * p0) * r0
    for j in range(cols):
        dweight[j] = parts[0, 0, j]
    for piece in range(1, pieces):
        for j in range(cols):
            dweight[j] += parts[piece, 0, j]


def dropout(y: Any, x: Any, p: Any, scale: Any) -> None:
    rows, cols = x.shape
    zero = x.dtype.type(0)
    for i in _prange(rows):
        for j in range(cols):
            y[i, j] = x[i, j] * scale if np.random.random() >= p else zero  # noqa: NPY002
