"""`python -m fastnorm check`: does this installation, on this machine, compute what fastnorm.reference says?

Walks every public function x dtype x memory layout x instruction-set level x thread count. Each result is held against
the exact value within the accuracy contract, and against the bits of the other levels and thread counts. Any miss, an
exception included, gives exit status 1. It judges values, not speed, and no error messages.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

import fastnorm
from fastnorm import _core, reference
from fastnorm.cli.calls import FUNCTIONS, Array, Options, bind, make_arrays, stem_of
from fastnorm.cli.screen import Screen, UsageError

DTYPES = ("float32", "float64")
_THREADS = (1, 2, 3)
_SHOWN_MISSES = 3  # of one function in one dtype: the first ones say what a hundred would


def _channels_last(a: Array) -> Array:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) if a.ndim > 2 else np.asfortranarray(a)


def _every_other(a: Array) -> Array:
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1] + 1), a.dtype)
    view = wide[..., 1::2]
    view[...] = a
    return view


def _reversed(a: Array) -> Array:
    backwards = (slice(None, None, -1),) * a.ndim
    return np.ascontiguousarray(a[backwards])[backwards]


def _unaligned(a: Array) -> Array:
    view = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "C order": np.ascontiguousarray,
    "channels last": _channels_last,
    "Fortran order": np.asfortranarray,
    "every other": _every_other,
    "negative strides": _reversed,
    "unaligned": _unaligned,
}


@dataclass(frozen=True)
class Trial:
    """Values and options for one call; `thorough` ones are left out by --quick."""

    shape: tuple[int, ...]
    options: Options = field(default_factory=dict)
    offset: float = 0.5
    spread: float = 1.0
    thorough: bool = False


# Odd sizes, sizes around the kernels' blocks (512, 2048), data far from zero, and one call large enough for threads.
_ROWS = (
    Trial((2, 3, 17)),
    Trial((5, 6, 31), {"axis": 1, "bias": False}, offset=-300.0),
    Trial((65, 1031), offset=1e4),
    Trial((3, 4099), {"weight": False, "bias": False}, spread=1e-3, thorough=True),
    Trial((2049,), {"weight": False}, thorough=True),
    Trial((7, 1), thorough=True),
    Trial((257, 769), thorough=True),
)
_IMAGES = (
    Trial((3, 6, 17)),
    Trial((4, 6, 9, 7), {"bias": False}, offset=-300.0),
    Trial((2, 5, 33, 12), {"channel_axis": -1}, offset=1e4),
    Trial((5, 4, 513), {"weight": False, "bias": False}, spread=1e-3, thorough=True),
    Trial((6, 3, 2, 3, 5), {"channel_axis": 0, "weight": False}, thorough=True),
    Trial((7, 6, 61, 67), thorough=True),
)
_FLAT = (Trial((33, 12)), Trial((2049, 6), {"weight": False}, offset=1e3, thorough=True))
_DROP = (
    Trial((3, 5, 17)),
    Trial((2, 3, 65), {"p": 1e-6}),
    Trial((300, 701), {"p": 0.5}, thorough=True),
    Trial((9, 7), {"p": 0.0}, thorough=True),
    Trial((9, 7), {"p": 1.0}, thorough=True),
)
_DROP_MORE = (
    Trial((4, 6, 5, 7), {"shared_axes": (2, 3)}),
    Trial((5, 129), {"scale": "classic", "p": 0.25}, thorough=True),
)
_RESIDUAL = (*_ROWS, Trial((4, 33), {"residual": False, "ds": False}), Trial((4, 33), {"p": 0.0}, thorough=True))


def trials(function: str) -> Iterator[Trial]:
    """What `check` calls a function with."""
    stem = stem_of(function)
    if stem.startswith("dropout_add"):
        yield from _RESIDUAL
    elif stem in ("layer_norm", "rms_norm"):
        yield from _ROWS
    elif stem == "moments":
        axes: tuple[Options, ...] = ({}, {"axis": -1}, {"axis": 0}, {"axis": (0, -1)})
        for trial, options in itertools.product(_IMAGES[:3] + _IMAGES[-1:], axes):
            yield Trial(trial.shape, options, trial.offset, trial.spread, trial.thorough)
    elif stem == "group_norm":
        for trial in (*_FLAT, *_IMAGES):
            channels = trial.shape[trial.options.get("channel_axis", 1)]
            groups = 3 if channels % 3 == 0 else 2 if channels % 2 == 0 else 1
            yield Trial(
                trial.shape, {**trial.options, "num_groups": groups}, trial.offset, trial.spread, trial.thorough
            )
    elif stem == "batch_norm":
        for trial in (*_FLAT, *_IMAGES):
            running = {"running": True} if function != "batch_norm" else {}
            yield Trial(trial.shape, trial.options | running, trial.offset, trial.spread, trial.thorough)
        if function != "batch_norm":
            yield Trial((4, 6, 9, 7), {"running": True, "training": False})
            yield Trial((4, 6, 9, 7), {}, thorough=True)
    elif stem == "instance_norm":
        yield from _IMAGES
    else:
        yield from _DROP
        if stem == "dropout":
            yield from _DROP_MORE
        elif stem == "dropout_mask":
            yield _DROP_MORE[0]


# ---------------------------------------------------------------------------------------------------------------------
# One call


@dataclass
class Summary:
    """What is known of one function in one dtype."""

    calls: int = 0
    # The result that came nearest to its limit: (share of the limit, error in u, limit in u, name of the result).
    worst: tuple[float, float, float, str] = (-1.0, 0.0, 0.0, "")
    same_on_levels: bool = True
    same_on_threads: bool = True
    messages: list[str] = field(default_factory=list)


def outputs(names: list[str], result: Any, arguments: dict[str, Any]) -> dict[str, Array]:
    """The arrays of a result under the names that the reference gives them; updated arguments count as results."""
    found: dict[str, Any] = {name: arguments[name] for name in names if name in arguments}
    if hasattr(result, "_asdict"):
        return {**found, **result._asdict()}
    if isinstance(result, tuple) and not isinstance(result[1], np.ndarray):
        result, cache = result
        cache = getattr(cache, "norm", cache)  # a residual step's holds the norm's
        found |= {name: getattr(cache, name) for name in names if getattr(cache, name, None) is not None}
    if isinstance(result, np.ndarray):
        result = (result,)
    if isinstance(result, tuple):
        rest = [name for name in names if name not in found]
        return found | dict(zip(rest, result, strict=False))
    return found | {name: getattr(result, name) for name in names}


def _fresh(call: Any) -> dict[str, Any]:
    """The arguments that the call would change, copied, so that every call starts from the same values."""
    return {name: call.keywords[name].copy() for name in ("running_mean", "running_var") if name in call.keywords}


def _takes_out(function: Callable[..., Any]) -> bool:
    return "out" in inspect.signature(function).parameters


def error_in_units(got: Any, exact: Any) -> tuple[float, tuple[int, ...]]:
    """The worst error of a result in u times its scale, and where; infinite where it should be exact and is not."""
    with np.errstate(all="ignore"):
        wide, value = (np.asarray(a).astype(np.longdouble) for a in (got, exact.value))
        error = np.abs(wide - value) / (exact.u * exact.scale)
    # Equal infinities and NaNs count as right, every other NaN as infinitely wrong.
    error = np.where((wide == value) | (np.isnan(wide) & np.isnan(value)), 0, error)
    error = np.where(np.isnan(error), np.inf, error)
    if exact.units == 0:  # to the last bit: the sign of a zero counts
        error = np.where(np.signbit(wide) != np.signbit(value), np.inf, error)
    if error.size == 0:
        return 0.0, ()
    where = np.unravel_index(int(np.argmax(error)), error.shape)
    return float(error[where]), tuple(map(int, where))


class _Expected(NamedTuple):
    """As the reference's exact values; with the defaults the kernels must give `value` to the last bit."""

    value: Array
    scale: Any = 0.0
    u: float = 0.0
    units: float = 0.0


