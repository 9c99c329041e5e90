"""Brevitas on PyTorch: 4-bit kernels, a scale a filter; ReLUs with learned scales; ends at 8."""

import functools

import brevitas.nn as qnn
import torch
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
from torch import nn

from tests.benchmarks.peers import task


def quantized_conv(inputs, filters, size, strides=1, bits=4):
    return qnn.QuantConv2d(
        inputs,
        filters,
        size,
        stride=strides,
        padding=size // 2,
        bias=False,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=bits,
    )


def quantized_relu():
    # The first steps collect percentiles to start a scale from; what lasts is what is timed.
    return qnn.QuantReLU(bit_width=4, collect_stats_steps=1)


def quantized_ends(inputs):
    head = qnn.QuantLinear(inputs, task.CLASSES, bias=True, weight_bit_width=8)
    first = qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, collect_stats_steps=1)
    return first, functools.partial(quantized_conv, bits=8), head


def float_conv(inputs, filters, size, strides=1):
    return nn.Conv2d(inputs, filters, size, stride=strides, padding=size // 2, bias=False)


def float_ends(inputs):
    return nn.Identity(), float_conv, nn.Linear(inputs, task.CLASSES)


class Block(nn.Module):
    def __init__(self, inputs, filters, strides, conv, relu):
        super().__init__()
        self.inside = nn.Sequential(
            conv(inputs, filters, 3, strides),
            nn.BatchNorm2d(filters),
            relu(),
            conv(filters, filters, 3),
            nn.BatchNorm2d(filters),
        )
        shortcut = (conv(inputs, filters, 1, strides), nn.BatchNorm2d(filters))
        self.shortcut = nn.Sequential(*(shortcut if strides > 1 else ()))
        self.relu = relu()

    def forward(self, x):
        return self.relu(self.inside(x) + self.shortcut(x))


def resnet20(blocks, conv, relu, ends):
    """The graph of `keras_net.resnet20`."""
    first, stem, head = ends(64)
    layers = [first, stem(3, 16, 3), nn.BatchNorm2d(16), relu()]
    inputs = 16
    for group, filters in enumerate((16, 32, 64)):
        for block in range(blocks):
            layers.append(Block(inputs, filters, 2 if group and not block else 1, conv, relu))
            inputs = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def step_of(net, x, y):
    """One step of SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net.train()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main():
    given = task.arguments(__doc__)
    images, classes = task.batch_of(given.batch)
    # Either order of the memory may be the faster one; each net is timed in both.
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    orders = {"channels first": x.contiguous(), "channels last": x}
    kinds = {
        "float": (float_conv, nn.ReLU, float_ends),
        "quantized": (quantized_conv, quantized_relu, quantized_ends),
    }
    steps = {
        (kind, form): step_of(resnet20(given.blocks, *parts), inputs, torch.from_numpy(classes))
        for form, inputs in orders.items()
        for kind, parts in kinds.items()
    }
    task.report("Brevitas", "w4a4", ("brevitas", "torch"), steps, given)


if __name__ == "__main__":
    main()
