"""What every test module starts from: the installed package, one thread count and one instruction-set level.

`python -m pytest` puts the working directory first on the path, where `fastnorm/` is the source tree without its
compiled module: it is taken off, so that what is tested is what was installed. No test inherits another's threads or
level.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    from fastnorm import _core

    threads, level = _core.get_num_threads(), _core.isa()
    yield
    _core.set_num_threads(threads)
    _core.set_isa(level)
