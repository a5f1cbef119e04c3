"""Instance norm: every channel of every sample is normalised over its spatial axes.

Forward and backward, checked against `fastnorm.reference.instance_norm` and its pair.
"""

from __future__ import annotations

from typing import Any, cast

from . import _core, _slow_path
from ._results import Array, NormGrads


def instance_norm(
    x: Any, weight: Any = None, bias: Any = None, *, channel_axis: int = 1, eps: float = 1e-5, out: Any = None
) -> Array:
    """Instance normalization: over the spatial axes of each sample and channel.

    y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), with the mean and the biased variance of each
    channel of each sample.

    Parameters
    ----------
    x : array_like
        Shape (N, C, ...) of at least three axes, or with the channels elsewhere; float32 or float64, any strides.
    weight, bias : array_like, optional
        Shape (C,), of x's dtype; None stands for 1 and 0.
    channel_axis : int, default 1
        Where the channels are. Axis 0 is the batch, or axis 1 where the channels are axis 0.
    eps : float, default 1e-5
        Added to the variance, >= 0. Where the sum is 0, rstd is taken as 0, so that y is bias.
    out : ndarray, optional
        Where to write y: x's shape and dtype, any strides; may be x itself.

    Returns
    -------
    ndarray
        y, of x's shape and dtype; a new array has its axes in memory in x's order.

    Raises
    ------
    TypeError
        An array is not of float32 or float64 in native byte order, a parameter's dtype is not x's, or a number is not
        one.
    ValueError
        A shape, an axis, eps or out does not fit. Nothing has been written then.

    References
    ----------
    D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization", 2016, arXiv:1607.08022.
    """
    y = _core.instance_norm(x, weight, bias, channel_axis, eps, out)
    if y is None:
        return cast(Array, _slow_path.forward("instance_norm", x, weight, bias, channel_axis, eps, out, cache=False))
    return y


def instance_norm_forward(
    x: Any, weight: Any = None, bias: Any = None, *, channel_axis: int = 1, eps: float = 1e-5, out: Any = None
) -> tuple[Array, _core.NormCache]:
    """`instance_norm` that also returns what `instance_norm_backward` needs.

    Parameters
    ----------
    x : array_like
        Shape (N, C, ...) of at least three axes, or with the channels elsewhere; float32 or float64, any strides.
    weight, bias : array_like, optional
        Shape (C,), of x's dtype; None stands for 1 and 0.
    channel_axis : int, default 1
        Where the channels are. Axis 0 is the batch, or axis 1 where the channels are axis 0.
    eps : float, default 1e-5
        Added to the variance, >= 0. Where the sum is 0, rstd is taken as 0, so that y is bias.
    out : ndarray, optional
        Where to write y: x's shape and dtype, any strides; must not overlap x, which the cache keeps.

    Returns
    -------
    y : ndarray
        As from `instance_norm`.
    cache : NormCache
        Read-only: x, weight, mean, rstd and the settings of the call.
        mean and rstd are float64, one per sample and channel.

    Raises
    ------
    TypeError
        An array is not of float32 or float64 in native byte order, a parameter's dtype is not x's, or a number is not
        one.
    ValueError
        A shape, an axis, eps or out does not fit. Nothing has been written then.
    """
    result = _core.instance_norm_forward(x, weight, bias, channel_axis, eps, out)
    if result is None:
        return cast(
            "tuple[Array, _core.NormCache]",
            _slow_path.forward("instance_norm", x, weight, bias, channel_axis, eps, out, cache=True),
        )
    return result


def instance_norm_backward(dy: Any, cache: Any, *, out: Any = None) -> NormGrads:
    """Gradients of `instance_norm` with respect to its input and its parameters.

    With g = dy * weight and means over the spatial axes: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)); dweight and
    dbias are the sums of dy * xhat and dy over samples and space.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y: the shape and dtype of x.
    cache : NormCache
        What `instance_norm_forward` returned. It is not changed, and x must not have been changed since.
    out : ndarray, optional
        Where to write dx; may be dy itself.

    Returns
    -------
    NormGrads
        (dx, dweight, dbias), in x's dtype; dweight or dbias is None where the parameter was None.

    Raises
    ------
    TypeError
        dy's dtype is not x's, or cache is not a cache.
    ValueError
        dy's shape is not x's, cache is of another function, or out does not fit.
    """
    grads = _core.instance_norm_backward(dy, cache, out)
    if grads is None:
        return _slow_path.backward("instance_norm", dy, cache, out)
    return grads
