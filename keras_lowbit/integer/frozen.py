"""The integer graph as a Keras model: one layer an operation, constants as weights.

`build` makes the model, `graph_of` reads the graph back from it, also after a round trip
through a `.keras` file. The forward pass is the arithmetic of `reference`, in every tensor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import keras
import numpy as np

from keras_lowbit.integer import arithmetic
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.integer_op import CONSTANT_DTYPES, IntegerOp
from keras_lowbit.integer.reference import checked_inputs
from keras_lowbit.numerics.fixed_point import CODE_RANGES


def build(graph: ir.Graph, name: str = "frozen", *, outputs=None) -> keras.Model:
    """The graph as a functional Keras model that computes the same codes.

    Inputs have the dtype of the graph's inputs and any batch; outputs are float32 tensors that
    hold codes, or reals behind a `Dequantize`. The model has no trainable weights, saves and
    loads in safe mode, and runs compiled.

    Args:
        graph: the integer graph.
        name: of the model.
        outputs: the structure of what the model returns, such as `{"box": None, "cls": None}`, a
            leaf for each of the graph's outputs, flattened. `None`: a tensor, or a list of them.

    Raises:
        ValueError: for an operation that the layers cannot compute, by the name of its output, or
            a structure of another number of outputs.
    """
    _check_used(graph)
    _check_structure(graph, outputs)
    names = _layer_names(graph)
    values = {}
    for key in graph.inputs:
        tensor = graph.tensors[key]
        values[key] = keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=names[key])
    for position, op in enumerate(graph):
        layer = _layer(op, graph, position, names[op.output])
        operands = [values[key] for key in op.inputs]
        values[op.output] = layer(operands[0] if len(operands) == 1 else operands)
    inputs = [values[key] for key in graph.inputs]
    made = [values[key] for key in graph.outputs]
    if outputs is None:
        made = made[0] if len(made) == 1 else made
    else:
        made = keras.tree.pack_sequence_as(outputs, made)
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, made, name=name)


def graph_of(model: keras.Model) -> ir.Graph:
    """The graph that `build` was given, from its model or a reloaded copy.

    Raises:
        ValueError: if the model holds layers that `build` does not make.
    """
    layers = integer_layers(model)
    tensors, names = {}, {}
    for layer in layers:
        symbols = layer.input if isinstance(layer.input, (list, tuple)) else [layer.input]
        for symbol, grid in zip(symbols, layer.grids, strict=True):
            names[id(symbol)] = grid.name
            tensors.setdefault(grid.name, grid)
        names[id(layer.output)] = layer.out.name
        tensors.setdefault(layer.out.name, layer.out)
    return ir.Graph(
        tensors=tensors,
        ops=tuple(layer.graph_op() for layer in layers),
        inputs=tuple(names[id(symbol)] for symbol in model.inputs),
        outputs=tuple(names[id(symbol)] for symbol in model.outputs),
    )


def tensors_of(model: keras.Model, inputs, batch_size: int = 32) -> dict[str, np.ndarray]:
    """What the model computes in every tensor of its graph.

    Args:
        model: a model from `build`, maybe reloaded.
        inputs: arrays by tensor name, or one array for a single input.
        batch_size: samples computed at a time.

    Returns:
        name -> array of the tensor's dtype, for inputs and every operation's output: what
        `reference.run` returns.
    """
    graph = graph_of(model)
    if not isinstance(inputs, Mapping):
        inputs = {graph.inputs[0]: inputs}
    arrays = checked_inputs(graph, inputs)
    feed = [arrays[name] for name in graph.inputs]
    found = observer(model).predict(
        feed[0] if len(feed) == 1 else feed, batch_size=batch_size, verbose=0
    )
    for op in graph:
        arrays[op.output] = np.asarray(found[op.output], graph.tensors[op.output].dtype)
    return arrays


def observer(model: keras.Model) -> keras.Model:
    """A model of the same layers that returns every operation's output, by tensor name."""
    return keras.Model(
        model.inputs[0] if len(model.inputs) == 1 else model.inputs,
        {layer.out.name: layer.output for layer in integer_layers(model)},
    )


