"""RMS norm: every sample is divided by the root mean square over its last axes.

Forward and backward, checked against `fastnorm.reference.rms_norm` and its pair.
"""

from __future__ import annotations

from typing import Any, cast

from . import _core, _slow_path
from ._results import Array, NormGrads


def rms_norm(x: Any, weight: Any = None, *, axis: int = -1, eps: float = 1e-5, out: Any = None) -> Array:
    """Root mean square normalization over the axes from `axis` to the last.

    y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), with the mean over the normalised axes.

    Parameters
    ----------
    x : array_like
        Shape (..., *normalised), float32 or float64, any strides.
    weight : array_like, optional
        Shape x.shape[axis:], of x's dtype; None stands for 1.
    axis : int, default -1
        The first normalised axis.
    eps : float, default 1e-5
        Added to the variance (here the mean square), >= 0. Where the sum is 0, rstd is taken as 0, so that y is 0.
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
    B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    y = _core.rms_norm(x, weight, None, axis, eps, out)
    if y is None:
        return cast(Array, _slow_path.forward("rms_norm", x, weight, None, axis, eps, out, cache=False))
    return y


def rms_norm_forward(
    x: Any, weight: Any = None, *, axis: int = -1, eps: float = 1e-5, out: Any = None
) -> tuple[Array, _core.NormCache]:
    """`rms_norm` that also returns what `rms_norm_backward` needs.

    Parameters
    ----------
    x : array_like
        Shape (..., *normalised), float32 or float64, any strides.
    weight : array_like, optional
        Shape x.shape[axis:], of x's dtype; None stands for 1.
    axis : int, default -1
        The first normalised axis.
    eps : float, default 1e-5
        Added to the variance (here the mean square), >= 0. Where the sum is 0, rstd is taken as 0, so that y is 0.
    out : ndarray, optional
        Where to write y: x's shape and dtype, any strides; must not overlap x, which the cache keeps.

    Returns
    -------
    y : ndarray
        As from `rms_norm`.
    cache : NormCache
        Read-only: x, weight, mean, rstd and the settings of the call.
        mean is None; rstd is float64, one per sample.

    Raises
    ------
    TypeError
        An array is not of float32 or float64 in native byte order, a parameter's dtype is not x's, or a number is not
        one.
    ValueError
        A shape, an axis, eps or out does not fit. Nothing has been written then.
    """
    result = _core.rms_norm_forward(x, weight, None, axis, eps, out)
    if result is None:
        return cast(
            "tuple[Array, _core.NormCache]", _slow_path.forward("rms_norm", x, weight, None, axis, eps, out, cache=True)
        )
    return result


def rms_norm_backward(dy: Any, cache: Any, *, out: Any = None) -> NormGrads:
    """Gradients of `rms_norm` with respect to its input and its parameters.

    With g = dy * weight and the mean over the normalised axes: dx = rstd * (g - xhat * mean(g * xhat)); dweight is the
    sum of dy * xhat over the samples.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y: the shape and dtype of x.
    cache : NormCache
        What `rms_norm_forward` returned. It is not changed, and x must not have been changed since.
    out : ndarray, optional
        Where to write dx; may be dy itself.

    Returns
    -------
    NormGrads
        (dx, dweight, dbias), in x's dtype; dweight is None where weight was None, dbias always.

    Raises
    ------
    TypeError
        dy's dtype is not x's, or cache is not a cache.
    ValueError
        dy's shape is not x's, cache is of another function, or out does not fit.
    """
    grads = _core.rms_norm_backward(dy, cache, out)
    if grads is None:
        return _slow_path.backward("rms_norm", dy, cache, out)
    return grads
