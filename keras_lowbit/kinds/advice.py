"""What to write in place of a layer or an operator that has no integer form."""

from __future__ import annotations

import keras

from keras_lowbit.kinds.activations import ACTIVATIONS
from keras_lowbit.kinds.calls import has_kind, reads_more
from keras_lowbit.walk import Call

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

# For layers of the user's own: what is inside them is not looked at.
_OPENED = "what its call computes into the model itself, layer by layer (functional code),"

# What `keras.applications.InceptionResNetV2` adds branches by: a layer without a public name.
_SCALED_SUM = (keras.applications.InceptionResNetV2.__module__, "CustomScaleLayer")


def rewrite_of(call: Call) -> str | None:
    """What to write in place of a call that has no integer form; `None` where nothing is known."""
    kind = type(call.operation)
    if kind is getattr(keras.layers, kind.__name__, None):
        if has_kind(kind) and reads_more(call):
            return _ARGUMENTS.get(kind.__name__, f"{kind.__name__} with one tensor and no mask")
        return REWRITES.get(kind.__name__)
    if (kind.__module__, kind.__name__) == _SCALED_SUM:
        return f"Add()([a, Rescaling({call.operation.scale:g})(b)]), for its tensors [a, b],"
    if isinstance(call.operation, keras.layers.Layer):
        own = kind.__module__.partition(".")[0] not in ("keras", "keras_lowbit")
        return _OPENED if own else None
    if kind.__name__ == "Cast" and "int" in call.inputs[0].dtype:
        return f"Rescaling, which takes {call.inputs[0].dtype} as it is,"
    if hasattr(keras.activations, kind.__name__.lower()):
        return ACTIVATIONS
    # A minus between two tensors; to take a constant off each pixel is another matter.
    if kind.__name__ == "Subtract" and len(call.inputs) == 2:
        return REWRITES["Subtract"]
    return CALL_REWRITES.get(kind.__name__)
