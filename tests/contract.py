"""The accuracy contract as one test for all norms: functions x dtypes x shapes, every layout and variant of arguments.

`CASES[stem]` is the table that tests/test_<stem>.py walks with `check`. Sizes lie around the lanes (16, 32) and blocks
(512, 2048) of the kernels; shapes have ranks 1 to 5 and odd extents. It refuses special values: see test_accuracy.py
(extremes) and test_invariants.py (NaN, constants, empties).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from operations import LAYOUTS, OPERATIONS
from ulps import assert_close, expected

EDGES = (1, 2, 3, 15, 16, 17, 31, 33, 64, 127, 255, 511, 512, 513, 1025, 2047, 2049, 4099)

ROWS: list[tuple[int, ...]] = [
    *((3, n) for n in EDGES),
    (7,),
    (2050,),
    (67, 5),
    (5, 3, 7),
    (2, 3, 1, 19),
    (3, 2, 2, 5, 3),
]
CHANNELS: list[tuple[int, ...]] = [
    *((2, 3, n) for n in EDGES),
    *((n, 5) for n in EDGES if n > 1),
    *((5, n) for n in EDGES if n < 1000),
    (3, 16, 7),
    (5, 17, 6),
    (2, 33, 4, 3),
    (3, 6, 5, 7),
    (2, 4, 3, 3, 5),
]
SHAPES = {
    "layer_norm": ROWS,
    "rms_norm": ROWS,
    "group_norm": CHANNELS,
    "instance_norm": [shape for shape in CHANNELS if len(shape) > 2],
    "batch_norm": CHANNELS,
}
DTYPES = (np.float32, np.float64)


def _cases(stem: str) -> list[Any]:
    return [
        pytest.param(function, dtype, shape, id=f"{function.removeprefix(stem)}-{np.dtype(dtype).name}-{shape}")
        for function in (stem, f"{stem}_forward", f"{stem}_backward")
        for dtype in DTYPES
        for shape in SHAPES[stem]
    ]


# The same contract holds for the kernels and for the references, so that the second judge the first rightly.
MODULES = [pytest.param(fn, id="kernels"), pytest.param(fn.reference, id="reference")]
CASES = {stem: _cases(stem) for stem in SHAPES}


def _one_value_per_channel(function: str, shape: tuple[int, ...], options: dict[str, Any]) -> bool:
    trains = function.startswith("batch_norm_") and options.get("training", True)
    return trains and math.prod(shape) == shape[options.get("channel_axis", 1)]


def check(function: str, dtype: Any, shape: tuple[int, ...]) -> None:
    """Small arrays go through every layout and variant; large ones through each variant, the layouts taking turns."""
    operation = OPERATIONS[function]
    for turn, options in enumerate(operation.variants):
        if _one_value_per_channel(function, shape, options):
            continue
        names = list(LAYOUTS)
        for layout in names if math.prod(shape) < 100 else (names[(turn + sum(shape)) % len(names)],):
            call = operation.make(fn, shape, dtype, layout=LAYOUTS[layout], seed=turn, **options)
            exact = expected(function, **call.arguments)
            assert_close(call.run(), exact, f"{function} {np.dtype(dtype).name} {shape} {layout} {options}")
