"""Rules for calls that pool, pad, slice, join or reshape: what each becomes in integers."""

from __future__ import annotations

import math

import keras
import numpy as np

from keras_lowbit import layers
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.values import Linear, Moved, NotExportable, OnGrid
from keras_lowbit.kinds import padding_value, windows_of
from keras_lowbit.numerics.grid import Grid
from keras_lowbit.numerics.windows import reaches_over, same_padding


def _moved(lowering, call, op, **attributes):
    parts = tuple(lowering.values[r.index] for r in call.inputs)
    shape = lowering.shape(call.output)
    return _staying(lowering, Moved(op, parts, attributes, shape, call.name), call.name)


def _staying(lowering, value, name):
    """Codes of a tensor on a grid stay on it; others get theirs later."""
    (first, *others) = value.parts
    if others or not isinstance(first, OnGrid) or first.relu is not None:
        return value
    return lowering.emitter.put(value, first.grid, name)


def concatenate(lowering, call):
    """Tensors side by side, all on the grid of the result."""
    rank = len(call.output.shape)
    axis = call.operation.axis % rank
    if axis == 0:
        raise NotExportable(f"{call.name}: it joins images of a batch, which a file takes singly")
    return _moved(lowering, call, ir.Concatenate, axis=axis)


def max_pool(lowering, call):
    """Maximum of codes."""
    pool, strides, padding = _pool_attributes(call)
    return _moved(lowering, call, ir.MaxPool2D, pool=pool, strides=strides, padding=padding)


def _check_layout(call):
    """Images have their channels last: in any other layout a window would slide over them."""
    layout = getattr(call.operation, "data_format", None)
    if layout == "channels_first" and len(call.inputs[0].shape) > 2:
        raise NotExportable(
            f"{call.name}: data_format='channels_first' has no integer form. Build the layer with "
            "'channels_last'"
        )


def _pool_attributes(call):
    _check_layout(call)
    return *windows_of(call.operation), call.operation.padding.upper()


def average_pool(lowering, call):
    """A mean over windows: one rounding, or one more where windows reach over the border."""
    pool, strides, padding = _pool_attributes(call)
    if getattr(call.operation, "zero_point", None) is not None:
        return _mean_of_codes(lowering, call, pool, strides, padding)
    value = lowering.grid_tensor(call)
    if padding == "SAME" and any(map(reaches_over, value.shape[1:3], pool, strides)):
        _check_border(call, value.shape[1:3], pool, strides)
        # The runtime, like Keras, does not count padding: no kernel of ones can say that. Its mean
        # stays on the grid of what it reads: another one would clip what goes into a mean.
        fine = lowering.emitter.put(value, _eight_bits(value.grid), f"{call.name}_source")
        return _runtime_mean(lowering, call, fine, pool, strides, padding)
    return _window_sum(lowering, call, value, pool, strides, lowering.shape(call.output))


def _mean_of_codes(lowering, call, pool, strides, padding):
    """A pool that rounds in training as the runtime does."""
    value = lowering.grid_tensor(call)
    if (value.grid.bits, value.grid.zero_point) != (8, call.operation.zero_point):
        raise NotExportable(
            f"{call.name}: it pools codes of zero point {call.operation.zero_point} and 8 bits. "
            f"Got a grid of zero point {value.grid.zero_point} and {value.grid.bits} bits"
        )
    return _runtime_mean(lowering, call, value, pool, strides, padding)


def _runtime_mean(lowering, call, value, pool, strides, padding):
    attributes = {"pool": pool, "strides": strides, "padding": padding}
    shape = lowering.shape(call.output)
    return _staying(
        lowering, Moved(ir.AveragePool2D, (value,), attributes, shape, call.name), call.name
    )


def _check_border(call, *axes):
    """Training must pool as the file does, which Keras' own pools on PyTorch do not always."""
    uneven = any(before != after for before, after in map(same_padding, *axes))
    ours = isinstance(call.operation, layers.AveragePooling2D)
    if uneven and not ours and keras.backend.backend() == "torch":
        raise NotExportable(
            f"{call.name}: on PyTorch Keras repeats the border under this pool, and files do not. "
            "Use keras_lowbit.layers.AveragePooling2D, as quantize_model does for that of Keras"
        )


def _eight_bits(grid):
    """The grid, or one of 8 bits on which each of its reals is a code, for finer means."""
    if grid.bits >= 8:
        return grid
    if grid.signs:
        return Grid(float(grid.scale) / 254, -128, 127, 8)  # -scale / 2 and scale / 2
    steps = 127 // grid.hi if grid.signed else 255 // grid.hi
    lo, hi = (-128, 127) if grid.signed else (0, 255)
    return Grid(float(grid.scale) / steps, lo, hi, 8)


def _window_sum(lowering, call, value, pool, strides, shape):
    """A mean as a depthwise convolution of ones: one rounding, straight to the output's grid."""
    channels = value.shape[-1]
    return Linear(
        op=ir.DepthwiseConv2D,
        inputs=value,
        kernel=np.ones((*pool, channels, 1), np.int8),
        kernel_scale=np.full(channels, 1.0 / math.prod(pool)),
        bias=np.zeros(channels),
        kernel_bits=8,
        shape=shape,
        source=call.name,
        attributes={"strides": strides, "padding": "VALID"},
    )


