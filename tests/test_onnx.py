"""ONNX's own node tests for the normalisations: inputs and outputs as the standard publishes them.

Refuses what ONNX defines otherwise: its running variance is biased, so it is recomputed from the cache. Skipped where
the onnx package is not installed. Dropout's node tests stand in test_dropout.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from contract import MODULES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other operators' tests overflow on purpose while they are collected
    onnx = pytest.importorskip("onnx")
    loader = pytest.importorskip("onnx.backend.test.loader")
    NODE_TESTS = loader.load_model_tests(kind="node")

Arrays = list[np.ndarray]


def batch_normalization(module: Any, inputs: Arrays, options: dict[str, Any]) -> Arrays:
    x, weight, bias, mean, var = inputs
    eps, keep = options.get("epsilon", 1e-5), options.get("momentum", 0.9)
    if not options.get("training_mode", 0):
        return [module.batch_norm(x, mean, var, weight, bias, eps=eps)]
    running = mean.copy()
    y, cache = module.batch_norm_forward(x, weight, bias, running_mean=running, momentum=1 - keep, eps=eps)
    return [y, running, keep * var + (1 - keep) * cache.batch_var]


def layer_normalization(module: Any, inputs: Arrays, options: dict[str, Any]) -> Arrays:
    axis, eps = options.get("axis", -1), options.get("epsilon", 1e-5)
    y, cache = module.layer_norm_forward(*inputs, axis=axis, eps=eps)
    shape = (*y.shape[:axis], *(1,) * len(y.shape[axis:]))
    return [y, cache.mean.reshape(shape), cache.rstd.reshape(shape)]


def rms_normalization(module: Any, inputs: Arrays, options: dict[str, Any]) -> Arrays:
    return [module.rms_norm(*inputs, axis=options.get("axis", -1), eps=options.get("epsilon", 1e-5))]


def group_normalization(module: Any, inputs: Arrays, options: dict[str, Any]) -> Arrays:
    x, weight, bias = inputs
    return [module.group_norm(x, options["num_groups"], weight, bias, eps=options.get("epsilon", 1e-5))]


def instance_normalization(module: Any, inputs: Arrays, options: dict[str, Any]) -> Arrays:
    return [module.instance_norm(*inputs, eps=options.get("epsilon", 1e-5))]


def mean_variance_normalization(module: Any, inputs: Arrays, options: dict[str, Any]) -> Arrays:
    assert list(options.get("axes", [0, 2, 3])) == [0, 2, 3]
    return [module.batch_norm_forward(inputs[0], eps=0)[0]]


OPERATORS: dict[str, Callable[[Any, Arrays, dict[str, Any]], Arrays]] = {
    "BatchNormalization": batch_normalization,
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
}


def node_of(case: Any) -> Any:
    """The only node of a test's model; tests of an operator's expansion into others have many."""
    nodes = case.model.graph.node if case.model else []
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type in OPERATORS else None


CASES = [case for case in NODE_TESTS if node_of(case) is not None]


def test_every_operator_has_cases() -> None:
    assert {node_of(case).op_type for case in CASES} == set(OPERATORS)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node(case: Any, module: Any) -> None:
    node = node_of(case)
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for inputs, outputs in case.data_sets:
        results = OPERATORS[node.op_type](module, list(inputs), options)
        assert len(results) >= len(outputs)
        for result, output in zip(results, outputs, strict=False):
            # The published outputs are computed in float32 without care.
            np.testing.assert_allclose(result, output, rtol=2e-6, atol=2e-6)
            assert result.shape == output.shape
