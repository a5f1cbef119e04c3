"""The benchmark cases: read from cases.csv, which bench/bench_kernels.cpp reads as well.

A row of cases.csv names an operation, the shape of x, its layout in memory (C or channels_last), the dtypes, and the
arrays that the operation has to move once between memory and the cores ("keep" is a mask of one byte an element, all
others are of x's shape and dtype). Options are name=value, separated by spaces.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from math import prod

import numpy as np

from fastnorm.cli.screen import UsageError


@dataclass(frozen=True)
class Case:
    """One row of cases.csv for one of its dtypes."""

    name: str
    operation: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    moves: tuple[str, ...]
    options: dict[str, float]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes_moved(self) -> int:
        item = np.dtype(self.dtype).itemsize
        return sum(self.elements * (1 if array == "keep" else item) for array in self.moves)


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)


def load_cases() -> list[Case]:
    """Every case, in the order of the file, one entry per dtype."""
    rows = csv.DictReader((files("fastnorm") / "cli" / "cases.csv").read_text(encoding="utf-8").splitlines())
    return [
        Case(
            name=row["name"],
            operation=row["operation"],
            shape=tuple(map(int, row["shape"].split("x"))),
            layout=row["layout"],
            dtype=dtype,
            moves=tuple(row["moves"].split()),
            options={key: _number(value) for key, value in (item.split("=") for item in row["options"].split())},
        )
        for row in rows
        for dtype in row["dtypes"].split()
    ]


def select_cases(patterns: str, dtypes: str) -> list[Case]:
    """Cases whose name or operation matches one of the comma-separated shell patterns, for the given dtypes."""
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    kinds = [dtype.strip() for dtype in dtypes.split(",")]
    every = load_cases()
    chosen = [
        case
        for case in every
        if case.dtype in kinds
        and any(fnmatchcase(case.name, pattern) or fnmatchcase(case.operation, pattern) for pattern in wanted)
    ]
    if not chosen:
        known = ", ".join(dict.fromkeys(case.operation for case in every))
        raise UsageError(f"no case matches --cases {patterns!r} with --dtypes {dtypes!r}; operations: {known}")
    return chosen
