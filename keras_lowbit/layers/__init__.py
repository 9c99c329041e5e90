"""Quantized layers and the borders between reals and codes."""

from keras_lowbit.layers.average_pool import AveragePooling2D
from keras_lowbit.layers.batch_norm import BatchNormalization
from keras_lowbit.layers.border import Dequantize, Quantize
from keras_lowbit.layers.conv import (
    QuantizedConv2D,
    QuantizedDepthwiseConv2D,
    QuantizedSeparableConv2D,
)
from keras_lowbit.layers.dense import QuantizedDense

__all__ = [
    "AveragePooling2D",
    "BatchNormalization",
    "Dequantize",
    "Quantize",
    "QuantizedConv2D",
    "QuantizedDense",
    "QuantizedDepthwiseConv2D",
    "QuantizedSeparableConv2D",
]
