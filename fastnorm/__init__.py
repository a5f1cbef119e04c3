"""fastnorm: normalization and dropout, forward and backward, from NumPy on a CPU: fast, exact, reproducible.

Every function here has a plain NumPy twin in `fastnorm.reference`; `verify` checks each call against it.
"""

from . import _source_tree  # noqa: F401  (first: it decides where the others are found)

# isort: split

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import _environment, reference  # noqa: F401
from ._batch_norm import batch_norm, batch_norm_backward, batch_norm_forward
from ._core import NormCache, __version__
from ._dropout import (
    DropoutCache,
    apply_dropout_mask,
    drop_connect,
    drop_connect_backward,
    drop_connect_forward,
    dropout,
    dropout_backward,
    dropout_forward,
    dropout_inference,
    dropout_mask,
    gaussian_noise,
)
from ._dropout_add_norm import (
    DropoutAddNormCache,
    DropoutAddNormGrads,
    dropout_add_layer_norm,
    dropout_add_layer_norm_backward,
    dropout_add_layer_norm_forward,
    dropout_add_rms_norm,
    dropout_add_rms_norm_backward,
    dropout_add_rms_norm_forward,
)
from ._group_norm import group_norm, group_norm_backward, group_norm_forward
from ._instance_norm import instance_norm, instance_norm_backward, instance_norm_forward
from ._layer_norm import layer_norm, layer_norm_backward, layer_norm_forward
from ._moments import Moments, moments
from ._philox import Philox
from ._results import NormGrads
from ._rms_norm import rms_norm, rms_norm_backward, rms_norm_forward
from ._threads import get_num_threads, num_threads, set_num_threads
from ._verify import VerificationError, VerificationWarning, verify

if _TYPE_CHECKING:
    from . import nn, preprocessing, regularization
else:

    def __getattr__(name: str) -> object:
        """The modules for training are imported when they are first asked for: a program of functions never pays."""
        if name in ("nn", "preprocessing", "regularization"):
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "DropoutAddNormCache",
    "DropoutAddNormGrads",
    "DropoutCache",
    "Moments",
    "NormCache",
    "NormGrads",
    "Philox",
    "VerificationError",
    "VerificationWarning",
    "__version__",
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
    "get_num_threads",
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
    "nn",
    "num_threads",
    "preprocessing",
    "reference",
    "regularization",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "set_num_threads",
    "verify",
]
