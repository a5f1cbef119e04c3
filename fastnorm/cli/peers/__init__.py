"""The libraries that `bench` puts beside fastnorm: one small module each, imported only where its library is installed.

A peer module has `prepare(function, arrays, options, threads)`, which returns a call without arguments that does the
same work on the same values as a user of the library would write it, or None where the library has no such operation.
Conversion to its own arrays, compilation and the forward before a backward happen there, outside the measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from fastnorm.cli.calls import Arrays, Options
from fastnorm.cli.screen import UsageError

Prepare = Callable[[str, Arrays, Options, int], "Callable[[], Any] | None"]

# Name in the tables -> (module here, distributions that must be installed).
_PEERS = {
    "numpy": ("with_numpy", ("numpy",)),
    "torch": ("with_torch", ("torch",)),
    "jax": ("with_jax", ("jax",)),
    "onnxruntime": ("with_onnxruntime", ("onnxruntime", "onnx")),
    "numba": ("with_numba", ("numba",)),
    "hash": ("with_hash", ("numba",)),
    "calls": ("with_calls", ("numpy",)),
    "fresh-calls": ("with_fresh_calls", ("numpy",)),
}
NAMES = tuple(_PEERS)
# As the libraries write themselves, for pages and pictures.
TITLES = {
    "numpy": "NumPy",
    "torch": "PyTorch",
    "jax": "JAX",
    "onnxruntime": "ONNX Runtime",
    "numba": "numba",
    "hash": "numba hash",
    "calls": "separate calls",
    "fresh-calls": "separate calls, fresh",
}


def installed() -> dict[str, str]:
    """Version by name of every peer that this environment has."""
    versions = {name: [_version(d) for d in distributions] for name, (_, distributions) in _PEERS.items()}
    return {name: found[0] for name, found in versions.items() if found[0] is not None and None not in found}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def chosen(wanted: str | None) -> list[str]:
    """The peers that `--peers` names, every installed one by default; raises UsageError for any other."""
    found = installed()
    if wanted is None:
        return list(found)
    names = [name for name in wanted.split(",") if name]
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--peers {name}: unknown; there are {', '.join(NAMES)}")
        if name not in found:
            raise UsageError(f"--peers {name}: not installed here")
    return names


def load(name: str) -> ModuleType:
    """The module of a peer; raises ImportError where its library is missing or broken."""
    return import_module(f"fastnorm.cli.peers.{_PEERS[name][0]}")


def axes_of(function: str, ndim: int, options: Options) -> tuple[int, ...]:
    """The axes that a norm reduces (for group norm: of x reshaped to (N, G, C/G, ...)), channels on axis 1."""
    if "batch_norm" in function:
        return (0, *range(2, ndim))
    if "instance_norm" in function:
        return tuple(range(2, ndim))
    if "group_norm" in function:
        return tuple(range(2, ndim + 1))
    return tuple(range(options.get("axis", -1) % ndim, ndim))
