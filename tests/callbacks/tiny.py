"""A tiny quantized model and its data, for the tests of callbacks."""

import keras
import numpy as np

from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.quantize_model import quantize_model

SHAPE = (5, 7, 2)


def images(n=24):
    """`n` random images and their classes, 0..2."""
    random = np.random.default_rng(3)
    x = random.normal(size=(n, *SHAPE)).astype("float32")
    return x, (np.arange(n) % 3).astype("int32")


def float_model(dropout=0.0):
    """Three products, so that one of them is no end; two batch norms; ReLU and an odd size."""
    inputs = keras.Input(SHAPE)
    x = keras.layers.Conv2D(3, 3, use_bias=False, padding="same", name="first")(inputs)
    x = keras.layers.ReLU(name="relu1")(keras.layers.BatchNormalization(name="bn1")(x))
    x = keras.layers.Conv2D(4, 3, strides=2, use_bias=False, name="middle")(x)
    x = keras.layers.ReLU(name="relu2")(keras.layers.BatchNormalization(name="bn2")(x))
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    if dropout:
        x = keras.layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="last")(x), name="tiny")


def model(scheme="w4a4", dropout=0.0, compiled=True):
    """Quantized, calibrated, compiled with Adam."""
    quantized = calibrate(quantize_model(float_model(dropout), scheme), images()[0])
    if compiled:
        compile_(quantized)
    return quantized


def compile_(quantized):
    """Adam and cross-entropy."""
    # Adam moves a scale by its learning rate a step, and 8-bit scales here are 0.003. XLA is
    # Keras' own choice on TensorFlow and costs seconds of compilation.
    quantized.compile(
        keras.optimizers.Adam(1e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )


def bits(quantized):
    """`{layer.argument: bits}` of every quantizer."""
    return {f"{s.layer_name}.{s.argument}": s.quantizer.bits for s in sites_of(quantized)}


def train(quantized, callbacks, epochs, n=24, **kwargs):
    """`fit` in order, three batches an epoch; the history."""
    x, y = images(n)
    return quantized.fit(
        x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **kwargs
    )
