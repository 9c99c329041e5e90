"""The arithmetic of `reference` in `keras.ops`: equal codes, eager and compiled.

Codes travel as float32 tensors that hold integers. No backend convolves or pools int32 on a
CPU, and float32 adds integers exactly up to 2^24, in any order and with or without fused
multiply-adds. Whatever may be larger is added in int32. The one inexact step of a product is a
single float32 multiplication with nothing but a rounding behind it, so there is nothing that a
compiler could contract or reassociate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_lowbit.integer import graph as ir
from keras_lowbit.numerics import backend
from keras_lowbit.numerics.fixed_point import (
    CODE_RANGES,
    activation_bounds,
    add_parameters,
    logistic_codes,
    product_multiplier,
    softmax_powers,
)
from keras_lowbit.numerics.windows import positions_seen

EXACT_IN_FLOAT32 = 2**24
_INT32_MAX = 2**31 - 1
# Axes of a kernel that a sum of products runs over; they lead in every layout.
_SUMMED_AXES = {ir.Conv2D: 3, ir.DepthwiseConv2D: 2, ir.FullyConnected: 1}


class Split(NamedTuple):
    """How a kernel is taken apart so that every float32 sum of its products is exact.

    Args:
        nibbles: whether the codes are `16 * high + low`, both in -8..8, convolved one by one.
        slabs: how many parts the summed positions are dealt to.
    """

    nibbles: bool = False
    slabs: int = 1


WHOLE = Split()


def run(
    op: ir.Op,
    operands: Sequence,
    grids: Sequence[ir.Tensor],
    out: ir.Tensor,
    constants: Mapping[str, object],
    split: Split = WHOLE,
):
    """Codes of the output of one operation.

    Args:
        op: kind and attributes; its arrays are not read.
        operands: one tensor an input, of any dtype, with any batch.
        grids: the graph's tensors that `operands` are.
        out: the graph's tensor to compute.
        constants: backend tensors by name: the operation's own and those of `derived`.
        split: that of `choose_split`, for products.

    Returns:
        float32 tensor that holds the codes (reals for `Dequantize`).
    """
    operands = [ops.cast(x, "float32") for x in operands]
    if isinstance(op, ir.Product):
        return _product(op, operands[0], grids[0], out, constants, split)
    return _FUNCTIONS[type(op)](op, operands, grids, out)


def derived(op: ir.Op, grids: Sequence[ir.Tensor], out: ir.Tensor) -> dict[str, np.ndarray]:
    """Constants that follow from the operation and its grids, computed once by NumPy."""
    if isinstance(op, ir.Product):
        return {"multiplier": product_multiplier(grids[0].scale, op.kernel_scale, out.scale)}
    return {}


# --- products -------------------------------------------------------------------------------


def choose_split(op: ir.Product, grid: ir.Tensor) -> Split:
    """The cheapest split whose float32 sums are exact for every input.

        max |x - zero_point| * sum |part of kernel|  <=  2^24          for each output channel

    Raises:
        ValueError: if a sum, bias included, could leave int32.
    """
    lo, hi = CODE_RANGES[grid.dtype]
    reach = max(hi - grid.zero_point, grid.zero_point - lo)
    axes = tuple(range(_SUMMED_AXES[type(op)]))

    def largest(part):
        return reach * np.abs(part.astype(np.int64)).sum(axes).reshape(-1)

    total = largest(op.kernel) + np.abs(op.bias.astype(np.int64))
    if total.max(initial=0) > _INT32_MAX:
        raise ValueError(
            f"{op.kind} {op.output}: a sum can reach {total.max()} and leave int32 "
            f"(at most {_INT32_MAX}). Use fewer inputs, smaller kernel codes or a smaller bias."
        )
    split = WHOLE
    while any(
        largest(ops.convert_to_numpy(part)).max(initial=0) > EXACT_IN_FLOAT32
        for _, part in kernel_parts(type(op), op.kernel, split)
    ):
        split = Split(nibbles=True, slabs=split.slabs + split.nibbles)
    return split


def kernel_parts(kind: type[ir.Product], kernel, split: Split) -> list[tuple[int, object]]:
    """`(weight, float32 codes)` pairs with `sum(weight * codes) == kernel`."""
    codes = ops.cast(kernel, "float32")
    digits = [(1, codes)]
    if split.nibbles:
        high = ops.round(codes / 16.0)
        digits = [(16, high), (1, codes - 16.0 * high)]
    if split.slabs == 1:
        return digits
    summed = tuple(kernel.shape[: _SUMMED_AXES[kind]])
    slab = np.arange(np.prod(summed)) * split.slabs // np.prod(summed)
    slab = slab.reshape(summed + (1,) * (len(kernel.shape) - len(summed)))
    masks = [ops.convert_to_tensor(slab == i, "float32") for i in range(split.slabs)]
    return [(weight, part * mask) for weight, part in digits for mask in masks]


def _product(op, x, grid, out, constants, split):
    """`clip(rint(float32(sum + bias) * m) + zero_point)`: one rounding, half to even."""
    # Centred codes: the zeros of SAME padding then stand for real zeros.
    x = x - float(grid.zero_point)
    sums = ops.convert_to_tensor(constants["bias"])
    for weight, part in kernel_parts(type(op), constants["kernel"], split):
        sums = sums + weight * ops.cast(_SUMS[type(op)](op, x, part), "int32")
    steps = ops.round(ops.cast(sums, "float32") * ops.convert_to_tensor(constants["multiplier"]))
    return _clip(steps, op.activation, out)


def _conv_sums(op, x, kernel):
    return ops.conv(x, kernel, **_window(op), dilation_rate=op.dilation)


def _depthwise_sums(op, x, kernel):
    return _depthwise(x, kernel, _window(op), op.dilation)


def _fully_connected_sums(op, x, kernel):
    return ops.matmul(x, kernel)


def _depthwise(x, kernel, window, dilation=(1, 1)):
    if window["strides"][0] == window["strides"][1]:
        return backend.depthwise(x, kernel, window["strides"], window["padding"], dilation)
    # TensorFlow's depthwise kernel wants equal strides; grouped convolution is the same sum.
    height, width, channels, multiplier = kernel.shape
    kernel = ops.reshape(kernel, (height, width, 1, channels * multiplier))
    return ops.conv(x, kernel, **window, dilation_rate=dilation)


def _window(op):
    return {
        "strides": op.strides,
        "padding": op.padding.lower(),
        "data_format": "channels_last",
    }


def _clip(steps, activation, out):
    """Steps from the zero point -> codes inside the activation's bounds."""
    zero_point = out.zero_point
    lo, hi = activation_bounds(activation, out.scale, zero_point, out.dtype)
    return ops.clip(steps, float(lo - zero_point), float(hi - zero_point)) + float(zero_point)


