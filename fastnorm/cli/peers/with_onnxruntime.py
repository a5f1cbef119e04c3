"""ONNX Runtime on the CPU: a model of the one operator, run on bound NumPy arrays. ONNX has no backward operators."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastnorm.cli.calls import Array, Arrays, Options

_EPS = 1e-5
_OPSET, _IR = 23, 10
# function -> (operator, its inputs after x)
_OPERATORS = {
    "layer_norm": ("LayerNormalization", ("weight", "bias")),
    "rms_norm": ("RMSNormalization", ("weight",)),
    "instance_norm": ("InstanceNormalization", ("weight", "bias")),
    "group_norm": ("GroupNormalization", ("weight", "bias")),
    "batch_norm": ("BatchNormalization", ("weight", "bias", "mean", "var")),
}


def prepare(function: str, arrays: Arrays, options: Options, threads: int) -> Callable[[], Any] | None:
    if function not in _OPERATORS or not arrays.x.flags.c_contiguous:
        return None
    operator, parameters = _OPERATORS[function]
    onnx, helper, runtime = (import_module(name) for name in ("onnx", "onnx.helper", "onnxruntime"))
    feeds = {name: getattr(arrays, name) for name in ("x", *parameters)}
    attributes: dict[str, Any] = {"epsilon": _EPS}
    if operator == "GroupNormalization":
        attributes["num_groups"] = options["num_groups"]
    kind = helper.np_dtype_to_tensor_dtype(arrays.x.dtype)
    graph = helper.make_graph(
        [helper.make_node(operator, list(feeds), ["y"], **attributes)],
        function,
        [helper.make_tensor_value_info(name, kind, value.shape) for name, value in feeds.items()],
        [helper.make_tensor_value_info("y", kind, arrays.x.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    onnx.checker.check_model(model)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 4
    # Its threads spin during a run and stop at its end: fast for itself, and out of the way of the next contender.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1")
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    y = np.empty_like(arrays.x)
    try:
        session = runtime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, value in (*feeds.items(), ("y", y)):
            (binding.bind_output if name == "y" else binding.bind_input)(
                name, "cpu", 0, value.dtype, value.shape, value.ctypes.data
            )
        session.run_with_iobinding(binding)
    except Exception:  # what it raises for an operator or dtype that it lacks differs from version to version
        return None

    def call() -> Array:
        session.run_with_iobinding(binding)
        return y

    return call
