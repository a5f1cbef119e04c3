"""fastnorm itself, one call after the other, where there is a function that does it all in one pass over memory.

The residual step only: dropout, an addition by NumPy, the norm, every one of them into an array that is used again.
The threads are those that fastnorm was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm.cli.calls import Arrays, Options, stem_of


def prepare(function: str, a: Arrays, options: Options, threads: int) -> Callable[[], Any] | None:
    return separate(function, a, options, [np.empty_like(a.x) for _ in range(3)])


def separate(function: str, a: Arrays, options: Options, results: list[Any]) -> Callable[[], Any] | None:
    """The calls, with these three results: arrays, or None for new ones."""
    if not function.startswith("dropout_add"):
        return None
    norm = stem_of(function).removeprefix("dropout_add_")
    parameters = (a.weight,) if norm == "rms_norm" else (a.weight, a.bias)
    p, seed = options.get("p", 0.1), 7
    dropped, s, y = results
    whole, forward, backward = (getattr(fn, norm + suffix) for suffix in ("", "_forward", "_backward"))

    def plain() -> Any:
        return whole(np.add(a.residual, fn.dropout(a.x, p, rng=seed, out=dropped), out=s), *parameters, out=y)

    def with_caches() -> Any:
        kept, of_dropout = fn.dropout_forward(a.x, p, rng=seed, out=dropped)
        return *forward(np.add(a.residual, kept, out=s), *parameters, out=y), of_dropout

    if not function.endswith("_backward"):
        return with_caches if function.endswith("_forward") else plain
    _, of_norm, of_dropout = with_caches()

    def gradients() -> Any:
        g = backward(a.dy, of_norm, out=y)
        total = np.add(g.dx, a.ds, out=g.dx)
        return fn.dropout_backward(total, of_dropout, out=dropped), g

    return gradients
