"""What a graph computes: a NumPy interpreter, one small function an operation.

This file is the definition. The runtime, the frozen Keras model and the written file are all
compared with it, code for code. Every function takes the codes of its inputs as integers and
returns the codes of the output, before they are cast to its dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keras_lowbit.integer import graph as ir
from keras_lowbit.numerics import windows
from keras_lowbit.numerics.fixed_point import (
    CODE_RANGES,
    activation_bounds,
    add_parameters,
    logistic_codes,
    product_multiplier,
    softmax_powers,
)

_INT32 = np.iinfo(np.int32)


def run(graph: ir.Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute every tensor of the graph.

    Args:
        graph: the integer graph.
        inputs: codes (or float32 values) by input name. The first axis may hold any number
            of samples, whatever batch the graph states.

    Returns:
        name -> array of the tensor's dtype, for every input and every operation's output.

    Raises:
        ValueError: for a missing or unknown input, or one of another shape or dtype.
    """
    values = checked_inputs(graph, inputs)
    for op in graph:
        operands = [_wide(values[name]) for name in op.inputs]
        grids = [graph.tensors[name] for name in op.inputs]
        out = graph.tensors[op.output]
        values[op.output] = _FUNCTIONS[type(op)](op, operands, grids, out).astype(out.dtype)
    return values


