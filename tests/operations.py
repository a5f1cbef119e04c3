"""Every public array function with a maker of valid arguments: the one list that the system tests walk.

Adding a function to fastnorm means adding its line to OPERATIONS here; threads, instruction sets, guard pages, overlaps
and errors are then tested without another edit (test_codebase.py fails while the line is missing).
It refuses to judge results: tolerances and references live in the tests of the operations.

    call = OPERATIONS["layer_norm_backward"].make(fn, (3, 5, 17), np.float64, layout=LAYOUTS["sliced"], axis=1)
    call()                  # what the function returns
    call(eps=1e-3)          # the same call with an argument changed or added
    call.run()              # {"dx": ..., "dweight": ..., "dbias": ...}: every array that the call produced or updated
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# A layout puts the values of an array somewhere else in memory: same shape, same dtype, same values.
Layout = Callable[[np.ndarray], np.ndarray]


def _fortran(a: np.ndarray) -> np.ndarray:
    return np.asfortranarray(a)


def _channels_last(a: np.ndarray) -> np.ndarray:
    if a.ndim < 3:
        return np.ascontiguousarray(a)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)


def _sliced(a: np.ndarray) -> np.ndarray:
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1] + 1), np.nan, a.dtype) if a.ndim else np.empty((), a.dtype)
    view = wide[..., 1::2][..., : a.shape[-1]] if a.ndim else wide
    view[...] = a
    return view


def _padded_rows(a: np.ndarray) -> np.ndarray:
    wide = np.full((*a.shape[:-1], a.shape[-1] + 3), np.nan, a.dtype) if a.ndim else np.empty((), a.dtype)
    view = wide[..., 1:-2] if a.ndim else wide
    view[...] = a
    return view


def _reversed(a: np.ndarray) -> np.ndarray:
    every = (slice(None, None, -1),) * a.ndim
    return np.ascontiguousarray(a[every])[every]


def _unaligned(a: np.ndarray) -> np.ndarray:
    memory = np.empty(a.nbytes + 1, np.uint8)
    view = memory[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


LAYOUTS: dict[str, Layout] = {
    "contiguous": np.ascontiguousarray,
    "fortran": _fortran,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "padded_rows": _padded_rows,
    "reversed": _reversed,
    "unaligned": _unaligned,
}


def results(value: Any, name: str = "y") -> dict[str, np.ndarray]:
    """Every array that a function returned, by name; a cache contributes its statistics, None nothing."""
    if value is None:
        return {}
    if isinstance(value, np.ndarray | np.generic):
        return {name: np.asarray(value)}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None) or [name if i == 0 else f"{name}{i}" for i in range(len(value))]
        found: dict[str, np.ndarray] = {}
        for field_name, item in zip(names, value, strict=True):
            found |= results(item, field_name)
        return found
    statistics = {s: getattr(value, s, None) for s in ("mean", "rstd", "batch_var", "m2")}
    return {s: np.asarray(a) for s, a in statistics.items() if a is not None}


@dataclass(frozen=True)
class Call:
    """A function with valid arguments, all passed by name."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    main: str  # the argument that decides the shape of the result: "x", "dy", "weight" or "shape"
    updated: tuple[str, ...] = ()  # arguments that the function writes to

    def __call__(self, **changes: Any) -> Any:
        return self.function(**{**self.arguments, **changes})

    def run(self, **changes: Any) -> dict[str, np.ndarray]:
        """Arrays produced and arguments updated; repeatable, because the updated arguments are copied first."""
        copies = {name: self.arguments[name].copy() for name in self.updated if self.arguments.get(name) is not None}
        return results(self(**{**copies, **changes})) | copies

    def empty_out(self) -> np.ndarray:
        """An array that fits ``out=``, filled with NaN (True for masks) so that what is not written shows."""
        like = self.arguments[self.main]
        return np.full(like.shape, np.nan, like.dtype)


@dataclass(frozen=True)
class Inputs:
    """Source of the arrays of one call: seeded values, then laid out in memory."""

    module: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    layout: Layout
    options: dict[str, Any]
    rng: np.random.Generator

    def array(self, shape: tuple[int, ...] | None = None, center: float = 0.0, spread: float = 1.0) -> np.ndarray:
        shape = self.shape if shape is None else shape
        return self.layout((center + spread * self.rng.standard_normal(shape)).astype(self.dtype))

    def x(self) -> np.ndarray:
        return self.option("x", lambda: self.array(center=1.5, spread=2.0))

    def option(self, name: str, default: Any) -> Any:
        if name in self.options:
            return self.options[name]
        return default() if callable(default) else default

    def given(self, *names: str) -> dict[str, Any]:
        return {name: self.options[name] for name in names if name in self.options}


Maker = Callable[[Inputs, str], Call]


