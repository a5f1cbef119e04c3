"""The transformer's residual step: s = residual + dropout(x), y = norm(s), and its gradients.

Promises the bits of the separate calls `dropout`, `+` and `layer_norm` or `rms_norm`: where arrays lie in one piece
they are done in one pass over memory, elsewhere one after the other. Every check comes before the random stream moves.
Refuses `rng=None` unless p is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _check, _core, _philox, _slow_path, _verify
from ._dropout import DropoutCache, dropout, dropout_backward, dropout_forward
from ._layer_norm import layer_norm, layer_norm_backward, layer_norm_forward
from ._philox import Philox, Rng
from ._results import Array
from ._rms_norm import rms_norm, rms_norm_backward, rms_norm_forward


@dataclass(frozen=True, slots=True)
class DropoutAddNormCache:
    """What the backward needs. Read-only.

    Attributes
    ----------
    function : str
        The forward that made it, "dropout_add_layer_norm" or "dropout_add_rms_norm".
    norm : NormCache
        The norm's own cache; its x is s, which must stay as it is until the backward.
    dropout : DropoutCache or None
        None where p was 0.
    has_residual : bool
    """

    function: str
    norm: _core.NormCache
    dropout: DropoutCache | None
    has_residual: bool

    @property
    def s(self) -> Array:
        return self.norm.x


class DropoutAddNormGrads(NamedTuple):
    """Gradients of a dropout-add-norm step; None where the argument was None."""

    dx: Array
    dresidual: Array | None
    dweight: Array | None
    dbias: Array | None


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "layer_norm_forward": layer_norm_forward,
    "rms_norm": rms_norm,
    "rms_norm_forward": rms_norm_forward,
}


def _forward(
    norm: str,
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    p: Any,
    rng: Any,
    axis: Any,
    eps: Any,
    out: Any,
    *,
    cached: bool,
) -> Any:
    """The pass of the common call, or every check and then `_step`, compared with the reference while that is on."""
    fused = _core.dropout_add_norm(norm == "rms_norm", x, residual, weight, bias, p, rng, axis, eps, out, cached)
    if fused is not None:
        if not cached:
            return fused
        y, s, norm_cache, seed, offset = fused
        dropped = None
        if p > 0.0:
            dropped = DropoutCache("dropout", seed, offset, float(p), x.shape, x.dtype, (), "inverted")
        return (y, s), DropoutAddNormCache(f"dropout_add_{norm}", norm_cache, dropped, residual is not None)
    x = _check.array("x", x)
    _check.rank("x", x, 1)
    if residual is not None:
        residual = _check.same("residual", residual, x.shape, x.dtype)
    axis = _check.axis("axis", axis, x.ndim)
    weight, bias = _slow_path.parameters(norm, x, weight, bias, axis)
    p = _check.number("p", p, 0.0, 1.0)
    eps = _check.number("eps", eps, 0.0)
    _slow_path.not_empty(norm, x, axis)
    if rng is not None:
        _philox.require(rng)
    elif p > 0.0:
        raise TypeError(
            f"rng is None; expected an int seed, a numpy.random.Generator or a fastnorm.Philox stream, since p is {p}"
        )
    out = _results(out, x, residual, {"weight": weight, "bias": bias}, cached)

    stream = None if rng is None else Philox(*_philox.take(rng))
    if not _verify.active():
        return _step(norm, x, residual, weight, bias, p, stream, axis, eps, out, cached)
    # The reference draws from a copy of the stream, which is this call's own: the caller's has moved on once.
    return _verify.run(
        f"dropout_add_{norm}" + "_forward" * cached,
        lambda: _step(norm, x, residual, weight, bias, p, stream, axis, eps, out, cached),
        (x, residual, weight) if norm == "rms_norm" else (x, residual, weight, bias),
        {"p": p, "rng": stream, "axis": axis, "eps": eps, "out": out},
    )


def _results(
    out: Any, x: Array, residual: Array | None, parameters: dict[str, Array | None], cached: bool
) -> tuple[Any, Any]:
    """The caller's arrays for y and s, checked; None where there is none."""
    y, s = _check.two_outputs(out, "y, s")
    names = ("out[0]", "out[1]") if isinstance(out, tuple) else ("out", "")
    in_place = None if cached else "x"
    found = _check.output(y, x, in_place=in_place, others={"residual": residual, **parameters}, name=names[0])
    # s may be the residual: each of its values is read before it is written.
    of_s = _check.output(s, x, in_place=in_place, others={"out[0]": found, **parameters}, name=names[1])
    if of_s is not None and residual is not None and not _check.same_view(of_s, residual):
        _check.output(s, x, in_place=in_place, others={"residual": residual}, name=names[1])
    return y, s


