"""Model in, model out: quantize, calibrate, re-estimate, fold, freeze."""

from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.correct_biases import correct_biases
from keras_lowbit.transform.expand_transposed import expand_transposed
from keras_lowbit.transform.fold_batchnorm import fold_batchnorm
from keras_lowbit.transform.freeze import freeze
from keras_lowbit.transform.quantize_model import quantize_model
from keras_lowbit.transform.reestimate import reestimate_batchnorm
from keras_lowbit.transform.rescale_depthwise import rescale_pairs
from keras_lowbit.transform.snap_biases import snap_biases
from keras_lowbit.transform.snap_levels import snap_levels

__all__ = [
    "calibrate",
    "correct_biases",
    "expand_transposed",
    "fold_batchnorm",
    "freeze",
    "quantize_model",
    "reestimate_batchnorm",
    "rescale_pairs",
    "snap_biases",
    "snap_levels",
]