# --- everything else ------------------------------------------------------------------------


def _add(op, operands, grids, out):
    """`((a - zp_a) k_a + (b - zp_b) k_b + half) >> shift`, in int32.

    Each term stays below 255 * 2^21 < 2^29 and half is at most 2^29, so nothing overflows.
    """
    k_a, k_b, shift = add_parameters(grids[0].scale, grids[1].scale, out.scale)
    total = _steps(operands[0], grids[0]) * k_a + _steps(operands[1], grids[1]) * k_b
    steps = ops.right_shift(total + (1 << (shift - 1)), shift)
    return _clip(ops.cast(steps, "float32"), op.activation, out)


def _multiply(op, operands, grids, out):
    """Products of at most 255^2 are exact in float32; one multiplication, then the rounding."""
    first, second = (x - float(grid.zero_point) for x, grid in zip(operands, grids, strict=True))
    multiplier = float(product_multiplier(grids[0].scale, grids[1].scale, out.scale))
    return _clip(ops.round(first * second * multiplier), op.activation, out)


def _steps(x, grid):
    return ops.cast(x, "int32") - grid.zero_point


def _max_pool(op, operands, grids, out):
    return ops.max_pool(operands[0], op.pool, **_window(op))


def _average_pool(op, operands, grids, out):
    """Integer mean of raw codes, half away from zero; padding is not counted."""
    x = operands[0]
    kernel = np.ones((*op.pool, x.shape[-1], 1), np.float32)
    # Sums as a depthwise convolution: the pools of the backends divide, each in its own way.
    sums = ops.cast(_depthwise(x, kernel, _window(op)), "int32")
    seen = [
        positions_seen(x.shape[axis + 1], op.pool[axis], op.strides[axis], op.padding)
        for axis in (0, 1)
    ]
    counts = ops.convert_to_tensor(np.multiply.outer(*seen)[:, :, None], "int32")
    means = ops.floor_divide(ops.abs(sums) + counts // 2, counts)
    return ops.cast(ops.sign(sums) * means, "float32")


def _softmax(op, operands, grids, out):
    """`256 p - 128`, half away from zero, every float32 step in the runtime's order."""
    codes = ops.cast(operands[0], "int32")
    below_max = ops.max(codes, axis=-1, keepdims=True) - codes
    powers = ops.take(softmax_powers(grids[0].scale), below_max, axis=0)
    # One by one: `sum` and `cumsum` add in an order, or a width, of their own on each backend.
    by_class = ops.moveaxis(powers, -1, 0)
    nothing = ops.zeros_like(by_class[0])
    total, _ = ops.scan(lambda so_far, power: (so_far + power, so_far), nothing, by_class)
    p = powers * (1.0 / (total[..., None] * np.float32(out.scale)))
    # A comparison with an exact half, because `floor(p + 0.5)` rounds and may be contracted.
    whole = ops.floor(p)
    steps = whole + ops.cast(p >= whole + 0.5, "float32")
    lo, hi = CODE_RANGES[out.dtype]
    return ops.clip(steps + float(out.zero_point), float(lo), float(hi))


def _logistic(op, operands, grids, out):
    table = logistic_codes(grids[0].scale, grids[0].zero_point).astype(np.float32)
    return ops.take(table, ops.cast(operands[0], "int32") + 128, axis=0)


def _quantize(op, operands, grids, out):
    if grids[0].dtype == "float32":
        # The runtime multiplies by the reciprocal; a division rounds near-ties differently.
        per_real = np.float32(1) / np.float32(out.scale)
        return _clip(ops.round(operands[0] * per_real), "none", out)
    return operands[0] + float(out.zero_point - grids[0].zero_point)


def _concatenate(op, operands, grids, out):
    return ops.concatenate(operands, op.axis)


def _pad(op, operands, grids, out):
    return ops.pad(operands[0], op.paddings, constant_values=float(out.zero_point))


def _resize_nearest(op, operands, grids, out):
    return ops.repeat(ops.repeat(operands[0], op.factors[0], 1), op.factors[1], 2)


def _reshape(op, operands, grids, out):
    return ops.reshape(operands[0], (-1, *out.shape[1:]))


def _slice(op, operands, grids, out):
    _, *ends = zip(op.begin, out.shape, strict=True)
    return operands[0][:, *(slice(at, at + size) for at, size in ends)]


def _transpose(op, operands, grids, out):
    return ops.transpose(operands[0], op.order)


def _dequantize(op, operands, grids, out):
    return (operands[0] - float(grids[0].zero_point)) * np.float32(grids[0].scale)


_SUMS: Mapping[type, Callable] = {
    ir.Conv2D: _conv_sums,
    ir.DepthwiseConv2D: _depthwise_sums,
    ir.FullyConnected: _fully_connected_sums,
}

_FUNCTIONS: Mapping[type, Callable] = {
    ir.Add: _add,
    ir.Multiply: _multiply,
    ir.MaxPool2D: _max_pool,
    ir.AveragePool2D: _average_pool,
    ir.Concatenate: _concatenate,
    ir.Pad: _pad,
    ir.ResizeNearest: _resize_nearest,
    ir.Reshape: _reshape,
    ir.Slice: _slice,
    ir.Transpose: _transpose,
    ir.Softmax: _softmax,
    ir.Logistic: _logistic,
    ir.Quantize: _quantize,
    ir.Dequantize: _dequantize,
}
