"""Rules for calls that put tensors on grids."""

from __future__ import annotations

from dataclasses import replace

from keras_lowbit.integer.affine import affine
from keras_lowbit.integer.values import Image, Linear, NotExportable, OnGrid


def quantize(lowering, call):
    """A tensor onto the grid of a Quantize layer."""
    quantizer = call.operation.quantizer
    return on_grid(lowering, call, lowering.read(call), quantizer)


def grid_of(lowering, call, quantizer):
    """The grid of an activation quantizer that has seen data."""
    if not quantizer.is_calibrated:
        if not lowering.dry:
            raise NotExportable(
                f"{call.name} is not calibrated. Run keras_lowbit.calibrate(model, images) first"
            )
        lowering.emitter.guessed = True
    try:
        grid = quantizer.grid()
    except ValueError as error:
        raise NotExportable(f"{call.name}: {error}") from error
    if grid.hi - grid.lo > 255:
        raise NotExportable(
            f"{call.name}: codes of {grid.bits} bits; files hold at most 8. Quantize with 8 "
            "bits or fewer"
        )
    return grid


def on_grid(lowering, call, value, quantizer):
    """A value onto the grid of a quantizer that reads the first input of a call."""
    grid = grid_of(lowering, call, quantizer)
    name = lowering.tensor_name(call.inputs[0])
    offset = getattr(quantizer, "offset", 0.0)
    if isinstance(value, Image):
        value = replace(value, offset=value.offset - offset)
    elif offset and isinstance(value, (Linear, OnGrid)):  # pixels that were moved about before
        value = affine(value, 1.0, -offset, call)
    if isinstance(value, OnGrid):
        name = f"{name}_a{grid.bits}"
    made = lowering.emitter.put(value, grid, name)
    lowering.grids[made.tensor] = quantizer
    return made


def dequantize(lowering, call):
    """Codes are values already; pixels get back what was taken off them."""
    value, offset = lowering.read(call), call.operation.offset
    return affine(value, 1.0, offset, call) if offset else value
