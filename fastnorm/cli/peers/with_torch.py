"""PyTorch on the CPU: torch.nn.functional, and for the gradients the native operators that autograd itself calls.

Arrays are shared, not copied; channels-last arrays stay channels-last. An operator without a native backward goes
through autograd. Every result is allocated anew: fast only where freed memory is kept, as memory.py sees to.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastnorm.cli.calls import Arrays, Options, stem_of

_torch: Any = import_module("torch")
_f: Any = import_module("torch.nn.functional")
_aten: Any = _torch.ops.aten
_EPS = 1e-5

Call = Callable[[], Any]


def prepare(function: str, arrays: Arrays, options: Options, threads: int) -> Call | None:
    _torch.set_num_threads(threads)
    t = {name: _torch.from_numpy(value) for name, value in vars(arrays).items() if value is not None}
    operation = _native_backward(function, t, options)
    if operation is None and function.endswith("_backward"):
        return _autograd(function, t, options)
    operation = operation or _operation(function, t, options)
    if operation is None:
        return None
    forward = operation

    def call() -> Any:
        with _torch.inference_mode():
            return forward()

    return call


def _autograd(function: str, t: dict[str, Any], options: Options) -> Call | None:
    operation = _operation(function, t, options)
    if operation is None:
        return None
    inputs = [t[name].requires_grad_() for name in ("x", "weight", "bias") if name in t]
    if stem_of(function).startswith("dropout_add"):
        inputs.append(t["residual"].requires_grad_())
        outputs, gradients = operation(), (t["dy"], t["ds"])
    else:
        outputs, gradients = operation(), t["dy"]
    return lambda: _torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def _native_backward(function: str, t: dict[str, Any], options: Options) -> Call | None:
    x, dy, weight, bias = t["x"], t["dy"], t.get("weight"), t.get("bias")
    wanted = [True, weight is not None, bias is not None]
    if function == "layer_norm_backward":
        shape = x.shape[options.get("axis", -1) :]
        _, mean, rstd = _torch.native_layer_norm(x, shape, weight, bias, _EPS)
        return lambda: _aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, wanted)
    if function == "batch_norm_backward":
        _, mean, rstd = _torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, _EPS)
        return lambda: _aten.native_batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, _EPS, wanted)
    if function == "group_norm_backward":
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), int(options["num_groups"]))
        _, mean, rstd = _torch.native_group_norm(x, weight, bias, *sizes, _EPS)
        return lambda: _aten.native_group_norm_backward(dy, x, mean, rstd, weight, *sizes, wanted)
    return None


def _operation(function: str, t: dict[str, Any], options: Options) -> Callable[[], Any] | None:
    x, weight, bias = t["x"], t.get("weight"), t.get("bias")
    trailing, p = x.shape[options.get("axis", -1) :], options.get("p", 0.3)

    def residual(norm: Callable[[Any], Any]) -> tuple[Any, Any]:
        s = t["residual"] + _f.dropout(x, p)
        return norm(s), s

    operations: dict[str, Callable[[], Any]] = {
        "layer_norm": lambda: _f.layer_norm(x, trailing, weight, bias, _EPS),
        "rms_norm": lambda: _f.rms_norm(x, trailing, weight, _EPS),
        "group_norm": lambda: _f.group_norm(x, int(options["num_groups"]), weight, bias, _EPS),
        "instance_norm": lambda: _f.instance_norm(x, None, None, weight, bias, True, 0.1, _EPS),
        "batch_norm": lambda: _f.batch_norm(x, None, None, weight, bias, True, 0.1, _EPS),
        "moments": lambda: _torch.var_mean(x, options.get("axis"), correction=0),
        "dropout": lambda: _f.dropout(x, p),
        "drop_connect": lambda: _f.dropout(x, p),
        "dropout_mask": lambda: _torch.empty(x.shape, dtype=_torch.bool).bernoulli_(1 - p),
        "apply_dropout_mask": lambda: x * t["keep"] * (1 / (1 - p)),
        "dropout_inference": lambda: x * (1 - p),
        "gaussian_noise": lambda: x + 0.5 * _torch.randn_like(x),
        "dropout_add_layer_norm": lambda: residual(lambda s: _f.layer_norm(s, trailing, weight, bias, _EPS)),
        "dropout_add_rms_norm": lambda: residual(lambda s: _f.rms_norm(s, trailing, weight, _EPS)),
    }
    if function == "batch_norm":
        return lambda: _f.batch_norm(x, t["mean"], t["var"], weight, bias, False, 0.1, _EPS)
    return operations.get(stem_of(function))
