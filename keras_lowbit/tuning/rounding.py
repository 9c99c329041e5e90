"""Codes of a kernel that cost its layer's outputs least, before any step of training.

Rounding to the nearest code makes the error of each weight small, not that of their sums: where
inputs move together (neighbouring pixels, channels of one sign) errors of single weights add up or
cancel. Here each filter's codes minimize

    mean over positions of (w . x - s q . x')^2

with `w` the float filter, `x` its float inputs, `x'` the inputs that it will get, `s` its scale and
whole numbers `q`: first the least squares solution in reals, then whole numbers near it, one
coordinate after the other. NumPy, once a block; no gradient.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from keras import ops

from keras_lowbit.kinds import kind_of
from keras_lowbit.layers import QuantizedConv2D, QuantizedDense, QuantizedDepthwiseConv2D
from keras_lowbit.numerics.windows import same_padding
from keras_lowbit.quantizers import LSQ
from keras_lowbit.tuning import programs
from keras_lowbit.tuning.blocks import Block

# What is looked at for a layer: images, and positions in all of them together.
IMAGES, POSITIONS = 200, 20_000
# Fewest positions for each input of a filter. With 10 to 17 (blocks of MobileNetV2 at 7 pixels, 200
# images) errors rose on new images, with 35 and more they fell as far as on those looked at.
COVERAGE = 32
# Most inputs of a filter, for their second moments are kept: larger ones keep the nearest codes.
LARGEST = 1500
# Scales that are tried, as shares of the calibrated one.
SHARES = (0.75, 0.85, 0.93, 1.0, 1.08, 1.2)
SWEEPS = 5
# Share of the inputs' mean square that holds the reals to the float kernel.
RIDGE = 1e-2


def variables(block: Block) -> list:
    """What `round_block` may change."""
    layers = [call.operation for call in block.quantized.calls if kind_of(call) == "product"]
    found = [v for x in layers if _fits(x) for v in (x.kernel, x.kernel_quantizer.scale, x.bias)]
    return [v for v in found if v is not None]


def is_covered(block: Block, rows: int) -> bool:
    """Whether so many images have `COVERAGE` positions for each input of the block's filters."""
    for call in block.quantized.calls:
        if kind_of(call) == "product" and _fits(call.operation):
            layer, spatial = call.operation, call.output.shape[1:-1]
            positions = min(rows, IMAGES) * int(np.prod(spatial))
            inputs = _grouped(layer, layer.kernel.shape)[1]
            if min(positions, POSITIONS) < COVERAGE * inputs:
                return False
    return True


def round_block(block: Block, quantized, floating, batch_size: int, seed: int, done=()) -> None:
    """Round the kernels of a block to its inputs, one layer after the other, in place.

    Kernel, scale and bias change. Separable layers, layers with an input quantizer of their own,
    kernels of other quantizers than `LSQ`, of 1 or more than 4 bits, or whose filters have more
    than `LARGEST` inputs stay as they are.

    Args:
        block: of `blocks.find`.
        quantized: streams of the block's inputs so far.
        floating: the float model's.
        batch_size: images at a time.
        seed: of the positions.
        done: `id` of kernel quantizers that stay as they are: layers of an earlier block.

    Reference:
        Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020,
        arXiv:2004.10568 (the layer-wise objective), and Frantar et al., GPTQ, ICLR 2023,
        arXiv:2210.17323 (one weight after the other on the inputs' second moments). Deviations:
        coordinate descent in sweeps, inputs of the quantized model against float targets, scales
        tried beside each other.
    """
    random = np.random.default_rng(seed)
    theirs = {c.plain: i for i, c in enumerate(block.floating.calls)}
    for i, call in enumerate(block.quantized.calls):
        layer = call.operation
        if kind_of(call) != "product" or not _fits(layer) or id(layer.kernel_quantizer) in done:
            continue
        j = theirs[call.plain]
        parts = [(block.quantized, i, quantized), (block.floating, j, floating)]
        moments = _Moments()
        rows = min(len(quantized[0]), IMAGES)
        for start in range(0, rows, batch_size):
            chosen = slice(start, min(start + batch_size, rows))
            share = POSITIONS * (chosen.stop - start) // rows
            inputs = [_inputs(program, k, [s[chosen] for s in st]) for program, k, st in parts]
            moments.add(*_patches(layer, inputs, share, random))
        _write(layer, block.floating.calls[j].operation, moments)


