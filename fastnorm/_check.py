"""Every message a user can meet, and the only conversion policy.

The compiled functions accept the common call and decline everything else; what they declined comes here, to be
converted (lists, DLPack objects, array subclasses) or refused with the argument, what was received and what was
expected. Nothing is ever cast, and nothing is written before every check has passed.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from typing import Any

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
MAX_RANK = 32
_PACKAGE = os.path.dirname(__file__) + os.sep


def frames_of_the_package() -> int:
    """The `stacklevel` of a warning, in the function that calls this, to name the first line outside the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def as_ndarray(name: str, value: Any) -> np.ndarray[Any, Any]:
    """`value` as a plain ndarray, without a copy where it is an array of some kind."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be ignored; pass {name}.filled(value) or {name}.data"
        )
    if isinstance(value, np.ndarray):
        return value if type(value) is np.ndarray else value.view(np.ndarray)
    if value is None:
        raise TypeError(f"{name} is None; expected an array of float32 or float64")
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{name} of type {type(value).__name__} could not be taken through DLPack: {error}"
                + (f" ({name} has dtype {value.dtype})" if _about_dtype(error, value) else "")
            ) from error
    try:
        return np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{name} could not be read as an array ({error}); expected float32 or float64") from error


def _about_dtype(error: BaseException | None, value: Any) -> bool:
    """Is an error of `numpy.from_dlpack` about the dtype, which it does not name?"""
    return "dtype" in str(error).lower() and hasattr(value, "dtype")


def conversion(name: str, value: Any, dtype: str) -> str:
    """The call that converts: a list has no astype."""
    return f"{name}.astype({dtype})" if hasattr(value, "astype") else f"np.asarray({name}, dtype={dtype})"


def array(name: str, value: Any, like: np.dtype[Any] | None = None) -> np.ndarray[Any, Any]:
    """`value` as an ndarray of float32 or float64 in native byte order; `like`: the dtype that is wanted in the end."""
    try:
        found = as_ndarray(name, value)
    except TypeError as error:
        if not _about_dtype(error.__cause__, value):
            raise
        call = "float()" if hasattr(value, "float") else "astype('float32')"
        raise TypeError(f"{error}; expected float32 or float64: use {name}.{call}") from error.__cause__
    dtype = found.dtype
    if dtype not in FLOATS:
        want, to = "float32 or float64", "np.float64" if dtype.kind not in "biu" else "np.float32"
        # A byte-swapped dtype compares unequal to the native one, and float16 waits for kernels of its own.
        if dtype.newbyteorder("=") in FLOATS:
            want, to = "native byte order", f"{name}.dtype.newbyteorder('=')"
        elif dtype == np.dtype(np.float16) or dtype.name == "bfloat16":
            want, to = "float32 or float64 (half precision is not supported yet)", "np.float32"
        elif dtype.kind == "c":
            raise TypeError(
                f"{name} has dtype {dtype}; expected real numbers of float32 or float64: use "
                f"np.asarray({name}).real.astype(np.{like or 'float64'}), or both parts"
            )
        if like is not None and to.startswith("np."):
            to = f"np.{like}"
        raise TypeError(
            f"{name} has dtype {dtype.str if dtype.byteorder == '>' else dtype}; expected {want}: "
            f"use {conversion(name, value, to)}"
        )
    if found.ndim > MAX_RANK:
        raise ValueError(f"{name} has {found.ndim} axes; expected at most {MAX_RANK}")
    return found


def same(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], of: str = "x") -> np.ndarray[Any, Any]:
    """An array that must have exactly the shape and dtype of another (dy of x's)."""
    found = array(name, value, dtype)
    if found.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {found.dtype}; expected {dtype}, the dtype of {of}: "
            f"use {conversion(name, value, f'np.{dtype}')}"
        )
    if found.shape != shape:
        raise ValueError(f"{name} has shape {_shape(found.shape)}; expected {_shape(shape)}, the shape of {of}")
    return found


def parameter(
    name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], meaning: str
) -> np.ndarray[Any, Any] | None:
    """An optional weight or bias; `meaning` says where the expected shape comes from."""
    if value is None:
        return None
    found = array(name, value, dtype)
    if found.shape != shape:
        raise ValueError(f"{name} has shape {_shape(found.shape)}; expected {_shape(shape)}, {meaning}")
    if found.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {found.dtype}; expected {dtype}, the dtype of x: "
            f"use {conversion(name, value, f'np.{dtype}')}"
        )
    return found