@dataclass(frozen=True)
class Operation:
    """One public function. ``make`` takes any of its arguments as an option, and derives the others."""

    name: str
    maker: Maker
    min_rank: int = 1
    out: bool = True  # has an out= argument
    in_place: str | None = None  # the argument that may be given as out=
    variants: tuple[dict[str, Any], ...] = field(default=({},))  # options under which the function takes another path

    def make(
        self,
        module: Any,
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        *,
        layout: Layout = np.ascontiguousarray,
        seed: int = 0,
        **options: Any,
    ) -> Call:
        rng = np.random.default_rng([seed, *shape])
        return self.maker(Inputs(module, shape, np.dtype(dtype), layout, options, rng), self.name)


def _row_parameters(inputs: Inputs, names: tuple[str, ...]) -> dict[str, Any]:
    shape = inputs.shape[inputs.option("axis", -1) :]
    return {n: inputs.option(n, lambda: inputs.array(shape, 0.5)) for n in names} | inputs.given("axis", "eps")


def _channel_parameters(inputs: Inputs, names: tuple[str, ...] = ("weight", "bias")) -> dict[str, Any]:
    shape = (inputs.shape[inputs.option("channel_axis", 1)],)
    return {n: inputs.option(n, lambda: inputs.array(shape, 0.5)) for n in names} | inputs.given("channel_axis", "eps")


def _layer_norm(inputs: Inputs, name: str) -> Call:
    arguments = {"x": inputs.x(), **_row_parameters(inputs, ("weight", "bias"))}
    return Call(getattr(inputs.module, name), arguments, "x")


def _rms_norm(inputs: Inputs, name: str) -> Call:
    return Call(getattr(inputs.module, name), {"x": inputs.x(), **_row_parameters(inputs, ("weight",))}, "x")


def _instance_norm(inputs: Inputs, name: str) -> Call:
    return Call(getattr(inputs.module, name), {"x": inputs.x(), **_channel_parameters(inputs)}, "x")


def _group_norm(inputs: Inputs, name: str) -> Call:
    channels = inputs.shape[inputs.option("channel_axis", 1)]
    num_groups = next((g for g in (2, 3, 5, 7) if channels % g == 0), 1)
    arguments = {"x": inputs.x(), "num_groups": inputs.option("num_groups", num_groups), **_channel_parameters(inputs)}
    return Call(getattr(inputs.module, name), arguments, "x")


def _statistics(inputs: Inputs, prefix: str) -> dict[str, Any]:
    shape = (inputs.shape[inputs.option("channel_axis", 1)],)
    mean, var = f"{prefix}mean", f"{prefix}var"
    return {
        mean: inputs.option(mean, lambda: inputs.array(shape, 1.5)),
        var: inputs.option(var, lambda: inputs.layout(np.abs(inputs.array(shape, 4.0)) + inputs.dtype.type(0.5))),
    }


def _batch_norm(inputs: Inputs, name: str) -> Call:
    arguments = {"x": inputs.x(), **_statistics(inputs, ""), **_channel_parameters(inputs)}
    return Call(getattr(inputs.module, name), arguments, "x")


def _batch_norm_forward(inputs: Inputs, name: str) -> Call:
    arguments = {"x": inputs.x(), **_channel_parameters(inputs), **_statistics(inputs, "running_")}
    arguments |= inputs.given("training", "momentum")
    return Call(getattr(inputs.module, name), arguments, "x", updated=("running_mean", "running_var"))


def _dropout(inputs: Inputs, name: str) -> Call:
    arguments = {"x": inputs.x(), "p": inputs.option("p", 0.3), "rng": inputs.option("rng", 20_240)}
    return Call(getattr(inputs.module, name), arguments | inputs.given("shared_axes", "scale"), "x")


def _dropout_mask(inputs: Inputs, name: str) -> Call:
    arguments = {"shape": inputs.shape, "p": inputs.option("p", 0.3), "rng": inputs.option("rng", 20_240)}
    return Call(getattr(inputs.module, name), arguments | inputs.given("shared_axes"), "shape")


def _apply_dropout_mask(inputs: Inputs, name: str) -> Call:
    keep = inputs.option("keep", lambda: inputs.layout(inputs.rng.random(inputs.shape) >= 0.3))
    return Call(getattr(inputs.module, name), {"x": inputs.x(), "keep": keep, "p": inputs.option("p", 0.3)}, "x")


def _drop_connect(inputs: Inputs, name: str) -> Call:
    weight = inputs.option("weight", lambda: inputs.array())
    arguments = {"weight": weight, "p": inputs.option("p", 0.3), "rng": inputs.option("rng", 20_240)}
    return Call(getattr(inputs.module, name), arguments, "weight")


def _gaussian_noise(inputs: Inputs, name: str) -> Call:
    arguments = {"x": inputs.x(), "std": inputs.option("std", 0.5), "rng": inputs.option("rng", 20_240)}
    return Call(getattr(inputs.module, name), arguments, "x")


def _dropout_inference(inputs: Inputs, name: str) -> Call:
    return Call(getattr(inputs.module, name), {"x": inputs.x(), "p": inputs.option("p", 0.3)}, "x")


