"""numba: the loops as a careful user would write them: one pass for the statistics, fastmath, prange over the sets.

They are fast and not exact: sums of squares in x's own dtype lose the small variance of data far from zero.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar, cast

import numpy as np

from fastnorm.cli.calls import Arrays, Options, stem_of

_numba: Any = import_module("numba")
_prange: Any = _numba.prange
_F = TypeVar("_F", bound=Callable[..., Any])
_EPS = 1e-5


def _jit(function: _F) -> _F:
    return cast(_F, _numba.njit(parallel=True, fastmath=True)(function))


@_jit
def _row_norm(x: Any, weight: Any, bias: Any, eps: Any, centred: Any) -> Any:
    rows, cols = x.shape
    y = np.empty_like(x)
    for i in _prange(rows):
        total = x.dtype.type(0)
        squares = x.dtype.type(0)
        for j in range(cols):
            total += x[i, j]
            squares += x[i, j] * x[i, j]
        mean = total / x.dtype.type(cols) * centred
        rstd = x.dtype.type(1) / np.sqrt(squares / x.dtype.type(cols) - mean * mean + eps)
        for j in range(cols):
            y[i, j] = (x[i, j] - mean) * rstd * weight[j] + bias[j]
    return y


@_jit
def _row_norm_backward(x: Any, dy: Any, weight: Any, mean: Any, rstd: Any, centred: Any) -> Any:
    rows, cols = x.shape
    dx = np.empty_like(x)
    parts = _numba.get_num_threads()
    dweight = np.zeros((parts, cols), x.dtype)
    dbias = np.zeros((parts, cols), x.dtype)
    for part in _prange(parts):
        for i in range(rows * part // parts, rows * (part + 1) // parts):
            sum_g = x.dtype.type(0)
            sum_gx = x.dtype.type(0)
            for j in range(cols):
                xhat = (x[i, j] - mean[i]) * rstd[i]
                g = dy[i, j] * weight[j]
                sum_g += g
                sum_gx += g * xhat
                dweight[part, j] += dy[i, j] * xhat
                dbias[part, j] += dy[i, j]
            sum_g = sum_g / x.dtype.type(cols) * centred
            sum_gx = sum_gx / x.dtype.type(cols)
            for j in range(cols):
                xhat = (x[i, j] - mean[i]) * rstd[i]
                dx[i, j] = (dy[i, j] * weight[j] - sum_g - xhat * sum_gx) * rstd[i]
    return dx, dweight.sum(0), dbias.sum(0)


@_jit
def _channel_norm(x: Any, weight: Any, bias: Any, eps: Any) -> Any:
    batch, channels, spatial = x.shape
    y = np.empty_like(x)
    count = x.dtype.type(batch * spatial)
    for c in _prange(channels):
        total = x.dtype.type(0)
        squares = x.dtype.type(0)
        for n in range(batch):
            for s in range(spatial):
                total += x[n, c, s]
                squares += x[n, c, s] * x[n, c, s]
        mean = total / count
        scale = weight[c] / np.sqrt(squares / count - mean * mean + eps)
        shift = bias[c] - mean * scale
        for n in range(batch):
            for s in range(spatial):
                y[n, c, s] = x[n, c, s] * scale + shift
    return y


@_jit
def _channel_norm_backward(x: Any, dy: Any, weight: Any, mean: Any, rstd: Any) -> Any:
    batch, channels, spatial = x.shape
    dx = np.empty_like(x)
    dweight = np.empty_like(weight)
    dbias = np.empty_like(weight)
    count = x.dtype.type(batch * spatial)
    for c in _prange(channels):
        sum_dy = x.dtype.type(0)
        sum_dyx = x.dtype.type(0)
        for n in range(batch):
            for s in range(spatial):
                sum_dy += dy[n, c, s]
                sum_dyx += dy[n, c, s] * (x[n, c, s] - mean[c])
        dbias[c] = sum_dy
        dweight[c] = sum_dyx * rstd[c]
        scale = weight[c] * rstd[c]
        slope = dweight[c] * rstd[c] / count
        for n in range(batch):
            for s in range(spatial):
                dx[n, c, s] = (dy[n, c, s] - sum_dy / count - (x[n, c, s] - mean[c]) * slope) * scale
    return dx, dweight, dbias


@_jit
def _drop(x: Any, p: Any, scale: Any) -> Any:
    rows, cols = x.shape
    y = np.empty_like(x)
    for i in _prange(rows):
        for j in range(cols):
            y[i, j] = x[i, j] * scale if np.random.random() >= p else x.dtype.type(0)  # noqa: NPY002
    return y


def prepare(function: str, a: Arrays, options: Options, threads: int) -> Callable[[], Any] | None:
    if not a.x.flags.c_contiguous:
        return None
    _numba.set_num_threads(min(threads, _numba.config.NUMBA_NUM_THREADS))
    stem, backward = stem_of(function), function.endswith("_backward")
    number = a.x.dtype.type
    if stem in ("dropout", "drop_connect") and not backward:
        x, p = a.x.reshape(-1, a.x.shape[-1]), options.get("p", 0.3)
        return lambda: _drop(x, p, number(1 / (1 - p)))
    if stem in ("layer_norm", "rms_norm") and a.weight is not None:
        return _rows(stem, a, backward)
    if stem == "batch_norm" and function != "batch_norm":
        return _batch(a, backward)
    return None


def _rows(stem: str, a: Arrays, backward: bool) -> Callable[[], Any]:
    assert a.weight is not None
    number, weight = a.x.dtype.type, a.weight.ravel()
    x, dy = a.x.reshape(-1, weight.size), a.dy.reshape(-1, weight.size)
    centred = number(stem == "layer_norm")
    bias = np.zeros_like(weight) if a.bias is None else a.bias.ravel()
    if not backward:
        return lambda: _row_norm(x, weight, bias, number(_EPS), centred)
    mean = x.mean(1) * centred
    rstd = 1 / np.sqrt((x * x).mean(1) - mean * mean + number(_EPS))
    return lambda: _row_norm_backward(x, dy, weight, mean, rstd, centred)


def _batch(a: Arrays, backward: bool) -> Callable[[], Any] | None:
    if a.weight is None or a.bias is None:
        return None
    number, weight, bias = a.x.dtype.type, a.weight, a.bias
    x, dy = (v.reshape(*v.shape[:2], -1) for v in (a.x, a.dy))
    if not backward:
        return lambda: _channel_norm(x, weight, bias, number(_EPS))
    mean = x.mean((0, 2))
    rstd = 1 / np.sqrt(x.var((0, 2)) + number(_EPS))
    return lambda: _channel_norm_backward(x, dy, weight, mean, rstd)
