"""Gradients against differences of the forward, in float64: every element of every gradient.

Refuses tolerances in u: a central difference of fourth order at step 2^-8 is good to about 1e-9. What it finds is a
wrong formula, in the kernels and in the references by which everything else is judged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from contract import MODULES
from operations import LAYOUTS, OPERATIONS, Call

STEP = 2.0**-8
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "layer_norm": [(3, 5), (2, 3, 4), (7,)],
    "rms_norm": [(3, 5), (2, 3, 4), (7,)],
    "group_norm": [(2, 4, 3), (3, 6), (2, 4, 2, 2)],
    "instance_norm": [(2, 3, 4), (2, 2, 3, 2)],
    "batch_norm": [(5, 3), (3, 2, 4), (2, 3, 2, 2)],
}


def difference(call: Call, name: str, dy: np.ndarray) -> np.ndarray:
    """d sum(y * dy) / d argument, from five-point differences."""
    base = call.arguments[name]
    gradient = np.empty(base.shape)
    for index in np.ndindex(base.shape):
        total = 0.0
        for step, factor in ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)):
            moved = base.copy()
            moved[index] += step * STEP
            total += factor * float(np.sum(call.run(**{name: moved})["y"] * dy))
        gradient[index] = total / STEP
    return gradient


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("stem", "shape"), [(stem, shape) for stem, shapes in SHAPES.items() for shape in shapes])
def test_gradients_are_the_differences_of_the_forward(module: Any, stem: str, shape: tuple[int, ...]) -> None:
    operation = OPERATIONS[f"{stem}_forward"]
    for turn, options in enumerate(operation.variants):
        layout = list(LAYOUTS.values())[turn % len(LAYOUTS)]
        call = operation.make(module, shape, np.float64, layout=layout, seed=turn, eps=0.25, **options)
        dy = np.random.default_rng(turn).normal(size=shape)
        _, cache = call()
        gradients = getattr(module, f"{stem}_backward")(dy, cache)._asdict()
        for name in ("x", "weight", "bias"):
            gradient = gradients[f"d{name}"]
            if call.arguments.get(name) is None:
                assert gradient is None
                continue
            numeric = difference(call, name, dy)
            np.testing.assert_allclose(gradient, numeric, rtol=1e-7, atol=1e-7, err_msg=f"d{name} {options}")
