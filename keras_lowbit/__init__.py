"""Low-bit quantization for Keras 3: the integers you trained are the integers the phone computes.

What this file lists is stable; other names may change.
"""

import importlib

# Whatever a saved model may hold is imported, so that Keras can load it; the rest comes when asked
# for, because all of it together takes longer to import than it should.
from keras_lowbit import (  # noqa: F401
    data,
    distillation,
    layers,
    named_outputs,
    optimizers,
    packed,
    quantizers,
    regularizers,
)
from keras_lowbit.integer import integer_op as _registered  # noqa: F401

_MODULES = ("analysis", "callbacks", "training", "transform", "tuning", "zoo")
_NAMES = {
    "NotExportable": "keras_lowbit.integer.values",
    "Scheme": "keras_lowbit.scheme",
    "calibrate": "keras_lowbit.transform",
    "correct_biases": "keras_lowbit.transform",
    "expand_transposed": "keras_lowbit.transform",
    "fold_batchnorm": "keras_lowbit.transform",
    "freeze": "keras_lowbit.transform",
    "integer_weights": "keras_lowbit.analysis",
    "quantize_model": "keras_lowbit.transform",
    "reconstruct": "keras_lowbit.tuning",
    "reestimate_batchnorm": "keras_lowbit.transform",
    "rescale_pairs": "keras_lowbit.transform",
    "save_packed": "keras_lowbit.packed",
    "snap_biases": "keras_lowbit.transform",
    "snap_levels": "keras_lowbit.transform",
    "summary": "keras_lowbit.analysis",
    "tune_thresholds": "keras_lowbit.tuning",
}

__all__ = [
    "NotExportable",
    "Scheme",
    "analysis",
    "calibrate",
    "callbacks",
    "correct_biases",
    "data",
    "distillation",
    "expand_transposed",
    "fold_batchnorm",
    "freeze",
    "integer_weights",
    "layers",
    "optimizers",
    "quantize_model",
    "quantizers",
    "reconstruct",
    "reestimate_batchnorm",
    "regularizers",
    "rescale_pairs",
    "save_packed",
    "snap_biases",
    "snap_levels",
    "summary",
    "training",
    "transform",
    "tune_thresholds",
    "tuning",
    "zoo",
]
__version__ = "0.1.0"


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"keras_lowbit.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'keras_lowbit' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