def _step(
    norm: str,
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    p: float,
    stream: Philox | None,
    axis: int,
    eps: float,
    out: tuple[Any, Any],
    cached: bool,
) -> tuple[Array, Array] | tuple[tuple[Array, Array], DropoutAddNormCache]:
    """The public function's result, of arguments that are checked."""
    out_y, out_s = out
    s = np.empty_like(x, order="K", subok=False) if out_s is None else out_s.view(np.ndarray)
    # Where s is one of the arrays that it is the sum of, the other is made first.
    in_place = out_s is not None and (
        np.may_share_memory(s, x) or (residual is not None and np.may_share_memory(s, residual))
    )
    term = np.empty_like(x, order="K", subok=False) if in_place else s
    dropped: DropoutCache | None = None
    if p == 0.0 or stream is None:
        np.copyto(term, x)
    elif cached:
        _, dropped = dropout_forward(x, p, rng=stream, out=term)
    else:
        dropout(x, p, rng=stream, out=term)
    if residual is not None:
        with np.errstate(all="ignore"):
            np.add(residual, term, out=s)
    elif in_place:
        np.copyto(s, term)

    normalise = _FUNCTIONS[norm + "_forward" * cached]
    parameters = (weight,) if norm == "rms_norm" else (weight, bias)
    result = normalise(s, *parameters, axis=axis, eps=eps, out=out_y)
    y = out_y if out_y is not None else result[0] if cached else result
    results = (y, s if out_s is None else out_s)
    if not cached:
        return results
    return results, DropoutAddNormCache(f"dropout_add_{norm}", result[1], dropped, residual is not None)


def _backward(norm: str, dy: Any, cache: Any, ds: Any, out: Any) -> DropoutAddNormGrads:
    function = f"dropout_add_{norm}"
    _check.cache(cache, DropoutAddNormCache, function)
    p, seed, offset = (0.0, 0, 0) if (d := cache.dropout) is None else (d.p, d.seed, d.offset)
    fused = _core.dropout_add_norm_backward(dy, cache.norm, ds, p, seed, offset, cache.has_residual, out)
    if fused is not None:
        return DropoutAddNormGrads(*fused)
    dy = _check.same("dy", dy, cache.s.shape, cache.s.dtype, of="the forward's x")
    if ds is not None:
        ds = _check.same("ds", ds, cache.s.shape, cache.s.dtype, of="the forward's s")
    out = _gradient_results(out, dy, cache, ds)
    if not _verify.active():
        return _gradients(norm, dy, cache, ds, out)
    kwargs = {"ds": ds, "out": out}
    return _verify.run(f"{function}_backward", lambda: _gradients(norm, dy, cache, ds, out), (dy, cache), kwargs)


def _gradient_results(out: Any, dy: Array, cache: DropoutAddNormCache, ds: Array | None) -> tuple[Any, Any]:
    """The caller's arrays for dx and dresidual, checked; None where there is none."""
    dx, dresidual = _check.two_outputs(out, "dx, dresidual")
    if dresidual is not None and not cache.has_residual:
        raise ValueError("out[1] is for dresidual; expected None, since the forward had no residual")
    names = ("out[0]", "out[1]") if isinstance(out, tuple) else ("out", "")
    read = {"the cache's s": cache.s, "the cache's weight": cache.norm.weight, "ds": ds}
    found = _check.output(dx, dy, in_place="dy", others=read, of="dy", name=names[0])
    others = {"dy": dy, "out[0]": found, **read}
    _check.output(dresidual, dy, in_place="", others=others, of="dy", name=names[1])
    return dx, dresidual


