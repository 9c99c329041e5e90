"""Putting pending values on grids: the half of the lowering that knows numbers, not Keras.

What waits for a grid is in `integer.values`; the arithmetic that everything here prepares is
`integer.reference`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import signs
from keras_lowbit.integer.products import (
    LARGEST_MULTIPLIER,
    bias_unit,
    integer_product,
    largest_bias,
)
from keras_lowbit.integer.values import (
    Biases,
    Elementwise,
    Image,
    Linear,
    Moved,
    NotExportable,
    OnGrid,
    Probabilities,
    container,
)
from keras_lowbit.kinds import FIXED_SCALES
from keras_lowbit.numerics.fixed_point import settled_scale
from keras_lowbit.numerics.grid import Grid

# Channels up to which a unit matrix is cheaper than to make an image of a row and a row of that.
LARGEST_UNIT_MATRIX = 64
# Where the runtime's softmax and sigmoid put their results.
PROBABILITY_GRID = Grid(FIXED_SCALES["softmax"], 0, 255, 8)


class Emitter:
    """Collects tensors and operations; puts pending values on grids."""

    def __init__(self, weights="int8"):
        self.weights = weights
        # Whether scales are placeholders, of a model without data: their ratios say nothing.
        self.guessed = False
        self.padded: dict[str, tuple[OnGrid, tuple]] = {}
        self.reshaped: dict[str, OnGrid] = {}  # images, by what a reshape made of them
        self.images: dict[str, tuple[Image, OnGrid]] = {}
        self.tensors: dict[str, ir.Tensor] = {}
        self.ops: list[ir.Op] = []
        self.done: dict[tuple, tuple[Any, OnGrid]] = {}
        self.biases: dict[str, list[Biases]] = {}  # of every product, by its source

    def name(self, wanted):
        """`wanted`, or with a number where taken."""
        name, n = wanted, 1
        while name in self.tensors:
            n += 1
            name = f"{wanted}.{n}"
        return name

    def tensor(self, wanted, shape, grid, relu=None):
        """A new int8 tensor on a grid: `(OnGrid, fused activation)`."""
        box = container(grid, relu)
        name = self.name(wanted)
        self.tensors[name] = ir.Tensor(
            name, tuple(shape), "int8", box.scale, box.zero_point, grid.bits
        )
        made = OnGrid(name, grid, self.tensors[name].scale / float(grid.scale), tuple(shape))
        return made, box.activation

    def put(self, value, grid, name) -> OnGrid:
        """The tensor of `value` on `grid`; the same value on the same grid is computed once."""
        if isinstance(value, OnGrid) and value.relu is None and value.grid.same_as(grid):
            return value
        key = (id(value), float(grid.scale), grid.lo, grid.hi, grid.signs)
        if key not in self.done:
            # The value is kept beside its result: an id is only unique while its object lives.
            self.done[key] = (value, self._emit(value, grid, name))
        return self.done[key][1]

    def _emit(self, value, grid, name):
        if grid.signs and (objection := signs.objection(value)):
            raise NotExportable(objection)
        if isinstance(value, OnGrid):
            return self._requantize(value, grid, name)
        if isinstance(value, Linear):
            return self._product(value, grid, name)
        if isinstance(value, Elementwise):
            return self._elementwise(value, grid, name)
        if isinstance(value, Probabilities):
            return self._probabilities(value, grid, name)
        if isinstance(value, Moved):
            return self._move(value, grid, name)
        if isinstance(value, Image):
            return self._image(value, grid, name)
        raise NotExportable(f"{name}: {type(value).__name__.lower()} cannot be put on a grid")

    def _product(self, value, grid, name):
        if value.op is ir.DepthwiseConv2D and len(value.shape) != 4:
            return self._copied_rows(value, grid, name)
        made, activation = self.tensor(name, value.shape, grid, value.relu)
        if grid.signs:
            kernel, scale, bias = signs.threshold(value, made, largest_bias(value.kernel_bits))
        else:
            value = signs.folded(value)
            kernel, scale, bias = integer_product(value, made, self.weights)
            unit = bias_unit(value, made, scale)
            self.biases.setdefault(value.source, []).append(Biases(value.bias, bias, unit))
        self.ops.append(
            value.op(
                (value.inputs.tensor,),
                made.tensor,
                value.source,
                kernel=kernel,
                kernel_scale=scale,
                bias=bias,
                kernel_bits=value.kernel_bits,
                activation=activation,
                **value.attributes,
            )
        )
        return made

    def _copied_rows(self, value, grid, name):
        """A copy of what is no image, by way of one."""
        rows = self._rows(value.inputs, value.source)
        copied = self._product(
            replace(value, inputs=rows, shape=rows.shape), grid, f"{name}_source"
        )
        return self._reshape(copied, value.shape, name, value.source)

    def _rows(self, part, source):
        """A tensor as an image: that of which it was made, or `(batch, 1, positions, channels)`."""
        image = self.reshaped.get(part.tensor)
        if image is not None and image.shape[-1] == part.shape[-1]:
            return image
        key = "rows", part.tensor
        if key not in self.done:
            shape = (part.shape[0], 1, math.prod(part.shape[1:-1]), part.shape[-1])
            self.done[key] = part, self._reshape(part, shape, f"{part.tensor}_rows", source)
        return self.done[key][1]

    def _reshape(self, part, shape, name, source):
        wanted = self.name(name)
        self.tensors[wanted] = replace(self.tensors[part.tensor], name=wanted, shape=shape)
        self.ops.append(ir.Reshape((part.tensor,), wanted, source))
        if len(part.shape) == 4:
            self.reshaped[wanted] = part
        return OnGrid(wanted, part.grid, part.factor, shape)

    def _probabilities(self, value, grid, name):
        """The runtime's table has a grid of its own; another one takes a second rounding."""
        own = OnGrid(value.tensor, PROBABILITY_GRID, 1.0, value.shape)
        return own if own.grid.same_as(grid) else self._requantize(own, grid, name)

    def in_reals(self, value: OnGrid) -> OnGrid:
        """The same codes in a tensor whose written scale is the true one, where their grid has one.

        What is written in pixels, or such that a ReLU6 ends at 6, has to be copied for it.
        """
        if _is_one(value.factor) or not _is_one(container(value.grid).scale / value.grid.scale):
            return value
        key = "in reals", value.tensor
        if key not in self.done:
            copied = identity(value, value.tensor)
            self.done[key] = value, self._product(copied, value.grid, f"{value.tensor}_reals")
        return self.done[key][1]

    def _elementwise(self, value, grid, name):
        parts = [self.in_reals(part) for part in (value.first, value.second)]
        box = container(grid, value.relu)
        if not _is_one(box.scale / grid.scale) and _is_one(container(grid).scale / grid.scale):
            # A ReLU that ends between the grid's ends: a copy on the same grid clips.
            whole = self._elementwise(replace(value, relu=None), grid, f"{name}_unclipped")
            return self._requantize(replace(whole, relu=value.relu), grid, name)
        made, activation = self.tensor(name, value.shape, grid, value.relu)
        for part in (made, *parts):
            if not _is_one(part.factor):
                raise NotExportable(
                    f"{value.source}: what is added or multiplied, and the result, must sit on "
                    f"8-bit grids. Got {part.grid.bits} bits at {part.tensor}; quantize_model puts "
                    "them there"
                )
        if value.op is ir.Add:
            parts = [self._summand(part, grid, value.source) for part in parts]
        else:
            made = self._settled(made, *parts, value.source)
        inputs = tuple(part.tensor for part in parts)
        self.ops.append(value.op(inputs, made.tensor, value.source, activation=activation))
        return made

    def _settled(self, made, first, second, source):
        """`made` on a written scale for which kernels on x86 and on Arm multiply alike.

        A step of the result that is a small part of every product but zero saturates on all of
        them, and so it does where the runtime's largest multiplier is written.
        """
        if self.guessed:
            return made
        a, b, out = (self.tensors[t.tensor].scale for t in (first, second, made))
        if a * b / out < 2.0**-16:
            raise NotExportable(
                f"{source}: products of {first.tensor} and {second.tensor} are all less than a "
                "step of the result. Calibrate on more images"
            )
        written = settled_scale(a, b, max(out, a * b / LARGEST_MULTIPLIER))
        self.tensors[made.tensor] = replace(self.tensors[made.tensor], scale=written)
        return replace(made, factor=written / float(made.grid.scale))

    def _summand(self, part, grid, source):
        """`part` on a grid that the runtime adds exactly: scale ratios in [2^-10, 2^8)."""
        ratio = float(part.grid.scale) / float(grid.scale)
        if ratio >= 2.0**8 and not self.guessed:
            raise NotExportable(
                f"{source}: the scale of {part.tensor} is {ratio:.3g} times that of the sum; "
                "the runtime adds exactly for ratios in [2^-10, 2^8). Calibrate on more images; if "
                "training shrank it, callbacks.ScaleGuard names the epoch"
            )
        if ratio > 2.0**-9.5:
            return part
        # All its codes together are less than half a code of the sum: a coarser grid will do.
        coarse = replace(part.grid, scale=float(grid.scale) * 2.0**-9)
        return self.put(part, coarse, f"{part.tensor}_coarse")

    def _requantize(self, value, grid, name):
        """A depthwise 1x1 convolution of ones: any two grids, one rounding, one fused clip."""
        image = self.reshaped.get(value.tensor)
        if image is not None and len(value.shape) != 4:
            # Sooner done where the channels are few.
            image = image if value.relu is None else replace(image, relu=value.relu)
            moved = self.put(image, grid, f"{name}_source")
            return self._reshape(moved, value.shape, name, name)
        return self._product(replace(identity(value, name), relu=value.relu), grid, name)

    def _move(self, value, grid, name):
        parts = [
            self.put(part, grid, f"{name}_{i}" if len(value.parts) > 1 else f"{name}_source")
            for i, part in enumerate(value.parts)
        ]
        if len({self._written(part) for part in parts}) > 1:
            # One of them ends at a ReLU6 of its own: the same codes, on the grid's own container.
            plain = container(grid)
            parts = [
                part
                if self._written(part) == (float(np.float32(plain.scale)), plain.zero_point)
                else self.put(identity(part, value.source), grid, f"{part.tensor}_same")
                for part in parts
            ]
        if value.op is ir.DepthwiseConv2D:
            # A strided slice, as a product that keeps codes: the runtime's own is not delegated.
            sliced = replace(
                identity(parts[0], value.source), shape=value.shape, attributes=value.attributes
            )
            return self._product(sliced, grid, name)
        if value.op is ir.Reshape:
            return self._reshape(parts[0], tuple(value.shape), name, value.source)
        wanted = self.name(name)
        source = self.tensors[parts[0].tensor]
        self.tensors[wanted] = replace(source, name=wanted, shape=tuple(value.shape))
        inputs = tuple(part.tensor for part in parts)
        self.ops.append(value.op(inputs, wanted, value.source, **value.attributes))
        made = OnGrid(wanted, grid, parts[0].factor, tuple(value.shape))
        if value.op is ir.Pad:
            self.padded[wanted] = (parts[0], value.attributes["paddings"])
        return made

    def _written(self, part):
        """What the runtime compares: scale and zero point of a tensor."""
        tensor = self.tensors[part.tensor]
        return tensor.scale, tensor.zero_point

    def _image(self, value, grid, name):
        """The int8 form of an input, written in units of what the model is given."""
        if value.name in self.images:
            return self._from_image(value, grid, name)
        if value.pixels and not _is_pixel_grid(value, grid):
            pixels, _ = self.tensor(f"{value.name}_int8", value.shape, Grid(1.0, 0, 255, 8))
            self.images[value.name] = (replace(value, scale=1.0, offset=0.0), pixels)
            return self._from_image(value, grid, name)
        wanted = self.name(f"{name}_int8")
        scale = float(grid.scale) / value.scale
        self.tensors[wanted] = ir.Tensor(
            wanted, tuple(value.shape), "int8", scale, grid.zero_point, grid.bits
        )
        factor = self.tensors[wanted].scale / float(grid.scale)
        made = OnGrid(wanted, grid, factor, tuple(value.shape))
        self.images[value.name] = (value, made)
        return made

    def _from_image(self, value, grid, name):
        """An input on a second grid: a product of one input an output, from the first.

            first = a * given + b = scale * code          second = c * given + d

        Raises:
            NotExportable: codes of the first do not say what the second needs.
        """
        first, made = self.images[value.name]
        gain = value.scale / first.scale
        shift = value.offset - gain * first.offset
        if not _are_same_codes(made.grid, grid, gain, shift):
            if not _is_pixel_grid(first, made.grid):
                raise NotExportable(
                    f"Input {value.name} is read on two grids, by {made.tensor} and {name}, of "
                    "which the second cannot be had from the first. Rescale the input once for all "
                    "its readers"
                )
            # Reals between two pixels might have a code of their own there.
            self.images[value.name] = replace(first, pixels=True), made
        channels = (value.shape[-1],)
        gain, shift = (np.broadcast_to(x, channels) for x in (gain, shift))
        return self._product(identity(made, value.name).affine(gain, shift), grid, name)


