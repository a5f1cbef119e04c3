"""Lets a clone be the working directory: there, `import fastnorm` finds the source tree, which has no compiled module.

The installed package then takes the tree's place for everything but `__init__.py`. Importing this module does that; in
an installed package it does nothing. It never mixes the tree's sources with an installed compiled module.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path


def _use_installed_package() -> None:
    if find_spec(f"{__package__}._core") is not None:
        return
    tree = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != tree.parent]
    installed = PathFinder.find_spec(str(__package__), elsewhere)
    if installed is None or not installed.submodule_search_locations:
        raise ImportError(
            f"{tree} is fastnorm's source tree, which has no compiled module, and no installed fastnorm was found: "
            "run `pip install .` in the tree first"
        )
    sys.modules[str(__package__)].__path__[:] = installed.submodule_search_locations


_use_installed_package()
