"""ONNX's own node tests for Dropout: inputs and outputs as the standard publishes them.

ONNX leaves the generator open, so a published random mask is applied, not drawn: this fixes the meaning of the ratio,
of the mask and of the scale. Skipped where the onnx package is not installed.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other operators' tests overflow on purpose while they are collected
    onnx = pytest.importorskip("onnx")
    loader = pytest.importorskip("onnx.backend.test.loader")
    CASES = [
        case
        for case in loader.load_model_tests(kind="node")
        if case.model is not None and [node.op_type for node in case.model.graph.node] == ["Dropout"]
    ]


def settings(case: Any, inputs: list[np.ndarray]) -> tuple[float, bool]:
    """(ratio, training), which have moved from attributes to inputs over the versions of the operator."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in case.model.graph.node[0].attribute}
    ratio = inputs[1] if len(inputs) > 1 else attributes.get("ratio", 0.5)
    return float(ratio), len(inputs) > 2 and bool(inputs[2])


def test_cases_of_both_kinds_are_there() -> None:
    training = [settings(case, case.data_sets[0][0])[1] for case in CASES]
    assert training.count(True) >= 6
    assert training.count(False) >= 5


@pytest.mark.parametrize("module", [fn, reference], ids=["fastnorm", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node(case: Any, module: Any) -> None:
    for inputs, outputs in case.data_sets:
        x, (y, *rest) = inputs[0], outputs
        ratio, training = settings(case, inputs)
        if not training:
            np.testing.assert_array_equal(module.dropout(x, 0.0, rng=1), y)
            np.testing.assert_array_equal(module.dropout_inference(x, 0.0), y)
            assert all(np.all(mask) for mask in rest)
            continue
        keep = rest[0].astype(bool) if rest else y != 0
        # The published y is x * keep * float32(1 / (1 - ratio)): two roundings and the ratio's own.
        np.testing.assert_allclose(module.apply_dropout_mask(x, keep, ratio), y, rtol=4 * 2.0**-24, atol=0)
        if ratio == 0.0:
            np.testing.assert_array_equal(module.dropout(x, ratio, rng=1), y)
            assert np.all(keep)
        else:
            assert 0 < np.count_nonzero(keep) < keep.size
