"""Dropout, DropConnect and gaussian noise: names, checks and docstrings around the kernels.

Promises masks that are a pure function of (seed, offset, logical index) as docs/dropout.md specifies, and backwards
that draw them again: a cache holds numbers, nothing of x's size. Every check comes before the result is touched and
before the random stream moves. Refuses to draw without `rng`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from . import _check, _core, _philox, _verify
from ._philox import Philox, Rng
from ._results import Array

Scale = Literal["inverted", "classic"]
Mask = np.ndarray[Any, np.dtype[np.bool_]] | np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class DropoutCache:
    """What the backward needs: the numbers that the mask is a function of. Read-only.

    Attributes
    ----------
    function : str
        The forward that made it, "dropout" or "drop_connect".
    seed, offset : int
        Where its draws come from.
    p : float
        Probability of dropping.
    shape : tuple of int
    dtype : numpy.dtype
    shared_axes : tuple of int
        Axes that share one draw, not negative, ascending.
    scale : str
        "inverted" or "classic".
    """

    function: str
    seed: int
    offset: int
    p: float
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shared_axes: tuple[int, ...] = ()
    scale: Scale = "inverted"

    @property
    def keep_probability(self) -> float:
        """The probability of keeping that the generator realises: a multiple of 2^-32 within 2^-33 of 1 - p."""
        return round((1.0 - self.p) * 2.0**32) / 2.0**32


_core.set_dropout_cache_type(DropoutCache)  # what the compiled forward returns


def _scale(scale: Any) -> Scale:
    if not isinstance(scale, str):
        raise TypeError(f"scale is {scale!r} of type {type(scale).__name__}; expected 'inverted' or 'classic'")
    if scale == "inverted":
        return "inverted"
    if scale == "classic":
        return "classic"
    raise ValueError(f"scale is {scale!r}; expected 'inverted' or 'classic'")


def _probability(p: Any) -> float:
    return _check.number("p", p, 0.0, 1.0)


def _result(out: Any, found: Array | None, x: Array) -> tuple[Array, Array]:
    """The plain array to fill and the object to return, which is the caller's own `out` where there is one."""
    if found is not None:
        return found, out
    y = np.empty_like(x, order="K", subok=False)
    return y, y


