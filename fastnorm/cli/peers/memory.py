"""Makes the C library keep freed memory, for peers that allocate every result: PyTorch, JAX.

Their users get the same from tcmalloc or jemalloc. Without it the pages of large results are mapped anew in every call,
at several times the price of the operation. For a whole process and for good, so only `bench` asks for it.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Results of any size come from one heap that does not shrink; C libraries other than glibc keep their rules."""
    if not sys.platform.startswith("linux"):
        return
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_ARENA_MAX, 1)  # the arenas of other threads would go back to pages of their own
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        return
