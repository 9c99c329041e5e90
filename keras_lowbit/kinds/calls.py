"""What a call of a Keras model is, in the words of quantization."""

from __future__ import annotations

from collections.abc import Mapping

import keras

from keras_lowbit import layers
from keras_lowbit.data.augment import RandomCropFlip
from keras_lowbit.kinds.affine import is_arithmetic, scaling_of
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
    if is_arithmetic(operation) and len(call.inputs) == 1:
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


def has_kind(layer: type[keras.layers.Layer]) -> bool:
    """Whether layers of a class have a kind, where their calls read one tensor of the model."""
    return layer in _LAYERS


def known_layers() -> list[str]:
    """Names of Keras' own layers that have a kind, those that only augment images aside."""
    return sorted(
        layer.__name__
        for layer, kind in _LAYERS.items()
        if kind != "augmentation" and getattr(K, layer.__name__, None) is layer
    )


def own_bias(call: Call) -> keras.Variable | None:
    """What a product or a batch norm adds to each channel, its bias or `beta`, or `None`."""
    kind, layer = kind_of(call), call.operation
    if kind == "batch_norm":
        return layer.beta if layer.center else None
    if kind == "product" and layer.use_bias:
        return layer.bias
    return None


def padding_value(call: Call) -> float:
    """What `ops.pad` puts around a tensor; 0.0 for what it takes from the tensor itself."""
    value = dict(call.kwargs).get("constant_values", (*call.args[1:], None)[0])
    return 0.0 if value is None else float(value)


def windows_of(operation) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size and strides of a pool's windows, by axis; of a layer or an operation of `keras.ops`."""
    pool, strides = operation.pool_size, operation.strides
    pool = (pool, pool) if isinstance(pool, int) else tuple(pool)
    strides = pool if strides is None else strides
    return pool, (strides, strides) if isinstance(strides, int) else tuple(strides)
