"""The integer graph of a trained model, with its ends and the containers of its kernels."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NamedTuple

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.checks import checked_choice, checked_count
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.lower import Lowering
from keras_lowbit.integer.values import NotExportable, OnGrid, Probabilities
from keras_lowbit.kinds import kind_of, normalizing_of

TYPES = ("float32", "int8", "uint8")
WEIGHTS = ("int8", "int4", "int4_all")


def integer_graph(
    model: keras.Model,
    *,
    batch=1,
    input_type=None,
    output_type="float32",
    weights="int8",
    preprocessing=None,
) -> ir.Graph:
    """The integer graph of a quantized, calibrated model.

    Args:
        model: functional or Sequential model of quantized layers.
        batch: images that the graph takes at a time.
        input_type: `"float32"` takes what the Keras model takes; `"uint8"` and `"int8"` take
            codes of the input's grid: raw pixels where the model knows their range (`uint8`).
            `None`: `"float32"`, or `"uint8"` where reals cannot say it.
        output_type: `"float32"`, `"int8"` or `"uint8"`.
        weights: `"int8"`, `"int4"` (dense and pointwise kernels of 4 bits or less as int4) or
            `"int4_all"` (every kernel that fits).
        preprocessing: what makes the model's input of pixels 0..255; the graph then takes pixels.
            A pair `(scale, offset)`, `real = scale * pixel + offset`, of numbers or of one value
            a channel, or a `Rescaling` or `Normalization` layer.

    Raises:
        NotExportable: names the layer that has no integer form, and the way out.
        ValueError: an unknown type.
    """
    checked_choice(output_type, TYPES, who="output_type")
    checked_choice(weights, WEIGHTS, who="weights")
    if input_type is not None:
        checked_choice(input_type, TYPES, who="input_type")
    batch = checked_count(batch, who="batch", least=1)
    program = walk.flatten(model)
    lowering = Lowering(program, batch, weights, preprocessing=_pixels(preprocessing, program))
    outputs = lowering.run()
    emitter = lowering.emitter
    heads = [_input_end(lowering, name, input_type) for name in program.input_names]
    ends = zip(outputs, model.output_names, strict=True)
    tails = [_output_end(emitter, value, name, output_type) for value, name in ends]
    graph_ops = _stored(emitter, _alive(emitter.ops, _read_by(tails)), heads, tails, weights)
    inputs, names = (tuple(end.tensor for end in side) for side in (heads, tails))
    used = {n for op in graph_ops for n in (*op.inputs, op.output)} | set(inputs)
    tensors = {name: t for name, t in emitter.tensors.items() if name in used}
    return _with_output_names(ir.Graph(tensors, graph_ops, inputs, names), _given_names(program))


def objections(program, *, input_type=None, output_type="float32", weights="int8"):
    """All that stands against the integer graph of a model that need not be calibrated.

    Args:
        program: that of a quantized model, from `walk.flatten`.
        input_type: as in `integer_graph`.
        output_type: likewise.
        weights: likewise.

    Returns:
        `(sentences, operations, tensors)`. Without sentences the operations are those of the graph,
        else those that could be lowered.

    Raises:
        NotExportable: an input of unknown size, on which all else depends.
    """
    lowering = Lowering(program, 1, weights, dry=True)
    found = lowering.objections()
    lowered = not found
    emitter, readers, heads, tails = lowering.emitter, program.readers(), [], []

    def hear(ends, end, *arguments):
        try:
            ends.append(end(*arguments))
        except NotExportable as objection:
            found.append(str(objection))

    for ref, name in zip(program.inputs, program.input_names, strict=True):
        # Where what reads an input was refused, it has no grid of which to speak.
        if lowered or name in emitter.images or ref.index not in readers:
            hear(heads, _input_end, lowering, name, input_type)
    for ref, name in zip(walk.refs(program.outputs), program.output_names, strict=True):
        if ref.index in lowering.values:
            hear(tails, _output_end, emitter, lowering.values[ref.index], name, output_type)
    body = emitter.ops if found else _alive(emitter.ops, _read_by(tails))
    return found, _stored(emitter, body, heads, tails, weights), emitter.tensors


def _pixels(preprocessing, program):
    """`preprocessing` as `(scale, offset)`, checked; `None` for none."""
    if preprocessing is None:
        return None
    if len(program.inputs) != 1:
        raise ValueError(
            f"preprocessing is for models of one input. Got {list(program.input_names)}; put a "
            "Rescaling layer behind each input"
        )
    given = preprocessing
    if isinstance(given, keras.layers.Normalization):
        # `None` fits nothing and is refused below.
        given = None if given.mean is None else normalizing_of(given)
    elif isinstance(given, keras.layers.Rescaling):
        given = (given.scale, given.offset)
    channels = program.inputs[0].shape[-1]
    try:
        scale, offset = (np.asarray(x, np.float64) for x in given)
    except (TypeError, ValueError):
        scale = offset = np.array(np.nan)
    fits = all(x.shape in ((), (1,), (channels,)) for x in (scale, offset))
    if not fits or not np.all(np.isfinite(offset)) or not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError(
            "preprocessing must be (scale, offset) with scale above 0, each a number or "
            f"{channels} of them, or a Rescaling or Normalization layer. Got {preprocessing!r}"
        )
    return tuple(float(x.reshape(-1)[0]) if x.size == 1 else x for x in (scale, offset))


class _End(NamedTuple):
    """An input or output of the graph, and the operation between it and the body, if any."""

    tensor: str
    op: ir.Op | None = None


def _input_end(lowering, name, input_type):
    if name not in lowering.emitter.images:
        raise NotExportable(f"Input {name} is not read by any layer. Build the model without it")
    image, made = lowering.emitter.images[name]
    tensor = lowering.emitter.tensors[made.tensor]
    shift = image.offset / float(made.grid.scale)
    # 1e-4 of a code is float32 noise of the offset, far below the half code that matters.
    shifted = abs(shift) > 1e-4
    kind = input_type or ("uint8" if shifted or image.pixels else "float32")
    if kind == "float32" and shifted:
        raise NotExportable(
            f"Input {name}: its grid stands {shift:.4g} codes beside 0.0, which a float input "
            "cannot say. Use input_type='uint8' (raw pixels) or 'int8'"
        )
    if kind == "int8":
        return _End(made.tensor)
    border = lowering.emitter.name(name)
    zero_point = tensor.zero_point + 128 if kind == "uint8" else 0
    scale = tensor.scale if kind == "uint8" else None
    lowering.emitter.tensors[border] = ir.Tensor(border, tensor.shape, kind, scale, zero_point)
    return _End(border, ir.Quantize((border,), made.tensor, name))


def _output_end(emitter, value, wanted, output_type):
    if not isinstance(value, (OnGrid, Probabilities)) or getattr(value, "relu", None):
        raise NotExportable(
            f"Output {wanted} has no grid: quantize_model puts one there; in a model built by "
            "hand, end with a Quantize and a Dequantize layer"
        )
    if isinstance(value, OnGrid):
        value = emitter.in_reals(value)
    if isinstance(value, OnGrid) and abs(value.factor - 1.0) > 1e-6:
        raise NotExportable(
            f"Output {wanted} sits on {value.grid.bits} bits; outputs need an 8-bit grid"
        )
    if output_type == "int8":
        return _End(value.tensor)
    tensor = emitter.tensors[value.tensor]
    border = emitter.name(f"{wanted}_{output_type}" if wanted == value.tensor else wanted)
    unsigned = output_type == "uint8"
    emitter.tensors[border] = ir.Tensor(
        border,
        tensor.shape,
        output_type,
        tensor.scale if unsigned else None,
        tensor.zero_point + 128 if unsigned else 0,
    )
    op = ir.Quantize if unsigned else ir.Dequantize
    return _End(border, op((value.tensor,), border, wanted))


def _given_names(program):
    """Names of the outputs; `None` for one that Keras named after the border of a grid."""
    producers = program.producers()
    made = [producers.get(ref.index) for ref in walk.refs(program.outputs)]
    return [
        None if call and kind_of(call) == "dequantize" and call.name == name else name
        for call, name in zip(made, program.output_names, strict=True)
    ]


def _with_output_names(graph, wanted):
    """The graph with `wanted` on its outputs; tensors that have one of the names move aside."""
    new = {a: b for a, b in zip(graph.outputs, wanted, strict=True) if b is not None}
    # Two outputs of one tensor, or of one name, have to stay as they are; so have inputs.
    if len(set(new.values())) < len(graph.outputs) - wanted.count(None):
        return graph
    if {*new, *new.values()} & {*graph.inputs}:
        return graph
    for name in set(new.values()) & ({*graph.tensors} - {*new}):
        aside, n = f"{name}_{graph.tensors[name].dtype}", 1
        while aside in graph.tensors or aside in new.values():
            n += 1
            aside = f"{name}_{graph.tensors[name].dtype}.{n}"
        new[name] = aside

    def named(name):
        return new.get(name, name)

    tensors = {named(n): replace(t, name=named(n)) for n, t in graph.tensors.items()}
    operations = tuple(
        replace(op, inputs=tuple(map(named, op.inputs)), output=named(op.output)) for op in graph
    )
    return ir.Graph(tensors, operations, graph.inputs, tuple(map(named, graph.outputs)))


def _read_by(tails):
    """Tensors of the body that outputs are, or are made of."""
    return {end.op.inputs[0] if end.op else end.tensor for end in tails}


def _stored(emitter, body, heads, tails, weights):
    """The operations of a graph in order, kernels in the containers of `weights`."""
    first, last = ([end.op for end in side if end.op] for side in (heads, tails))
    return (*first, *(stored(op, emitter.tensors, weights) for op in body), *last)


def _alive(ops, wanted):
    """Operations that something reads, in order."""
    wanted = set(wanted)
    kept = []
    for op in reversed(ops):
        if op.output in wanted:
            wanted.update(op.inputs)
            kept.append(op)
    return kept[::-1]


def stored(op: ir.Op, tensors, weights: str) -> ir.Op:
    """The operation with its kernel in the container that `weights` asks for."""
    if not isinstance(op, ir.Product) or weights == "int8" or op.kernel_bits > 4:
        return op
    fits = op.kernel.size and op.kernel.min() >= -8 and op.kernel.max() <= 7
    # The delegate leaves an odd number of input channels in int4 to kernels that round otherwise.
    exact = op.kernel.shape[-2] % 2 == 0
    if isinstance(op, ir.FullyConnected):
        return replace(op, storage="int4") if fits and (exact or weights == "int4_all") else op
    pointwise = (
        isinstance(op, ir.Conv2D)
        and op.kernel.shape[:2] == (1, 1)
        and op.strides == (1, 1)
        and op.kernel.shape[2] == tensors[op.inputs[0]].shape[-1]
    )
    if pointwise and fits and exact:
        # Only as FULLY_CONNECTED does the delegate take a pointwise kernel of int4.
        shared = {f.name: getattr(op, f.name) for f in fields(ir.Product)}
        shared.update(kernel=op.kernel[0, 0], storage="int4")
        return ir.FullyConnected(**shared)
    return replace(op, storage="int4") if weights == "int4_all" and fits else op