def expected(function: str, call: Any) -> dict[str, Any]:
    """Value, scale and allowed error of each result, by name; None for a gradient that is not asked for."""
    arguments = {**call.keywords, **_fresh(call)}
    if function in reference._EXACT:
        exact: dict[str, Any] = reference._EXACT[function](*call.args, **arguments)
        only_y = function == stem_of(function) and "y" in exact
        return {name: value for name, value in exact.items() if name in ("y", "s") or not only_y}
    name = "dx" if function.endswith("_backward") else "y"
    found = outputs([name], getattr(reference, function)(*call.args, **arguments), arguments)
    return {name: _Expected(np.asarray(value)) for name, value in found.items()}


class Checker:
    """Runs the calls and keeps the summaries."""

    def __init__(self, levels: tuple[str, ...], threads: tuple[int, ...]) -> None:
        self.levels, self.threads = levels, threads
        self.summaries: dict[tuple[str, str], Summary] = {}

    @property
    def misses(self) -> int:
        return sum(len(summary.messages) for summary in self.summaries.values())

    def check(self, function: str, dtype: str, trial: Trial) -> None:
        """One function, dtype and trial: every layout, level and thread count."""
        summary = self.summaries.setdefault((function, dtype), Summary())
        arrays = make_arrays(function, trial.shape, dtype, trial.options, offset=trial.offset, spread=trial.spread)
        exact: dict[str, Any] | None = None
        for name, layout in LAYOUTS.items():
            what = f"{function}, {dtype}, shape {trial.shape}, {name}"
            what += "".join(f", {key}={value}" for key, value in trial.options.items())
            try:
                call = bind(fastnorm, function, arrays.laid_out(layout), trial.options)
                exact = expected(function, call) if exact is None else exact
                self._layout(summary, what, call, exact, layout)
            except Exception as error:  # a call that raises is a miss, and the walk goes on
                summary.messages.append(f"{what}: {type(error).__name__}: {error}")

    def _layout(
        self, summary: Summary, what: str, call: Any, exact: dict[str, Any], layout: Callable[[Array], Array]
    ) -> None:
        first: dict[str, Array] = {}
        for level in self.levels:
            _core.set_isa(level)
            on_level: dict[str, Array] = {}
            for threads in self.threads:
                fastnorm.set_num_threads(threads)
                got = self._call(summary, call, exact)
                place = f"{what}, {level}, {threads} threads"
                if not first:
                    first = got
                    self._judge(summary, place, got, exact)
                if not on_level:
                    on_level = got
                    if not _same(first, got):
                        summary.same_on_levels = False
                        summary.messages.append(f"{place}: other bits than {self.levels[0]}")
                        self._judge(summary, place, got, exact)
                elif not _same(on_level, got):
                    summary.same_on_threads = False
                    summary.messages.append(f"{place}: other bits than 1 thread")
                    self._judge(summary, place, got, exact)
        self._out(summary, what, call, exact, first, layout)

    def _call(self, summary: Summary, call: Any, exact: dict[str, Any], **more: Any) -> dict[str, Array]:
        changed = _fresh(call)
        summary.calls += 1
        return outputs(list(exact), call(**changed, **more), changed)

    def _out(
        self, summary: Summary, what: str, call: Any, exact: dict[str, Any], first: dict[str, Array],
        layout: Callable[[Array], Array],
    ) -> None:  # fmt: skip
        name = "dx" if "dx" in exact else "y"
        if name not in exact or not _takes_out(call.func):
            return
        out = layout(np.full_like(np.ascontiguousarray(first[name]), np.nan))
        got = self._call(summary, call, exact, out=out)
        if got[name] is not out:
            summary.messages.append(f"{what}, out=: another array came back")
        self._judge(summary, f"{what}, out=", got, exact)

    def _judge(self, summary: Summary, place: str, got: dict[str, Array], exact: dict[str, Any]) -> None:
        for name, value in exact.items():
            result = got.get(name)
            if value is None:
                if result is not None:
                    summary.messages.append(f"{place}: {name}: got an array, expected None")
                continue
            if result is None or np.shape(result) != value.value.shape:
                shape = "nothing" if result is None else f"shape {np.shape(result)}"
                summary.messages.append(f"{place}: {name}: got {shape}, expected shape {value.value.shape}")
                continue
            error, where = error_in_units(result, value)
            limit = float(value.units)
            share = error / limit if limit else (0.0 if error == 0 else np.inf)
            summary.worst = max(summary.worst, (share, error, limit, name))
            if share > 1:
                summary.messages.append(
                    f"{place}: {name}{list(where)} is {np.asarray(result)[where]!s}, exact {value.value[where]!s}: "
                    f"{error:.3g} u, allowed {limit:g} u",
                )


