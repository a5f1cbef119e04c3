"""The separate calls of with_calls.py, with new arrays for all results: what they cost as they are usually written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastnorm.cli.calls import Arrays, Options
from fastnorm.cli.peers.with_calls import separate


def prepare(function: str, a: Arrays, options: Options, threads: int) -> Callable[[], Any] | None:
    return separate(function, a, options, [None] * 3)
