"""The five norms, their gradients and the moments, from the formulas, in plain NumPy.

Promises results rounded once from a computation in longdouble (float64 where longdouble is no wider): exact enough to
judge the kernels, at any offset and any magnitude. ``EXACT`` gives the same results before rounding, each with the
error that the accuracy contract allows. Refuses to be fast, and refuses to share code with what it judges.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from .._results import Array, NormGrads

F = TypeVar("F", bound=Callable[..., Any])

# x87's 64-bit significand and 15-bit exponent, or IEEE quad; where the compiler has neither, float64.
WIDE: Any = np.longdouble if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps else np.float64
FORWARD_UNITS, GRADIENT_UNITS = 4.0, 8.0  # the accuracy contract, in units of u * scale


class Exact(NamedTuple):
    """A result before rounding. The contract for a computed ``got`` is ``|got - value| <= units * u * scale``."""

    value: Array
    scale: Array
    u: float
    units: float


@dataclass(frozen=True)
class Cache:
    """What a backward needs. It holds references to the arguments of the forward, no copies."""

    function: str
    x: Array
    weight: Array | None
    bias: Array | None
    mean: Array | None
    rstd: Array
    eps: float
    axis: int | None = None
    channel_axis: int | None = None
    num_groups: int | None = None
    batch_var: Array | None = None
    count: int | None = None
    training: bool | None = None


def _quiet(function: F) -> F:
    """Overflow to Inf, and NaN from Inf - Inf, are results here, not warnings."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return cast(F, wrapper)


# ---------------------------------------------------------------------------------------------------------------------
# How an array is cut into sets


@dataclass(frozen=True)
class _Sets:
    """x seen as ``x.transpose(order).reshape(shape)``: one set of values runs along ``axes`` of that view."""

    order: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    parameter_shape: tuple[int, ...]  # what weight and bias must have
    parameter_view: tuple[int, ...]  # as which they broadcast against the view
    void: bool  # there are examples, but nothing in them to normalise

    @property
    def count(self) -> int:
        """M, the number of values in one set."""
        return math.prod(self.shape[i] for i in self.axes)

    def view(self, a: Array) -> Array:
        return cast(Array, a.transpose(self.order).reshape(self.shape))

    def back(self, v: Array, like: Array) -> Array:
        transposed = v.reshape(tuple(like.shape[i] for i in self.order))
        return cast(Array, transposed.transpose(tuple(np.argsort(self.order))))

    def parameter(self, name: str, value: Array | None, default: float) -> Array:
        if value is None:
            return np.full((1,) * len(self.shape), default, WIDE)
        if value.shape != self.parameter_shape:
            raise ValueError(f"{name} has shape {value.shape}, expected {self.parameter_shape}")
        return cast(Array, value.reshape(self.parameter_view).astype(WIDE))

    def parameter_sum(self, v: Array) -> Array:
        """Sum over every axis along which a parameter is repeated."""
        leading = len(self.shape) - len(self.parameter_view)
        repeated = [leading + i for i, length in enumerate(self.parameter_view) if length == 1]
        return _sum(v, (*range(leading), *repeated)).reshape(self.parameter_shape)


def _rows(x: Array, axis: int) -> _Sets:
    """Layer and RMS norm: every axis from ``axis`` to the last; a parameter for each position in the row."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, expected {-x.ndim} to {x.ndim - 1} for x of rank {x.ndim}")
    first = axis % x.ndim
    every = tuple(range(x.ndim))
    row = x.shape[first:]
    return _Sets(every, x.shape, every[first:], row, row, _void(x.shape[:first], row))


def _void(examples: tuple[int, ...], values: tuple[int, ...]) -> bool:
    return 0 in values and 0 not in examples


def _channels_first(x: Array, channel_axis: int, least_rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The order of axes (batch, channel, the rest), and x's shape in that order."""
    if x.ndim < least_rank:
        raise ValueError(f"x has rank {x.ndim}, expected at least {least_rank}")
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(f"channel_axis is {channel_axis}, expected {-x.ndim} to {x.ndim - 1} for x of rank {x.ndim}")
    channel = channel_axis % x.ndim
    batch = 1 if channel == 0 else 0
    order = (batch, channel, *(i for i in range(x.ndim) if i not in (batch, channel)))
    return order, tuple(x.shape[i] for i in order)


