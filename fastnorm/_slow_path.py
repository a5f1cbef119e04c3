"""The calls that the compiled functions declined: explained, converted, or checked against the reference.

One function per pass for all norms. Each makes every check of `_check`, then runs the same compiled function on clean
arguments, through `_verify` while verification is on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from . import _check, _core, _verify
from ._results import Array, NormGrads

_BY_ROW = ("layer_norm", "rms_norm")


def _run(
    function: str, args: tuple[Any, ...], out: Any, public: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
) -> Any:
    """Runs `_core.<function>`, checked; `public` gives the same call in the public signature, for the reference.

    The result is the caller's own `out`, where there is one: of a subclass (a memmap) the kernels saw a plain view.
    """

    def kernel() -> Any:
        result = getattr(_core, function)(*args, True)
        if result is None:
            raise RuntimeError(
                f"fastnorm.{function} was declined by its kernels after every check passed: please report this"
            )
        return result

    result = _verify.run(function, kernel, *public()) if _verify.active() else kernel()
    if out is None:
        return result
    if isinstance(result, NormGrads):
        return result._replace(dx=out)
    return (out, *result[1:]) if isinstance(result, tuple) else out


def parameters(function: str, x: Array, weight: Any, bias: Any, axis: int) -> tuple[Array | None, Array | None]:
    if function in _BY_ROW:
        shape, meaning = x.shape[axis:], "the shape of x from the first normalised axis on"
    else:
        shape, meaning = (x.shape[axis],), "one value per channel"
    return (
        _check.parameter("weight", weight, shape, x.dtype, meaning),
        _check.parameter("bias", bias, shape, x.dtype, meaning),
    )


def not_empty(function: str, x: Array, axis: int, training: bool = True) -> None:
    """Statistics of nothing, for a batch of something, do not exist."""
    if x.size > 0 or not training:
        return
    if function in _BY_ROW:
        batch, normalised = x.shape[:axis], x.shape[axis:]
    else:
        batch_axis = 1 if axis == 0 else 0
        over = (batch_axis,) if function == "group_norm" else (batch_axis, axis)
        batch = tuple(x.shape[i] for i in over)
        normalised = tuple(n for i, n in enumerate(x.shape) if i not in over)
    if 0 not in batch and 0 in normalised:
        raise ValueError(
            f"x has shape {x.shape}, with nothing to normalise in each set; expected a normalised extent of at least 1"
        )


def forward(
    function: str,
    x: Any,
    weight: Any,
    bias: Any,
    axis: Any,
    eps: Any,
    out: Any,
    *,
    cache: bool,
    num_groups: Any = None,
) -> Any:
    x = _check.array("x", x)
    by_row = function in _BY_ROW
    axis_name = "axis" if by_row else "channel_axis"
    _check.rank("x", x, 1 if by_row else 3 if function == "instance_norm" else 2)
    axis = _check.axis(axis_name, axis, x.ndim)
    groups: tuple[int, ...] = ()
    if function == "group_norm":
        count = _check.integer("num_groups", num_groups)
        if count < 1:
            raise ValueError(f"num_groups is {count}; expected at least 1")
        if x.ndim == _check.MAX_RANK:
            raise ValueError(f"x has {x.ndim} axes; expected at most {_check.MAX_RANK - 1} for group_norm")
        if x.shape[axis] == 0 and count >= 2**31:
            raise ValueError(f"num_groups is {count}; expected less than 2**31")
        if x.shape[axis] % count != 0:
            raise ValueError(f"num_groups is {count}; expected a divisor of the number of channels, {x.shape[axis]}")
        groups = (count,)
    weight, bias = parameters(function, x, weight, bias, axis)
    eps = _check.number("eps", eps, 0.0)
    not_empty(function, x, axis)
    target = _check.output(out, x, in_place=None if cache else "x", others={"weight": weight, "bias": bias})
    name = function + ("_forward" if cache else "")
    params = (weight,) if function == "rms_norm" else (weight, bias)
    return _run(
        name,
        (x, *groups, weight, bias, axis, eps, target),
        out,
        lambda: ((x, *groups, *params), {axis_name: axis, "eps": eps, "out": target}),
    )


def backward(function: str, dy: Any, cache: Any, out: Any) -> NormGrads:
    _check.cache(cache, _core.NormCache, function)
    if not cache.intact:
        raise ValueError(
            f"cache holds an x or parameter whose shape was changed after {function}_forward; expected both as then"
        )
    x = cache.x
    dy = _check.same("dy", dy, x.shape, x.dtype, of="the forward's x")
    target = _check.output(
        out, dy, in_place="dy", others={"the cache's x": x, "the cache's weight": cache.weight}, of="dy"
    )
    grads = _run(f"{function}_backward", (dy, cache, target), out, lambda: ((dy, cache), {"out": target}))
    return cast(NormGrads, grads)


def batch_norm(x: Any, mean: Any, var: Any, weight: Any, bias: Any, channel_axis: Any, eps: Any, out: Any) -> Any:
    x = _check.array("x", x)
    _check.rank("x", x, 2)
    axis = _check.axis("channel_axis", channel_axis, x.ndim)
    mean = _check.channels("mean", mean, x.shape[axis], x.dtype)
    var = _check.channels("var", var, x.shape[axis], x.dtype)
    _check.variance("var", var)
    weight, bias = parameters("batch_norm", x, weight, bias, axis)
    eps = _check.number("eps", eps, 0.0)
    target = _check.output(out, x, in_place="x", others={"weight": weight, "bias": bias, "mean": mean, "var": var})
    return _run(
        "batch_norm",
        (x, mean, var, weight, bias, axis, eps, target),
        out,
        lambda: ((x, mean, var, weight, bias), {"channel_axis": axis, "eps": eps, "out": target}),
    )


def batch_norm_forward(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    momentum: Any,
    channel_axis: Any,
    eps: Any,
    training: Any,
    out: Any,
) -> Any:
    x = _check.array("x", x)
    _check.rank("x", x, 2)
    axis = _check.axis("channel_axis", channel_axis, x.ndim)
    if not isinstance(training, (bool, np.bool_)):
        raise TypeError(f"training is {training!r} of type {type(training).__name__}; expected True or False")
    training = bool(training)
    weight, bias = parameters("batch_norm", x, weight, bias, axis)
    if momentum is not None:
        momentum = _check.number("momentum", momentum, 0.0, 1.0)
    eps = _check.number("eps", eps, 0.0)
    running: dict[str, Array | None] = {}
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        running[name] = None
        if value is not None:
            found = running[name] = _check.channels(name, value, x.shape[axis], x.dtype)
            if training:
                _check.writeable(name, value, found)
        elif not training:
            raise ValueError(
                f"{name} is None; expected an array of one value per channel, since training=False reads it"
            )
    if training:
        count = x.size // x.shape[axis] if x.shape[axis] else 0
        if count == 1:
            raise ValueError(
                f"x has shape {x.shape}, one value per channel, whose variance is always 0; expected at least 2 values "
                "per channel in training: use a larger batch, or training=False with running statistics"
            )
        for name, updated in running.items():
            if updated is not None:
                _check.updated_in_place(name, updated, {**running, "x": x, "weight": weight, "bias": bias})
    elif running["running_var"] is not None:
        _check.variance("running_var", running["running_var"])
    not_empty("batch_norm", x, axis, training)
    target = _check.output(out, x, in_place=None, others={"weight": weight, "bias": bias, **running})
    return _run(
        "batch_norm_forward",
        (x, weight, bias, running["running_mean"], running["running_var"], momentum, axis, eps, training, target),
        out,
        lambda: (
            (x, weight, bias),
            {**running, "momentum": momentum, "channel_axis": axis, "eps": eps, "training": training, "out": target},
        ),
    )
