"""JAX on the CPU: the formulas in jax.numpy, compiled by jax.jit; gradients by jax.vjp after the forward has run.

The number of threads can only be asked for before JAX starts: XLA's pool takes it from NPROC.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastnorm.cli.calls import SEED, Arrays, Options, stem_of
from fastnorm.cli.peers import axes_of

_EPS = 1e-5


def _start(threads: int) -> tuple[Any, Any]:
    if "jax" not in sys.modules:
        os.environ.setdefault("NPROC", str(threads))
    jax = import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax, import_module("jax.numpy")


def prepare(function: str, arrays: Arrays, options: Options, threads: int) -> Callable[[], Any] | None:
    if stem_of(function) not in ("layer_norm", "rms_norm", "batch_norm", "instance_norm", "group_norm", "dropout"):
        return None
    if arrays.x.strides[-1] != arrays.x.itemsize:
        return None  # JAX would copy another layout to C order: not the same work
    jax, jnp = _start(threads)
    t = {name: jnp.asarray(value) for name, value in vars(arrays).items() if value is not None}
    names = [name for name in ("x", "weight", "bias", "mean", "var") if name in t]
    operation = _operation(jax, jnp, function, options)
    if function != "batch_norm":
        names = [name for name in names if name not in ("mean", "var")]
    if function.endswith("_backward"):
        _, pull = jax.vjp(lambda *values: operation(dict(zip(names, values, strict=True))), *(t[n] for n in names))
        return _reusing(jax, lambda pullback, dy: pullback(dy), pull, t["dy"])
    return _reusing(jax, operation, {name: t[name] for name in names})


def _reusing(jax: Any, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Each call gives its predecessor's result back to be overwritten, so that no call maps new pages."""
    last = jax.block_until_ready(jax.jit(function)(*arguments))
    compiled = jax.jit(lambda old, *given: function(*given), donate_argnums=0, keep_unused=True)

    def call() -> Any:
        nonlocal last
        last = jax.block_until_ready(compiled(last, *arguments))
        return last

    return call


def _operation(jax: Any, jnp: Any, function: str, options: Options) -> Callable[[dict[str, Any]], Any]:
    def scaled(xhat: Any, t: dict[str, Any], shape: tuple[int, ...]) -> Any:
        if "weight" in t:
            xhat = xhat * t["weight"].reshape(shape)
        return xhat + t["bias"].reshape(shape) if "bias" in t else xhat

    def dropout(t: dict[str, Any]) -> Any:
        p, x = options.get("p", 0.3), t["x"]
        return jnp.where(jax.random.bernoulli(jax.random.key(SEED), 1 - p, x.shape), x / (1 - p), 0)

    def norm(t: dict[str, Any]) -> Any:
        x = t["x"]
        rows = function.startswith(("layer", "rms"))
        shape = x.shape[options.get("axis", -1) :] if rows else (-1,) + (1,) * (x.ndim - 2)
        if function == "batch_norm":
            mean, var = t["mean"].reshape(shape), t["var"].reshape(shape)
            return scaled((x - mean) * jax.lax.rsqrt(var + _EPS), t, shape)
        grouped = x
        if function.startswith("group"):
            groups = options["num_groups"]
            grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        axes = axes_of(function, x.ndim, options)
        if function.startswith("rms"):
            mean, var = 0, (x * x).mean(axes, keepdims=True)
        else:
            mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
        return scaled(((grouped - mean) * jax.lax.rsqrt(var + _EPS)).reshape(x.shape), t, shape)

    return dropout if stem_of(function) == "dropout" else norm
