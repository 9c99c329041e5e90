"""What a call of a Keras model is, in the words of quantization."""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable, Mapping

import keras
import numpy as np
from keras import ops

from keras_lowbit import layers
from keras_lowbit.data.augment import RandomCropFlip
from keras_lowbit.numerics.arrays import float64_of
from keras_lowbit.walk import Call, Ref

K = keras.layers

_LAYERS = {
    K.Conv2D: "product",
    K.DepthwiseConv2D: "product",
    K.SeparableConv2D: "product",
    K.Dense: "product",
    layers.QuantizedConv2D: "product",
    layers.QuantizedDepthwiseConv2D: "product",
    layers.QuantizedSeparableConv2D: "product",
    layers.QuantizedDense: "product",
    layers.Quantize: "quantize",
    layers.Dequantize: "dequantize",
    K.Add: "add",
    K.Multiply: "multiply",
    K.Concatenate: "concatenate",
    K.ReLU: "activation",
    K.LeakyReLU: "activation",
    K.Activation: "activation",
    K.Softmax: "activation",
    K.MaxPooling2D: "max_pool",
    K.GlobalMaxPooling2D: "global_max_pool",
    K.AveragePooling2D: "average_pool",
    layers.AveragePooling2D: "average_pool",
    K.GlobalAveragePooling2D: "global_average_pool",
    K.ZeroPadding2D: "pad",
    K.UpSampling2D: "upsample",
    K.Cropping2D: "slice",
    K.BatchNormalization: "batch_norm",
    layers.BatchNormalization: "batch_norm",
    K.Flatten: "reshape",
    K.Reshape: "reshape",
    K.Permute: "transpose",
    K.Dropout: "dropout",
    K.SpatialDropout2D: "dropout",
    K.Identity: "dropout",
    K.ActivityRegularization: "dropout",
    K.Rescaling: "rescaling",
    K.Normalization: "normalization",
}

# Layers that change reals while training and nothing at inference; not every Keras has all.
_AUGMENTATIONS = (
    "AlphaDropout", "GaussianDropout", "GaussianNoise", "AugMix", "RandAugment",
    "RandomBrightness", "RandomColorDegeneration", "RandomColorJitter", "RandomContrast",
    "RandomElasticTransform", "RandomErasing", "RandomFlip", "RandomGaussianBlur",
    "RandomGrayscale", "RandomHue", "RandomInvert", "RandomPerspective", "RandomPosterization",
    "RandomRotation", "RandomSaturation", "RandomSharpness", "RandomShear", "RandomTranslation",
    "RandomZoom",
)  # fmt: skip
_LAYERS |= {getattr(K, name): "augmentation" for name in _AUGMENTATIONS if hasattr(K, name)}
_LAYERS[RandomCropFlip] = "augmentation"

# `keras.ops` calls: their classes are private to Keras, their names are the functions'.
_OPERATIONS = {
    "Add": "add",
    "Multiply": "multiply",
    "Concatenate": "concatenate",
    "Relu": "activation",
    "Relu6": "activation",
    "ReLU": "activation",  # `keras.activations.relu` with a limit, a slope or a threshold
    "Softmax": "activation",
    "Sigmoid": "activation",
    "HardSigmoid": "activation",
    "Silu": "activation",
    "HardSilu": "activation",
    "LeakyRelu": "activation",
    "MaxPool": "max_pool",
    "AveragePool": "average_pool",
    "Mean": "global_average_pool",
    "Max": "global_max_pool",
    "Pad": "pad",  # or "filled_pad"
    "GetItem": "slice",
    "Transpose": "transpose",
    "Reshape": "reshape",
    "ExpandDims": "reshape",
    "Squeeze": "reshape",
}

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

