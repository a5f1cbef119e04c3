"""Every public function of fastnorm again, in plain NumPy, from the formulas: same names, same signatures.

Promises results rounded once from a computation in longdouble (float64 where longdouble is no wider); written to be
read. It is the oracle of the tests and of `fastnorm.verify`. Refuses to be fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._results import NormGrads
from . import _dropout, _norm
from ._dropout import (
    apply_dropout_mask,
    drop_connect,
    drop_connect_backward,
    drop_connect_forward,
    dropout,
    dropout_add_layer_norm,
    dropout_add_layer_norm_backward,
    dropout_add_layer_norm_forward,
    dropout_add_rms_norm,
    dropout_add_rms_norm_backward,
    dropout_add_rms_norm_forward,
    dropout_backward,
    dropout_forward,
    dropout_inference,
    dropout_mask,
    gaussian_noise,
)
from ._norm import (
    Moments,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    moments,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)

# Name of a function -> the same function, giving each output before rounding with its allowed error, and writing to
# nothing. A function that is not here must agree with its reference to the last bit.
_EXACT: dict[str, Callable[..., dict[str, Any]]] = {**_norm.EXACT, **_dropout.EXACT}

__all__ = [
    "Moments",
    "NormGrads",
    "apply_dropout_mask",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "drop_connect",
    "drop_connect_backward",
    "drop_connect_forward",
    "dropout",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_backward",
    "dropout_add_layer_norm_forward",
    "dropout_add_rms_norm",
    "dropout_add_rms_norm_backward",
    "dropout_add_rms_norm_forward",
    "dropout_backward",
    "dropout_forward",
    "dropout_inference",
    "dropout_mask",
    "gaussian_noise",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "moments",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
]
