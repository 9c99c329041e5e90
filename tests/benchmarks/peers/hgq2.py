"""HGQ2: starts at 4 bits, one width a tensor; widths are trained and their cost is in the loss."""

import functools

import keras
from hgq.config import QuantizerConfig
from hgq.layers import QConv2D, QDense

from tests.benchmarks.peers import keras_net, task

ONE_WIDTH = {"homogeneous_axis": None, "heterogeneous_axis": ()}


def kernel(bits):
    # b0 leaves out the sign.
    return QuantizerConfig("kbi", "weight", b0=bits - 1, i0=0, **ONE_WIDTH)


def values(bits, signed):
    whole = 2
    return QuantizerConfig(
        "kif", "datalane", k0=signed, i0=whole, f0=bits - whole - signed, **ONE_WIDTH
    )


def conv(filters, size, strides, bits=4, signed=False):
    return QConv2D(
        filters,
        size,
        strides=strides,
        padding="same",
        use_bias=False,
        kq_conf=kernel(bits),
        iq_conf=values(bits, signed),
    )


def dense(classes):
    return QDense(classes, kq_conf=kernel(8), iq_conf=values(8, False))


def main():
    given = task.arguments(__doc__)
    float_net = functools.partial(keras_net.resnet20, keras, given.blocks)
    stem = functools.partial(conv, bits=8, signed=True)
    steps = keras_net.steps_of(
        keras,
        float_net,
        functools.partial(float_net, conv=conv, dense=dense, stem=stem),
        task.batch_of(given.batch),
        keras_net.TENSORFLOW_FORMS,
    )
    task.report("HGQ2", "w4a4", ("HGQ2", "keras", "tensorflow-cpu"), steps, given)


if __name__ == "__main__":
    main()