def _gradients(
    norm: str, dy: Array, cache: DropoutAddNormCache, ds: Array | None, out: tuple[Any, Any]
) -> DropoutAddNormGrads:
    """The backward's result, of arguments that are checked."""
    out_x, out_residual = out
    gradient = rms_norm_backward if norm == "rms_norm" else layer_norm_backward
    total, dweight, dbias = gradient(dy, cache.norm, out=out_residual if cache.has_residual else out_x)
    if ds is not None:
        with np.errstate(all="ignore"):
            np.add(total, ds, out=total)
    dx = out_x if cache.has_residual else total
    if cache.dropout is not None:
        dx = dropout_backward(total, cache.dropout, out=dx)
    elif cache.has_residual and dx is None:
        dx = total.copy(order="K")
    elif cache.has_residual:
        np.copyto(dx, total)
    return DropoutAddNormGrads(dx, total if cache.has_residual else None, dweight, dbias)


def dropout_add_layer_norm(
    x: Any,
    residual: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """The residual step of a transformer: ``s = residual + dropout(x, p)``, ``y = layer_norm(s, weight, bias)``.

    Parameters
    ----------
    x : array of float32 or float64, shape (..., *normalised)
    residual : array of x's shape and dtype, optional
        None: s = dropout(x).
    weight, bias : arrays of shape x.shape[axis:] and x's dtype, optional
        None stands for 1 and 0.
    p, rng :
        As in `dropout`. rng may be None, and is not needed, when p is 0.
    axis, eps :
        As in `layer_norm`.
    out : array of x's shape and dtype, or a tuple of two, optional
        Receives y, or y and s: ``out=(y, s)``, of which either may be None. y may be x itself, s may be x or residual;
        the two are separate. Where arrays do not lie in one piece, an s that is x or residual costs an array of x's
        size for the time of the call.

    Returns
    -------
    y, s : arrays of x's shape and dtype, in x's memory order
        New arrays, but for those given.

    Raises
    ------
    TypeError, ValueError
        As in `dropout` and `layer_norm`; residual of another shape or dtype; an out that shares memory with another
        array of the call than it may be. A failed call draws and writes nothing.

    Notes
    -----
    The bits are those of the separate calls. The pre-norm step is drawn in Vaswani et al., "Attention is all you need",
    NeurIPS 2017, with the residual inside the norm.
    """
    result: tuple[Array, Array] = _forward(
        "layer_norm", x, residual, weight, bias, p, rng, axis, eps, out, cached=False
    )
    return result


def dropout_add_layer_norm_forward(
    x: Any,
    residual: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[tuple[Array, Array], DropoutAddNormCache]:
    """`dropout_add_layer_norm`, and what its backward needs.

    Parameters
    ----------
    x, residual, weight, bias, p, rng, axis, eps :
        As in `dropout_add_layer_norm`.
    out : array of x's shape and dtype, or a tuple of two, optional
        Receives y, or y and s: ``out=(y, s)``, of which either may be None. Neither may share memory with x, nor y with
        residual; s may be residual itself.

    Returns
    -------
    (y, s) : arrays of x's shape and dtype, in x's memory order
    cache : DropoutAddNormCache
        Keeps s, which must not be changed before the backward, and the numbers that the mask follows from.

    Raises
    ------
    TypeError, ValueError
        As `dropout_add_layer_norm`; `out` shares memory with x.
    """
    result: tuple[tuple[Array, Array], DropoutAddNormCache] = _forward(
        "layer_norm", x, residual, weight, bias, p, rng, axis, eps, out, cached=True
    )
    return result


def dropout_add_layer_norm_backward(
    dy: Any, cache: DropoutAddNormCache, *, ds: Any = None, out: Any = None
) -> DropoutAddNormGrads:
    """Gradients of `dropout_add_layer_norm`.

    With g the layer norm's input gradient for dy, plus ds: ``dresidual = g``, ``dx = keep * g / P(keep)``.

    Parameters
    ----------
    dy : array of the forward's shape and dtype
        Gradient of y.
    cache : DropoutAddNormCache
    ds : array of the forward's shape and dtype, optional
        Gradient that reaches s by the other path (the next residual).
    out : array of dy's shape and dtype, or a tuple of two, optional
        Receives dx, or dx and dresidual: ``out=(dx, dresidual)``, of which either may be None, and the second has to be
        where the forward had no residual. dx may be dy itself; else neither shares memory with another array of the
        call or of the cache.

    Returns
    -------
    dx, dresidual, dweight, dbias : DropoutAddNormGrads
        None where the forward's argument was None.

    Raises
    ------
    TypeError, ValueError
        cache of another function; dy or ds of another shape or dtype; an out that cannot receive its gradient.
    """
    return _backward("layer_norm", dy, cache, ds, out)


def dropout_add_rms_norm(
    x: Any,
    residual: Any = None,
    weight: Any = None,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """The residual step with an RMS norm: ``s = residual + dropout(x, p)``, ``y = rms_norm(s, weight)``.

    Parameters
    ----------
    x, residual, p, rng, axis, eps, out :
        As in `dropout_add_layer_norm`.
    weight : array of shape x.shape[axis:] and x's dtype, optional
        None stands for 1.

    Returns
    -------
    y, s : arrays of x's shape and dtype, in x's memory order
        New arrays, but for those given.

    Raises
    ------
    TypeError, ValueError
        As `dropout_add_layer_norm`.
    """
    result: tuple[Array, Array] = _forward("rms_norm", x, residual, weight, None, p, rng, axis, eps, out, cached=False)
    return result


def dropout_add_rms_norm_forward(
    x: Any,
    residual: Any = None,
    weight: Any = None,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[tuple[Array, Array], DropoutAddNormCache]:
    """`dropout_add_rms_norm`, and what its backward needs.

    Parameters
    ----------
    x, residual, weight, p, rng, axis, eps :
        As in `dropout_add_rms_norm`.
    out : array of x's shape and dtype, or a tuple of two, optional
        Receives y, or y and s: ``out=(y, s)``, of which either may be None. Neither may share memory with x, nor y with
        residual; s may be residual itself.

    Returns
    -------
    (y, s) : arrays of x's shape and dtype, in x's memory order
    cache : DropoutAddNormCache
        Keeps s, which must not be changed before the backward, and the numbers that the mask follows from.

    Raises
    ------
    TypeError, ValueError
        As `dropout_add_rms_norm`; `out` shares memory with x.
    """
    result: tuple[tuple[Array, Array], DropoutAddNormCache] = _forward(
        "rms_norm", x, residual, weight, None, p, rng, axis, eps, out, cached=True
    )
    return result


def dropout_add_rms_norm_backward(
    dy: Any, cache: DropoutAddNormCache, *, ds: Any = None, out: Any = None
) -> DropoutAddNormGrads:
    """Gradients of `dropout_add_rms_norm`.

    With g the RMS norm's input gradient for dy, plus ds: ``dresidual = g``, ``dx = keep * g / P(keep)``.

    Parameters
    ----------
    dy, ds, out :
        As in `dropout_add_layer_norm_backward`.
    cache : DropoutAddNormCache
        From `dropout_add_rms_norm_forward`.

    Returns
    -------
    dx, dresidual, dweight, dbias : DropoutAddNormGrads
        None where the forward's argument was None; dbias always is.

    Raises
    ------
    TypeError, ValueError
        As `dropout_add_layer_norm_backward`.
    """
    return _backward("rms_norm", dy, cache, ds, out)
