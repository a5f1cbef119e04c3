"""Verify mode: every call runs the kernel and `fastnorm.reference`, and compares all that the kernel wrote.

Promises to name the first thing a bug report needs: function, dtype, shape, worst index, both values, the error in u.
It is one switch for the whole process (the kernels' fast entries are shared by all threads): while any thread is inside
`verify`, calls of every thread are compared, in the mode of the ``with`` entered last. Refuses to repair results: on a
miss, what the kernel wrote stays as it is.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from . import _check, _core, reference
from ._results import Array, NormGrads
from .reference._norm import WIDE, Exact

__all__ = ["VerificationError", "VerificationWarning", "active", "run", "verify"]

R = TypeVar("R")


@dataclass
class Miss:
    """The worst element of one output that is further from the reference than the accuracy contract allows."""

    function: str
    output: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    index: tuple[int, ...]
    got: Any
    expected: Any
    error: float  # in u * scale
    bound: float  # in u * scale
    detail: str = ""

    def __str__(self) -> str:
        at = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        if self.detail:
            return f"{self.function}: {self.output}{at} of {self.dtype} {self.shape}: {self.detail}"
        return (
            f"{self.function}: {self.output}{at} of {self.dtype} {self.shape} is {self.got!r}, the reference gives "
            f"{self.expected!r}: off by {self.error:.4g} u, at most {self.bound:.4g} u allowed"
        )


class VerificationError(AssertionError):
    """A result was further from the reference than the accuracy contract allows. ``misses``: one for each output."""

    def __init__(self, misses: list[Miss]) -> None:
        super().__init__("; ".join(map(str, misses)))
        self.misses = misses


class VerificationWarning(UserWarning):
    """What `VerificationError` says, where ``mode="warn"`` asks for a warning."""


# ---------------------------------------------------------------------------------------------------------------------
# The switch

_MODES = ("raise", "warn")
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # a thread that held it does not exist in the child
_entered: list[list[str]] = []  # one [mode] for each `with` that is open, the last entered last


class _Inside(threading.local):
    """Is this thread inside the kernel of a call that is being compared? Its parts are compared as a part of it."""

    kernel = False


_inside = _Inside()


def _enter(mode: str) -> list[str]:
    token = [mode]
    with _lock:
        _entered.append(token)
        _core.set_verifying(True)
    return token


def _leave(token: list[str]) -> None:
    with _lock:
        # By identity: threads may leave in another order than they entered.
        _entered[:] = [other for other in _entered if other is not token]
        _core.set_verifying(bool(_entered))


@contextmanager
def _verifying(mode: str) -> Iterator[None]:
    token = _enter(mode)
    try:
        yield
    finally:
        _leave(token)


def verify(mode: str = "raise") -> AbstractContextManager[None]:
    """Compare every call inside the ``with`` block to `fastnorm.reference`.

    Parameters
    ----------
    mode : {"raise", "warn"}
        What a result beyond the accuracy contract does: raise `VerificationError` or issue a `VerificationWarning`.

    Raises
    ------
    ValueError
        For another mode.

    Notes
    -----
    Blocks may be nested; leaving one restores the state before it. The switch is the process's: calls of other threads
    are compared too while the block is open. Setting ``FASTNORM_VERIFY`` to ``1`` or ``warn`` in the environment
    compares every call of a program. The references need some 100 bytes and 100 ns for each value of x.

    Examples
    --------
    >>> with fastnorm.verify():
    ...     y = fastnorm.layer_norm(x)
    """
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}, expected 'raise' or 'warn'")
    return _verifying(mode)


def _enter_from_environment(environment: Mapping[str, str]) -> None:
    value = environment.get("FASTNORM_VERIFY", "")
    modes = {"": None, "0": None, "1": "raise", "warn": "warn"}
    if value not in modes:
        raise ValueError(f"FASTNORM_VERIFY is {value!r} in the environment, expected '1', 'warn' or '0'")
    mode = modes[value]
    if mode is not None:
        _enter(mode)


# ---------------------------------------------------------------------------------------------------------------------
# One call


def active() -> bool:
    """Is any thread inside `verify`, or FASTNORM_VERIFY set? Not so within a call that is being compared."""
    return bool(_entered) and not _inside.kernel


def run(function: str, kernel: Callable[[], R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """``kernel()``, compared to ``reference.<function>(*args, **kwargs)`` while verify mode is on.

    ``args`` and ``kwargs`` are those of the public function, checked and converted. The reference runs first and writes
    to nothing, so ``out=x``, ``out=dy`` and running statistics need no copies; a generator is copied, so that the call
    advances it once. Where ``kernel`` makes further calls, they are not compared on their own: that would cost the
    references twice, and an error would name a function that the caller never called.
    """
    if not active():
        return kernel()
    expected = _expected(function, args, kwargs)
    _inside.kernel = True
    try:
        result = kernel()
    finally:
        _inside.kernel = False
    got = _outputs(function, result)
    got |= {name: kwargs[name] for name in ("running_mean", "running_var") if kwargs.get(name) is not None}
    misses = [miss for name in got if (miss := _compare(function, name, got[name], expected.get(name)))]
    if misses:
        with _lock:
            mode = _entered[-1][0] if _entered else "raise"
        if mode == "raise":
            raise VerificationError(misses)
        warnings.warn(str(VerificationError(misses)), VerificationWarning, stacklevel=_check.frames_of_the_package())
    return result


def _expected(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Exact | None]:
    kwargs = {**kwargs, "rng": copy.deepcopy(kwargs["rng"])} if "rng" in kwargs else dict(kwargs)
    kwargs.pop("out", None)
    if function in reference._EXACT:
        return reference._EXACT[function](*args, **kwargs)
    outputs = _outputs(function, getattr(reference, function)(*args, **kwargs))
    return {name: None if a is None else _to_the_last_bit(a) for name, a in outputs.items()}


def _to_the_last_bit(a: Array) -> Exact:
    value = np.array(a).astype(WIDE)
    return Exact(value, np.zeros(value.shape, WIDE), 0.0, 0.0)


def _outputs(function: str, result: Any) -> dict[str, Array | None]:
    """Every array of a result by name: y or dx, the s of a residual step, gradients, the statistics of a cache."""
    result = getattr(result, "norm", result)  # the cache of a residual step holds the norm's
    if isinstance(result, np.ndarray | np.generic):
        return {"dx" if function.endswith("_backward") else "y": np.asarray(result)}
    if isinstance(result, tuple):
        if function.endswith("_backward"):
            return dict(zip(getattr(result, "_fields", NormGrads._fields), result, strict=True))
        first, second = result
        if isinstance(second, np.ndarray):
            return {"y": first, "s": second}
        return {**_outputs(function, first), **_outputs(function, second)}
    names = ("count", "mean", "m2") if hasattr(result, "m2") else ("mean", "rstd", "batch_var")
    found = {name: getattr(result, name, None) for name in names}
    return {name: np.asarray(a) for name, a in found.items() if a is not None}


def _compare(function: str, output: str, got: Array | None, exact: Exact | None) -> Miss | None:
    """The worst element beyond the contract, if there is one.

    Where the exact result is not finite, or too large for the dtype, anything that is not finite agrees with it.
    """
    if got is None or exact is None:
        if got is None and exact is None:
            return None
        detail = "is None, the reference is not" if got is None else "is an array, the reference gives None"
        return Miss(function, output, np.dtype(object), (), (), got, exact, np.inf, 0.0, detail)
    if got.shape != exact.value.shape:
        detail = f"the reference has shape {exact.value.shape}"
        return Miss(function, output, got.dtype, got.shape, (), None, None, np.inf, exact.units, detail)
    with np.errstate(all="ignore"):
        value = got.astype(WIDE)
        error = np.abs(value - exact.value)
        tolerance = exact.units * exact.u * exact.scale
        if got.dtype.kind == "f":
            tolerance = tolerance + exact.units * np.finfo(got.dtype).smallest_subnormal.astype(WIDE)
        within = error <= tolerance
        if exact.units == 0:  # of numbers that are equal, only zeros can have two signs
            within &= (value != 0) | (np.signbit(value) == np.signbit(exact.value))
        if within.all():
            return None
        rounded = exact.value.astype(got.dtype) if got.dtype.kind == "f" else exact.value
        wrong = ~within & (np.isfinite(rounded) | np.isfinite(value))
        if not wrong.any():
            return None
        # inf for what is infinite or NaN against the reference, or bound to agree to the last bit
        relative = np.where(wrong, np.where(np.isfinite(error), error / tolerance, np.inf), -1)
        relative = np.where(np.isnan(relative), np.inf, relative)
    worst = int(np.argmax(relative))
    index = tuple(int(i) for i in np.unravel_index(worst, got.shape))
    with np.errstate(over="ignore"):
        expected = exact.value[index].astype(got.dtype)
    return Miss(
        function,
        output,
        got.dtype,
        got.shape,
        index,
        got[index],
        expected,
        float(relative[index]) * exact.units if exact.units else np.inf,
        exact.units,
    )


_enter_from_environment(os.environ)
