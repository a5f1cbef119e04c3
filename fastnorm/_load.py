"""Loads the compiled module with an OpenMP runtime that soon stops waiting actively.

A thread pool that spins for milliseconds while it waits turns a call of 0.2 ms into one of 8 ms as soon as another
process wants the core. libgomp reads how long to spin from the environment when it is loaded, and there is no other way
to say it; the environment is left as it was found, and a user's own setting is kept.
"""

import os

_SPIN = "GOMP_SPINCOUNT"
_shorten = _SPIN not in os.environ and "OMP_WAIT_POLICY" not in os.environ
if _shorten:
    os.environ[_SPIN] = "1000"
try:
    from . import _core  # noqa: F401
finally:
    if _shorten:
        del os.environ[_SPIN]
