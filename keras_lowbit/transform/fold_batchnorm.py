"""Fold batch normalization into the layer that feeds it.

    gain = gamma / sqrt(variance + epsilon)
    gain * (W x + b - mean) + beta  =  (gain W) x + (gain (b - mean) + beta)

`gain` runs over output channels: the last axis of a convolution's or dense kernel, the last two
of a depthwise one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.kinds import activation_name, batch_norm_of, kind_of
from keras_lowbit.numerics.arrays import float64_of
from keras_lowbit.transform.copies import (
    config_of,
    constraints_of,
    rebuilt,
    rebuilt_model,
    refuse_changed,
)

_FOLDABLE = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)


@dataclass(frozen=True)
class Declined:
    """A batch norm that stays, and why."""

    batch_norm: str
    why: str


@dataclass(frozen=True)
class FoldReport:
    """What `fold_batchnorm` did.

    Args:
        folded: batch norm's name to the name of the layer that took it in.
        declined: those that stay.
    """

    folded: dict[str, str] = field(default_factory=dict)
    declined: tuple[Declined, ...] = ()


def fold_batchnorm(
    model: keras.Model, *, return_report: bool = False, name: str | None = None
) -> keras.Model | tuple[keras.Model, FoldReport]:
    """A copy of a float model with batch norms folded into the layers in front of them.

    Outputs in inference are the same up to float32 rounding. A folded layer has a bias, and its
    kernel is `gain * kernel`; it has no constraints, and regularizers weigh its new numbers.
    `quantize_model` needs no folding (a batch norm's gain goes into
    kernel scales at export); this is for methods that are defined on folded models.

    Args:
        model: functional, Sequential or nested float model; stays as it is.
        return_report: return `(model, FoldReport)`.
        name: name of the new model.

    Returns:
        A functional model, nested ones opened.

    Raises:
        ValueError: a model without a graph, or one that Keras' `quantize()` or LoRA has changed.
    """
    program = walk.flatten(model)
    refuse_changed(program)
    pairs, declined = _pairs(program)
    made = _rebuild(program, pairs, walk.plain(name or f"{model.name}_folded"))
    if not return_report:
        return made
    folded = {norm.name: layer.name for norm, layer in pairs}
    return made, FoldReport(folded, tuple(declined))


def _pairs(program):
    """`[(batch norm call, call in front of it)]` and what was declined."""
    readers, producers = program.readers(), program.producers()
    times = program.times()
    outputs = {ref.index for ref in walk.refs(program.outputs)}
    pairs, declined = [], []
    for norm in program.calls:
        if kind_of(norm) != "batch_norm":
            continue
        layer = producers.get(norm.inputs[0].index)
        why = _objection(norm, layer, readers, outputs, times)
        if why is None:
            pairs.append((norm, layer))
        else:
            declined.append(Declined(norm.name, why))
    return pairs, declined


def _objection(norm, layer, readers, outputs, times):
    """Why `norm` cannot be folded into `layer`, or `None`."""
    if layer is None:
        return "it reads an input of the model"
    if type(layer.operation) not in _FOLDABLE:
        kinds = ", ".join(t.__name__ for t in _FOLDABLE)
        return f"it reads {layer.name} ({type(layer.operation).__name__}); foldable are {kinds}"
    others = [c.name for c in readers[norm.inputs[0].index] if c is not norm]
    if others:
        return f"the output of {layer.name} is also read by {', '.join(others)}"
    if norm.inputs[0].index in outputs:
        return f"the output of {layer.name} is an output of the model"
    if activation_name(layer.operation) != "linear":
        return f"activation {activation_name(layer.operation)!r} of {layer.name} stands between"
    for call in (layer, norm):
        if times[id(call.operation)] > 1:
            return f"{call.name} is called {times[id(call.operation)]} times"
    if dict(norm.kwargs).get("training"):
        return "it is called with training=True"
    if norm.operation.axis not in (-1, len(norm.output.shape) - 1):
        return f"it runs over axis {norm.operation.axis}, not over the channels of {layer.name}"
    if getattr(layer.operation, "data_format", "channels_last") != "channels_last":
        return f"{layer.name} has its channels first"
    return None


def _rebuild(program, pairs, name):
    norm_of = {id(layer): norm.operation for norm, layer in pairs}
    gone = {id(norm) for norm, _ in pairs}

    def replace(call, args):
        if id(call) in gone:
            return args[0]
        if id(call) not in norm_of:
            return None
        original = call.operation
        config = {**config_of(original), "name": call.plain, "use_bias": True}
        # They were said of other numbers: the first step would press `gain * kernel` into them.
        config |= dict.fromkeys(constraints_of(original))
        layer = rebuilt(original, config)
        results = layer(*args)
        layer.set_weights(_folded(original, norm_of[id(call)]))
        return results

    return rebuilt_model(program, replace, name)


def _folded(layer, norm):
    """`[kernel, bias]` with the batch norm inside, computed in float64."""
    gain, bias = batch_norm_of(norm)
    kernel = float64_of(layer.kernel)
    if layer.use_bias:
        bias = bias + gain * float64_of(layer.bias)
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        kernel = kernel * gain.reshape(kernel.shape[-2:])
    else:
        kernel = kernel * gain
    return [kernel.astype(np.float32), bias.astype(np.float32)]
