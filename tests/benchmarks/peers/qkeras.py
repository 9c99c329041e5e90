"""QKeras: fixed-point kernels and ReLUs at 4 bits, ends at 8; scales are not learned there."""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import functools

import qkeras
import tf_keras as keras

from tests.benchmarks.peers import keras_net, task


def conv(filters, size, strides, bits=4):
    return qkeras.QConv2D(
        filters,
        size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_quantizer=qkeras.quantized_bits(bits, 0, 1, alpha=1),
    )


def relu():
    return qkeras.QActivation(qkeras.quantized_relu(4, 2))


def dense(classes):
    kernel, bias = (qkeras.quantized_bits(8, 0, 1, alpha=1) for _ in range(2))
    return qkeras.QDense(classes, kernel_quantizer=kernel, bias_quantizer=bias)


def main():
    given = task.arguments(__doc__)
    float_net = functools.partial(keras_net.resnet20, keras, given.blocks)
    stem = functools.partial(conv, bits=8)
    steps = keras_net.steps_of(
        keras,
        float_net,
        functools.partial(float_net, conv=conv, relu=relu, dense=dense, stem=stem),
        task.batch_of(given.batch),
        keras_net.TENSORFLOW_FORMS,
    )
    task.report("QKeras", "w4a4", ("QKeras", "tf-keras", "tensorflow"), steps, given)


if __name__ == "__main__":
    main()