def _same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return all(
        value is None if b[name] is None else np.asarray(value).tobytes() == np.asarray(b[name]).tobytes()
        for name, value in a.items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer shapes: a few seconds")
    parser.add_argument("--functions", default=None, help="comma-separated; default: all of them")


def run(options: argparse.Namespace, screen: Screen) -> int:
    functions = FUNCTIONS if options.functions is None else tuple(options.functions.split(","))
    for name in functions:
        if name not in FUNCTIONS:
            raise UsageError(f"--functions {name}: unknown; there are {', '.join(FUNCTIONS)}")
    work = [
        (function, dtype, trial)
        for function in functions
        for dtype in DTYPES
        for trial in trials(function)
        if not (options.quick and trial.thorough)
    ]
    checker = Checker(_core.isa_levels(), _THREADS)
    level, threads, start = _core.isa(), fastnorm.get_num_threads(), time.perf_counter()
    try:
        with screen.progress("check", len(work)) as advance:
            for function, dtype, trial in work:
                checker.check(function, dtype, trial)
                advance(f"{function} {dtype}" + (f"  {checker.misses} misses" if checker.misses else ""))
    finally:
        _core.set_isa(level)
        fastnorm.set_num_threads(threads)
    _show(checker, functions, screen)
    calls = sum(summary.calls for summary in checker.summaries.values())
    screen.line(f"{calls} calls in {time.perf_counter() - start:.0f} s")
    return 1 if checker.misses else 0


def _show(checker: Checker, functions: tuple[str, ...], screen: Screen) -> None:
    rows = []
    for function in functions:
        per_dtype = [checker.summaries[function, dtype] for dtype in DTYPES]
        rows.append([
            function,
            *(_worst(summary) for summary in per_dtype),
            "same" if all(summary.same_on_levels for summary in per_dtype) else "DIFFER",
            "same" if all(summary.same_on_threads for summary in per_dtype) else "DIFFER",
            str(sum(summary.calls for summary in per_dtype)),
            str(sum(len(summary.messages) for summary in per_dtype) or "-"),
        ])  # fmt: skip
    levels, threads = ", ".join(checker.levels), ", ".join(map(str, checker.threads))
    header = ["function", *(f"worst error, {dtype}" for dtype in DTYPES), "bits, levels", "threads", "calls", "misses"]
    screen.table(f"Levels {levels}; {threads} threads; {len(LAYOUTS)} layouts", header, rows)
    screen.line("errors in u (2^-24, 2^-53) of the result nearest to what the accuracy contract allows it")
    for summary in checker.summaries.values():
        for message in summary.messages[:_SHOWN_MISSES]:
            screen.line(f"MISS {message}")
        if len(summary.messages) > _SHOWN_MISSES:
            screen.line(f"     and {len(summary.messages) - _SHOWN_MISSES} more of this function and dtype")
    wrong = dict.fromkeys(function for (function, _), summary in checker.summaries.items() if summary.messages)
    screen.line(f"FAILED: {', '.join(wrong)}" if wrong else "All results are within the contract.")


def _worst(summary: Summary) -> str:
    _, error, limit, name = summary.worst
    if not name:
        return "-"
    if limit == 0 and error == 0:
        return "exact"
    return f"{error:.2f} of {limit:g} ({name})" if error < 1000 else f"{error:.1e} of {limit:g} ({name})"
