"""Two models of one origin, as programs: do they correspond, what are their logits, forward passes.

Everything here runs in inference mode: batch norms use their moving statistics, dropout does
nothing.
"""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.kinds import activation_name, kind_of
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.transform.rescale_depthwise import without_activation

_WEIGHTED = ("product", "batch_norm")


def pair(model, float_model) -> tuple[walk.Program, walk.Program]:
    """The programs of a quantized model and of its float model.

    Raises:
        ValueError: their layers with weights differ in name, kind or kernel shape.
    """
    quantized, floating = walk.flatten(model), walk.flatten(float_model)
    if not any(kernels(call.operation) for call in quantized.calls):
        raise ValueError(
            f"{model.name} has no quantized layer: pass the quantized model first, the float one "
            "second"
        )
    ours = {c.plain: _identity(c) for c in quantized.calls if kind_of(c) in _WEIGHTED}
    theirs = {c.plain: _identity(c) for c in floating.calls if kind_of(c) in _WEIGHTED}
    odd = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if odd:
        name = odd[0]
        raise ValueError(
            f"{model.name} and {float_model.name} differ in {len(odd)} layers; {name} is "
            f"{ours.get(name, 'absent')} in the first and {theirs.get(name, 'absent')} in the "
            "second. Pass the float model that the quantized one was made from (the folded one, "
            "if batch norms were folded)"
        )
    if not any(kind == "product" for kind, _ in ours.values()):
        raise ValueError(f"{model.name} has no layer with a kernel: nothing to tune")
    shapes = [[ref.shape for ref in walk.refs(p.outputs)] for p in (quantized, floating)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{model.name} has outputs of shapes {shapes[0]}, {float_model.name} of {shapes[1]}"
        )
    return quantized, floating


def _identity(call):
    layer = call.operation
    if kind_of(call) == "batch_norm":
        return "batch_norm", tuple(layer.moving_mean.shape)
    found = [tuple(k.latent.shape) for k in kernels(layer)]
    if not found:
        found = [
            tuple(getattr(layer, name).shape)
            for name in ("kernel", "depthwise_kernel", "pointwise_kernel")
            if getattr(layer, name, None) is not None and not _is_alias(layer, name)
        ]
    return "product", tuple(found)


def _is_alias(layer, name):
    # Keras' DepthwiseConv2D knows its one kernel by the plain name too.
    return name == "depthwise_kernel" and not hasattr(layer, "pointwise_kernel")


class LogitsCall(walk.Call):
    """A product whose fused softmax `execute` leaves out."""


def logits(program: walk.Program) -> walk.Program:
    """`program` with each output taken before its softmax, where one ends it.

    A softmax inside a layer with a kernel has no tensor in front of it: such a call becomes a
    `LogitsCall`. Probabilities that another call reads stay what they are.
    """
    producers, readers = program.producers(), program.readers()

    def ends(ref):
        """The call of the softmax that ends an output, or `None`."""
        call = producers.get(ref.index) if isinstance(ref, walk.Ref) else None
        if call is None or ref.index in readers or kind_of(call) not in ("activation", "product"):
            return None
        return call if "softmax" in activation_name(call.operation) else None

    def before(ref):
        call = ends(ref)
        return ref if call is None or kind_of(call) == "product" else call.inputs[0]

    outputs = keras.tree.map_structure(before, program.outputs)
    last = {id(call): call for ref in walk.refs(program.outputs) if (call := ends(ref))}
    fused = {key for key, call in last.items() if kind_of(call) == "product"}
    calls = tuple(
        LogitsCall(**vars(call)) if id(call) in fused else call
        for call in program.calls
        if id(call) in fused or id(call) not in last
    )
    return dataclasses.replace(program, calls=calls, outputs=outputs)


def execute(call, args, kwargs):
    """One call in inference mode, a `LogitsCall` without its softmax."""
    operation = call.operation
    if not isinstance(call, LogitsCall):
        return walk.infer(call, args, kwargs)
    with without_activation(operation):
        return operation(*args, **kwargs)


def run(program: walk.Program, feeds) -> list:
    """Outputs of a program as tensors that carry gradients, in the order of its outputs."""
    values = walk.run(program, feeds, execute)
    return [values[ref.index] for ref in walk.refs(program.outputs)]


def forward(program: walk.Program, feeds) -> list[np.ndarray]:
    """Outputs of a program for one batch, as NumPy arrays in the order of its outputs."""
    values = walk.forward(program, program.feeds(feeds), execute)
    return [ops.convert_to_numpy(values[ref.index]) for ref in walk.refs(program.outputs)]
