"""Activations by name, however they were written: their limits, slopes and fixed ranges."""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable

import keras
from keras import ops

K = keras.layers


# The activations that have an integer form, for sentences.
ACTIVATIONS = (
    "relu (with a max_value or none), leaky_relu (with a slope up to 1), hard_sigmoid, sigmoid, "
    "silu, hard_silu, softmax or linear"
)

# Activations whose range is known, and so the 8-bit grid behind them: reals per code, codes 0..255.
FIXED_SCALES = {"softmax": 1 / 256, "sigmoid": 1 / 256, "hard_sigmoid": 1 / 255}

# Activations that multiply their input by another one of it.
GATES = {"silu": "sigmoid", "hard_silu": "hard_sigmoid"}

# Activations that become two tensors of 8 bits, multiplied or added.
OF_TWO_TENSORS = (*GATES, "leaky_relu")

# Activations with an integer form that clips the codes of what stands before them.
CLIPS = ("linear", "relu", "relu6", "relu_limited", "hard_sigmoid")

# By identity: a function of somebody's own may have any name.
_FUNCTIONS = {
    getattr(module, name): getattr(keras.activations, name).__name__
    for name in dir(keras.activations)
    for module in (keras.activations, ops)
    if inspect.isfunction(getattr(keras.activations, name)) and hasattr(module, name)
}


def activation_name(operation) -> str:
    """`"linear"`, `"relu"`, `"relu6"`, `"softmax"` or the name of another activation.

    A ReLU with a limit other than 6 is `"relu_limited"`, one with a slope below 1 `"leaky_relu"`,
    and one with a threshold, or with slope and limit, `"relu_variant"`. A softmax over another
    axis than the last is a `"softmax_variant"`. Of a layer with an activation it is the name of
    that, of another layer or function the one it was written with.
    """
    kind = type(operation).__name__
    if type(operation) in (K.ReLU, K.LeakyReLU) or _is_operation(operation, "LeakyRelu", "ReLU"):
        slope, limit = float(operation.negative_slope or 0), getattr(operation, "max_value", None)
        if getattr(operation, "threshold", 0) or (slope and limit is not None) or slope > 1:
            return "relu_variant"
        if slope:
            return "linear" if slope == 1 else "leaky_relu"
        return {None: "relu", 6.0: "relu6"}.get(limit, "relu_limited" if limit else "relu_variant")
    if type(operation) is K.Softmax or _is_operation(operation, "Softmax"):
        return "softmax" if is_last_axis(operation) else "softmax_variant"
    if isinstance(operation, K.Layer):
        if not hasattr(operation, "activation"):
            return _unlike_ours(kind)
        function = operation.activation
    elif isinstance(operation, keras.Operation):
        return {"HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu"}.get(kind, kind.lower())
    else:
        function = operation
    if function is None:
        return "linear"
    if isinstance(function, keras.Operation):
        return activation_name(function)
    known = _FUNCTIONS.get(function) if isinstance(function, Hashable) else None
    return known or _unlike_ours(getattr(function, "__name__", type(function).__name__))


def activation_as_written(operation) -> str:
    """An activation in the words of who wrote it: `activation 'gelu'`, `ReLU(threshold=0.1)`."""
    name = activation_name(operation)
    if name != "relu_variant":
        return f"activation {name!r}"
    own = _own_activation(operation)
    given = {
        "max_value": getattr(own, "max_value", None),
        "negative_slope": own.negative_slope or None,
        "threshold": getattr(own, "threshold", None) or None,
    }
    written = ", ".join(f"{key}={x:g}" for key, x in given.items() if x is not None)
    return f"{type(own).__name__}({written})"


def is_last_axis(operation, rank: int | None = None) -> bool:
    """Whether a softmax runs over the last axis of a tensor.

    Args:
        operation: a `Softmax` layer or operation.
        rank: of the tensor; `None` for that of the operation's first call.
    """
    axis = operation.axis
    if isinstance(axis, (tuple, list)):
        axis = axis[0] if len(axis) == 1 else None
    if axis is None or axis < 0:
        return axis == -1
    if rank is None:
        try:
            rank = len(operation.input.shape)
        except (AttributeError, ValueError):
            return False  # not called yet
    return axis == rank - 1


def limit_of(operation) -> float | None:
    """The largest value that an activation lets pass, `inf` for none; `None`: it is no clip."""
    name = activation_name(operation)
    if name == "relu_limited":
        return float(_own_activation(operation).max_value)
    return {"relu": math.inf, "relu6": 6.0, "hard_sigmoid": 1.0}.get(name)


def slope_of(operation) -> float:
    """The factor of negative values of a `"leaky_relu"`."""
    # The function of `keras.activations` has no attributes, and this default.
    return float(getattr(_own_activation(operation), "negative_slope", 0.2))


def _is_operation(operation, *names):
    return type(operation).__name__ in names and not isinstance(operation, K.Layer)


def _unlike_ours(name):
    """The name of somebody's own activation, told from Keras' of the same name."""
    return f"custom {name}" if name in _FUNCTIONS.values() else name


def _own_activation(operation):
    """A layer's activation where it has one, else the operation itself."""
    return getattr(operation, "activation", None) or operation