def _per_channel(x: Array, channel_axis: int) -> _Sets:
    """Batch norm: a set is one channel of the whole batch."""
    order, shape = _channels_first(x, channel_axis, 2)
    axes = (0, *range(2, x.ndim))
    return _Sets(order, shape, axes, shape[1:2], (shape[1], *(1,) * (x.ndim - 2)), _void(shape[:2], shape[2:]))


def _per_instance(x: Array, channel_axis: int) -> _Sets:
    """Instance norm: a set is one channel of one example."""
    order, shape = _channels_first(x, channel_axis, 3)
    axes = tuple(range(2, x.ndim))
    return _Sets(order, shape, axes, shape[1:2], (shape[1], *(1,) * (x.ndim - 2)), _void(shape[:2], shape[2:]))


def _per_group(x: Array, channel_axis: int, num_groups: int) -> _Sets:
    """Group norm: a set is a group of neighbouring channels of one example."""
    order, whole = _channels_first(x, channel_axis, 2)
    batch, channels, *spatial = whole
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, expected a divisor of the {channels} channels")
    if channels == 0 and num_groups >= 2**31:
        raise ValueError(f"num_groups is {num_groups}, expected less than 2**31")
    shape = (batch, num_groups, channels // num_groups, *spatial)
    axes = tuple(range(2, len(shape)))
    return _Sets(order, shape, axes, (channels,), (*shape[1:3], *(1,) * len(spatial)), _void(whole[:1], shape[2:]))


# ---------------------------------------------------------------------------------------------------------------------
# The formulas


def _sum(v: Array, axes: tuple[int, ...]) -> Array:
    """v.sum(axis=axes, keepdims=True), pairwise wherever the axes lie.

    NumPy adds in pairs along the innermost axis alone. Along others it adds one term after the other, and 10^5 terms of
    two kinds, whose roundings all go the same way, were off by a dozen units of float64.
    """
    kept = [i for i in range(v.ndim) if i not in axes]
    inner = math.prod(v.shape[i] for i in axes)
    terms = np.ascontiguousarray(v.transpose(*kept, *axes)).reshape(*(v.shape[i] for i in kept), inner)
    return cast(Array, terms.sum(axis=-1).reshape([1 if i in axes else n for i, n in enumerate(v.shape)]))


def _mean(v: Array, axes: tuple[int, ...]) -> Array:
    count = math.prod(v.shape[i] for i in axes)
    return cast(Array, _sum(v, axes) / max(count, 1))


def _ratio(v: Array, sigma: Array) -> Array:
    """v / sigma, and 0 where sigma is: a constant set with eps = 0 has xhat = 0 and no gradient."""
    quotient: Array = np.empty(np.broadcast_shapes(v.shape, sigma.shape), WIDE)
    np.divide(v, sigma, out=quotient)
    if not sigma.all():
        quotient[np.broadcast_to(sigma == 0, quotient.shape)] = 0
    return quotient


def _power_of_two(least: Array, most: Array) -> Array:
    """A power of two near each set's largest |v|. Dividing by it is exact and keeps sums and squares in range."""
    largest = np.maximum(np.abs(least), np.abs(most))
    exponent = np.maximum(np.frexp(largest)[1] - 1, -1000)
    power: Array = np.where(np.isfinite(largest) & (largest > 0), np.ldexp(WIDE(1), exponent), WIDE(1))
    return power


def _statistics(v: Array, axes: tuple[int, ...], eps: float, *, centred: bool = True) -> tuple[Array, Array, Array]:
    """mean, sigma = sqrt(var + eps) and xhat = (v - mean) / sigma of every set; mean is taken as 0 if not centred.

    v comes in its own dtype, in which least and largest are found as well as in longdouble, and sooner.
    A mean rounded at a large offset is wrong by much more than the deviations can bear, so deviations are taken twice:
    the second mean is what the rounding of the first left over (the corrected two-pass algorithm, Chan et al. 1983).
    """
    if v.size == 0:  # no values: statistics of 0, so that nothing follows from them
        none = np.zeros([1 if i in axes else n for i, n in enumerate(v.shape)], WIDE)
        return none, none, v.astype(WIDE)
    least, most = (bound(axis=axes, keepdims=True).astype(WIDE) for bound in (v.min, v.max))
    p = _power_of_two(least, most)
    d = v.astype(WIDE)
    d /= p
    mean = np.zeros_like(p)
    if centred:
        # Clipped because a rounded mean can leave the range of its set; a constant set must give d = 0.
        mean = np.clip(_mean(d, axes), least / p, most / p)
        d -= mean
        rest = _mean(d, axes)
        d -= rest
        mean = mean + rest
    std = np.sqrt(_mean(d * d, axes))
    sigma = p * np.hypot(std, np.sqrt(WIDE(eps)) / p)
    d *= p
    return p * mean, sigma, _ratio(d, sigma)


@_quiet
def _normalise(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    sets: _Sets,
    eps: float,
    *,
    centred: bool = True,
    given: tuple[Array, Array] | None = None,
) -> dict[str, Exact]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with the sets' own mean and var or with those given."""
    v = sets.view(_floating("x", x))
    if not eps >= 0:
        raise ValueError(f"eps is {eps!r}, expected eps >= 0")
    if given is None:
        if sets.void:
            raise ValueError(f"x has shape {x.shape}: nothing to normalise in each set")
        mean, sigma, xhat = _statistics(v, sets.axes, eps, centred=centred)
    else:
        mean = sets.parameter("mean", given[0], 0)
        sigma = np.sqrt(sets.parameter("var", given[1], 0) + WIDE(eps))
        xhat = _ratio(v - mean, sigma)
    w, b = sets.parameter("weight", weight, 1), sets.parameter("bias", bias, 0)
    # In place, as far as it goes: of large arrays, the memory of each new one costs what computing it costs.
    y_scale = np.abs(xhat)
    y_scale = np.maximum(1, y_scale, out=y_scale)
    y = xhat
    if weight is not None:
        y *= w
        y_scale *= np.abs(w)
    y += b
    if bias is not None:
        y_scale += np.abs(b)

    # The contract is for xhat; weight and bias each add one rounding.
    units = FORWARD_UNITS + (weight is not None) + (bias is not None)
    u = _unit(x.dtype)
    mean, sigma = mean.ravel(), sigma.ravel()
    rstd = _ratio(np.ones_like(sigma), sigma)
    # A mean is as good as the deviations need it to be, and then rounded to float64.
    mean_scale = sigma + np.abs(mean) * _unit(np.dtype(np.float64)) / u
    return {
        "y": Exact(sets.back(y, x), sets.back(y_scale, x), u, units),
        "mean": Exact(mean, mean_scale, u, FORWARD_UNITS),
        "rstd": Exact(rstd, rstd, u, FORWARD_UNITS),
    }


@_quiet
def _differentiate(dy: Array, cache: Any, sets: _Sets, *, centred: bool = True) -> dict[str, Exact | None]:
    """Gradients of sum(y * dy). With g = dy * weight and means over each set,

        dx      = (g - mean(g) - xhat * mean(g * xhat)) / sigma     without mean(g) where the mean is not subtracted
        dweight = sum(dy * xhat)
        dbias   = sum(dy)

    and dx = g / sigma where the statistics are constants. The error scale is the sum of the absolute values of these
    terms, where xhat counts as max(1, |xhat|) in dweight: that is what the forward's contract says of it.
    """
    x, weight, bias = cache.x, cache.weight, cache.bias
    if _floating("dy", dy).shape != x.shape:
        raise ValueError(f"dy has shape {dy.shape}, expected x's {x.shape}")
    v, dv = sets.view(x), sets.view(dy).astype(WIDE)
    g = dv * sets.parameter("weight", weight, 1)  # never dv itself, as it is computed with in place
    if cache.training is False:
        rstd = sets.parameter("rstd", cache.rstd, 1)
        xhat = (v - sets.parameter("mean", cache.mean, 0)) * rstd
        xhat_size = np.abs(xhat)
        dx = g * rstd
        dx_scale = np.abs(dx)
    else:
        _, sigma, xhat = _statistics(v, sets.axes, cache.eps, centred=centred)
        product, size, xhat_size = g * xhat, np.abs(g), np.abs(xhat)
        g1 = _mean(g, sets.axes) if centred else WIDE(0)
        g2 = _mean(product, sets.axes)
        scale1 = _mean(size, sets.axes) if centred else WIDE(0)
        scale2 = _mean(np.abs(product, out=product), sets.axes)
        g -= g1
        g -= xhat * g2
        size += scale1
        size += xhat_size * scale2
        dx, dx_scale = _ratio(g, sigma), _ratio(size, sigma)

    u = _unit(x.dtype)
    gradients: dict[str, Exact | None] = {
        "dx": Exact(sets.back(dx, x), sets.back(dx_scale, x), u, GRADIENT_UNITS),
        "dweight": None,
        "dbias": None,
    }
    dv_size = np.abs(dv)
    if weight is not None:
        scale = sets.parameter_sum(dv_size * np.maximum(1, xhat_size, out=xhat_size))
        gradients["dweight"] = Exact(sets.parameter_sum(dv * xhat), scale, _unit(weight.dtype), GRADIENT_UNITS)
    if bias is not None:
        scale = sets.parameter_sum(dv_size)
        gradients["dbias"] = Exact(sets.parameter_sum(dv), scale, _unit(bias.dtype), GRADIENT_UNITS)
    return gradients


# ---------------------------------------------------------------------------------------------------------------------
# Arguments in, results out


def _unit(dtype: np.dtype[Any]) -> float:
    """u, the unit round-off."""
    return float(np.finfo(dtype).eps) / 2


def _floating(name: str, a: Array) -> Array:
    if not np.issubdtype(a.dtype, np.floating):
        raise TypeError(f"{name} has dtype {a.dtype}, expected a floating-point dtype")
    return a


@_quiet
def _filled(value: Array, like: Array, out: Array | None) -> Array:
    """``value`` rounded to the dtype of ``like``, in its memory order ("K") or in ``out``."""
    if out is None:
        out = np.empty_like(like, order="K", subok=False)
    elif out.shape != like.shape or out.dtype != like.dtype:
        raise ValueError(f"out is {out.dtype} {out.shape}, expected {like.dtype} {like.shape}")
    out[...] = value
    return out


@_quiet
def _rounded(exact: Exact | None, like: Array | None) -> Array | None:
    return None if exact is None or like is None else exact.value.astype(like.dtype)


def _forward(function: str, exact: dict[str, Exact], x: Array, out: Array | None, **rest: Any) -> tuple[Array, Cache]:
    if out is not None and np.shares_memory(x, out):
        raise ValueError(f"out overlaps x, which {function}_backward needs; expected separate memory")
    y = _filled(exact["y"].value, x, out)
    with np.errstate(all="ignore"):
        for name in ("mean", "rstd", "batch_var"):
            rest[name] = exact[name].value.astype(np.float64) if name in exact else None
    return y, Cache(function, x, **rest)


def _backward(exact: dict[str, Exact | None], dy: Array, cache: Any, out: Array | None) -> NormGrads:
    dx = cast(Exact, exact["dx"]).value
    dweight, dbias = _rounded(exact["dweight"], cache.weight), _rounded(exact["dbias"], cache.bias)
    return NormGrads(_filled(dx, dy, out), dweight, dbias)


def _of(cache: Any, function: str) -> Any:
    if cache.function != function:
        raise ValueError(f"cache comes from {cache.function}_forward, expected {function}_forward")
    return cache


# ---------------------------------------------------------------------------------------------------------------------
# Layer norm


def _exact_layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> dict[str, Exact]:
    return _normalise(x, weight, bias, _rows(x, axis), eps)


def _exact_layer_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> dict[str, Exact | None]:
    return _differentiate(dy, cache, _rows(_of(cache, "layer_norm").x, cache.axis))


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over the axes from ``axis`` to the last.

    J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    return _filled(_exact_layer_norm(x, weight, bias, axis=axis, eps=eps)["y"].value, x, out)


def layer_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """`layer_norm`, and what its backward needs."""
    exact = _exact_layer_norm(x, weight, bias, axis=axis, eps=eps)
    return _forward("layer_norm", exact, x, out, weight=weight, bias=bias, eps=eps, axis=axis % x.ndim)


def layer_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> NormGrads:
    """dx = (g - mean(g) - xhat mean(g xhat)) / sigma with g = dy weight; dweight = sum(dy xhat), dbias = sum(dy)."""
    return _backward(_exact_layer_norm_backward(dy, cache), dy, cache, out)


# ---------------------------------------------------------------------------------------------------------------------
# RMS norm


def _exact_rms_norm(
    x: Array, weight: Array | None = None, *, axis: int = -1, eps: float = 1e-5, out: Array | None = None
) -> dict[str, Exact]:
    exact = _normalise(x, weight, None, _rows(x, axis), eps, centred=False)
    del exact["mean"]
    return exact


def _exact_rms_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> dict[str, Exact | None]:
    return _differentiate(dy, cache, _rows(_of(cache, "rms_norm").x, cache.axis), centred=False)


def rms_norm(
    x: Array, weight: Array | None = None, *, axis: int = -1, eps: float = 1e-5, out: Array | None = None
) -> Array:
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean over the axes from ``axis`` to the last.

    B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    return _filled(_exact_rms_norm(x, weight, axis=axis, eps=eps)["y"].value, x, out)


def rms_norm_forward(
    x: Array, weight: Array | None = None, *, axis: int = -1, eps: float = 1e-5, out: Array | None = None
) -> tuple[Array, Cache]:
    """`rms_norm`, and what its backward needs."""
    exact = _exact_rms_norm(x, weight, axis=axis, eps=eps)
    return _forward("rms_norm", exact, x, out, weight=weight, bias=None, eps=eps, axis=axis % x.ndim)


def rms_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> NormGrads:
    """dx = (g - xhat mean(g xhat)) / sigma with g = dy weight and xhat = x / sigma; dweight = sum(dy xhat)."""
    return _backward(_exact_rms_norm_backward(dy, cache), dy, cache, out)


# ---------------------------------------------------------------------------------------------------------------------
# Group norm


def _exact_group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> dict[str, Exact]:
    return _normalise(x, weight, bias, _per_group(x, channel_axis, num_groups), eps)


def _exact_group_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> dict[str, Exact | None]:
    return _differentiate(dy, cache, _per_group(_of(cache, "group_norm").x, cache.channel_axis, cache.num_groups))


def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over each group of C / num_groups channels of
    each example; weight and bias by channel.

    Y. Wu, K. He, "Group Normalization", 2018, arXiv:1803.08494.
    """
    exact = _exact_group_norm(x, num_groups, weight, bias, channel_axis=channel_axis, eps=eps)
    return _filled(exact["y"].value, x, out)


def group_norm_forward(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """`group_norm`, and what its backward needs."""
    exact = _exact_group_norm(x, num_groups, weight, bias, channel_axis=channel_axis, eps=eps)
    rest = {"weight": weight, "bias": bias, "eps": eps, "channel_axis": channel_axis % x.ndim, "num_groups": num_groups}
    return _forward("group_norm", exact, x, out, **rest)


def group_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> NormGrads:
    """`layer_norm_backward`'s formulas, over groups; dweight and dbias are sums over each channel."""
    return _backward(_exact_group_norm_backward(dy, cache), dy, cache, out)


# ---------------------------------------------------------------------------------------------------------------------
# Instance norm


def _exact_instance_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> dict[str, Exact]:
    return _normalise(x, weight, bias, _per_instance(x, channel_axis), eps)


def _exact_instance_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> dict[str, Exact | None]:
    return _differentiate(dy, cache, _per_instance(_of(cache, "instance_norm").x, cache.channel_axis))


def instance_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over each channel of each example.

    D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016,
    arXiv:1607.08022.
    """
    return _filled(_exact_instance_norm(x, weight, bias, channel_axis=channel_axis, eps=eps)["y"].value, x, out)


def instance_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """`instance_norm`, and what its backward needs."""
    exact = _exact_instance_norm(x, weight, bias, channel_axis=channel_axis, eps=eps)
    rest = {"weight": weight, "bias": bias, "eps": eps, "channel_axis": channel_axis % x.ndim}
    return _forward("instance_norm", exact, x, out, **rest)


def instance_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> NormGrads:
    """`layer_norm_backward`'s formulas, over each channel of each example; dweight and dbias sum over examples."""
    return _backward(_exact_instance_norm_backward(dy, cache), dy, cache, out)


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm


def _exact_batch_norm(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> dict[str, Exact]:
    if np.any(var < 0):
        raise ValueError(f"var holds {np.min(var)}, expected values of at least 0")
    return _normalise(x, weight, bias, _per_channel(x, channel_axis), eps, given=(mean, var))


@_quiet
def _exact_batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float | None = 0.1,
    channel_axis: int = 1,
    eps: float = 1e-5,
    training: bool = True,
    out: Array | None = None,
) -> dict[str, Exact]:
    sets = _per_channel(x, channel_axis)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("training=False needs running_mean and running_var")
        exact = _exact_batch_norm(x, running_mean, running_var, weight, bias, channel_axis=channel_axis, eps=eps)
        kept = {"running_mean": running_mean, "running_var": running_var}
        return exact | {k: Exact(r.astype(WIDE), np.zeros(r.shape, WIDE), 0.0, 0.0) for k, r in kept.items()}
    if sets.count == 1:
        raise ValueError(f"x has shape {x.shape}: one value per channel has no variance; use training=False")
    exact = _normalise(x, weight, bias, sets, eps)
    mean = exact["mean"].value
    std = _statistics(sets.view(x), sets.axes, 0.0)[1].ravel()
    var = std**2
    u = _unit(x.dtype)
    exact["batch_var"] = Exact(var, var, u, GRADIENT_UNITS)

    # The running variance is an estimate for the population, so it takes the unbiased var * M / (M - 1).
    unbiased = var * sets.count / max(sets.count - 1, 1)
    for name, running, new, scale, units in (
        ("running_mean", running_mean, mean, np.abs(mean) + std, FORWARD_UNITS),
        ("running_var", running_var, unbiased, unbiased, GRADIENT_UNITS),
    ):
        if running is None:
            continue
        if running.shape != sets.parameter_shape:
            raise ValueError(f"{name} has shape {running.shape}, expected {sets.parameter_shape}")
        rate = WIDE(0 if momentum is None or sets.count == 0 else momentum)
        # A weight of 0 leaves no trace of what it weighs, of Inf neither.
        old = (1 - rate) * running.astype(WIDE) if rate < 1 else np.zeros(running.shape, WIDE)
        update, update_scale = (rate * new, rate * scale) if rate > 0 else np.zeros((2, *running.shape), WIDE)
        unit = max(u, _unit(running.dtype))
        exact[name] = Exact(old + update, np.abs(old) + update_scale, unit, units)
    return exact


def _exact_batch_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> dict[str, Exact | None]:
    return _differentiate(dy, cache, _per_channel(_of(cache, "batch_norm").x, cache.channel_axis))


def batch_norm(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, everything but x by channel: inference.

    S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift", 2015, arXiv:1502.03167, algorithm 2.
    """
    exact = _exact_batch_norm(x, mean, var, weight, bias, channel_axis=channel_axis, eps=eps)
    return _filled(exact["y"].value, x, out)


@_quiet
def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float | None = 0.1,
    channel_axis: int = 1,
    eps: float = 1e-5,
    training: bool = True,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var (biased) of each channel over the whole batch;
    and what the backward needs. With ``training=False`` mean and var are the running statistics.

    Where given, the running statistics become (1 - momentum) running + momentum batch, the variance unbiased.
    Ioffe & Szegedy 2015, algorithm 1.
    """
    exact = _exact_batch_norm_forward(
        x,
        weight,
        bias,
        running_mean=running_mean,
        running_var=running_var,
        momentum=momentum,
        channel_axis=channel_axis,
        eps=eps,
        training=training,
    )
    rest = {"weight": weight, "bias": bias, "eps": eps, "channel_axis": channel_axis % x.ndim, "training": training}
    y, cache = _forward("batch_norm", exact, x, out, **rest, count=_per_channel(x, channel_axis).count)
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None and training:
            running[...] = exact[name].value
    return y, cache


def batch_norm_backward(dy: Array, cache: Any, *, out: Array | None = None) -> NormGrads:
    """dx = (g - mean(g) - xhat mean(g xhat)) / sigma with g = dy weight, means over each channel of the whole batch;
    dx = g / sigma where the forward used the running statistics. dweight = sum(dy xhat), dbias = sum(dy).

    Ioffe & Szegedy 2015, section 3.
    """
    return _backward(_exact_batch_norm_backward(dy, cache), dy, cache, out)


# ---------------------------------------------------------------------------------------------------------------------
# Moments


@dataclass(frozen=True)
class Moments:
    """Number of values, their mean, and m2 = sum((x - mean)^2), in float64."""

    count: int
    mean: Array
    m2: Array

    def var(self, ddof: int = 0) -> Array:
        """m2 / (count - ddof)."""
        return cast(Array, self.m2 / (self.count - ddof))

    def std(self, ddof: int = 0) -> Array:
        """Square root of `var`."""
        return np.sqrt(self.var(ddof))

    @staticmethod
    def merge(*parts: Moments) -> Moments:
        """The moments of all values together.

        count = sum(count_i), mean = sum(count_i mean_i) / count, m2 = sum(m2_i + count_i (mean_i - mean)^2):
        T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for Computing the Sample Variance: Analysis and
        Recommendations", The American Statistician 37(3), 1983.
        """
        count = sum(part.count for part in parts)
        origin = parts[0].mean.astype(WIDE)  # means are taken from here, so that a large offset costs nothing
        shifts = [part.mean.astype(WIDE) - origin for part in parts]
        shift = sum(part.count * s for part, s in zip(parts, shifts, strict=True)) / count
        m2 = sum(part.m2 + part.count * (s - shift) ** 2 for part, s in zip(parts, shifts, strict=True))
        return Moments(count, np.asarray(origin + shift, np.float64), np.asarray(m2, np.float64))


@_quiet
def _exact_moments(x: Array, axis: int | tuple[int, ...] | None = None) -> dict[str, Exact]:
    chosen = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    axes = tuple(sorted(i % x.ndim for i in chosen))
    count = math.prod(x.shape[i] for i in axes)
    shape = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    if count == 0 and math.prod(shape):
        raise ValueError(f"x has shape {x.shape}: no values along axis {axis}, expected at least one")
    mean, std, _ = _statistics(_floating("x", x), axes, 0.0)
    mean, std = mean.reshape(shape), std.reshape(shape)
    u = _unit(x.dtype)
    mean_scale = std + np.abs(mean) * _unit(np.dtype(np.float64)) / u
    m2 = std * std * count
    counts = np.asarray(count, WIDE)
    return {
        "count": Exact(counts, np.zeros((), WIDE), u, 0.0),
        "mean": Exact(mean, mean_scale, u, FORWARD_UNITS),
        "m2": Exact(m2, m2, u, GRADIENT_UNITS),
    }


@_quiet
def moments(x: Array, axis: int | tuple[int, ...] | None = None) -> Moments:
    """mean = sum(x) / count and m2 = sum((x - mean)^2), reduced over ``axis`` as `numpy.mean` does.

    Computed by the corrected two-pass algorithm of Chan et al. 1983 (see `Moments.merge`).
    """
    exact = _exact_moments(x, axis)
    mean, m2 = (np.asarray(exact[name].value, np.float64) for name in ("mean", "m2"))
    return Moments(int(exact["count"].value), mean, m2)


EXACT: dict[str, Callable[..., dict[str, Any]]] = {
    "layer_norm": _exact_layer_norm,
    "layer_norm_forward": _exact_layer_norm,
    "layer_norm_backward": _exact_layer_norm_backward,
    "rms_norm": _exact_rms_norm,
    "rms_norm_forward": _exact_rms_norm,
    "rms_norm_backward": _exact_rms_norm_backward,
    "group_norm": _exact_group_norm,
    "group_norm_forward": _exact_group_norm,
    "group_norm_backward": _exact_group_norm_backward,
    "instance_norm": _exact_instance_norm,
    "instance_norm_forward": _exact_instance_norm,
    "instance_norm_backward": _exact_instance_norm_backward,
    "batch_norm": _exact_batch_norm,
    "batch_norm_forward": _exact_batch_norm_forward,
    "batch_norm_backward": _exact_batch_norm_backward,
    "moments": _exact_moments,
}