def _fits(layer):
    known = (QuantizedConv2D, QuantizedDepthwiseConv2D, QuantizedDense)
    quantizer = getattr(layer, "kernel_quantizer", None)
    if not isinstance(layer, known) or type(quantizer) is not LSQ or layer.input_quantizer:
        return False
    return 2 <= quantizer.bits <= 4 and _grouped(layer, layer.kernel.shape)[1] <= LARGEST


def _grouped(layer, shape):
    """Groups, inputs of a filter, filters of a group."""
    if isinstance(layer, QuantizedDepthwiseConv2D):
        return shape[2], shape[0] * shape[1], shape[3]
    groups = getattr(layer, "groups", 1)
    return groups, int(np.prod(shape[:-1])), shape[-1] // groups


def _inputs(program, position, feeds):
    """The input of a call, in reals."""
    call = program.calls[position]
    ahead = dataclasses.replace(program, calls=program.calls[:position], outputs=call.args[0])
    values = programs.forward(ahead, feeds)
    return values[0] * values[1] if len(values) == 2 else values[0]


def _patches(layer, inputs, count, random):
    """What filters read at some positions, the same for all `inputs`: `(groups, positions, n)`."""
    if isinstance(layer, QuantizedDense):
        flat = [x.reshape(1, -1, x.shape[-1]) for x in inputs]
        rows = random.permutation(flat[0].shape[1])[:count]
        return [x[:, rows] for x in flat]
    size, dilation, strides = layer.kernel_size, layer.dilation_rate, layer.strides
    extents = [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
    views = []
    for x in inputs:
        if layer.padding == "same":
            sides = zip(x.shape[1:3], extents, strides, strict=True)
            x = np.pad(x, [(0, 0), *(same_padding(*side) for side in sides), (0, 0)])
        view = np.lib.stride_tricks.sliding_window_view(x, extents, (1, 2))
        views.append(
            view[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]
        )  # (images, height, width, channels, kernel height, kernel width)
    at = [random.integers(0, n, count) for n in views[0].shape[:3]]
    groups = _grouped(layer, layer.kernel.shape)[0]
    found = []
    for view in views:
        read = view[at[0], at[1], at[2]]
        split = read.reshape(count, groups, -1, *read.shape[2:])
        # The kernel's order: height, width, channel.
        found.append(split.transpose(1, 0, 3, 4, 2).reshape(groups, count, -1))
    return found


class _Moments:
    """Sums over positions of inputs, of their squares and of their products with float inputs."""

    def __init__(self):
        self.count, self.got, self.wanted, self.square, self.product = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, got, wanted):
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        turned = got.transpose(0, 2, 1)
        self.count += got.shape[1]
        self.got, self.wanted = self.got + got.sum(1), self.wanted + wanted.sum(1)
        self.square, self.product = self.square + turned @ got, self.product + turned @ wanted

    def means(self, centred):
        """Means of both inputs, of squares and of products; without the means' own, if asked."""
        got, wanted, square, product = (
            total / self.count for total in (self.got, self.wanted, self.square, self.product)
        )
        if centred:
            square = square - got[:, :, None] * got[:, None, :]
            product = product - got[:, :, None] * wanted[:, None, :]
        return got, wanted, square, product


