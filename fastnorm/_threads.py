"""How many threads a call may use. The setting is one for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from . import _check, _core

MOST = 4096


def get_num_threads() -> int:
    """Most threads that a call uses.

    Starts as FASTNORM_NUM_THREADS, or else as OpenMP would: OMP_NUM_THREADS, or the CPUs this process may use.

    Returns
    -------
    int
    """
    return _core.get_num_threads()


def set_num_threads(n: int) -> None:
    """Set the most threads that a call may use, for the whole process. Results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int
        1 to 4096. Small work runs on the calling thread in any case.

    Raises
    ------
    TypeError
        n is not an integer.
    ValueError
        n is out of range.
    """
    _core.set_num_threads(_checked(n))


def num_threads(n: int) -> AbstractContextManager[None]:
    """Use at most n threads inside a `with` block.

    Parameters
    ----------
    n : int
        As for `set_num_threads`, whose setting comes back at the end of the block.

    Returns
    -------
    context manager

    Raises
    ------
    TypeError
        n is not an integer.
    ValueError
        n is out of range.
    """
    return _limited(_checked(n))


@contextmanager
def _limited(n: int) -> Iterator[None]:
    before = get_num_threads()
    _core.set_num_threads(n)
    try:
        yield
    finally:
        _core.set_num_threads(before)


def _checked(n: int) -> int:
    found = _check.integer("n", n)
    if not 1 <= found <= MOST:
        raise ValueError(f"n is {found}; expected 1 <= n <= {MOST}")
    return found
