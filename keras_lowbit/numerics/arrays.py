"""Values of the backend as NumPy arrays."""

from __future__ import annotations

import numpy as np
from keras import ops


def float64_of(value) -> np.ndarray:
    """A variable or a tensor as float64."""
    return np.asarray(ops.convert_to_numpy(value), np.float64)
