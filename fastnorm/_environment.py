"""Reads FASTNORM_ISA and FASTNORM_NUM_THREADS, once, when the package is imported. A bad value is an error."""

import os

from . import _core, _threads


def _apply(isa: str, threads: str) -> None:
    if isa:
        if isa not in _core.isa_levels():
            raise ValueError(
                f"FASTNORM_ISA is {isa!r}; expected an instruction-set level that this build and this CPU have: "
                + ", ".join(_core.isa_levels())
            )
        _core.set_isa(isa)
    if threads:
        if not threads.isascii() or not threads.isdigit() or not 1 <= int(threads) <= _threads.MOST:
            raise ValueError(f"FASTNORM_NUM_THREADS is {threads!r}; expected an integer from 1 to {_threads.MOST}")
        _core.set_num_threads(int(threads))


_apply(os.environ.get("FASTNORM_ISA", ""), os.environ.get("FASTNORM_NUM_THREADS", ""))
