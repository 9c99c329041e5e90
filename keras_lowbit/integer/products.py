"""The numbers of a product: codes of kernel and bias, and the scales that are written for them."""

from __future__ import annotations

import numpy as np
from keras import ops

from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.values import Linear, NotExportable, OnGrid
from keras_lowbit.layers.packed_kernels import Kernel
from keras_lowbit.numerics.arrays import float64_of

SMALLEST_MULTIPLIER = 2.0**-30
LARGEST_MULTIPLIER = 255.5  # the runtime refuses 256


def bias_unit(value: Linear, made: OnGrid, written: np.ndarray) -> np.ndarray:
    """Reals that one unit of a product's sums stands for, by output channel."""
    true = np.asarray(written, np.float64) * (value.inputs.factor / made.factor)
    return true * float(value.inputs.grid.scale)


def largest_code(op: type, kernel: np.ndarray, weights: str) -> int:
    """The largest code that a kernel may be spread to, for a finer unit of its sums.

    Dense and pointwise kernels stay within four bits, so that `weights="int4"` can store what
    `"int8"` stores; others use eight, or four where `"int4_all"` wants them all small.
    """
    pointwise = op is ir.FullyConnected or (op is ir.Conv2D and kernel.shape[:2] == (1, 1))
    return 7 if pointwise or weights == "int4_all" else 127


def largest_bias(kernel_bits: int) -> int:
    """Codes of a bias from which a channel counts as constant.

    XNNPACK's kernels for VNNI and AMX compute a product with an int4 kernel times 16, the bias
    included, in int32: from 2^27 on it overflows there and nowhere else. The other half is room for
    the sums. Kernels of 4 bits or fewer keep to it in every container, so that all files agree.
    """
    return 2**26 if kernel_bits <= 4 else 2**30


def integer_product(value: Linear, made: OnGrid, weights: str = "int8"):
    """`(kernel codes, written kernel scales, bias codes)` of a product.

    Codes move to a finer unit where they do not fill their container (`code * k`, `scale / k`):
    no product changes, and the bias is rounded to the finer unit. `k` depends on the layer's
    kind and width only.

    A channel without gain, or whose bias would not fit, gets zero codes and the output's unit.
    A channel one unit of whose sums is more codes than int8 has saturates on every sum but zero,
    so its scale is capped where the runtime still loads it: no code changes.

    Raises:
        NotExportable: NaN or infinite weights.
    """
    largest = {1: 1, 2: 2, 3: 4}.get(value.kernel_bits, 2 ** (value.kernel_bits - 1) - 1)
    unit = max(largest_code(value.op, value.kernel, weights) // largest, 1)
    kernel = value.kernel.astype(np.int64) * unit
    scale_in, scale_out = float(value.inputs.grid.scale), float(made.grid.scale)
    scale = np.asarray(value.kernel_scale, np.float64) / unit
    bias = np.asarray(value.bias, np.float64)
    if value.copies:
        kernel, scale = _with_whole_biases(kernel, scale, bias / scale_in)
    multiplier = scale_in * scale / scale_out
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        codes = np.abs(bias) / (scale_in * scale)
    limit = largest_bias(value.kernel_bits)
    dead = (multiplier < SMALLEST_MULTIPLIER) | ~(codes < limit)
    scale = np.where(dead, scale_out / scale_in, scale)
    if value.op is ir.DepthwiseConv2D:
        kernel = np.where(dead.reshape(kernel.shape[-2:]), 0, kernel)
    else:
        kernel = np.where(dead, 0, kernel)
    if not np.all(np.isfinite(bias)) or not np.all(np.isfinite(scale)):
        raise NotExportable(f"{value.source}: NaN or infinite weights")
    bias_codes = np.clip(np.rint(bias / (scale_in * scale)), -limit, limit).astype(np.int32)
    scale = np.minimum(scale, LARGEST_MULTIPLIER * scale_out / scale_in)
    written = scale * (made.factor / value.inputs.factor)
    return kernel.astype(np.int8), written.astype(np.float32), bias_codes


def _with_whole_biases(kernel, scale, bias):
    """A copying kernel's codes and scales, moved within 64..127 such that biases round little.

    A code `c` in place of 127 leaves the products and makes the bias `bias * c / (127 * scale)`
    units, which for one of 64 codes lies near a whole number: 0.01 units off or the nearest.
    """
    largest = np.abs(kernel).max()
    choices = np.arange(largest, largest // 2, -1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        units = bias[:, None] / scale[:, None] * (choices / largest)
        off = np.abs(units - np.rint(units))
    off = np.where(np.isfinite(off), off, 0.0)
    near = off < np.maximum(0.01, off.min(axis=1, keepdims=True) + 1e-12)
    code = choices[near.argmax(axis=1)]
    signs = np.sign(kernel)
    code_by_output = code.reshape(kernel.shape[-2:]) if kernel.ndim == 4 else code
    return signs * code_by_output, scale * largest / code


def kernel_codes(layer, kernel: Kernel):
    """`(integer codes, true scales by output channel, bits that hold the codes)` of a kernel."""
    quantizer = kernel.quantizer
    if quantizer is None:
        raise NotExportable(f"{layer.name}: its kernel has no quantizer, it would stay float")
    try:
        width = quantizer.code_width
    except ValueError as error:
        raise NotExportable(f"{layer.name}: {error}") from error
    if not np.all(np.isfinite(ops.convert_to_numpy(kernel.latent))):
        raise NotExportable(f"{layer.name}: NaN or infinite weights")
    codes, scale = quantizer.encode(ops.convert_to_tensor(kernel.latent))
    codes = np.rint(ops.convert_to_numpy(codes)).astype(np.int64)
    channels = codes.shape[-1] * (codes.shape[-2] if kernel.depthwise else 1)
    if width > 8 or codes.min(initial=0) < -128 or codes.max(initial=0) > 127:
        raise NotExportable(
            f"{layer.name}: kernel codes of {quantizer.bits} bits; files hold at most 8. Quantize "
            "it with 8 bits or fewer"
        )
    scale = float64_of(scale)
    if not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        raise NotExportable(f"{layer.name}: kernel scales are not positive and finite")
    return codes, np.broadcast_to(scale.reshape(-1), (channels,)).copy(), width
