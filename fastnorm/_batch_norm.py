"""Batch norm: every channel is normalised over the batch and its spatial axes.

Inference from given statistics, training with running statistics, backward; checked against `fastnorm.reference`.
"""

from __future__ import annotations

from typing import Any, cast

from . import _core, _slow_path
from ._results import Array, NormGrads


def batch_norm(
    x: Any,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Any = None,
) -> Array:
    """Batch normalization with given statistics, as at inference.

    y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), channel by channel.

    Parameters
    ----------
    x : array_like
        Shape (N, C, ...), or with the channels elsewhere; float32 or float64, any strides.
    mean, var : array_like
        Shape (C,), of x's dtype or float64; var >= 0.
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
    S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.
    """
    y = _core.batch_norm(x, mean, var, weight, bias, channel_axis, eps, out)
    if y is None:
        return cast(Array, _slow_path.batch_norm(x, mean, var, weight, bias, channel_axis, eps, out))
    return y


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    running_mean: Any = None,
    running_var: Any = None,
    momentum: float | None = 0.1,
    channel_axis: int = 1,
    eps: float = 1e-5,
    training: bool = True,
    out: Any = None,
) -> tuple[Array, _core.NormCache]:
    """Batch normalization in training, with the statistics of the batch; or with running statistics, for a backward.

    y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), with the mean and the biased variance of each
    channel over the batch and its spatial axes. Running statistics, where given, are updated in place:
    running = (1 - momentum) * running + momentum * batch, the variance unbiased (divided by M - 1).

    Parameters
    ----------
    x : array_like
        Shape (N, C, ...), or with the channels elsewhere; float32 or float64, any strides.
    weight, bias : array_like, optional
        Shape (C,), of x's dtype; None stands for 1 and 0.
    running_mean, running_var : ndarray, optional
        Shape (C,), of x's dtype or float64, writeable. training=False reads them and needs both.
    momentum : float or None, default 0.1
        The weight of the new batch, 0 to 1. None leaves the running statistics as they are.
    channel_axis : int, default 1
        Where the channels are. Axis 0 is the batch, or axis 1 where the channels are axis 0.
    eps : float, default 1e-5
        Added to the variance, >= 0. Where the sum is 0, rstd is taken as 0, so that y is bias.
    training : bool, default True
        False normalises with the running statistics, which the backward then treats as constants.
    out : ndarray, optional
        Where to write y: x's shape and dtype, any strides; must not overlap x, which the cache keeps.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype; a new array has its axes in memory in x's order.
    cache : NormCache
        Read-only: x, weight, mean and rstd (float64, one per channel), batch_var (biased; None with training=False),
        count (M, the values per channel) and the settings of the call.

    Raises
    ------
    TypeError
        An array is not of float32 or float64 in native byte order, a parameter's dtype is not x's, or a number is not
        one.
    ValueError
        A shape, an axis, eps or out does not fit, momentum is outside [0, 1], there is one value per channel in
        training, or training=False lacks running statistics. Nothing has been written then.

    References
    ----------
    S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.
    """
    result = _core.batch_norm_forward(
        x, weight, bias, running_mean, running_var, momentum, channel_axis, eps, training, out
    )
    if result is None:
        return cast(
            "tuple[Array, _core.NormCache]",
            _slow_path.batch_norm_forward(
                x, weight, bias, running_mean, running_var, momentum, channel_axis, eps, training, out
            ),
        )
    return result


def batch_norm_backward(dy: Any, cache: Any, *, out: Any = None) -> NormGrads:
    """Gradients of `batch_norm` with respect to its input and its parameters.

    With g = dy * weight and means over the batch and space: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), or
    rstd * g where the forward had training=False; dweight and dbias are the sums of dy * xhat and dy.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y: the shape and dtype of x.
    cache : NormCache
        What `batch_norm_forward` returned. It is not changed, and x must not have been changed since.
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
    grads = _core.batch_norm_backward(dy, cache, out)
    if grads is None:
        return _slow_path.backward("batch_norm", dy, cache, out)
    return grads
