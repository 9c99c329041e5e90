"""Rules for calls that join two tensors number by number."""

from __future__ import annotations

from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.values import Elementwise, NotExportable


def check_axes(name, shapes):
    """`NotExportable` where tensors to add or multiply, of these shapes, differ in rank."""
    fewer, more = min(shapes, key=len), max(shapes, key=len)
    if len(fewer) == len(more):
        return
    target = (1,) * (len(more) - max(len(fewer), 1)) + tuple(fewer[1:])
    raise NotExportable(
        f"{name}: tensors to add or multiply must have as many axes. Got "
        f"{' and '.join(map(str, shapes))}; put Reshape({target}) behind the smaller one, or keep "
        "its axes (keepdims=True)"
    )


def add(lowering, call):
    """A sum, on a grid to come."""
    first, second = _two(lowering, call)
    check_axes(call.name, [first.shape, second.shape])
    if first.shape != second.shape:
        raise NotExportable(
            f"{call.name}: only equal shapes are added. Got {first.shape} and {second.shape}; "
            "repeat the smaller one, such as (1, 1, channels) with UpSampling2D, or "
            "(height, width, 1) with Concatenate()([x] * channels)"
        )
    return Elementwise(ir.Add, first, second, first.shape, call.name)


def multiply(lowering, call):
    """A product of two tensors, on a grid to come."""
    first, second = _two(lowering, call)
    check_axes(call.name, [first.shape, second.shape])
    return Elementwise(ir.Multiply, first, second, lowering.shape(call.output), call.name)


def _two(lowering, call):
    if len(call.inputs) != 2:
        raise NotExportable(f"{call.name}: expected two tensors. Got {len(call.inputs)}")
    return lowering.grid_tensor(call, 0), lowering.grid_tensor(call, 1)
