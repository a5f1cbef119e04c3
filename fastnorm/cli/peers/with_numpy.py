"""NumPy: the expressions that one finds in courses and blogs, in x's own dtype, a new array per operation.

One thread, because NumPy's element-wise loops have no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastnorm.cli.calls import SEED, Array, Arrays, Options, stem_of
from fastnorm.cli.peers import axes_of

_EPS = 1e-5


def prepare(function: str, a: Arrays, options: Options, threads: int) -> Callable[[], Any] | None:
    del threads
    stem, backward = stem_of(function), function.endswith("_backward")
    if stem.startswith("dropout_add"):
        return _residual_backward(stem, a, options) if backward else _residual(stem, a, options)
    if stem in ("dropout", "drop_connect", "apply_dropout_mask", "dropout_mask", "dropout_inference"):
        return _drop(stem, a, options, backward)
    if stem == "gaussian_noise":
        rng, dtype = np.random.default_rng(SEED), a.x.dtype
        return lambda: a.x + 0.5 * rng.standard_normal(a.x.shape, dtype)
    if stem == "moments":
        axis = options.get("axis")
        return lambda: (a.x.mean(axis, dtype=np.float64), a.x.var(axis, dtype=np.float64))
    return _norm_backward(stem, a, options) if backward else _norm(function, a, options)


def _reshaped(stem: str, a: Arrays, options: Options) -> tuple[Array, Array, Array | None, Array | None]:
    """x and dy with the axes that axes_of speaks of, weight and bias shaped to broadcast against them."""
    x, dy, weight, bias = a.x, a.dy, a.weight, a.bias
    if stem.endswith(("layer_norm", "rms_norm")):
        return x, dy, weight, bias
    ones = (1,) * (x.ndim - 2)
    if stem == "group_norm":
        groups = options["num_groups"]
        shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        x, dy, ones = x.reshape(shape), dy.reshape(shape), (*ones, 1)
        parameter: tuple[int, ...] = (groups, shape[2], *ones[1:])
    else:
        parameter = (x.shape[1], *ones)
    return (
        x,
        dy,
        None if weight is None else weight.reshape(parameter),
        None if bias is None else bias.reshape(parameter),
    )


def _affine(xhat: Array, weight: Array | None, bias: Array | None) -> Array:
    if weight is not None:
        xhat = xhat * weight
    return xhat if bias is None else xhat + bias


def _norm(function: str, a: Arrays, options: Options) -> Callable[[], Any]:
    x, _, weight, bias = _reshaped(stem_of(function), a, options)
    axes = axes_of(function, a.x.ndim, options)
    eps = x.dtype.type(_EPS)
    if "rms" in function:
        return lambda: _affine(x / np.sqrt((x * x).mean(axes, keepdims=True) + eps), weight, bias)
    if function == "batch_norm" and a.mean is not None and a.var is not None:
        shape = (-1,) + (1,) * (x.ndim - 2)
        mean, var = a.mean.reshape(shape), a.var.reshape(shape)
        return lambda: _affine((x - mean) / np.sqrt(var + eps), weight, bias)

    def norm() -> Array:
        mean = x.mean(axes, keepdims=True)
        var = x.var(axes, keepdims=True)
        return _affine((x - mean) / np.sqrt(var + eps), weight, bias).reshape(a.x.shape)

    return norm


def _gradients(x: Array, weight: Array | None, axes: tuple[int, ...], over: tuple[int, ...], centred: bool) -> Any:
    """A function dy -> (dx, dweight, dbias); what a forward would have saved is computed here."""
    mean = x.mean(axes, keepdims=True) if centred else x.dtype.type(0)
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + x.dtype.type(_EPS))

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        xhat = (x - mean) * rstd
        g = dy if weight is None else dy * weight
        dx = g - xhat * (g * xhat).mean(axes, keepdims=True)
        if centred:
            dx = dx - g.mean(axes, keepdims=True)
        return dx * rstd, (dy * xhat).sum(over), dy.sum(over)

    return backward


def _norm_backward(stem: str, a: Arrays, options: Options) -> Callable[[], Any]:
    x, dy, weight, _ = _reshaped(stem, a, options)
    axes = axes_of(stem, a.x.ndim, options)
    rows = stem.endswith(("layer_norm", "rms_norm"))
    over = tuple(range(axes[0])) if rows else (0, *range(3 if stem == "group_norm" else 2, x.ndim))
    backward = _gradients(x, weight, axes, over, not stem.endswith("rms_norm"))
    return lambda: backward(dy)


def _drop(stem: str, a: Arrays, options: Options, backward: bool) -> Callable[[], Any]:
    p = options.get("p", 0.3)
    rng, shape, dtype = np.random.default_rng(SEED), a.x.shape, a.x.dtype
    scale = dtype.type(1 / (1 - p))
    if stem == "dropout_inference":
        return lambda: a.x * dtype.type(1 - p)
    if stem == "dropout_mask":
        return lambda: rng.random(shape, np.float32) >= p
    if stem == "apply_dropout_mask":
        return lambda: a.x * a.keep * scale
    if backward:
        # The usual NumPy dropout keeps its scaled mask for the backward.
        mask = (rng.random(shape, np.float32) >= p) * scale
        return lambda: a.dy * mask
    return lambda: a.x * ((rng.random(shape, np.float32) >= p) * scale)


def _residual(stem: str, a: Arrays, options: Options) -> Callable[[], Any]:
    dropped = _drop("dropout", a, options, False)
    axes, eps = axes_of(stem, a.x.ndim, options), a.x.dtype.type(_EPS)

    def forward() -> tuple[Array, Array]:
        s = a.residual + dropped()
        centred = s if "rms" in stem else s - s.mean(axes, keepdims=True)
        return _affine(centred / np.sqrt((centred * centred).mean(axes, keepdims=True) + eps), a.weight, a.bias), s

    return forward


def _residual_backward(stem: str, a: Arrays, options: Options) -> Callable[[], Any]:
    p, axes = options.get("p", 0.3), axes_of(stem, a.x.ndim, options)
    mask = (np.random.default_rng(SEED).random(a.x.shape, np.float32) >= p) * a.x.dtype.type(1 / (1 - p))
    norm = _gradients(a.residual + a.x * mask, a.weight, axes, tuple(range(axes[0])), "rms" not in stem)

    def backward() -> tuple[Array, ...]:
        ds, dweight, dbias = norm(a.dy)
        ds = ds + a.ds
        return ds * mask, ds, dweight, dbias

    return backward