def global_average_pool(lowering, call):
    """A mean over height and width."""
    value = lowering.grid_tensor(call)
    pool, shape = _whole_window(call, value, "mean")
    mean = _window_sum(lowering, call, value, pool, (1, 1), shape)
    return _without_window(call, mean, shape)


def global_max_pool(lowering, call):
    """The largest code over height and width."""
    value = lowering.read(call)
    pool, shape = _whole_window(call, value, "maximum")
    attributes = {"pool": pool, "strides": (1, 1), "padding": "VALID"}
    most = Moved(ir.MaxPool2D, (value,), attributes, shape, call.name)
    if call.operation.keepdims:
        return _staying(lowering, most, call.name)
    most = _staying(lowering, most, f"{call.name}_window")
    return _staying(lowering, _without_window(call, most, shape), call.name)


def _whole_window(call, value, what):
    """Window and output shape, with its axes kept, of what is taken over height and width."""
    _check_layout(call)
    axis = getattr(call.operation, "axis", (1, 2))
    axes = () if axis is None else tuple(a % 4 for a in np.atleast_1d(axis))
    if len(value.shape) != 4 or axes != (1, 2):
        pool = {"mean": "GlobalAveragePooling2D", "maximum": "GlobalMaxPooling2D"}[what]
        raise NotExportable(
            f"{call.name}: only a {what} over height and width is supported, that of {pool}. "
            f"Got axis={axis} of {value.shape}"
        )
    return value.shape[1:3], (value.shape[0], 1, 1, value.shape[-1])


def _without_window(call, value, shape):
    if call.operation.keepdims:
        return value
    return Moved(ir.Reshape, (value,), {}, (shape[0], shape[-1]), call.name)


def pad(lowering, call):
    """Zeros around a tensor."""
    _check_layout(call)
    operation = call.operation
    if hasattr(operation, "pad_width"):
        widths = tuple((int(a), int(b)) for a, b in operation.pad_width)
        if operation.mode != "constant" or padding_value(call):
            raise NotExportable(
                f"{call.name}: only zero padding is supported. Use ZeroPadding2D, or "
                "padding='same' in the layer behind it"
            )
    else:
        widths = ((0, 0), *(tuple(p) for p in operation.padding), (0, 0))
    return _moved(lowering, call, ir.Pad, paddings=widths)


def upsample(lowering, call):
    """Every code repeated."""
    _check_layout(call)
    layer = call.operation
    if layer.interpolation != "nearest":
        raise NotExportable(
            f"{call.name}: only interpolation='nearest' has an integer form. "
            f"Got {layer.interpolation!r}"
        )
    return _moved(lowering, call, ir.ResizeNearest, factors=tuple(layer.size))


def reshape(lowering, call):
    """The same codes in another shape."""
    _check_layout(call)
    before, after = call.inputs[0].shape[1:], call.output.shape[1:]
    if None not in (*before, *after) and math.prod(before) != math.prod(after):
        raise NotExportable(
            f"{call.name}: {before} for each image becomes {after}: it mixes the images of a batch"
        )
    return _moved(lowering, call, ir.Reshape)


def same(lowering, call):
    """A layer that does nothing at inference."""
    return lowering.read(call)


def strided_slice(lowering, call):
    """`x[:, ::s, ::t, :]`: a depthwise 1x1 convolution of ones with strides."""
    key = call.args[1] if len(call.args) > 1 else dict(call.kwargs).get("key")
    strides = _slice_strides(key, len(call.inputs[0].shape))
    if strides is None:
        parts = key if isinstance(key, (tuple, list)) else [key]
        written = ", ".join(_as_written(part) for part in parts)
        raise NotExportable(
            f"{call.name}: only x[:, ::s, ::t, :] is supported. Got x[{written}]; "
            "crop, turn and reorder images before the model; means and deviations of channels may "
            "be a Normalization layer, or preprocessing= of the export"
        )
    return _moved(lowering, call, ir.DepthwiseConv2D, strides=strides, padding="VALID")


def _as_written(part):
    """A part of a slice's key: `1:`, `::2`, `...` or an index."""
    if part is Ellipsis:
        return "..."
    if not isinstance(part, slice):
        return str(part)
    start, stop, step = ("" if n is None else str(n) for n in (part.start, part.stop, part.step))
    return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


def _slice_strides(key, rank):
    parts = list(key) if isinstance(key, (tuple, list)) else [key]
    parts = [p for p in parts if p is not Ellipsis]
    if rank != 4 or not all(isinstance(p, slice) for p in parts):
        return None
    if any(p.start not in (None, 0) or p.stop is not None for p in parts):
        return None
    steps = [p.step or 1 for p in parts] + [1] * (4 - len(parts))
    forward = min(steps) > 0 and steps[0] == steps[3] == 1
    return (steps[1], steps[2]) if forward else None
