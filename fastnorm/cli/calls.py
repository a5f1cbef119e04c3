"""Calls of public functions with valid arguments, made from the function's name; `check` and `bench` share them.

Every argument depends on (name, shape, dtype, seed, options) alone: layouts and modules get the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Options = dict[str, Any]

# What carries the name of an operation: layer_norm of layer_norm_backward.
STEMS = (
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "moments",
    "dropout_mask",
    "apply_dropout_mask",
    "dropout_inference",
    "drop_connect",
    "gaussian_noise",
    "dropout",
)
_TRIPLES = tuple(s for s in STEMS if s.endswith("_norm") or s in ("dropout", "drop_connect"))

# Every public function that takes arrays and gives arrays.
FUNCTIONS = tuple(
    stem + suffix for stem in STEMS for suffix in (("", "_forward", "_backward") if stem in _TRIPLES else ("",))
)

SEED = 20_240_607


def stem_of(function: str) -> str:
    return function.removesuffix("_forward").removesuffix("_backward")


@dataclass(frozen=True)
class Arrays:
    """The arrays that a call may need; parameters are None where the operation has none or the options say so."""

    x: Array
    dy: Array
    residual: Array
    ds: Array
    keep: Array
    weight: Array | None
    bias: Array | None
    mean: Array | None
    var: Array | None

    def laid_out(self, layout: Callable[[Array], Array]) -> Arrays:
        """The same values with the arrays of x's shape placed in memory by `layout`."""
        moved = {name: layout(getattr(self, name)) for name in ("x", "dy", "residual", "ds", "keep")}
        return replace(self, **moved)


def make_arrays(
    function: str,
    shape: tuple[int, ...],
    dtype: Any,
    options: Options,
    *,
    offset: float = 0.5,
    spread: float = 1.0,
    seed: int = 0,
) -> Arrays:
    """Random arguments in C order; x and residual have the given mean and standard deviation."""
    rng = np.random.default_rng([seed, *shape])

    def normal(size: tuple[int, ...], center: float = 0.0, scale: float = 1.0) -> Array:
        return (center + scale * rng.standard_normal(size)).astype(dtype)

    stem = stem_of(function)
    parameters: tuple[int, ...] | None = None
    if stem.endswith(("layer_norm", "rms_norm")):
        parameters = shape[options.get("axis", -1) :]
    elif stem.endswith("_norm"):
        parameters = (shape[options.get("channel_axis", 1)],)
    has_weight = parameters is not None and options.get("weight", True)
    has_bias = parameters is not None and options.get("bias", True) and not stem.endswith("rms_norm")
    channels = parameters if stem == "batch_norm" else None
    return Arrays(
        x=normal(shape, offset, spread),
        dy=normal(shape, 0.25),
        residual=normal(shape, -offset, spread),
        ds=normal(shape, -0.25),
        keep=rng.random(shape) >= options.get("p", 0.3),
        weight=normal(parameters, 1.0, 0.3) if parameters is not None and has_weight else None,
        bias=normal(parameters, 0.0, 0.3) if parameters is not None and has_bias else None,
        mean=normal(channels, offset, spread / 4) if channels is not None else None,
        var=(spread**2 * (0.5 + rng.random(channels))).astype(dtype) if channels is not None else None,
    )


def bind(module: Any, function: str, arrays: Arrays, options: Options) -> Callable[..., Any]:
    """The function of `module` with these arguments, ready to be called; accepts `out=` where the function does.

    For a _backward the _forward has already run, and the call is the backward alone.
    """
    stem = stem_of(function)
    if function.endswith("_backward"):
        cache = bind(module, stem + "_forward", arrays, options)()[1]
        extra = {"ds": arrays.ds} if stem.startswith("dropout_add") and options.get("ds", True) else {}
        return partial(getattr(module, function), arrays.dy, cache, **extra)
    positional, named = _ARGUMENTS[stem](function, arrays, options)
    return partial(getattr(module, function), *positional, **named)


_Bound = tuple[tuple[Any, ...], dict[str, Any]]


def _given(options: Options, *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _rows(function: str, a: Arrays, options: Options) -> _Bound:
    parameters = {"weight": a.weight} if function.startswith("rms") else {"weight": a.weight, "bias": a.bias}
    return (a.x,), parameters | _given(options, "axis", "eps")


def _channels(function: str, a: Arrays, options: Options) -> _Bound:
    groups = (options["num_groups"],) if function.startswith("group") else ()
    return (a.x, *groups), {"weight": a.weight, "bias": a.bias} | _given(options, "channel_axis", "eps")


def _batch(function: str, a: Arrays, options: Options) -> _Bound:
    named = {"weight": a.weight, "bias": a.bias} | _given(options, "channel_axis", "eps")
    if not function.endswith("_forward"):
        return (a.x, a.mean, a.var), named
    if options.get("running", False):
        named |= {"running_mean": a.mean, "running_var": a.var}
    return (a.x,), named | _given(options, "training", "momentum")


def _dropped(function: str, a: Arrays, options: Options) -> _Bound:
    return (a.x, options.get("p", 0.3)), {"rng": SEED} | _given(options, "shared_axes", "scale")


def _mask(function: str, a: Arrays, options: Options) -> _Bound:
    return (a.x.shape, options.get("p", 0.3)), {"rng": SEED} | _given(options, "shared_axes")


def _connect(function: str, a: Arrays, options: Options) -> _Bound:
    return (a.x, options.get("p", 0.3)), {"rng": SEED}


def _residual(function: str, a: Arrays, options: Options) -> _Bound:
    parameters = {"weight": a.weight} if "rms" in function else {"weight": a.weight, "bias": a.bias}
    residual = a.residual if options.get("residual", True) else None
    return (a.x, residual), parameters | {"p": options.get("p", 0.3), "rng": SEED} | _given(options, "axis", "eps")


_ARGUMENTS: dict[str, Callable[[str, Arrays, Options], _Bound]] = {
    "layer_norm": _rows,
    "rms_norm": _rows,
    "group_norm": _channels,
    "instance_norm": _channels,
    "batch_norm": _batch,
    "moments": lambda function, a, options: ((a.x,), _given(options, "axis")),
    "dropout": _dropped,
    "dropout_mask": _mask,
    "apply_dropout_mask": lambda function, a, options: ((a.x, a.keep, options.get("p", 0.3)), {}),
    "dropout_inference": lambda function, a, options: ((a.x, options.get("p", 0.3)), {}),
    "drop_connect": _connect,
    "gaussian_noise": lambda function, a, options: ((a.x, options.get("std", 0.5)), {"rng": SEED}),
    "dropout_add_layer_norm": _residual,
    "dropout_add_rms_norm": _residual,
}
