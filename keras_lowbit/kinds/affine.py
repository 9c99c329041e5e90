"""What layers and operators compute that scale and shift a tensor: `gain * x + shift`."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics.arrays import float64_of
from keras_lowbit.walk import Call, Ref

# `keras.ops` calls that with one tensor and constants are a Rescaling: (gain, shift) of the tensor
# and the constant, for the tensor before the operator and behind it.
_ARITHMETIC = {
    "Add": (lambda c: (1.0, c), lambda c: (1.0, c)),
    "Subtract": (lambda c: (1.0, -c), lambda c: (-1.0, c)),
    "Multiply": (lambda c: (c, 0.0), lambda c: (c, 0.0)),
    "TrueDivide": (lambda c: (1.0 / c, 0.0), None),
    "Divide": (lambda c: (1.0 / c, 0.0), None),
    "Negative": (lambda c: (-1.0, 0.0), None),  # the one that takes no constant
}


def is_arithmetic(operation) -> bool:
    """Whether an operation is one of `keras.ops` that scales or shifts by a constant."""
    return type(operation).__name__ in _ARITHMETIC


def scaling_of(call: Call) -> tuple[np.ndarray, np.ndarray] | None:
    """`(gain, shift)` of a call of the kind `"rescaling"`: `gain * x + shift`.

    Numbers, or one a channel: float64 arrays of shape `()` or `(channels,)`. `None` where the call
    computes something else, such as with a constant for each pixel.
    """
    operation = call.operation
    if isinstance(operation, keras.layers.Rescaling):
        found = operation.scale, operation.offset
    else:
        operands = (*call.args, *dict(call.kwargs).values())[:2]
        first = isinstance(operands[0], Ref)
        one = type(operation).__name__ == "Negative"
        constant = 1.0 if one else _constant(operands[1] if first else operands[0])
        form = _ARITHMETIC[type(operation).__name__][0 if first else 1]
        if constant is None or form is None:
            return None
        with np.errstate(divide="ignore"):
            found = form(constant)
    channels = call.inputs[0].shape[-1]
    arrays = [np.asarray(x, np.float64) for x in found]
    # By shape: a constant for each row has as many numbers where there are as many rows.
    if any(x.size != 1 and (x.shape[-1], x.size) != (channels, channels) for x in arrays):
        return None
    if len(call.output.shape) != len(call.inputs[0].shape):
        return None  # a constant of more axes
    return tuple(x.reshape(() if x.size == 1 else (channels,)) for x in arrays)


def normalizing_of(layer: keras.layers.Normalization) -> tuple[np.ndarray, np.ndarray] | None:
    """`(gain, shift)` of a built `Normalization`: `gain * x + shift`, one of each or one a channel.

    `None` where it has numbers of its own for other axes than the last.
    """
    mean, variance = float64_of(layer.mean), float64_of(layer.variance)
    if any(n != 1 for n in mean.shape[:-1]):
        return None
    deviation = np.maximum(np.sqrt(variance.reshape(-1)), keras.config.epsilon())
    mean = mean.reshape(-1)
    return (deviation, mean) if layer.invert else (1.0 / deviation, -mean / deviation)


def batch_norm_of(layer: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """`(gain, shift)` of a built batch norm at inference: `gain * x + shift`, one a channel.

    gain = gamma / sqrt(moving_variance + epsilon)
    shift = beta - moving_mean * gain
    """
    gain = 1.0 / np.sqrt(float64_of(layer.moving_variance) + layer.epsilon)
    if layer.scale:
        gain = gain * float64_of(layer.gamma)
    shift = -float64_of(layer.moving_mean) * gain
    return gain, shift + float64_of(layer.beta) if layer.center else shift


def _constant(value):
    """A number or an array as float64; `None` for anything that may change."""
    if isinstance(value, (keras.Variable, Ref)):
        return None
    if ops.is_tensor(value):
        value = ops.convert_to_numpy(value)
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return None
