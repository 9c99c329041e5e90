"""Integer `.tflite` files of quantized Keras models, each proven code by code."""

from keras_lowbit.integer.values import NotExportable
from tflite_export.convert import ExportResult, check, convert

__all__ = ["ExportResult", "NotExportable", "check", "convert"]
