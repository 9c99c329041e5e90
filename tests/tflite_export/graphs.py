"""Integer graphs built by hand, for tests of the reference and of the writer."""

import numpy as np

from keras_lowbit.integer import graph as ir


class Builder:
    """Grows a graph: every method adds one operation and returns its output's name.

    Output shapes come from a run of the reference; output scales are such that random codes
    fill the range of int8.
    """

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.tensors = {}
        self.ops = []
        self.inputs = []

    def tensor(self, name, shape, scale=0.02, zero_point=3, dtype="int8"):
        self.tensors[name] = ir.Tensor(name, tuple(shape), dtype, scale, zero_point)
        return name

    def input(self, *shape, name="x", **grid):
        self.inputs.append(name)
        return self.tensor(name, shape, **grid)

    def op(self, kind, *inputs, shape, scale, zero_point=-5, dtype="int8", name=None, **fields):
        name = name or f"{kind.kind}_{len(self.ops)}"
        self.tensor(name, shape, scale, zero_point, dtype)
        self.ops.append(kind(inputs, name, source=name, **fields))
        return name

    def same_grid(self, kind, *inputs, shape, **fields):
        first = self.tensors[inputs[0]]
        return self.op(
            kind, *inputs, shape=shape, scale=first.scale, zero_point=first.zero_point, **fields
        )

    def product(
        self, kind, x, kernel_shape, shape, *, codes=(-127, 128), scale=None, gain=1, **fields
    ):
        channels = shape[-1]
        kernel = self.random.integers(*codes, kernel_shape).astype(np.int8)
        kernel_scale = (gain * self.random.uniform(0.005, 0.02, channels)).astype(np.float32)
        bias = self.random.integers(-2000, 2000, channels).astype(np.int32)
        if scale is None:
            products = kernel.size / channels
            spread = 74 * np.sqrt(products) * max(kernel.std(), 1) * 0.0125 * gain
            scale = float(self.tensors[x].scale * spread / 60)
        return self.op(
            kind,
            x,
            shape=shape,
            scale=scale,
            kernel=kernel,
            kernel_scale=kernel_scale,
            bias=bias,
            **fields,
        )

    def copy(self, x, **grid):
        """Codes on another grid: a depthwise convolution of ones."""
        shape = self.tensors[x].shape
        return self.op(
            ir.DepthwiseConv2D,
            x,
            shape=shape,
            kernel=np.ones((1, 1, shape[-1], 1), np.int8),
            kernel_scale=np.ones(shape[-1], np.float32),
            bias=np.zeros(shape[-1], np.int32),
            **grid,
        )

    def graph(self, *outputs):
        return ir.Graph(self.tensors, tuple(self.ops), tuple(self.inputs), outputs)

    def codes(self, shape, dtype="int8"):
        low = -128 if dtype == "int8" else 0
        return self.random.integers(low, low + 256, shape).astype(dtype)


def small_network(storage="int8", seed=0):
    """Every kind of operation once or more, odd sizes, uint8 pixels to float32 probabilities."""
    b = Builder(seed)
    x = b.input(1, 13, 11, 3, scale=1 / 127.5, zero_point=128, dtype="uint8")
    x = b.op(ir.Quantize, x, shape=(1, 13, 11, 3), scale=1 / 127.5, zero_point=0)
    paddings = ((0, 0), (0, 1), (1, 0), (0, 0))
    x = b.same_grid(ir.Pad, x, shape=(1, 14, 12, 3), paddings=paddings)
    x = b.product(ir.Conv2D, x, (3, 3, 3, 8), (1, 6, 5, 8), strides=(2, 2))
    y = b.copy(x, scale=6 / 15, zero_point=-128, activation="relu6", name="clipped")
    y = b.product(ir.DepthwiseConv2D, y, (3, 3, 8, 2), (1, 6, 5, 16), padding="SAME")
    y = b.product(
        ir.FullyConnected,
        y,
        (16, 8),
        (1, 6, 5, 8),
        codes=(-7, 8),
        storage=storage,
        name="pointwise",
    )
    x = b.op(ir.Add, x, y, shape=(1, 6, 5, 8), scale=b.tensors[x].scale * 2, activation="relu")
    p = b.same_grid(ir.MaxPool2D, x, shape=(1, 3, 3, 8), padding="SAME")
    q = b.same_grid(ir.AveragePool2D, x, shape=(1, 3, 3, 8), padding="SAME")
    x = b.same_grid(ir.Concatenate, p, q, shape=(1, 3, 3, 16), axis=-1)
    x = b.same_grid(ir.AveragePool2D, x, shape=(1, 1, 1, 16), pool=(3, 3), strides=(3, 3))
    x = b.same_grid(ir.Reshape, x, shape=(1, 16))
    # The gain gives logits that leave few probabilities at 0 or 1.
    fields = {"codes": (-7, 8), "storage": storage, "gain": 0.5}
    x = b.product(ir.FullyConnected, x, (16, 10), (1, 10), **fields)
    x = b.op(ir.Softmax, x, shape=(1, 10), scale=1 / 256, zero_point=-128)
    x = b.op(ir.Dequantize, x, shape=(1, 10), scale=None, dtype="float32", name="probabilities")
    # From dark to bright, so that images differ after the last pool too.
    images = b.codes((9, 13, 11, 3), "uint8") * np.linspace(0, 1, 9)[:, None, None, None]
    return b.graph(x), images.astype(np.uint8)
