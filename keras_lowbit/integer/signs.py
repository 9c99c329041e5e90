"""Sign activations in integers: `h`, 0 or 1, stands for `x = 2h - 1`.

An int8 tensor cannot keep -1 and 1 and be padded with -1, because SAME padding inserts its zero
point. With `h` the zero point is -1. What reads the tensor multiplies `h` by twice the scale and
has `-scale * sum(kernel)` in its bias; what writes it compares a sum with a threshold.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from keras_lowbit.integer import graph as ir


def objection(value) -> str | None:
    """Why a pending value or a tensor (see `values`) cannot become signs; `None` if it can."""
    if hasattr(value, "pixels"):
        return (
            f"Input {value.name}: images cannot be signs; give the input 8 bits, as quantize_model "
            "does, and quantize to signs behind the first layer"
        )
    if getattr(value, "relu", None) is not None:
        return (
            f"{_name(value)}: the sign of what a ReLU leaves is always 1. Take the ReLU away, or "
            "use 1-bit codes 0 and 1: Scheme(binary_activation='heaviside')"
        )
    if getattr(value, "op", None) is ir.Pad:
        return (
            f"{value.source}: the zeros that it puts around a tensor are no signs. Let the "
            "convolution behind it pad, with padding='same': it pads with -1"
        )
    reals = [*getattr(value, "bias", ()), *getattr(value, "kernel_scale", ())]
    return None if np.all(np.isfinite(reals)) else f"{value.source}: NaN or infinite weights"


def _name(value):
    return getattr(value, "source", None) or value.tensor


def kernel_sums(value) -> np.ndarray:
    """Sum of a product's kernel codes, by output channel."""
    kernel = value.kernel.astype(np.int64)
    outputs = 2 if value.op is ir.DepthwiseConv2D else 1
    return kernel.sum(axis=tuple(range(kernel.ndim - outputs))).reshape(-1)


def folded(value):
    """A product (`values.Linear`) with what code 0 of its input stands for in the bias."""
    offset = value.inputs.grid.offset
    if not offset:
        return value
    return replace(value, bias=value.bias + offset * value.kernel_scale * kernel_sums(value))


def threshold(value, made, largest_bias):
    """`(kernel codes, written kernel scales, bias codes)` of a product whose sign is wanted.

    With `y = unit * (sum + b)`, `unit > 0` and a whole `sum`,

        h = 1 where y >= 0, else 0  =  clip(sum + floor(b) + 1, 0, 1)

    exactly: no bias is rounded. One unit is written as one code of the output, so that a sum of 1
    is already at the upper end, and 0 at the lower.

    Args:
        value: the product, not `folded`.
        made: the tensor of signs.
        largest_bias: codes of biases end there; a sum never reaches it.
    """
    unit = float(value.inputs.grid.scale) * np.asarray(value.kernel_scale, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        bias = np.where(unit > 0, value.bias / unit, np.where(value.bias < 0, -1.0, 0.0))
    kernel = np.where((unit > 0).reshape(_by_output(value)), value.kernel, 0)
    if value.inputs.grid.signs:
        # In units, not as `folded` reals: halves are exact, and a tie decides a sign.
        bias = bias - 0.5 * kernel_sums(replace(value, kernel=kernel))
    codes = np.floor(np.clip(bias, -largest_bias, largest_bias)) + 1
    one = made.factor * float(made.grid.scale)
    one /= value.inputs.factor * float(value.inputs.grid.scale)
    return kernel.astype(np.int8), np.full(len(unit), one, np.float32), codes.astype(np.int32)


def _by_output(value):
    return value.kernel.shape[-2:] if value.op is ir.DepthwiseConv2D else (-1,)