def _checked(function: str, kernel: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The kernel's result, compared with the reference on the same public arguments while verification is on."""
    return _verify.run(function, kernel, args, kwargs) if _verify.active() else kernel()


def _forward(
    function: str, x: Any, p: Any, rng: Any, shared_axes: Any, scale: Any, out: Any, *, cached: bool
) -> tuple[Array, DropoutCache] | Array:
    name = "x" if function == "dropout" else "weight"
    x = _check.array(name, x)
    p = _probability(p)
    axes = _check.axes("shared_axes", shared_axes, x.ndim)
    scale = _scale(scale)
    _philox.require(rng)
    found = _check.output(out, x, in_place=None if cached else name, others={}, of=name)
    y, returned = _result(out, found, x)
    seed, offset = _philox.take(rng)
    cache = DropoutCache(function, seed, offset, p, x.shape, x.dtype, axes, scale)

    def kernel() -> tuple[Array, DropoutCache] | Array:
        _core.drop(y, x, p, seed, offset, axes, scale == "inverted")
        return (returned, cache) if cached else returned

    kwargs: dict[str, Any] = {"rng": Philox(seed, offset), "out": out}
    if function == "dropout":
        kwargs.update(shared_axes=axes, scale=scale)
    result: tuple[Array, DropoutCache] | Array = _checked(function + "_forward" * cached, kernel, (x, p), kwargs)
    return result


def _backward(function: str, dy: Any, cache: Any, out: Any) -> Array:
    _check.cache(cache, DropoutCache, function)
    name = "x" if function == "dropout" else "weight"
    dy = _check.same("dy", dy, cache.shape, cache.dtype, of=f"the forward's {name}")
    found = _check.output(out, dy, in_place="dy", others={}, of="dy")
    dx, returned = _result(out, found, dy)

    def kernel() -> Array:
        _core.drop(dx, dy, cache.p, cache.seed, cache.offset, cache.shared_axes, cache.scale == "inverted")
        return returned

    result: Array = _checked(f"{function}_backward", kernel, (dy, cache), {"out": out})
    return result


def dropout(
    x: Any,
    p: float = 0.5,
    *,
    rng: Rng,
    shared_axes: int | tuple[int, ...] = (),
    scale: Scale = "inverted",
    out: Array | None = None,
) -> Array:
    """Set each element of x to zero with probability p, and scale the others so that the mean stays.

    ``y = keep * x / P(keep)`` with ``scale="inverted"``, ``y = keep * x`` with ``scale="classic"``.

    Parameters
    ----------
    x : array of float32 or float64, any shape and strides
    p : float, 0 <= p <= 1
        The probability of dropping (not of keeping). p = 0 returns x's values unchanged, p = 1 zeros.
    rng : int, numpy.random.Generator or Philox
        A seed (offset 0); a generator, from which one 64-bit integer is drawn as the seed; or a stream, which this call
        advances by one. A call that fails advances nothing.
    shared_axes : int or tuple of int
        One draw is shared along these axes: (2, 3) drops whole channels of an (N, C, H, W) array.
    scale : "inverted" or "classic"
        "classic" leaves kept values as they are; `dropout_inference` is its counterpart at test time.
    out : array of x's shape and dtype, optional
        Filled and returned. May be x itself.

    Returns
    -------
    y : array of x's shape and dtype, in x's memory order
        Dropped elements are +0.0 whatever x holds there, NaN and Inf included.

    Raises
    ------
    TypeError
        x is not float32 or float64; rng is missing or of another type.
    ValueError
        p, a seed or an axis out of range, an axis repeated, an unknown scale, an `out` that does not fit.

    Notes
    -----
    The mask is a pure function of seed, offset and each element's index in C order: not of dtype, memory layout,
    threads, instruction set or platform. P(keep) is exactly K / 2^32 with K = round((1 - p) 2^32), and 2^32 / K,
    rounded once to x's dtype, is what kept values are multiplied by. The mapping is specified in docs/dropout.md.

    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural networks from
    overfitting", JMLR 15, 2014.
    """
    y = _core.dropout(x, p, rng, shared_axes, scale, out)
    if y is None:
        return cast(Array, _forward("dropout", x, p, rng, shared_axes, scale, out, cached=False))
    return y


def dropout_forward(
    x: Any,
    p: float = 0.5,
    *,
    rng: Rng,
    shared_axes: int | tuple[int, ...] = (),
    scale: Scale = "inverted",
    out: Array | None = None,
) -> tuple[Array, DropoutCache]:
    """`dropout`, and what its backward needs.

    Parameters
    ----------
    x, p, rng, shared_axes, scale :
        As in `dropout`.
    out : array of x's shape and dtype, optional
        Filled and returned; must not share memory with x.

    Returns
    -------
    y : array of x's shape and dtype, in x's memory order
    cache : DropoutCache
        Seed, offset and the other numbers that the mask follows from; nothing of x's size.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; `out` shares memory with x.
    """
    result = _core.dropout_forward(x, p, rng, shared_axes, scale, out, "dropout")
    if result is None:
        slow = _forward("dropout", x, p, rng, shared_axes, scale, out, cached=True)
        return cast("tuple[Array, DropoutCache]", slow)
    return cast("tuple[Array, DropoutCache]", result)


def dropout_backward(dy: Any, cache: DropoutCache, *, out: Array | None = None) -> Array:
    """The gradient of `dropout`: ``dx = keep * dy / P(keep)``, or ``keep * dy`` for classic scaling.

    The mask is drawn again.

    Parameters
    ----------
    dy : array of the forward's shape and dtype
        Any memory layout: the mask follows the logical index.
    cache : DropoutCache
        From `dropout_forward`.
    out : array of dy's shape and dtype, optional
        May be dy itself.

    Returns
    -------
    dx : array of dy's shape and dtype, in dy's memory order

    Raises
    ------
    TypeError, ValueError
        cache of another function; dy of another shape or dtype; an `out` that does not fit.
    """
    dx = _core.dropout_backward(dy, cache, out, "dropout")
    return _backward("dropout", dy, cache, out) if dx is None else dx


def dropout_mask(
    shape: int | Sequence[int] | Array,
    p: float = 0.5,
    *,
    rng: Rng,
    shared_axes: int | tuple[int, ...] = (),
    index_range: tuple[int, int] | None = None,
    packed: bool = False,
) -> Mask:
    """The mask that `dropout` applies to an array of this shape: True = kept.

    Parameters
    ----------
    shape : int, or sequence or array of int
    p, rng, shared_axes :
        As in `dropout`; the same arguments give the same mask.
    index_range : (start, stop), optional
        Only these elements of the flattened mask, ``dropout_mask(...).reshape(-1)[start:stop]``, computed without the
        others: a process can draw its part of a mask that would not fit in memory. 0 <= start <= stop <= size.

    packed : bool, default False
        One bit per element instead of one byte, in the order of `numpy.packbits`: the first element is the highest bit.

    Returns
    -------
    keep : bool array of `shape`, or of shape (stop - start,) with `index_range`
        With ``packed=True`` ``numpy.packbits`` of that: a uint8 array of ceil(n / 8) bytes, n being the number of
        elements, made without the bytes ever being there all at once; the last byte is filled up with zeros.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`; a negative extent; a range outside the mask; 2^63 elements or more.
    """
    try:
        # Arrays of any rank have __index__.
        one = hasattr(shape, "__index__") and getattr(shape, "ndim", 0) == 0
        given: tuple[Any, ...] = (shape,) if one else tuple(cast("Sequence[int]", shape))
    except TypeError as error:
        raise TypeError(
            f"shape is {shape!r} of type {type(shape).__name__}; expected an int or a sequence of int"
        ) from error
    extents = tuple(_check.integer("shape", n) for n in given)
    if any(n < 0 for n in extents) or len(extents) > _check.MAX_RANK:
        raise ValueError(f"shape is {shape!r}; expected at most {_check.MAX_RANK} extents, none of them negative")
    size = math.prod(extents)
    if math.prod(max(n, 1) for n in extents) >= 2**63:
        raise ValueError(f"shape is {shape!r}, {size} elements; expected fewer than 2**63")
    p = _probability(p)
    axes = _check.axes("shared_axes", shared_axes, len(extents))
    start, stop = 0, size
    if index_range is not None:
        try:
            start, stop = (_check.integer("index_range", n) for n in index_range)
        except (TypeError, ValueError) as error:
            raise TypeError(f"index_range is {index_range!r}; expected two integers (start, stop)") from error
        if not 0 <= start <= stop <= size:
            raise ValueError(
                f"index_range is {index_range!r}; expected 0 <= start <= stop <= {size}, the size of the mask"
            )
    if not isinstance(packed, (bool, np.bool_)):
        raise TypeError(f"packed is {packed!r} of type {type(packed).__name__}; expected True or False")
    _philox.require(rng)
    count = stop - start
    keep: Mask = np.empty(-(-count // 8), np.uint8) if packed else np.empty(count, np.bool_)
    seed, offset = _philox.take(rng)

    def kernel() -> Mask:
        _core.keep_mask(keep, extents, start, count, p, seed, offset, axes, bool(packed))
        return keep if packed or index_range is not None else keep.reshape(extents)

    kwargs = {"rng": Philox(seed, offset), "shared_axes": axes, "index_range": index_range, "packed": packed}
    result: Mask = _checked("dropout_mask", kernel, (extents, p), kwargs)
    return result


def apply_dropout_mask(x: Any, keep: Any, p: float, *, out: Array | None = None) -> Array:
    """Mask and scale with a mask of one's own: ``y = keep * x / P(keep)``, dropped elements +0.0.

    Parameters
    ----------
    x : array of float32 or float64
    keep : bool array of x's shape
        True = kept.
    p : float, 0 <= p <= 1
        The probability of dropping with which `keep` was made. The factor is the same as `dropout`'s, so that
        ``apply_dropout_mask(x, dropout_mask(x.shape, p, rng=seed), p)`` has the bits of ``dropout(x, p, rng=seed)``; it
        differs from ``1 / (1 - p)`` by a relative 2^-33 / (1 - p) at most. p = 1 gives zeros.
    out : array of x's shape and dtype, optional
        May be x itself. The gradient is this same function of dy.

    Returns
    -------
    y : array of x's shape and dtype, in x's memory order

    Raises
    ------
    TypeError
        x is not float32 or float64; keep is not bool.
    ValueError
        keep of another shape; p out of range; an `out` that does not fit.
    """
    x = _check.array("x", x)
    if keep is None:
        raise TypeError("keep is None; expected an array of bool, True = kept")
    mask = _check.as_ndarray("keep", keep)
    if mask.dtype != np.bool_:
        raise TypeError(f"keep has dtype {mask.dtype}; expected bool, True = kept: use keep.astype(bool)")
    if mask.shape != x.shape:
        raise ValueError(f"keep has shape {mask.shape}; expected {x.shape}, the shape of x")
    p = _probability(p)
    found = _check.output(out, x, in_place="x", others={"keep": mask})
    y, returned = _result(out, found, x)

    def kernel() -> Array:
        _core.apply_mask(y, x, mask, p)
        return returned

    result: Array = _checked("apply_dropout_mask", kernel, (x, mask, p), {"out": out})
    return result


def drop_connect(weight: Any, p: float, *, rng: Rng, out: Array | None = None) -> Array:
    """Dropout on the weights of a layer: each is set to zero with probability p, the others divided by P(keep).

    Parameters
    ----------
    weight : array of float32 or float64, any shape
    p, rng :
        As in `dropout`, of which this is the inverted form; the same mask for the same arguments.
    out : array of weight's shape and dtype, optional
        Filled and returned. May be weight itself.

    Returns
    -------
    y : array of weight's shape and dtype

    Raises
    ------
    TypeError, ValueError
        As in `dropout`.

    Notes
    -----
    Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect", ICML 2013.
    """
    y = _core.dropout(weight, p, rng, (), "inverted", out)
    if y is None:
        return cast(Array, _forward("drop_connect", weight, p, rng, (), "inverted", out, cached=False))
    return y


def drop_connect_forward(weight: Any, p: float, *, rng: Rng, out: Array | None = None) -> tuple[Array, DropoutCache]:
    """`drop_connect`, and what its backward needs.

    Parameters
    ----------
    weight, p, rng :
        As in `drop_connect`.
    out : array of weight's shape and dtype, optional
        Filled and returned; must not share memory with weight.

    Returns
    -------
    y : array of weight's shape and dtype, in weight's memory order
    cache : DropoutCache

    Raises
    ------
    TypeError, ValueError
        As `drop_connect`; `out` shares memory with weight.
    """
    result = _core.dropout_forward(weight, p, rng, (), "inverted", out, "drop_connect")
    if result is None:
        slow = _forward("drop_connect", weight, p, rng, (), "inverted", out, cached=True)
        return cast("tuple[Array, DropoutCache]", slow)
    return cast("tuple[Array, DropoutCache]", result)


def drop_connect_backward(dy: Any, cache: DropoutCache, *, out: Array | None = None) -> Array:
    """The gradient of `drop_connect`: ``dweight = keep * dy / P(keep)``.

    Parameters
    ----------
    dy : array of the forward's shape and dtype
        Gradient of the masked weight.
    cache : DropoutCache
        From `drop_connect_forward`.
    out : array of dy's shape and dtype, optional
        Filled and returned. May be dy itself.

    Returns
    -------
    dweight : array of dy's shape and dtype, in dy's memory order

    Raises
    ------
    TypeError, ValueError
        As `dropout_backward`.
    """
    dweight = _core.dropout_backward(dy, cache, out, "drop_connect")
    return _backward("drop_connect", dy, cache, out) if dweight is None else dweight


def gaussian_noise(x: Any, std: float, *, rng: Rng, out: Array | None = None) -> Array:
    """Add normal noise: ``y = x + std * z``, z independent standard normal for each element.

    Parameters
    ----------
    x : array of float32 or float64, any shape and strides
    std : float, finite, >= 0
        0 returns x's values unchanged.
    rng : int, numpy.random.Generator or Philox
        As in `dropout`. Noise and masks of the same seed and offset come from different parts of the generator.
    out : array of x's shape and dtype, optional
        May be x itself.

    Returns
    -------
    y : array of x's shape and dtype, in x's memory order
        x + std z computed in float64 and rounded to x's dtype. The gradient by x is dy itself.

    Raises
    ------
    TypeError
        x is not float32 or float64; rng is missing or of another type.
    ValueError
        std negative, infinite or NaN; a seed out of range; an `out` that does not fit.

    Notes
    -----
    Box and Muller's transform in float64 of 104 bits per pair of elements; |z| reaches 8.49. The bits are the same for
    every layout, thread count, instruction set and IEEE platform. Formulas in docs/dropout.md.

    Box, Muller, "A note on the generation of random normal deviates", Ann. Math. Stat. 29, 1958.
    """
    x = _check.array("x", x)
    std = _check.number("std", std, 0.0)
    if math.isinf(std):
        raise ValueError(f"std is {std!r}; expected a finite number")
    _philox.require(rng)
    found = _check.output(out, x, in_place="x", others={})
    y, returned = _result(out, found, x)
    seed, offset = _philox.take(rng)

    def kernel() -> Array:
        _core.gaussian_noise(y, x, std, seed, offset)
        return returned

    result: Array = _checked("gaussian_noise", kernel, (x, std), {"rng": Philox(seed, offset), "out": out})
    return result


def dropout_inference(x: Any, p: float, *, out: Array | None = None) -> Array:
    """The weight scaling rule, for nets trained with ``scale="classic"``: ``y = (1 - p) x``.

    Parameters
    ----------
    x : array of float32 or float64, any shape and strides
        Activations, or the weights that they are multiplied by.
    p : float, 0 <= p <= 1
        The probability of dropping during training. p = 1 gives zeros, whatever x holds.
    out : array of x's shape and dtype, optional
        May be x itself.

    Returns
    -------
    y : array of x's shape and dtype, in x's memory order
        x times 1 - p rounded to x's dtype.

    Raises
    ------
    TypeError, ValueError
        x is not float32 or float64; p out of range; an `out` that does not fit.

    Notes
    -----
    Hinton, Srivastava, Krizhevsky, Sutskever, Salakhutdinov, "Improving neural networks by preventing co-adaptation of
    feature detectors", 2012, arXiv:1207.0580.
    """
    x = _check.array("x", x)
    p = _probability(p)
    found = _check.output(out, x, in_place="x", others={})
    y, returned = _result(out, found, x)

    def kernel() -> Array:
        _core.weight_scaling(y, x, p)
        return returned

    result: Array = _checked("dropout_inference", kernel, (x, p), {"out": out})
    return result