# The activations that have an integer form, for sentences.
ACTIVATIONS = (
    "relu (with a max_value or none), leaky_relu (with a slope up to 1), hard_sigmoid, sigmoid, "
    "silu, hard_silu, softmax or linear"
)
# What to write for a layer that has no integer form. Each of these exports exactly:
# tests/tflite_export/test_rewrites.py.
_ONE_AXIS = "Reshape((steps, 1, channels)) and {}"
REWRITES = {
    "Conv1D": _ONE_AXIS.format("Conv2D with a kernel of (k, 1)"),
    "DepthwiseConv1D": _ONE_AXIS.format("DepthwiseConv2D with a kernel of (k, 1)"),
    "SeparableConv1D": _ONE_AXIS.format("SeparableConv2D with a kernel of (k, 1)"),
    "MaxPooling1D": _ONE_AXIS.format("MaxPooling2D with a window of (k, 1)"),
    "AveragePooling1D": _ONE_AXIS.format("AveragePooling2D with a window of (k, 1)"),
    "GlobalMaxPooling1D": _ONE_AXIS.format("GlobalMaxPooling2D"),
    "GlobalAveragePooling1D": _ONE_AXIS.format("GlobalAveragePooling2D"),
    "UpSampling1D": _ONE_AXIS.format("UpSampling2D((n, 1))"),
    "ZeroPadding1D": _ONE_AXIS.format("ZeroPadding2D(((before, after), (0, 0)))"),
    "Conv2DTranspose": (
        "Conv2D, as keras_lowbit.expand_transposed(model) does, or UpSampling2D and Conv2D,"
    ),
    "Average": "Add and Rescaling(1 / n), for n tensors,",
    "Subtract": "Rescaling(-1.0) of the second tensor and Add",
    "LayerNormalization": "BatchNormalization",
    "GroupNormalization": "BatchNormalization",
    "RMSNormalization": "BatchNormalization",
    "ELU": "LeakyReLU or ReLU",
    "PReLU": "LeakyReLU or ReLU",
    "SpatialDropout1D": "Dropout",
}
# The same where a constant stands among the tensors.
_ARGUMENTS = {
    "Add": "x + constant, a number or one a channel,",
    "Multiply": "x * constant, a number or one a channel,",
    "Concatenate": "Concatenate of tensors of the model alone",
}
# The same for calls of `keras.ops`.
CALL_REWRITES = {
    "Clip": "keras.layers.ReLU(n), for a clip to 0..n,",
    "Maximum": "keras.layers.ReLU(), for a maximum with 0,",
    "Split": "a slice for each part, such as x[..., :n],",
}

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

# What joins tensors.
_OF_SEVERAL = ("Add", "Multiply", "Concatenate")
# Calls that move codes about and leave their grid alone.
TRANSPARENT = frozenset(
    {
        *("max_pool", "global_max_pool", "pad", "upsample", "dropout"),
        *("reshape", "slice", "transpose"),
    }
)


def kind_of(call: Call) -> str | None:
    """The kind of a call, or `None` for one that quantization does not know."""
    operation = call.operation
    name = type(operation).__name__
    if isinstance(operation, K.Layer):
        kind = _LAYERS.get(type(operation))
        known = kind != "rescaling" or scaling_of(call) is not None
        return kind if known and not (kind and reads_more(call)) else None
    if name == "Pad" and padding_value(call):
        return "filled_pad"
    if name in _ARITHMETIC and len(call.inputs) == 1:
        return None if scaling_of(call) is None else "rescaling"
    if name == "Concatenate" and reads_more(call):
        return None
    return _OPERATIONS.get(name)


def reads_more(call: Call) -> bool:
    """Whether a call reads more than the tensors of its kind: constants among them, or a mask."""
    name = type(call.operation).__name__
    if type(call.operation) is not getattr(K, name, None) and name != "Concatenate":
        return False  # attributes say the rest
    named = {key: value for key, value in call.kwargs.items() if key != "training"}
    leaves = keras.tree.flatten((call.args, named))
    constants = any(leaf is not None and not isinstance(leaf, Ref) for leaf in leaves)
    return constants or (name not in _OF_SEVERAL and len(call.inputs) != 1)


def walk_back(producers: Mapping[int, Call], ref: Ref, kinds) -> Call | None:
    """The first producer behind `ref` whose kind is not in `kinds`; `None` at an input."""
    call = producers.get(ref.index)
    while call is not None and kind_of(call) in kinds:
        call = producers.get(call.inputs[0].index)
    return call