def _write(layer, float_layer, moments):
    """The kernel, its scale and, where there is one, the bias that keeps the outputs' means."""
    quantizer = layer.kernel_quantizer
    groups, inputs, filters = _grouped(layer, layer.kernel.shape)
    kernel = _by_group(layer, _numpy(float_layer.kernel))
    got, wanted, square, product = moments.means(centred=layer.use_bias)
    spread = np.trace(square, axis1=1, axis2=2) / inputs
    ridge = (RIDGE * spread + 1e-12)[:, None, None] * np.eye(inputs)
    target = np.linalg.solve(square + ridge, product @ kernel + ridge @ kernel)
    scale = _numpy(quantizer.scale)
    each = np.broadcast_to(scale.reshape(-1), groups * filters).reshape(groups, filters)
    codes, each = nearest_outputs(
        target, square + ridge, each, *quantizer.static_bounds(), shared=scale.size == 1
    )
    values = codes * each[:, None, :]
    layer.kernel.assign(_as_kernel(layer, values).astype(np.float32))
    if scale.size == 1:
        quantizer.scale.assign(np.full(scale.shape, each.flat[0], np.float32))
    else:
        quantizer.scale.assign(each.reshape(scale.shape).astype(np.float32))
    if layer.use_bias:
        missing = np.einsum("gi,gif->gf", wanted, kernel) - np.einsum("gi,gif->gf", got, values)
        # Where images have an offset, a layer got its bias from `quantize_model`.
        theirs = np.float32(0) if float_layer.bias is None else _numpy(float_layer.bias)
        layer.bias.assign(theirs + missing.reshape(-1).astype(np.float32))


def _numpy(variable):
    return np.asarray(ops.convert_to_numpy(variable))


def _by_group(layer, kernel):
    """A kernel as `(groups, inputs, filters)`, float64."""
    groups, inputs, filters = _grouped(layer, kernel.shape)
    return kernel.reshape(inputs, groups, filters).transpose(1, 0, 2).astype(np.float64)


def _as_kernel(layer, values):
    """`_by_group` turned back."""
    return values.transpose(1, 0, 2).reshape(layer.kernel.shape)


def nearest_outputs(target, square, scales, lo, hi, *, shared=False):
    """Whole numbers and scales whose outputs are nearest to those of reals.

    Minimizes `(t - s q)^T H (t - s q)` of each filter over whole numbers `q` in `lo..hi`, by
    coordinate descent from the nearest ones, at each scale of `SHARES`; the best scale stays. So no
    filter ends worse than rounded to the nearest at the scale given.

    Args:
        target: reals `t`, shape `(groups, n, filters)`.
        square: symmetric positive definite `H` of each group, shape `(groups, n, n)`.
        scales: shape `(groups, filters)`.
        lo: lowest code.
        hi: highest code.
        shared: one scale for all, which `scales` repeats.

    Returns:
        Codes of the shape of `target`, and scales.
    """
    best = None
    for share in SHARES:
        tried = scales * share
        codes = np.empty_like(target)
        errors = np.empty_like(tried)
        for g in range(len(target)):
            codes[g], errors[g] = _descend(target[g], square[g], tried[g], lo, hi)
        if best is None:
            best = [codes, tried, errors]
            continue
        better = errors < best[2]
        if shared:
            better = np.full_like(better, errors.sum() < best[2].sum())
        best[0] = np.where(better[:, None, :], codes, best[0])
        best[1] = np.where(better, tried, best[1])
        best[2] = np.where(better, errors, best[2])
    return best[0], best[1]


def _descend(target, square, scale, lo, hi):
    """Codes of one group at one scale, and the error of each filter."""
    codes = np.clip(np.rint(target / scale), lo, hi)
    slope = square @ (target - codes * scale)
    for _ in range(SWEEPS):
        moved = False
        for i in range(len(target)):
            wanted = codes[i] + slope[i] / (square[i, i] * scale)
            step = np.clip(np.rint(wanted), lo, hi) - codes[i]
            if step.any():
                codes[i] += step
                slope -= np.outer(square[:, i], step * scale)
                moved = True
        if not moved:
            break
    left = target - codes * scale
    return codes, (left * (square @ left)).sum(0)
