"""What the functions return beside arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _core

Array = np.ndarray[Any, Any]


class NormGrads(NamedTuple):
    """Gradients of a normalisation.

    Attributes
    ----------
    dx : ndarray
        With respect to x.
    dweight, dbias : ndarray or None
        With respect to the parameters; None where the parameter was None.
    """

    dx: Array
    dweight: Array | None
    dbias: Array | None


_core.set_grads_type(NormGrads)  # what the compiled backward functions return
