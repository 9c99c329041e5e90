"""Larq: binary kernels and inputs, ends in float; the sign at each input replaces the ReLU."""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import functools

import larq
import tf_keras as keras

from tests.benchmarks.peers import keras_net, task


def conv(filters, size, strides):
    return larq.layers.QuantConv2D(
        filters,
        size,
        strides=strides,
        padding="same",
        use_bias=False,
        input_quantizer="ste_sign",
        kernel_quantizer="ste_sign",
        kernel_constraint="weight_clip",
    )


def no_relu():
    return keras.layers.Activation("linear")


def main():
    given = task.arguments(__doc__)
    float_net = functools.partial(keras_net.resnet20, keras, given.blocks)
    steps = keras_net.steps_of(
        keras,
        float_net,
        functools.partial(float_net, conv=conv, relu=no_relu),
        task.batch_of(given.batch),
        keras_net.TENSORFLOW_FORMS,
    )
    task.report("Larq", "w1a1", ("larq", "tf-keras", "tensorflow"), steps, given)


if __name__ == "__main__":
    main()
