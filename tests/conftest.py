"""What every test module starts from: the installed package, one thread count and one instruction-set level.

`python -m pytest` puts the working directory first on the path, where `fastnorm/` is the source tree without its
compiled module: it is taken off, so that what is tested is what was installed. No test inherits another's threads or
level.

With FASTNORM_VERIFY set the suite is a walk through every function, dtype, layout and path on which each call meets its
reference. A test marked `unverified(reason)` is left out of it: a long one that compares every result with the
references itself, or the kernels with themselves; one that measures what the references would add to; one that is
beyond the contract. What is left must still be that walk.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from fastnorm import _verify

    for item in items:
        mark = item.get_closest_marker("unverified")
        if mark is not None and _verify.active():
            (reason,) = mark.args
            item.add_marker(pytest.mark.skip(reason=f"unverified: {reason}"))


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    from fastnorm import _core

    threads, level = _core.get_num_threads(), _core.isa()
    yield
    _core.set_num_threads(threads)
    _core.set_isa(level)