def _dropout_add_norm(inputs: Inputs, name: str, parameters: tuple[str, ...]) -> Call:
    arguments = {
        "x": inputs.x(),
        "residual": inputs.option("residual", lambda: inputs.array(center=-0.5)),
        "p": inputs.option("p", 0.3),
        "rng": inputs.option("rng", 20_240),
        **_row_parameters(inputs, parameters),
    }
    return Call(getattr(inputs.module, name), arguments, "x")


def _dropout_add_layer_norm(inputs: Inputs, name: str) -> Call:
    return _dropout_add_norm(inputs, name, ("weight", "bias"))


def _dropout_add_rms_norm(inputs: Inputs, name: str) -> Call:
    return _dropout_add_norm(inputs, name, ("weight",))


def _moments(inputs: Inputs, name: str) -> Call:
    return Call(getattr(inputs.module, name), {"x": inputs.x(), **inputs.given("axis")}, "x")


def _backward(forward: Maker, *extra: str) -> Maker:
    """The maker of a _backward: runs the forward of the same module for the cache, and draws a random dy."""

    def maker(inputs: Inputs, name: str) -> Call:
        forward_name = name.removesuffix("_backward") + "_forward"
        _, cache = forward(inputs, forward_name)()
        arguments = {
            "dy": inputs.option("dy", lambda: inputs.array(center=0.25)),
            "cache": inputs.option("cache", cache),
        }
        arguments |= {name: inputs.option(name, lambda: inputs.array(center=-0.25)) for name in extra}
        return Call(getattr(inputs.module, name), arguments, "dy")

    return maker


_ROWS = ({}, {"axis": 0}, {"weight": None, "bias": None}, {"bias": None}, {"weight": None})
_RMS_ROWS = ({}, {"axis": 0}, {"weight": None})
_CHANNELS = (
    {},
    {"channel_axis": -1},
    {"channel_axis": 0},
    {"weight": None, "bias": None},
    {"bias": None},
    {"weight": None},
)
_BATCH = (*_CHANNELS, {"training": False}, {"running_mean": None, "running_var": None})
_DROPOUT = ({}, {"p": 0.0}, {"p": 1.0}, {"p": 1e-6}, {"shared_axes": (-1,)}, {"scale": "classic"})
_DROP_CONNECT = ({}, {"p": 0.0}, {"p": 1.0})
_FUSED = (*_ROWS, {"residual": None}, {"p": 0.0, "rng": None})
_FUSED_RMS = (*_RMS_ROWS, {"residual": None}, {"p": 0.0, "rng": None})


def _triple(
    stem: str,
    maker: Maker,
    variants: tuple[dict[str, Any], ...],
    *,
    min_rank: int = 1,
    forward: Maker | None = None,
    in_place: str = "x",
) -> list[Operation]:
    forward = forward or maker
    own = maker is forward
    plain = tuple(v for v in variants if own or not v.keys() & {"training", "running_mean"})
    return [
        Operation(stem, maker, min_rank, in_place=in_place, variants=plain),
        Operation(f"{stem}_forward", forward, min_rank, variants=variants),
        Operation(f"{stem}_backward", _backward(forward), min_rank, in_place="dy", variants=variants),
    ]


def _fused_triple(stem: str, maker: Maker, variants: tuple[dict[str, Any], ...]) -> list[Operation]:
    return [
        Operation(stem, maker, variants=variants),
        Operation(f"{stem}_forward", maker, variants=variants),
        Operation(f"{stem}_backward", _backward(maker, "ds"), out=False, variants=(*variants, {"ds": None})),
    ]


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in [
        *_triple("batch_norm", _batch_norm, _BATCH, min_rank=2, forward=_batch_norm_forward),
        *_triple("layer_norm", _layer_norm, _ROWS),
        *_triple("rms_norm", _rms_norm, _RMS_ROWS),
        *_triple("group_norm", _group_norm, _CHANNELS, min_rank=2),
        *_triple("instance_norm", _instance_norm, _CHANNELS, min_rank=3),
        Operation("moments", _moments, out=False, variants=({}, {"axis": 0}, {"axis": -1}, {"axis": (0, -1)})),
        *_triple("dropout", _dropout, _DROPOUT),
        Operation("dropout_mask", _dropout_mask, out=False, variants=_DROPOUT[:-1]),
        Operation("apply_dropout_mask", _apply_dropout_mask, in_place="x"),
        Operation("dropout_inference", _dropout_inference, in_place="x"),
        *_triple("drop_connect", _drop_connect, _DROP_CONNECT, in_place="weight"),
        Operation("gaussian_noise", _gaussian_noise, in_place="x"),
        *_fused_triple("dropout_add_layer_norm", _dropout_add_layer_norm, _FUSED),
        *_fused_triple("dropout_add_rms_norm", _dropout_add_rms_norm, _FUSED_RMS),
    ]
}
