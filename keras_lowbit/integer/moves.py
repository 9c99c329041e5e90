"""Rules for calls that pool, pad, slice, join, turn or reshape: what each becomes in integers."""

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
    if getattr(call.operation, "initial", None) is not None:
        raise NotExportable(
            f"{call.name}: a maximum with initial={call.operation.initial} has no integer form. "
            "Leave initial out"
        )
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
    if len(value.shape) != 4 or sorted(axes) != [1, 2]:
        pool = {"mean": "AveragePooling2D", "maximum": "MaxPooling2D"}[what]
        way_out = ""
        if len(value.shape) == 4 and axes == (3,):
            h, w, c = value.shape[1:]
            back = (h, w, 1) if call.operation.keepdims else (h, w)
            way_out = f"; write Reshape({(h * w, c, 1)}), {pool}({(1, c)}) and Reshape({back})"
        raise NotExportable(
            f"{call.name}: only a {what} over height and width is supported, that of "
            f"Global{pool}. Got axis={axis} of {value.shape}{way_out}"
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
            f"Got {layer.interpolation!r}; {_near(layer)}"
        )
    return _moved(lowering, call, ir.ResizeNearest, factors=tuple(layer.size))


def _near(layer):
    """What comes near an interpolation: between pixels the same as the bilinear one."""
    if layer.interpolation != "bilinear":
        return "nearest exports"
    # Each pixel n times, then these weights, is the tent of 2 n values that interpolates.
    rows = [np.full(n, 1 / n) if n % 2 else np.r_[0.5, np.ones(n - 1), 0.5] / n for n in layer.size]
    kernel = ", ".join(f"[{', '.join(f'{x:.6g}' for x in row)}]" for row in rows)
    return (
        "the same but at the border is nearest, then "
        f"DepthwiseConv2D({tuple(map(len, rows))}, padding='same', use_bias=False) with "
        f"np.outer({kernel}) as its kernel of each channel"
    )


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


def slice_(lowering, call):
    """`x[:, a:b:s, c:d:t, e:f]` and crops: codes inside, then every s-th and t-th of them."""
    value, shape = lowering.read(call), lowering.shape(call.inputs[0])
    begin, end, steps = _slice_of(call, shape)
    inside = tuple(max(b - a, 0) for a, b in zip(begin, end, strict=True))
    if 0 in inside:
        raise NotExportable(f"{call.name}: nothing is left of {shape}. Got {_as_written(call)}")
    if inside != shape:
        name = call.name if max(steps) == 1 else f"{call.name}_inside"
        inner = Moved(ir.Slice, (value,), {"begin": begin}, inside, call.name)
        value = _staying(lowering, inner, name)
    if max(steps) == 1:
        return value
    # As a product that keeps codes: the runtime's own slices with steps are not delegated.
    attributes = {"strides": steps[1:3], "padding": "VALID"}
    result = lowering.shape(call.output)
    strided = Moved(ir.DepthwiseConv2D, (value,), attributes, result, call.name)
    return _staying(lowering, strided, call.name)


def transpose(lowering, call):
    """Codes with their axes in another order."""
    operation, rank = call.operation, len(call.inputs[0].shape)
    axes = (0, *operation.dims) if hasattr(operation, "dims") else operation.axes
    order = tuple(range(rank))[::-1] if axes is None else tuple(int(a) % rank for a in axes)
    if order[0] != 0:
        raise NotExportable(
            f"{call.name}: the first axis counts images and stays where it is. Got axes={order}"
        )
    return _moved(lowering, call, ir.Transpose, order=order)


def _slice_of(call, shape):
    """`(begin, end, steps)` by axis; refuses what is no plain crop."""
    if hasattr(call.operation, "cropping"):
        _check_layout(call)
        crops = ((0, 0), *call.operation.cropping, (0, 0))
        begin = tuple(int(before) for before, _ in crops)
        end = tuple(n - int(after) for n, (_, after) in zip(shape, crops, strict=True))
        return begin, end, (1,) * len(shape)
    parts = list(_key(call))
    if Ellipsis in parts:
        at, missing = parts.index(Ellipsis), len(shape) + 1 - len(parts)
        parts[at : at + 1] = [slice(None)] * missing
    parts += [slice(None)] * (len(shape) - len(parts))
    plain = all(isinstance(p, slice) and (p.step or 1) > 0 for p in parts)
    found = [p.indices(n) for p, n in zip(parts, shape, strict=True)] if plain else []
    steps = tuple(step for _, _, step in found)
    if not plain or not _is_whole(parts[0]) or (max(steps) > 1 and not _is_strided(steps)):
        if any(isinstance(p, (int, np.integer)) for p in parts):
            raise NotExportable(
                f"{call.name}: an index takes an axis away. Got {_as_written(call)}; write a slice "
                "of one, such as x[:, 0:1], and Reshape behind it"
            )
        raise NotExportable(
            f"{call.name}: only slices that step forward, x[:, a:b:s, c:d:t, e:f], have an integer "
            f"form. Got {_as_written(call)}; turn and reorder images before the model; means and "
            "deviations of channels may be a Normalization layer, or preprocessing= of the export"
        )
    return *(tuple(ends) for ends in list(zip(*found, strict=True))[:2]), steps


def _is_whole(part):
    return part.start in (None, 0) and part.stop is None and part.step in (None, 1)


def _is_strided(steps):
    return len(steps) == 4 and steps[0] == steps[3] == 1


def _key(call):
    key = call.args[1] if len(call.args) > 1 else dict(call.kwargs).get("key")
    return key if isinstance(key, (tuple, list)) else (key,)


def _as_written(call):
    """The call as a slice, `x[:, 1:, ::2, ...]`, or as a layer."""
    if hasattr(call.operation, "cropping"):
        return f"cropping={call.operation.cropping}"
    return f"x[{', '.join(map(_part_as_written, _key(call)))}]"


def _part_as_written(part):
    """A part of a slice's key: `1:`, `::2`, `...` or an index."""
    if part is Ellipsis:
        return "..."
    if not isinstance(part, slice):
        return str(part)
    start, stop, step = ("" if n is None else str(n) for n in (part.start, part.stop, part.step))
    return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
