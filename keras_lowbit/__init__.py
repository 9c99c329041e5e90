"""Low-bit quantization for Keras 3: the integers you trained are the integers the phone computes.

What this file lists is stable; other names may change.
"""

from keras_lowbit import analysis, callbacks, data, layers, quantizers, transform, zoo
from keras_lowbit.analysis import integer_weights, summary
from keras_lowbit.integer import integer_op as _registered  # noqa: F401 - so that files load
from keras_lowbit.integer.emit import NotExportable
from keras_lowbit.packed import save_packed
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform import (
    calibrate,
    correct_biases,
    fold_batchnorm,
    freeze,
    quantize_model,
    reestimate_batchnorm,
)

__all__ = [
    "NotExportable",
    "Scheme",
    "analysis",
    "calibrate",
    "callbacks",
    "correct_biases",
    "data",
    "fold_batchnorm",
    "freeze",
    "integer_weights",
    "layers",
    "quantize_model",
    "quantizers",
    "reestimate_batchnorm",
    "save_packed",
    "summary",
    "transform",
    "zoo",
]
__version__ = "0.1.0"
