"""Where the draws of dropout and noise come from: a seed, a NumPy generator, or a `Philox` stream.

Promises that nothing global is read or changed, and that a stream moves on by exactly one for each call that succeeds.
Refuses seeds and offsets outside 64 bits, and anything that is not one of the three. The draws themselves are computed
by the kernels, from (seed, offset) alone: docs/dropout.md.
"""

from __future__ import annotations

import operator
from typing import Any, TypeAlias, Union

import numpy as np

from . import _core

_WORD = 2**64


def _word(name: str, value: Any, expected: str = "an integer") -> int:
    """An integer that fits in 64 bits, without a sign."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected {expected}")
    try:
        found = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected {expected}") from error
    if not 0 <= found < _WORD:
        raise ValueError(f"{name} is {found}; expected 0 <= {name} < 2**64")
    return found


class Philox:
    """A stream of independent masks: call number k of a stream draws with offset ``offset + k``.

    A stream is a pair of numbers and no more. Two streams with the same pair give the same masks; different seeds, or
    different offsets under one seed, give draws that have nothing in common.

    Parameters
    ----------
    seed : int
        0 <= seed < 2**64.
    offset : int, default 0
        0 <= offset < 2**64. After 2**64 - 1 comes 0.

    Attributes
    ----------
    seed : int
        As given; fixed.
    offset : int
        The offset that the next call draws with. Assign to it to repeat or to skip calls.

    Raises
    ------
    TypeError, ValueError
        seed or offset is no integer, or does not fit in 64 bits.

    Notes
    -----
    The generator is Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
    (SC 2011). A stream may be shared between threads: every call gets an offset of its own.

    Examples
    --------
    >>> import fastnorm as fn
    >>> rng = fn.Philox(seed=7)
    >>> first = fn.dropout_mask((2, 3), 0.5, rng=rng)
    >>> rng
    Philox(seed=7, offset=1)
    """

    __slots__ = ("_offset", "_seed")
    __hash__ = None  # type: ignore[assignment]  # equality follows the offset, which moves

    def __init__(self, seed: int, offset: int = 0) -> None:
        self._seed = _word("seed", seed)
        self._offset = _word("offset", offset)

    @property
    def seed(self) -> int:
        return self._seed

    @property
    def offset(self) -> int:
        return self._offset

    @offset.setter
    def offset(self, value: int) -> None:
        self._offset = _word("offset", value)

    def copy(self) -> Philox:
        """A stream of its own, at the same place."""
        return type(self)(self._seed, self._offset)

    def _take(self) -> tuple[int, int]:
        """This call's (seed, offset); the stream moves on. One step for all threads: the interpreter's lock is held."""
        return _core.take_offset(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seed={self._seed}, offset={self._offset})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Philox):
            return NotImplemented
        return (self._seed, self._offset) == (other._seed, other._offset)

    def __reduce__(self) -> tuple[type[Philox], tuple[int, int]]:
        return type(self), (self._seed, self._offset)


_core.set_stream_type(Philox)  # what the compiled entries accept besides an int

# In quotes what importing this must not import; typing.get_type_hints reads it where the alias is used.
Rng: TypeAlias = Union[int, "np.random.Generator", Philox]


def require(rng: Any) -> None:
    """Raises unless `take(rng)` will succeed. Draws nothing."""
    if not isinstance(rng, (Philox, np.random.Generator)):
        _word("rng", rng, "an int seed, a numpy.random.Generator or a fastnorm.Philox stream")


def take(rng: Rng) -> tuple[int, int]:
    """(seed, offset) of one call. Only to be called when nothing else can fail: it advances `rng`."""
    if isinstance(rng, Philox):
        return rng._take()
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(0, _WORD, dtype=np.uint64)), 0
    return operator.index(rng), 0
