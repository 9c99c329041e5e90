"""What a call of a Keras model is, in the words of quantization."""

from __future__ import annotations

import keras

from keras_lowbit import layers
from keras_lowbit.walk import Call

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
    K.Concatenate: "concatenate",
    K.ReLU: "activation",
    K.Activation: "activation",
    K.Softmax: "activation",
    K.MaxPooling2D: "max_pool",
    K.GlobalMaxPooling2D: "global_max_pool",
    K.AveragePooling2D: "average_pool",
    K.GlobalAveragePooling2D: "global_average_pool",
    K.ZeroPadding2D: "pad",
    K.BatchNormalization: "batch_norm",
    layers.BatchNormalization: "batch_norm",
    K.Flatten: "reshape",
    K.Reshape: "reshape",
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

# `keras.ops` calls: their classes are private to Keras, their names are the functions'.
_OPERATIONS = {
    "Add": "add",
    "Concatenate": "concatenate",
    "Relu": "activation",
    "Relu6": "activation",
    "Softmax": "activation",
    "Sigmoid": "activation",
    "MaxPool": "max_pool",
    "AveragePool": "average_pool",
    "Mean": "global_average_pool",
    "Max": "global_max_pool",
    "Pad": "pad",
    "GetItem": "strided_slice",
    "Reshape": "reshape",
}

# Calls that move codes about and leave their grid alone.
TRANSPARENT = frozenset(
    {"max_pool", "global_max_pool", "pad", "reshape", "dropout", "strided_slice"}
)


def kind_of(call: Call) -> str | None:
    """The kind of a call, or `None` for one that quantization does not know."""
    operation = call.operation
    if isinstance(operation, K.Layer):
        return _LAYERS.get(type(operation))
    return _OPERATIONS.get(type(operation).__name__)


def activation_name(operation) -> str:
    """`"linear"`, `"relu"`, `"relu6"`, `"softmax"` or the name of another activation.

    A ReLU with a slope, a threshold or a limit other than 6 is `"relu_variant"`.
    """
    kind = type(operation).__name__
    if isinstance(operation, K.ReLU):
        if float(operation.negative_slope or 0) or float(operation.threshold or 0):
            return "relu_variant"
        limits = {None: "relu", 6.0: "relu6"}
        limit = operation.max_value
        return limits.get(None if limit is None else float(limit), "relu_variant")
    if isinstance(operation, K.Softmax):
        return "softmax" if operation.axis in (-1, (-1,)) else "softmax_variant"
    if not isinstance(operation, K.Layer):
        return {"Relu": "relu", "Relu6": "relu6", "Softmax": "softmax"}.get(kind, kind.lower())
    function = getattr(operation, "activation", None)
    if function is None:
        return "linear"
    return getattr(function, "__name__", type(function).__name__)