def channels(name: str, value: Any, size: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Statistics per channel: x's dtype or, kept more precisely, float64."""
    found = array(name, value, dtype)
    if found.dtype not in (dtype, np.dtype(np.float64)):
        either = "" if dtype == np.float64 else ", or float64"
        raise TypeError(
            f"{name} has dtype {found.dtype}; expected {dtype}, the dtype of x{either}: "
            f"use {conversion(name, value, f'np.{dtype}')}"
        )
    if found.shape != (size,):
        raise ValueError(f"{name} has shape {_shape(found.shape)}; expected ({size},), one value per channel")
    return found


def float_dtype(name: str, value: Any) -> np.dtype[Any]:
    """float32 or float64, from whatever NumPy takes for a dtype."""
    try:
        found: np.dtype[Any] = np.dtype(value)
    except (TypeError, ValueError, SyntaxError) as error:  # the last of text that nearly is one
        raise TypeError(f"{name} is {value!r}; expected np.float32 or np.float64") from error
    if value is None or found not in FLOATS:
        shown = None if value is None else found.str if found.byteorder == ">" else found
        raise TypeError(f"{name} is {shown}; expected np.float32 or np.float64")
    return found


def variance(name: str, value: np.ndarray[Any, Any]) -> None:
    if bool(np.any(value < 0)):
        raise ValueError(f"{name} holds {float(np.nanmin(value))!r}; expected variances >= 0")


def writeable(name: str, value: Any, found: np.ndarray[Any, Any]) -> None:
    """An array argument that the call updates in place."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a NumPy array, since it is updated in place")
    if not found.flags.writeable:
        raise ValueError(f"{name} is read-only; expected a writeable array, since it is updated in place")
    if _overlaps_itself(found):
        raise ValueError(f"{name} has elements that share memory (strides {found.strides}); expected separate elements")


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A real number in [low, high]; NaN is outside."""
    if isinstance(value, (bool, np.bool_, str, bytes, complex)) or value is None:
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected a real number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf if value > 0 else -math.inf
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected a real number") from error
    if not low <= found <= high:
        expected = f"{name} >= {low:g}" if high == math.inf else f"{low:g} <= {name} <= {high:g}"
        raise ValueError(f"{name} is {found if isinstance(value, int) else value!r}; expected {expected}")
    return found


def integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected an integer") from error


def axis(name: str, value: Any, rank: int) -> int:
    """A non-negative axis number."""
    found = integer(name, value)
    if not -rank <= found < rank:
        raise ValueError(f"{name} is {found}; expected {-rank} <= {name} < {rank} for an array of {rank} axes")
    return found % rank


def axes(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """Non-negative axis numbers, in order, from one axis or a tuple of them."""
    try:
        given = (value,) if isinstance(value, str) else tuple(value)
    except TypeError:
        given = (value,)
    try:
        given = tuple(integer(name, a) for a in given)
    except TypeError as error:
        raise TypeError(f"{name} is {value!r}; expected an axis or a tuple of axes (integers)") from error
    if not all(-rank <= a < rank for a in given):
        raise ValueError(f"{name} is {value!r}; expected {-rank} <= axis < {rank} for an array of {rank} axes")
    found = tuple(sorted(int(a) % rank for a in given))
    if len(set(found)) != len(found):
        raise ValueError(f"{name} is {value!r}; expected every axis at most once")
    return found


def _axes(count: int) -> str:
    return f"{count} axis" if count == 1 else f"{count} axes"


def rank(name: str, found: np.ndarray[Any, Any], least: int) -> None:
    if found.ndim < least:
        raise ValueError(
            f"{name} has shape {_shape(found.shape)} ({_axes(found.ndim)}); expected at least {_axes(least)}"
        )


def _overlaps_itself(found: np.ndarray[Any, Any]) -> bool:
    if found.size == 0:
        return False  # numpy gives such an array any strides
    extent = found.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(found.strides, found.shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False


def same_view(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.ctypes.data == b.ctypes.data


def shares(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Do two arrays share memory? Where that is too hard to tell, yes."""
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except Exception:  # numpy.exceptions.TooHardError, and its own limits for odd strides
        return True


def output(
    out: Any,
    x: np.ndarray[Any, Any],
    *,
    in_place: str | None,
    others: dict[str, np.ndarray[Any, Any] | None],
    of: str = "x",
    name: str = "out",
) -> np.ndarray[Any, Any] | None:
    """`out` for a result of x's shape and dtype; None stays None.

    `in_place` names the array that out may be (the same view of it); it is "" where an overlap with x is for
    `others` to judge, and None where out must not touch x, because a cache keeps it.
    `others` are further arrays of the call, by name, with which out must not share memory.
    """
    if out is None:
        return None
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a {type(out).__name__}; expected a NumPy array of shape {_shape(x.shape)} and dtype {x.dtype}"
        )
    found = out if type(out) is np.ndarray else out.view(np.ndarray)
    if found.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {found.dtype}; expected {x.dtype}, the dtype of {of}")
    if found.shape != x.shape:
        raise ValueError(f"{name} has shape {_shape(found.shape)}; expected {_shape(x.shape)}, the shape of {of}")
    if not found.flags.writeable:
        raise ValueError(f"{name} is read-only; expected a writeable array")
    if _overlaps_itself(found):
        raise ValueError(f"{name} has elements that share memory (strides {found.strides}); expected separate elements")
    if in_place is None:
        if shares(found, x):
            raise ValueError(
                f"{name} shares memory with {of}; expected separate memory: a forward with a cache is never in place"
            )
    elif in_place and not same_view(found, x) and shares(found, x):
        raise ValueError(f"{name} overlaps {of} in part; expected {in_place} itself or separate memory")
    for other_name, other in others.items():
        if other is not None and shares(found, other):
            raise ValueError(f"{name} shares memory with {other_name}; expected separate memory")
    return found


def two_outputs(out: Any, names: str) -> tuple[Any, Any]:
    """`out` of a function with two results: an array for the first, or a tuple with an array or None for each."""
    if not isinstance(out, tuple):
        return out, None
    if len(out) != 2:
        raise ValueError(f"out is a tuple of {len(out)}; expected an array or a tuple of two, ({names})")
    return out


def updated_in_place(name: str, found: np.ndarray[Any, Any], others: dict[str, np.ndarray[Any, Any] | None]) -> None:
    """An array that the call updates must not share memory with any other of its arrays."""
    for other_name, other in others.items():
        if other is not None and other_name != name and shares(found, other):
            raise ValueError(
                f"{name} shares memory with {other_name}; expected separate memory, since {name} is updated in place"
            )


def cache(value: Any, kind: type, function: str) -> None:
    """A cache that `<function>_forward` returned."""
    source = getattr(value, "function", None)
    if isinstance(source, str) and source != function:
        raise ValueError(f"cache comes from {source}_forward; expected one from {function}_forward")
    if not isinstance(value, kind):
        received = "None" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"cache is {received}; expected the cache that {function}_forward returned")
