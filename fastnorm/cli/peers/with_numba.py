"""numba: the loops of numba_rows, numba_planes and numba_columns, compiled with fastmath, into preallocated results.

One thread gets the plain form; the parallel one costs microseconds a call before it has done anything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from fastnorm.cli.calls import Array, Arrays, Options, stem_of
from fastnorm.cli.peers import numba_columns, numba_planes, numba_rows, numba_streams

_numba: Any = import_module("numba")
_EPS = 1e-5
# Up to this many values a plane is short; this many values of a sample are then taken in one go.
_SHORT, _RUN = 100, 1024

Call = Callable[[], Any]


@cache
def _compiled(module: ModuleType, name: str, parallel: bool) -> Any:
    return _numba.njit(fastmath=True, error_model="numpy", parallel=parallel)(getattr(module, name))


def streams(threads: int) -> SimpleNamespace:
    """The copies of numba_streams, to be run on this many threads."""
    _numba.set_num_threads(min(threads, _numba.config.NUMBA_NUM_THREADS))
    return numba_streams.compiled(threads > 1)


def prepare(function: str, a: Arrays, options: Options, threads: int) -> Call | None:
    threads = min(threads, _numba.config.NUMBA_NUM_THREADS)
    _numba.set_num_threads(threads)
    stem, backward = stem_of(function), function.endswith("_backward")
    if stem in ("dropout", "drop_connect") and not backward and a.x.flags.c_contiguous:
        return _drop(a, options.get("p", 0.3), threads)
    if a.weight is None:
        return None
    if stem in ("layer_norm", "rms_norm"):
        return _rows(stem, a, backward, threads)
    if stem == "batch_norm":
        return _batch(function, a, threads)
    if stem in ("group_norm", "instance_norm"):
        groups = options["num_groups"] if stem == "group_norm" else a.x.shape[1]
        return _groups(a, int(groups), backward, threads)
    return None


def _drop(a: Arrays, p: float, threads: int) -> Call:
    kernel = _compiled(numba_rows, "dropout", threads > 1)
    x, y = (v.reshape(-1, a.x.shape[-1]) for v in (a.x, np.empty_like(a.x)))
    scale = a.x.dtype.type(1 / (1 - p))

    def call() -> Array:
        kernel(y, x, p, scale)
        return y

    return call


def _statistics(x: Array, axes: tuple[int, ...], *, centred: bool = True) -> tuple[Array, Array]:
    """mean and rstd as a forward would have left them."""
    mean = x.mean(axes, keepdims=True) * x.dtype.type(centred)
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + x.dtype.type(_EPS))
    return mean.ravel(), rstd.ravel()


def _calling(kernel: Any, arguments: tuple[Any, ...], *results: Array) -> Call:
    def call() -> tuple[Array, ...]:
        kernel(*arguments)
        return results

    return call


def _rows(stem: str, a: Arrays, backward: bool, threads: int) -> Call | None:
    assert a.weight is not None
    if not a.x.flags.c_contiguous:
        return None
    weight, eps = a.weight.ravel(), a.x.dtype.type(_EPS)
    x, dy = a.x.reshape(-1, weight.size), a.dy.reshape(-1, weight.size)
    y, dweight, dbias = np.empty_like(x), np.empty_like(weight), np.empty_like(weight)
    kernel = _compiled(numba_rows, stem + "_backward" * backward, threads > 1)
    if not backward:
        mean, rstd = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
        if stem == "rms_norm":
            return _calling(kernel, (y, rstd, x, weight, eps, threads), y, rstd)
        bias = np.zeros_like(weight) if a.bias is None else a.bias.ravel()
        return _calling(kernel, (y, mean, rstd, x, weight, bias, eps, threads), y, mean, rstd)
    mean, rstd = _statistics(x, (1,), centred=stem == "layer_norm")
    parts = np.empty((threads, 2, weight.size), x.dtype)
    if stem == "rms_norm":
        return _calling(kernel, (y, dweight, dy, x, weight, rstd, parts), y, dweight)
    return _calling(kernel, (y, dweight, dbias, dy, x, weight, mean, rstd, parts), y, dweight, dbias)


def _channels_innermost(x: Array) -> bool:
    """Whether (N, C) or channels-last memory: any other layout is no case of the bench."""
    return x.ndim == 2 or x.strides[1] == x.itemsize


def _batch(function: str, a: Arrays, threads: int) -> Call | None:
    if a.weight is None or a.bias is None or a.mean is None or a.var is None:
        return None
    channels, eps = a.x.shape[1], a.x.dtype.type(_EPS)
    y = np.empty_like(a.x)
    stem = "plane"
    module: ModuleType = numba_planes
    workspace: tuple[Any, ...] = ()
    if _channels_innermost(a.x):
        wide = channels * _rows_side_by_side(a.x.size // channels, channels)
        views: list[Array] = [np.moveaxis(v, 1, -1).reshape(-1, wide) for v in (a.x, a.dy, y)]
        stem, module, workspace = "column", numba_columns, (np.empty((threads, 3, wide), y.dtype),)
    else:
        views = [v.reshape(*v.shape[:2], -1) for v in (a.x, a.dy, y)]
    x, dy, to = views
    if function == "batch_norm":
        kernel = _compiled(module, f"{stem}_apply", threads > 1)
        return _calling(kernel, (to, x, a.mean, a.var, a.weight, a.bias, eps, *workspace), y)
    if stem == "plane" and x.shape[2] <= _SHORT:
        run = max(1, min(channels // threads, _RUN // x.shape[2]))
        stem, workspace = "short_plane", (np.empty((3, x[0].size), x.dtype), run)
    kernel = _compiled(module, f"{stem}_norm" + "_backward" * function.endswith("_backward"), threads > 1)
    if not function.endswith("_backward"):
        mean, rstd = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
        return _calling(kernel, (to, mean, rstd, x, a.weight, a.bias, eps, *workspace), y, mean, rstd)
    mean, rstd = _statistics(a.x, (0, *range(2, a.x.ndim)))
    dweight, dbias = np.empty_like(a.weight), np.empty_like(a.weight)
    arguments = (to, dweight, dbias, dy, x, a.weight, mean, rstd, *workspace)
    return _calling(kernel, arguments, y, dweight, dbias)


def _rows_side_by_side(rows: int, channels: int) -> int:
    """How many rows of few channels to take as one: the first divisor that makes a row of 256 values or more."""
    return next((n for n in range(1, 33) if rows % n == 0 and n * channels >= 256), 1)


def _groups(a: Arrays, groups: int, backward: bool, threads: int) -> Call | None:
    if a.weight is None or a.bias is None:
        return None
    batch, each = len(a.x), a.x.shape[1] // groups
    last = _channels_innermost(a.x)

    def view(v: Array) -> Array:
        if last:
            return np.moveaxis(v, 1, -1).reshape(batch, -1, groups, each)
        return v.reshape(batch, groups, each, -1)

    weight, bias = a.weight.reshape(groups, each), a.bias.reshape(groups, each)
    y = np.empty_like(a.x)
    x, dy, to = view(a.x), view(a.dy), view(y)
    workspace: tuple[Any, ...] = (np.empty((batch, 6, groups, each), x.dtype),) if last else ()
    name = "group_norm" + "_last" * last + "_backward" * backward
    kernel = _compiled(numba_columns if last else numba_planes, name, threads > 1)
    if not backward and not last and x.shape[3] <= _SHORT // 4:
        kernel = _compiled(numba_planes, "group_norm_short", threads > 1)
        workspace = tuple(np.empty((groups, each * x.shape[3]), x.dtype) for _ in range(2))
    if not backward:
        mean, rstd = np.empty(batch * groups, x.dtype), np.empty(batch * groups, x.dtype)
        return _calling(kernel, (to, mean, rstd, x, weight, bias, x.dtype.type(_EPS), *workspace), y, mean, rstd)
    mean, rstd = _statistics(x, (1, 3) if last else (2, 3))
    dweight, dbias = np.empty_like(weight), np.empty_like(weight)
    return _calling(kernel, (to, dweight, dbias, dy, x, weight, mean, rstd, *workspace), y, dweight, dbias)
