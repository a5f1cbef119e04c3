"""Group norm: the channels of every sample are normalised group by group.

Forward and backward, checked against `fastnorm.reference.group_norm` and its pair.
"""

from __future__ import annotations

from typing import Any, cast

from . import _core, _slow_path
from ._results import Array, NormGrads


def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Any = None,
) -> Array:
    """Group normalization: over the channels of a group and the spatial axes, for each sample.

    y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), with the mean and the biased variance of each
    group of C / num_groups neighbouring channels of each sample. One group is layer norm over (C, ...), C groups are
    instance norm.

    Parameters
    ----------
    x : array_like
        Shape (N, C, ...), or with the channels elsewhere; float32 or float64, any strides.
    num_groups : int
        A divisor of C.
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
    Y. Wu and K. He, "Group Normalization", 2018, arXiv:1803.08494.
    """
    y = _core.group_norm(x, num_groups, weight, bias, channel_axis, eps, out)
    if y is None:
        return cast(
            Array,
            _slow_path.forward(
                "group_norm", x, weight, bias, channel_axis, eps, out, cache=False, num_groups=num_groups
            ),
        )
    return y


def group_norm_forward(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Any = None,
) -> tuple[Array, _core.NormCache]:
    """`group_norm` that also returns what `group_norm_backward` needs.

    Parameters
    ----------
    x : array_like
        Shape (N, C, ...), or with the channels elsewhere; float32 or float64, any strides.
    num_groups : int
        A divisor of C.
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
        As from `group_norm`.
    cache : NormCache
        Read-only: x, weight, mean, rstd and the settings of the call.
        mean and rstd are float64, one per sample and group.

    Raises
    ------
    TypeError
        An array is not of float32 or float64 in native byte order, a parameter's dtype is not x's, or a number is not
        one.
    ValueError
        A shape, an axis, eps or out does not fit. Nothing has been written then.
    """
    result = _core.group_norm_forward(x, num_groups, weight, bias, channel_axis, eps, out)
    if result is None:
        return cast(
            "tuple[Array, _core.NormCache]",
            _slow_path.forward(
                "group_norm", x, weight, bias, channel_axis, eps, out, cache=True, num_groups=num_groups
            ),
        )
    return result


def group_norm_backward(dy: Any, cache: Any, *, out: Any = None) -> NormGrads:
    """Gradients of `group_norm` with respect to its input and its parameters.

    With g = dy * weight and means over the group: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)); dweight and dbias
    are the sums of dy * xhat and dy over samples and space, one per channel.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y: the shape and dtype of x.
    cache : NormCache
        What `group_norm_forward` returned. It is not changed, and x must not have been changed since.
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
    grads = _core.group_norm_backward(dy, cache, out)
    if grads is None:
        return _slow_path.backward("group_norm", dy, cache, out)
    return grads
