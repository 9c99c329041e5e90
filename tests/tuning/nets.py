"""Tiny nets of every shape that tuning must handle, and their data."""

import keras
import numpy as np

from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.quantize_model import quantize_model

K = keras.layers
SHAPE = (9, 7, 3)


def images(n=24, seed=0):
    """Random images."""
    return np.random.default_rng(seed).normal(size=(n, *SHAPE)).astype("float32")


def norm(x, name):
    """A batch norm."""
    return K.BatchNormalization(name=name)(x)


def mobile(norms=True, softmax=False, seed=1):
    """Stem, a bottleneck without and one with a residual, head: like MobileNetV2."""
    bias = not norms
    norm_ = norm if norms else lambda x, name: x

    def bottleneck(x, name, stride, out):
        y = K.Conv2D(8, 1, use_bias=bias, name=f"{name}_expand")(x)
        y = K.ReLU(6.0, name=f"{name}_expand_relu")(norm_(y, f"{name}_expand_bn"))
        y = K.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=bias, name=f"{name}_dw")(
            y
        )
        y = K.ReLU(6.0, name=f"{name}_dw_relu")(norm_(y, f"{name}_dw_bn"))
        y = K.Conv2D(out, 1, use_bias=bias, name=f"{name}_project")(y)
        return norm_(y, f"{name}_project_bn")

    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, padding="same", use_bias=bias, name="stem")(inputs)
    x = K.ReLU(6.0, name="stem_relu")(norm_(x, "stem_bn"))
    x = bottleneck(x, "b1", 2, 5)
    x = K.Add(name="b2_add")([x, bottleneck(x, "b2", 1, 5)])
    x = bottleneck(x, "b3", 2, 6)
    x = K.GlobalAveragePooling2D(name="pool")(x)
    x = K.Dense(4, activation="softmax" if softmax else None, name="head")(x)
    model = keras.Model(inputs, x, name="mobile")
    return spread(model, seed)


def spread(model, seed=1):
    """Random weights, the same on every backend; batch norms away from their neutral values."""
    random = np.random.default_rng(seed)
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            shape = layer.kernel.shape
            depthwise = isinstance(layer, K.DepthwiseConv2D)
            fan_in = np.prod(shape[:2] if depthwise else shape[:-1])
            layer.kernel.assign(random.normal(size=shape) * np.sqrt(2 / fan_in))
        if isinstance(layer, K.BatchNormalization):
            n = layer.moving_mean.shape[0]
            layer.set_weights(
                [
                    random.uniform(0.5, 1.5, n),
                    random.normal(size=n) * 0.3,
                    random.normal(size=n) * 0.1,
                    random.uniform(0.2, 1.0, n),
                ]
            )
        elif getattr(layer, "use_bias", False):
            layer.bias.assign(random.normal(size=layer.bias.shape) * 0.1)
    return model


def quantized(model, scheme="w4a4", n=24):
    """Quantized and calibrated."""
    return calibrate(quantize_model(model, scheme), images(n))


def small(norms=False, seed=3):
    """A stem, a residual block, a head: three blocks that compile in a moment."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, strides=2, use_bias=not norms, name="stem")(inputs)
    x = K.ReLU(name="stem_relu")(norm(x, "stem_bn") if norms else x)
    y = K.DepthwiseConv2D(3, padding="same", use_bias=not norms, name="dw")(x)
    y = norm(y, "dw_bn") if norms else y
    x = K.Add(name="sum")([x, y])
    x = K.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(inputs, K.Dense(4, name="head")(x), name="small")
    return spread(model, seed)