def integer_layers(model: keras.Model) -> list[IntegerOp]:
    """The layers of a frozen model, in the graph's order.

    Raises:
        ValueError: if the model holds other layers.
    """
    layers = [x for x in model.layers if not isinstance(x, keras.layers.InputLayer)]
    strange = [x.name for x in layers if not isinstance(x, IntegerOp)]
    if strange or not layers:
        raise ValueError(
            f"Model {model.name} is not a frozen model: layers {strange} are no integer operations."
            " Pass the model that `freeze` returned, not one that wraps it."
        )
    return sorted(layers, key=lambda layer: layer.position)


def _layer(op, graph, position, name):
    grids = [graph.tensors[key] for key in op.inputs]
    out = graph.tensors[op.output]
    _check(op, grids, out)
    values = {**op.constants, **arithmetic.derived(op, grids, out)}
    split = (
        arithmetic.choose_split(op, grids[0]) if isinstance(op, ir.Product) else arithmetic.WHOLE
    )
    return IntegerOp(
        kind=op.kind,
        attributes=op.attributes,
        inputs=[dataclasses.asdict(grid) for grid in grids],
        output=dataclasses.asdict(out),
        source=op.source,
        position=position,
        constants={key: list(value.shape) for key, value in values.items()},
        split=split,
        values=values,
        name=name,
    )


def _check(op, grids, out):
    """Refuse what the backends would compute otherwise, or not at all."""

    def require(fits, fault, way_out):
        if not fits:
            raise ValueError(f"{op.kind} {op.output}: {fault}. {way_out}")

    if hasattr(op, "padding"):
        require(
            op.padding in ("SAME", "VALID"), f"padding is {op.padding!r}", "Use 'SAME' or 'VALID'."
        )
    if hasattr(op, "dilation"):
        require(
            max(op.strides) == 1 or max(op.dilation) == 1,
            f"strides {op.strides} with dilation {op.dilation}",
            "Keras allows one of them above 1.",
        )
    if isinstance(op, ir.Product):
        dtypes = {name: str(array.dtype) for name, array in op.constants.items()}
        wanted = {name: CONSTANT_DTYPES.get(name, "float32") for name in dtypes}
        require(dtypes == wanted, f"constants are {dtypes}", f"Make them {wanted}.")
    moves_batch = (
        (isinstance(op, ir.Reshape) and grids[0].shape[0] != out.shape[0])
        or (isinstance(op, ir.Pad) and any(op.paddings[0]))
        or (isinstance(op, ir.Concatenate) and op.axis in (0, -len(out.shape)))
        or (isinstance(op, ir.Slice) and grids[0].shape[0] != out.shape[0])
        or (isinstance(op, ir.Transpose) and op.order[0] != 0)
    )
    require(not moves_batch, "it moves the batch axis", "Keep the first axis as it is.")
    if isinstance(op, ir.Quantize) and grids[0].dtype != "float32":
        apart = out.zero_point - grids[0].zero_point
        low = {name: bounds[0] for name, bounds in CODE_RANGES.items()}
        require(
            out.scale == grids[0].scale and apart == low[out.dtype] - low[grids[0].dtype] != 0,
            f"from codes it only moves between int8 and uint8 on one grid. Got {grids[0]} -> {out}",
            "A DepthwiseConv2D of ones moves codes to any other grid.",
        )


def _check_used(graph):
    """A functional model keeps only what its outputs need, so the graph must hold nothing else."""
    computed = {op.output for op in graph}
    used = {name for op in graph for name in op.inputs} | (computed & set(graph.outputs))
    idle = [n for n in graph.tensors if n not in used]
    passed = [n for n in graph.outputs if n not in computed]
    if idle or passed:
        raise ValueError(
            f"Tensors {idle} lead to no output and outputs {passed} are plain inputs: a model "
            "cannot hold either. Remove them from the graph."
        )


def _check_structure(graph, outputs):
    leaves = len(graph.outputs) if outputs is None else len(keras.tree.flatten(outputs))
    if leaves != len(graph.outputs):
        raise ValueError(
            f"outputs={outputs} holds {leaves} outputs, the graph has {len(graph.outputs)}: "
            f"{list(graph.outputs)}. Give a leaf for each."
        )


def _layer_names(graph):
    """Layer names that Keras and the three backends take, unique, in the graph's order."""
    names = {}
    for tensor in (*graph.inputs, *(op.output for op in graph)):
        name = base = re.sub(r"^(?=[^A-Za-z])", "t", re.sub(r"[^A-Za-z0-9_]", "_", tensor))
        count = 1
        while name in names.values():
            count += 1
            name = f"{base}_{count}"
        names[tensor] = name
    return names
