"""The trained Keras model beside the integer reference, one grid at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.integer.lower import Lowering
from keras_lowbit.kinds import kind_of
from keras_lowbit.numerics.fixed_point import product_multiplier


@dataclass(frozen=True)
class Drift:
    """How far the codes of one tensor lie from those that the trained model computes.

    Args:
        most: codes of the largest difference.
        far: how many codes differ by more than they may, for the reasons in `drifts`.
        differing: how many codes differ.
        compared: how many there are.
    """

    most: float
    far: int
    differing: int
    compared: int


def drifts(small, arrays) -> dict[str, Drift]:
    """Codes of every `Quantize`, and probabilities in 256ths, beside the reference's, by tensor.

    Each grid is looked at by itself: behind it the Keras model goes on with the reference's
    codes, so a code that fell to the other side of a tie is counted once. Allowed are one code for
    that, and half a unit of a product's sums, to which its bias is rounded. Means of a padded
    average pool, which rounds codes in training too, must be the reference's.

    Args:
        small: a quantized, calibrated model.
        arrays: one for each input, in what the Keras model takes.
    """
    graph = integer_graph(small)
    feeds = {
        name: np.asarray(x).astype(graph.tensors[name].dtype)
        for name, x in zip(graph.inputs, arrays, strict=True)
    }
    integers = reference.run(graph, feeds)
    program = walk.flatten(small)
    lowering = Lowering(program, 1, "int8")
    lowering.run()
    made = {op.output: op for op in graph}
    found = {}

    def rounded_before(name):
        """Codes that biases and means which lead to a tensor may have lost."""
        op, out = made.get(name), graph.tensors[name]
        if isinstance(op, ir.Product):
            unit = product_multiplier(graph.tensors[op.inputs[0]].scale, op.kernel_scale, out.scale)
            # Of a channel that a unit saturates only the sign of its sums is known.
            return np.where(unit > 255, 510.0, unit) / 2
        moved = (ir.Reshape, ir.Pad, ir.Concatenate, ir.MaxPool2D, ir.ResizeNearest)
        if isinstance(op, moved):
            return max(np.max(rounded_before(source)) for source in op.inputs)
        return 0.0

    def note(name, trained, centred):
        apart = np.abs(trained - centred)
        # 1e-2 of a code is float32 noise of probabilities, which are no whole numbers.
        mean = made[name].kind == "average_pool_2d"
        allowed = 0.0 if mean else 1.01 + rounded_before(name)
        far, differing = (int((apart > bound).sum()) for bound in (allowed, 0.75))
        found[name] = Drift(float(apart.max()), far, differing, apart.size)

    def execute(call, args, kwargs):
        results = walk.infer(call, args, kwargs)
        value = lowering.values[walk.refs(call.outputs)[0].index]
        name = getattr(value, "tensor", None)
        if name in graph.outputs and f"{name}_int8" in made:
            name = f"{name}_int8"  # what stands before an output makes way for its name
        if name not in made:
            return results  # pending, or leads to no output
        centred = integers[name].astype(np.float32) - graph.tensors[name].zero_point
        if kind_of(call) == "quantize":
            codes, scale = results
            centred = 2 * centred - 1 if value.grid.signs else centred
            note(name, ops.convert_to_numpy(codes), centred)
            return ops.convert_to_tensor(centred, codes.dtype), scale
        if kind_of(call) == "average_pool" and made[name].kind == "average_pool_2d":
            note(name, ops.convert_to_numpy(results), centred)
            return ops.convert_to_tensor(centred, results.dtype)
        if made[name].kind in ("softmax", "logistic"):
            # The largest probability has the last code, 255 of 256.
            note(name, np.minimum(256 * ops.convert_to_numpy(results), 255), centred)
        return results

    walk.run(program, [ops.convert_to_tensor(x, "float32") for x in arrays], execute)
    return found