def own_bias(call: Call) -> keras.Variable | None:
    """What a product or a batch norm adds to each channel, its bias or `beta`, or `None`."""
    kind, layer = kind_of(call), call.operation
    if kind == "batch_norm":
        return layer.beta if layer.center else None
    if kind == "product" and layer.use_bias:
        return layer.bias
    return None


def rewrite_of(call: Call) -> str | None:
    """What to write in place of a call that has no integer form; `None` where nothing is known."""
    kind = type(call.operation)
    if kind is getattr(K, kind.__name__, None):
        if kind in _LAYERS and reads_more(call):
            return _ARGUMENTS.get(kind.__name__, f"{kind.__name__} with one tensor and no mask")
        return REWRITES.get(kind.__name__)
    if isinstance(call.operation, K.Layer):
        return None
    if hasattr(keras.activations, kind.__name__.lower()):
        return ACTIVATIONS
    # A minus between two tensors; to take a constant off each pixel is another matter.
    if kind.__name__ == "Subtract" and len(call.inputs) == 2:
        return REWRITES["Subtract"]
    return CALL_REWRITES.get(kind.__name__)


def known_layers() -> list[str]:
    """Names of Keras' own layers that have a kind, those that only augment images aside."""
    return sorted(
        layer.__name__
        for layer, kind in _LAYERS.items()
        if kind != "augmentation" and getattr(K, layer.__name__, None) is layer
    )


def padding_value(call: Call) -> float:
    """What `ops.pad` puts around a tensor; 0.0 for what it takes from the tensor itself."""
    value = dict(call.kwargs).get("constant_values", (*call.args[1:], None)[0])
    return 0.0 if value is None else float(value)


def scaling_of(call: Call) -> tuple[np.ndarray, np.ndarray] | None:
    """`(gain, shift)` of a call of the kind `"rescaling"`: `gain * x + shift`.

    Numbers, or one a channel: float64 arrays of shape `()` or `(channels,)`. `None` where the call
    computes something else, such as with a constant for each pixel.
    """
    operation = call.operation
    if isinstance(operation, K.Rescaling):
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


def normalizing_of(layer: K.Normalization) -> tuple[np.ndarray, np.ndarray] | None:
    """`(gain, shift)` of a built `Normalization`: `gain * x + shift`, one of each or one a channel.

    `None` where it has numbers of its own for other axes than the last.
    """
    mean, variance = float64_of(layer.mean), float64_of(layer.variance)
    if any(n != 1 for n in mean.shape[:-1]):
        return None
    deviation = np.maximum(np.sqrt(variance.reshape(-1)), keras.config.epsilon())
    mean = mean.reshape(-1)
    return (deviation, mean) if layer.invert else (1.0 / deviation, -mean / deviation)


def batch_norm_of(layer: K.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
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


def _is_operation(operation, *names):
    return type(operation).__name__ in names and not isinstance(operation, K.Layer)


def _unlike_ours(name):
    """The name of somebody's own activation, told from Keras' of the same name."""
    return f"custom {name}" if name in _FUNCTIONS.values() else name


def limit_of(operation) -> float | None:
    """The largest value that an activation lets pass, `inf` for none; `None`: it is no clip."""
    name = activation_name(operation)
    if name == "relu_limited":
        return float(_own_activation(operation).max_value)
    return {"relu": math.inf, "relu6": 6.0, "hard_sigmoid": 1.0}.get(name)


def windows_of(operation) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size and strides of a pool's windows, by axis; of a layer or an operation of `keras.ops`."""
    pool, strides = operation.pool_size, operation.strides
    pool = (pool, pool) if isinstance(pool, int) else tuple(pool)
    strides = pool if strides is None else strides
    return pool, (strides, strides) if isinstance(strides, int) else tuple(strides)


def slope_of(operation) -> float:
    """The factor of negative values of a `"leaky_relu"`."""
    # The function of `keras.activations` has no attributes, and this default.
    return float(getattr(_own_activation(operation), "negative_slope", 0.2))


def _own_activation(operation):
    """A layer's activation where it has one, else the operation itself."""
    return getattr(operation, "activation", None) or operation
