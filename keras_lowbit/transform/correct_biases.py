"""Biases that undo the mean error of quantization, channel by channel.

Rounded kernels and clipped activations shift the mean of a channel. The shift is measured on
images, layer after layer in the order of execution, and taken off the bias (or off the batch norm's
`beta` where one follows), so that every later layer sees corrected inputs.

Reference:
    Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019,
    arXiv:1906.04721, section 4.2 (the empirical form: means from images).
"""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.kinds import activation_name, kind_of, own_bias
from keras_lowbit.progress import track
from keras_lowbit.transform.batches import checked_batches
from keras_lowbit.transform.ready import check_ready
from keras_lowbit.transform.rescale_depthwise import without_activation
from keras_lowbit.transform.snap_biases import snap_biases


def correct_biases(model: keras.Model, float_model: keras.Model, images) -> keras.Model:
    """Match the channel means of a quantized model to those of its float model, in place.

    Means are those in front of an activation, which a quantized product has behind it, as a layer
    of its own, unless it clips. Layers that are called several times stay as they are: they have
    one bias and several means.

    Args:
        model: a calibrated model of `quantize_model`.
        float_model: the model it was made from.
        images: array `(n, ...)`, or for several inputs a list of arrays or arrays by input name;
            kept in memory with the activations of one layer at a time. A few dozen are enough.

    Returns:
        The model.

    Raises:
        ValueError: an uncalibrated model, quantizers that are switched off, images that do not fit,
            or a float model of other layers.
    """
    check_ready(model, who="correct_biases")
    means = _float_means(walk.flatten(float_model), images)
    program = walk.flatten(model)
    sites = _sites(program)
    if not any(call.name in means for call in program.calls):
        raise ValueError(
            f"{float_model.name} shares no layer names with {model.name}: pass the float model "
            "that it was quantized from"
        )
    batch = _only_batch(program, images)
    feeds = program.feeds(batch)
    bar = iter(track(range(len(program.calls)), "correct biases"))

    def execute(call, args, kwargs):
        next(bar, None)
        outputs = walk.infer(call, args, kwargs)
        name = sites.get(call.output.index) if len(walk.refs(call.outputs)) == 1 else None
        if name not in means:
            return outputs
        shift = means[name] - _channel_mean(outputs)
        variable = own_bias(call)
        variable.assign(ops.convert_to_numpy(variable) + shift)
        return outputs + ops.convert_to_tensor(shift)

    walk.forward(program, feeds, execute)
    return snap_biases(model)


def _sites(program) -> dict[int, str]:
    """Tensors whose mean a bias can move, by index: products and the batch norms behind them."""
    readers = program.readers()
    times = program.times()
    found = {}
    for call in program.calls:
        if times[id(call.operation)] > 1:
            continue
        followed = [kind_of(c) for c in readers.get(call.output.index, [])] if _single(call) else []
        if kind_of(call) == "product" and followed != ["batch_norm"]:
            if _is_linear(call.operation) and call.operation.use_bias:
                found[call.output.index] = call.name
        elif kind_of(call) == "batch_norm" and call.operation.center:
            found[call.output.index] = call.name
    return found


def _single(call):
    return len(walk.refs(call.outputs)) == 1


def _is_linear(layer):
    return activation_name(layer) == "linear"


def _float_means(program, images):
    """Channel means of the outputs that `_sites` names, by layer name as in the quantized model.

    Of a product without its activation: where `_sites` names one, the quantized one has none.
    """
    batch = _only_batch(program, images)
    means = {}

    def execute(call, args, kwargs):
        if kind_of(call) == "product":
            with without_activation(call.operation) as activation:
                sums = walk.infer(call, args, kwargs)
            means[call.plain] = _channel_mean(sums)
            return activation(sums)
        outputs = walk.infer(call, args, kwargs)
        if kind_of(call) == "batch_norm":
            means[call.plain] = _channel_mean(outputs)
        return outputs

    walk.forward(program, program.feeds(batch), execute)
    return means


def _only_batch(program, images):
    batches = checked_batches(program, images, None)
    if len(batches) > 1:
        raise ValueError(
            f"Means are taken over one batch. Got {len(batches)}: pass one array an input, of as "
            "many images as a model of a fixed batch size takes"
        )
    return batches[0]


def _channel_mean(x):
    axes = tuple(range(len(x.shape) - 1))
    return np.asarray(ops.convert_to_numpy(ops.mean(x, axis=axes)), np.float32)