def checked_inputs(graph: ir.Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs as arrays, by name, or a ValueError that says which one does not fit."""
    if set(inputs) != set(graph.inputs):
        raise ValueError(f"The graph's inputs are {list(graph.inputs)}. Got {list(inputs)}")
    arrays = {name: np.asarray(inputs[name]) for name in graph.inputs}
    for name, array in arrays.items():
        tensor = graph.tensors[name]
        if array.dtype != tensor.dtype or array.shape[1:] != tensor.shape[1:]:
            shape = ", ".join(["N", *map(str, tensor.shape[1:])])
            raise ValueError(
                f"Input {name} must be {tensor.dtype} of shape ({shape}). "
                f"Got {array.dtype} of shape {array.shape}"
            )
    if len({len(array) for array in arrays.values()}) > 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"All inputs must hold the same number of samples. Got {shapes}")
    return arrays


def same_padding(size: int, window: int, stride: int, padding: str) -> tuple[int, int]:
    """Zeros before and after one axis. SAME puts the odd one after.

    Args:
        size: length of the axis.
        window: extent of the kernel, dilation included.
        stride: step of the window.
        padding: `"SAME"` or `"VALID"`.
    """
    if padding == "VALID":
        return 0, 0
    if padding != "SAME":
        raise ValueError(f"padding must be 'SAME' or 'VALID'. Got {padding!r}")
    return windows.same_padding(size, window, stride)


def _taps(x, window, strides, dilation, padding, fill):
    """For every place (i, j) of a window: what each output position sees there."""
    extent = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    pads = [same_padding(x.shape[a + 1], extent[a], strides[a], padding) for a in (0, 1)]
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    rows, columns = ((x.shape[a + 1] - extent[a]) // strides[a] + 1 for a in (0, 1))
    for i in range(window[0]):
        for j in range(window[1]):
            top, left = i * dilation[0], j * dilation[1]
            yield (
                (i, j),
                x[
                    :,
                    top : top + (rows - 1) * strides[0] + 1 : strides[0],
                    left : left + (columns - 1) * strides[1] + 1 : strides[1],
                ],
            )


def _exact_floats(x, kernel, products_axes):
    """Both as floats wide enough that every sum of their products is exact."""
    largest = np.abs(x).max(initial=0) * np.abs(kernel.astype(int)).sum(products_axes).max()
    dtype = np.float32 if largest < 2**24 else np.float64
    return x.astype(dtype), kernel.astype(dtype)


def _matmul(x, kernel):
    # One large product: NumPy takes many small ones for a stack of matrices.
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def _rescale(sums, op, grid, out):
    """Sums of products -> output codes: bias, one float32 multiplication, one rounding."""
    sums = sums.astype(np.int64) + op.bias
    if sums.size and (sums.min() < _INT32.min or sums.max() > _INT32.max):
        raise ValueError(f"{op.kind} {op.output}: a sum leaves int32; use fewer or smaller codes.")
    multiplier = product_multiplier(grid.scale, op.kernel_scale, out.scale)
    codes = np.rint(sums.astype(np.float32) * multiplier) + np.float32(out.zero_point)
    return np.clip(codes, *activation_bounds(op.activation, out.scale, out.zero_point, out.dtype))


def conv_2d(op, operands, grids, out):
    """A matrix product for every place of the window, in every group."""
    x, kernel = _exact_floats(operands[0] - grids[0].zero_point, op.kernel, (0, 1, 2))
    groups = x.shape[-1] // kernel.shape[2]
    parts = []
    for xg, kg in zip(np.split(x, groups, -1), np.split(kernel, groups, -1), strict=True):
        taps = _taps(xg, kernel.shape[:2], op.strides, op.dilation, op.padding, fill=0)
        parts.append(sum(_matmul(seen, kg[place]) for place, seen in taps))
    return _rescale(np.concatenate(parts, -1), op, grids[0], out)


def depthwise_conv_2d(op, operands, grids, out):
    """A product for every place of the window; output channel `c * multiplier + j`."""
    x, kernel = _exact_floats(operands[0] - grids[0].zero_point, op.kernel, (0, 1))
    taps = _taps(x, kernel.shape[:2], op.strides, op.dilation, op.padding, fill=0)
    sums = sum(seen[..., None] * kernel[place] for place, seen in taps)
    return _rescale(sums.reshape(*sums.shape[:3], -1), op, grids[0], out)


def fully_connected(op, operands, grids, out):
    """A matrix product over the last axis."""
    x, kernel = _exact_floats(operands[0] - grids[0].zero_point, op.kernel, 0)
    return _rescale(_matmul(x, kernel), op, grids[0], out)


def add(op, operands, grids, out):
    """`((a - zp_a) k_a + (b - zp_b) k_b + half) >> shift`, integers only."""
    k_a, k_b, shift = add_parameters(grids[0].scale, grids[1].scale, out.scale)
    total = (operands[0] - grids[0].zero_point) * k_a + (operands[1] - grids[1].zero_point) * k_b
    codes = ((total + (1 << (shift - 1))) >> shift) + out.zero_point
    return np.clip(codes, *activation_bounds(op.activation, out.scale, out.zero_point, out.dtype))


def multiply(op, operands, grids, out):
    """`(a - zp_a) * (b - zp_b)`, rescaled as a sum of products is."""
    products = (operands[0] - grids[0].zero_point) * (operands[1] - grids[1].zero_point)
    multiplier = product_multiplier(grids[0].scale, grids[1].scale, out.scale)
    codes = np.rint(products.astype(np.float32) * multiplier) + np.float32(out.zero_point)
    return np.clip(codes, *activation_bounds(op.activation, out.scale, out.zero_point, out.dtype))


def max_pool_2d(op, operands, grids, out):
    """Largest code of each window; padding never wins."""
    taps = _taps(operands[0], op.pool, op.strides, (1, 1), op.padding, fill=-1024)
    return np.maximum.reduce([seen for _, seen in taps])


def average_pool_2d(op, operands, grids, out):
    """Sum of the codes over how many there are, half away from zero."""

    def summed(x):
        return sum(s for _, s in _taps(x, op.pool, op.strides, (1, 1), op.padding, fill=0))

    sums, counts = summed(operands[0]), summed(np.ones_like(operands[0]))
    return np.sign(sums) * ((np.abs(sums) + counts // 2) // counts)


def concatenate(op, operands, grids, out):
    """Codes side by side."""
    return np.concatenate(operands, op.axis)


def pad(op, operands, grids, out):
    """Codes with zero points around them."""
    return np.pad(operands[0], op.paddings, constant_values=out.zero_point)


def resize_nearest(op, operands, grids, out):
    """Each code a rectangle of itself."""
    return operands[0].repeat(op.factors[0], 1).repeat(op.factors[1], 2)


def reshape(op, operands, grids, out):
    """The same codes; the first axis stays the samples."""
    return operands[0].reshape(-1, *out.shape[1:])


def slice_(op, operands, grids, out):
    """The codes inside; the first axis stays the samples."""
    _, *ends = zip(op.begin, out.shape, strict=True)
    return operands[0][:, *(slice(at, at + size) for at, size in ends)]


def transpose(op, operands, grids, out):
    """The codes with their axes in another order."""
    return operands[0].transpose(op.order)


def softmax(op, operands, grids, out):
    """`256 p - 128`, half away from zero, in float32 and in the order in which the runtime sums.

    Powers come from `softmax_powers`, so that ties fall as they do there.
    """
    powers = softmax_powers(grids[0].scale)[operands[0].max(-1, keepdims=True) - operands[0]]
    total = np.add.accumulate(powers, axis=-1, dtype=np.float32)[..., -1:]
    p = powers * (np.float32(1) / (total * np.float32(out.scale)))
    codes = np.floor(p.astype(np.float64) + 0.5) + out.zero_point
    return np.clip(codes, *CODE_RANGES[out.dtype])


def logistic(op, operands, grids, out):
    """`256 sigmoid - 128` from a table, as the runtime has one."""
    return logistic_codes(grids[0].scale, grids[0].zero_point)[operands[0].astype(np.int32) + 128]


def quantize(op, operands, grids, out):
    """Reals to codes, or codes between int8 and uint8 on one grid."""
    x, grid = operands[0], grids[0]
    if grid.dtype == "float32":
        # The runtime multiplies by the reciprocal; a division rounds near-ties differently.
        codes = np.rint(x * (np.float32(1) / np.float32(out.scale))) + np.float32(out.zero_point)
        return np.clip(codes, *CODE_RANGES[out.dtype])
    shift = CODE_RANGES[out.dtype][0] - CODE_RANGES[grid.dtype][0]
    if shift == 0 or grid.scale != out.scale or grid.zero_point + shift != out.zero_point:
        raise ValueError(
            f"quantize {op.output}: from codes it only moves between int8 and uint8, on one scale "
            f"with zero points 128 apart. Got {grid} and {out}; a DepthwiseConv2D of ones moves "
            "codes to any other grid."
        )
    return x + shift


def dequantize(op, operands, grids, out):
    """`(code - zero_point) * scale` in float32."""
    return (operands[0] - grids[0].zero_point).astype(np.float32) * np.float32(grids[0].scale)


def _wide(x):
    return x if x.dtype == np.float32 else x.astype(np.int32)


_FUNCTIONS = {
    ir.Conv2D: conv_2d,
    ir.DepthwiseConv2D: depthwise_conv_2d,
    ir.FullyConnected: fully_connected,
    ir.Add: add,
    ir.Multiply: multiply,
    ir.MaxPool2D: max_pool_2d,
    ir.AveragePool2D: average_pool_2d,
    ir.Concatenate: concatenate,
    ir.Pad: pad,
    ir.ResizeNearest: resize_nearest,
    ir.Reshape: reshape,
    ir.Slice: slice_,
    ir.Transpose: transpose,
    ir.Softmax: softmax,
    ir.Logistic: logistic,
    ir.Quantize: quantize,
    ir.Dequantize: dequantize,
}
