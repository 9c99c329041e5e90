"""Rules for activations: what each becomes in integers."""

from __future__ import annotations

import re

from keras_lowbit import walk
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.affine import affine
from keras_lowbit.integer.emit import PROBABILITY_GRID
from keras_lowbit.integer.values import NotExportable, Probabilities, with_relu
from keras_lowbit.kinds import (
    ACTIVATIONS,
    OF_TWO_TENSORS,
    activation_as_written,
    activation_name,
    is_last_axis,
    limit_of,
)

_PROBABILITIES = {"softmax": ir.Softmax, "sigmoid": ir.Logistic}


def activated(value, call, who):
    """A value behind the activation that a call is, or ends with; `who` is named in refusals."""
    name, limit = activation_name(call.operation), limit_of(call.operation)
    if name == "linear":
        return value
    if name == "hard_sigmoid":
        value = affine(value, 1 / 6, 0.5, call)
    if limit is not None:
        return with_relu(value, limit, call.name)
    if name in _PROBABILITIES:
        raise NotExportable(
            f"{who}: a {name} inside a layer has no grid before it; give the layer "
            "activation=None, then Quantize, Dequantize and the activation, as quantize_model does"
        )
    if name in OF_TWO_TENSORS:
        raise NotExportable(
            f"{who}: {name} becomes two tensors with grids of their own, which "
            "quantize_model puts there; in a model built by hand, write it as a product or a sum"
        )
    if name == "softmax_variant":
        raise NotExportable(_other_axis(call))
    raise NotExportable(
        f"{who}: {activation_as_written(call.operation)} has no exact integer form. "
        f"Use {ACTIVATIONS}"
    )


def _other_axis(call):
    own = getattr(call.operation, "activation", None) or call.operation
    rank, axis, way_out = len(call.output.shape), own.axis, ""
    if isinstance(axis, int) and axis % rank:
        order = [*(a for a in range(1, rank) if a != axis % rank), axis % rank]
        back = [1 + order.index(a) for a in range(1, rank)]
        way_out = f"; write Permute({tuple(order)}), Softmax() and Permute({tuple(back)})"
    return (
        f"{call.name}: only a softmax over the last axis has an integer form, and "
        f"this one runs over another{way_out}"
    )


def activation(lowering, call):
    """A clip in the operation before, or a table of its own."""
    name = activation_name(call.operation)
    if name in _PROBABILITIES:
        # A table is of reals: an image may be written in pixels.
        value = lowering.emitter.in_reals(lowering.grid_tensor(call))
        # The name is that of a layer's first call; this one may be of a tensor of another rank.
        shared = name == "softmax" and hasattr(call.operation, "axis")
        if shared and not is_last_axis(call.operation, len(value.shape)):
            raise NotExportable(_other_axis(call))
        wanted = lowering.emitter.name(call.name)
        tensor = ir.Tensor(wanted, value.shape, "int8", PROBABILITY_GRID.scale, -128)
        lowering.emitter.tensors[wanted] = tensor
        lowering.emitter.ops.append(_PROBABILITIES[name]((value.tensor,), wanted, call.name))
        return Probabilities(wanted, value.shape)
    return activated(lowering.read(call), call, _owner(lowering, call))


def _owner(lowering, call):
    """The layer that an activation was written into: `quantize_model` made its own call of it."""
    layer = lowering.tensor_name(call.inputs[0])
    made = walk.plain(f"{layer}_{activation_name(call.operation)}")
    return layer if re.fullmatch(rf"{re.escape(made)}(_\d+)?", call.name) else call.name
