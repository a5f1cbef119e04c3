"""What the functions return beside arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class NormGrads(NamedTuple):
    """Gradients of a normalisation: of its input and of its parameters (None where the parameter was None)."""

    dx: Array
    dweight: Array | None
    dbias: Array | None