def _is_one(ratio):
    return bool(np.isclose(ratio, 1.0, rtol=1e-6))  # float32 noise


def _are_same_codes(first, second, gain, shift):
    """Whether `gain * x + shift` of a grid's codes are codes of another, one by one."""
    if np.ndim(gain) or np.ndim(shift):
        return False
    steps, moved = np.float64([gain * first.scale, shift]) / float(second.scale)
    # 1e-4 of a code is float32 noise, far below the half code that matters.
    return abs(steps - 1.0) * 255 < 1e-4 and abs(first.lo + moved - second.lo) < 1e-4


def _is_pixel_grid(image, grid):
    """Whether each pixel value is a code of the grid, in order."""
    steps = np.asarray([image.scale, image.offset], object) / float(grid.scale)
    if any(np.ndim(x) for x in steps):
        return False
    # 1e-4 of a code is float32 noise, far below the half code that matters.
    same_step = abs(steps[0] - 1.0) * 255 < 1e-4
    return same_step and abs(steps[1] - grid.lo) < 1e-4 and grid.hi - grid.lo == 255


def identity(value: OnGrid, source: str) -> Linear:
    """A product that computes its input: a depthwise 1x1 kernel of ones, or a small unit matrix.

    One is written as code 127, so that a bias added later is rounded to a fine unit.
    """
    channels = value.shape[-1]
    dense = len(value.shape) != 4 and channels <= LARGEST_UNIT_MATRIX
    kernel = 127 * (np.eye(channels) if dense else np.ones((1, 1, channels, 1)))
    return Linear(
        op=ir.FullyConnected if dense else ir.DepthwiseConv2D,
        inputs=value,
        kernel=kernel.astype(np.int8),
        kernel_scale=np.full(channels, 1 / 127),
        bias=np.zeros(channels),
        kernel_bits=8,
        shape=value.shape,
        source=source,
        attributes={},
        copies=True,
    )
