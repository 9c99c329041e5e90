"""Tuning without labels: a quantized model against the float model that it was made from."""

from keras_lowbit.tuning.block_model import Rates
from keras_lowbit.tuning.reconstruct import BlockResult, Reconstruction, reconstruct
from keras_lowbit.tuning.refine import refine
from keras_lowbit.tuning.thresholds import Tuning, tune_thresholds

__all__ = [
    "BlockResult",
    "Rates",
    "Reconstruction",
    "Tuning",
    "reconstruct",
    "refine",
    "tune_thresholds",
]
