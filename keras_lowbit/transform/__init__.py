"""Model in, model out: quantize, calibrate, re-estimate, freeze."""

from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.freeze import freeze
from keras_lowbit.transform.quantize_model import quantize_model
from keras_lowbit.transform.reestimate import reestimate_batchnorm

__all__ = ["calibrate", "freeze", "quantize_model", "reestimate_batchnorm"]
