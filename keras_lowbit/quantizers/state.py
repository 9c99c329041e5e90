"""What quantizers make their variables with."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

PACKAGE = "keras_lowbit"


def constant(value):
    """An initializer from NumPy: on JAX `keras.initializers.Constant` compiles for each shape."""
    return lambda shape, dtype: ops.convert_to_tensor(np.full(shape, value, dtype), dtype=dtype)


def count_features(shape, role, axis=None) -> float | None:
    """N of a gradient's damping: weights of a kernel, or features of one sample.

    With `axis`, those that share the indices along it. `None` where another axis is dynamic: then
    the call counts.
    """
    counted = shape if role == "kernel" else shape[1:]
    if any(n is None for n in counted):
        return None
    total = float(np.prod(counted, dtype=float))
    if axis is not None:
        total /= float(np.prod([shape[a] for a in axis], dtype=float))
    return max(total, 1.0)


@keras.saving.register_keras_serializable(package=PACKAGE)
class PositiveScale(keras.constraints.Constraint):
    """Keeps a scale at or above `smallest` after an optimizer's step."""

    def __init__(self, smallest=1e-8):
        self.smallest = smallest

    def __call__(self, w):
        """`max(w, smallest)`; NaN stays NaN, for the guard that names the layer."""
        w = ops.convert_to_tensor(w)
        return ops.where(w < self.smallest, self.smallest, w)

    def get_config(self):
        """Arguments of the constructor."""
        return {"smallest": self.smallest}
