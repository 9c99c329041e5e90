"""The calls of a model in the words of quantization: kinds, activations, affine maps, advice."""

from keras_lowbit.kinds.activations import (
    ACTIVATIONS,
    CLIPS,
    FIXED_SCALES,
    GATES,
    OF_TWO_TENSORS,
    activation_as_written,
    activation_name,
    is_last_axis,
    limit_of,
    slope_of,
)
from keras_lowbit.kinds.advice import CALL_REWRITES, REWRITES, rewrite_of
from keras_lowbit.kinds.affine import batch_norm_of, normalizing_of, scaling_of
from keras_lowbit.kinds.calls import (
    TRANSPARENT,
    kind_of,
    known_layers,
    own_bias,
    padding_value,
    walk_back,
    windows_of,
)

__all__ = [
    "ACTIVATIONS",
    "CALL_REWRITES",
    "CLIPS",
    "FIXED_SCALES",
    "GATES",
    "OF_TWO_TENSORS",
    "REWRITES",
    "TRANSPARENT",
    "activation_as_written",
    "activation_name",
    "batch_norm_of",
    "is_last_axis",
    "kind_of",
    "known_layers",
    "limit_of",
    "normalizing_of",
    "own_bias",
    "padding_value",
    "rewrite_of",
    "scaling_of",
    "slope_of",
    "walk_back",
    "windows_of",
]
