"""From a quantized Keras model to the integer graph: what each kind of call becomes.

A table of small functions, one a kind (`keras_lowbit.kinds`); `integer.values` holds what they
pass around, `integer.emit` puts them on grids, with the numbers of `integer.products`.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from keras import ops

from keras_lowbit import layers, walk
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import moves
from keras_lowbit.integer.emit import PROBABILITY_GRID, Emitter, identity
from keras_lowbit.integer.products import kernel_codes
from keras_lowbit.integer.values import (
    Elementwise,
    Image,
    Linear,
    NotExportable,
    OnGrid,
    Probabilities,
    with_relu,
)
from keras_lowbit.kinds import (
    ACTIVATIONS,
    OF_TWO_TENSORS,
    activation_as_written,
    activation_name,
    is_last_axis,
    kind_of,
    known_layers,
    limit_of,
    normalizing_of,
    rewrite_of,
    scaling_of,
)
from keras_lowbit.numerics.grid import Grid
from keras_lowbit.numerics.windows import same_padding


class Lowering:
    """Values of a program's tensors while its calls are lowered one by one."""

    def __init__(self, program, batch, weights, *, dry=False, preprocessing=None):
        self.program = program
        # A dry run looks for objections in a model that need not be calibrated yet.
        self.dry = dry
        self.batch = batch
        self.emitter = Emitter(weights)
        self.producers = program.producers()
        self.values = {}
        self.grids = {}  # quantizers by the tensors that they write
        for ref, name in zip(program.inputs, program.input_names, strict=True):
            scale, offset = preprocessing or (1.0, 0.0)
            pixels = preprocessing is not None
            self.values[ref.index] = Image(name, scale, offset, self.shape(ref), pixels)

    def shape(self, ref):
        """Static shape with the batch size."""
        if any(n is None for n in ref.shape[1:]):
            raise NotExportable(
                f"A tensor has the dynamic shape {ref.shape}: files have fixed sizes. "
                "Build the model with keras.Input of a full image size"
            )
        return (self.batch, *ref.shape[1:])

    def run(self):
        """Lower every call; values of the model's outputs."""
        for call in self.program.calls:
            self.values[walk.refs(call.outputs)[0].index] = self.lower(call)
        return [self.values[ref.index] for ref in walk.refs(self.program.outputs)]

    def lower(self, call):
        """The value of a call's output."""
        rule = RULES.get(kind_of(call))
        if rule is None:
            raise NotExportable(_unknown(call))
        return rule(self, call)

    def objections(self) -> list[str]:
        """All that stands against an integer graph, each call looked at by itself."""
        return [sentence for refused in self.refusals().values() for sentence in refused]

    def refusals(self) -> dict[str, list[str]]:
        """`objections` by the name of the call that they stand against."""
        found = {}
        for call in self.program.calls:
            # Scales travel beside codes and are no values here.
            if not all(ref.index in self.values for ref in call.inputs if ref.shape):
                continue  # behind a tensor whose size is not known
            made = walk.refs(call.outputs)
            try:
                self.values[made[0].index] = self.lower(call)
            except NotExportable as objection:
                found.setdefault(call.name, []).append(str(objection))
                # An 8-bit tensor stands in, so that calls behind this one are heard too.
                stand_in = Grid(1.0, -128, 127, 8)
                self.emitter.guessed = True
                for ref in made:
                    if None not in ref.shape[1:]:
                        shape = self.shape(ref)
                        value, _ = self.emitter.tensor(call.name, shape, stand_in)
                        self.values[ref.index] = value
        return found

    def read(self, call, position=0):
        """The value of an input tensor of a call."""
        return self.values[call.inputs[position].index]

    def grid_tensor(self, call, position=0) -> OnGrid:
        """An input that must sit on a grid."""
        value = self.read(call, position)
        if isinstance(value, OnGrid) and value.relu is None:
            return value
        raise NotExportable(
            f"{call.name}: its input has no grid. quantize_model puts one there; in a model built "
            "by hand, put a Quantize layer before it"
        )

    def tensor_name(self, ref):
        """The name of the Keras layer that computes a tensor, grids aside."""
        call = self.producers.get(ref.index)
        while call is not None and kind_of(call) in ("quantize", "dequantize"):
            ref = call.inputs[0]
            call = self.producers.get(ref.index)
        if call is None:
            indices = [r.index for r in self.program.inputs]
            return self.program.input_names[indices.index(ref.index)]
        return call.name


def _unknown(call):
    better = rewrite_of(call)
    way_out = (
        f"Write {better} instead"
        if better
        else "Leave it out, or end the exported model before it and compute the rest in float. "
        f"Layers that have one: {', '.join(known_layers())}"
    )
    return f"{call.name} ({type(call.operation).__name__}) has no integer form. {way_out}"


def _quantize(lowering, call):
    quantizer = call.operation.quantizer
    return _on_grid(lowering, call, lowering.read(call), quantizer)


def _grid(lowering, call, quantizer):
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


def _on_grid(lowering, call, value, quantizer):
    grid = _grid(lowering, call, quantizer)
    name = lowering.tensor_name(call.inputs[0])
    offset = getattr(quantizer, "offset", 0.0)
    if isinstance(value, Image):
        value = replace(value, offset=value.offset - offset)
    elif offset and isinstance(value, (Linear, OnGrid)):  # pixels that were moved about before
        value = _affine(value, 1.0, -offset, call)
    if isinstance(value, OnGrid):
        name = f"{name}_a{grid.bits}"
    made = lowering.emitter.put(value, grid, name)
    lowering.grids[made.tensor] = quantizer
    return made


def _dequantize(lowering, call):
    value, offset = lowering.read(call), call.operation.offset
    return _affine(value, 1.0, offset, call) if offset else value


def _product(lowering, call):
    layer = call.operation
    if not isinstance(
        layer,
        (
            layers.QuantizedConv2D,
            layers.QuantizedDepthwiseConv2D,
            layers.QuantizedSeparableConv2D,
            layers.QuantizedDense,
        ),
    ):
        raise NotExportable(f"{call.name} stayed float. Quantize it to export the model")
    value = lowering.read(call)
    if len(call.inputs) == 1:
        if layer.input_quantizer is None:
            raise NotExportable(f"{call.name}: neither its input nor the layer has a quantizer")
        value = _on_grid(lowering, call, value, layer.input_quantizer)
    if isinstance(layer, layers.QuantizedSeparableConv2D):
        value = _separable(lowering, call, value)
    else:
        value = _linear(lowering, call, value, layer.kernel, layer.kernel_quantizer, layer.bias)
    value = _activated(value, call, call.name)
    if layer.output_quantizer is not None:
        value = lowering.emitter.put(
            value, _grid(lowering, call, layer.output_quantizer), call.name
        )
    return value


def _separable(lowering, call, value):
    layer = call.operation
    if layer.between_quantizer is None:
        raise NotExportable(f"{call.name}: between_quantizer=None leaves a float tensor inside")
    spatial = _conv_shape(value.shape, layer, layer.depthwise_kernel.shape)
    first = _linear(
        lowering,
        call,
        value,
        layer.depthwise_kernel,
        layer.depthwise_quantizer,
        None,
        shape=(*spatial, value.shape[-1] * layer.depth_multiplier),
    )
    between = lowering.emitter.put(
        first, _grid(lowering, call, layer.between_quantizer), f"{call.name}/depthwise"
    )
    return _linear(
        lowering,
        call,
        between,
        layer.pointwise_kernel,
        layer.pointwise_quantizer,
        layer.bias,
        pointwise=True,
    )


def _conv_shape(shape, layer, kernel_shape):
    sizes = []
    for n, k, s, d in zip(
        shape[1:3], kernel_shape[:2], layer.strides, layer.dilation_rate, strict=True
    ):
        reach = (k - 1) * d + 1
        sizes.append(-(-n // s) if layer.padding == "same" else (n - reach) // s + 1)
    return (shape[0], *sizes)


def _linear(lowering, call, value, kernel, quantizer, bias, *, shape=None, pointwise=False):
    layer = call.operation
    if not isinstance(value, OnGrid):
        raise NotExportable(f"{call.name}: its input has no grid; put a Quantize layer before it")
    codes, scale, bits = kernel_codes(layer, kernel, quantizer)
    attributes = {}
    if isinstance(layer, layers.QuantizedDense):
        op = ir.FullyConnected
    elif pointwise:
        op = ir.Conv2D
        attributes = {"padding": "VALID"}
    else:
        depthwise = len(codes.shape) == 4 and kernel is not getattr(layer, "pointwise_kernel", None)
        depthwise = depthwise and not isinstance(layer, layers.QuantizedConv2D)
        op = ir.DepthwiseConv2D if depthwise else ir.Conv2D
        attributes = {
            "strides": tuple(layer.strides),
            "dilation": tuple(layer.dilation_rate),
            "padding": layer.padding.upper(),
        }
        value, attributes = _without_padding(lowering, value, codes, attributes)
        _check_padding(layer, value, codes.shape)
    channels = len(scale)
    return Linear(
        op=op,
        inputs=value,
        kernel=codes,
        kernel_scale=scale,
        bias=np.zeros(channels) if bias is None else _numpy(bias),
        kernel_bits=bits,
        shape=shape or lowering.shape(call.output),
        source=call.name,
        attributes=attributes,
    )


def _without_padding(lowering, value, kernel, attributes):
    """VALID behind a pad that SAME would have put there is SAME without the pad."""
    known = lowering.emitter.padded.get(value.tensor)
    if known is None or attributes["padding"] != "VALID":
        return value, attributes
    source, paddings = known
    wanted = [(0, 0)]
    for n, k, s, d in zip(
        source.shape[1:3],
        kernel.shape[:2],
        attributes["strides"],
        attributes["dilation"],
        strict=True,
    ):
        wanted.append(same_padding(n, (k - 1) * d + 1, s))
    if tuple(paddings) == (*wanted, (0, 0)):
        return source, {**attributes, "padding": "SAME"}
    return value, attributes


def _check_padding(layer, value, kernel_shape):
    """Training must pad as the file does: with code 0, which stands for -1 where signs are."""
    wanted = -1 if value.grid.signs else 0
    pads = layer.padding == "same" and max(kernel_shape[:2]) > 1
    if pads and layer.pad_code != wanted:
        raise NotExportable(
            f"{layer.name} pads its input with code {layer.pad_code}, the file with {wanted}. "
            f"Give the layer pad_code={wanted}, as quantize_model does, and train it so"
        )


_PROBABILITIES = {"softmax": ir.Softmax, "sigmoid": ir.Logistic}


def _activated(value, call, who):
    name, limit = activation_name(call.operation), limit_of(call.operation)
    if name == "linear":
        return value
    if name == "hard_sigmoid":
        value = _affine(value, 1 / 6, 0.5, call)
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
    return (
        f"{call.name}: only a softmax over the last axis has an integer form, and "
        "this one runs over another"
    )


def _activation(lowering, call):
    name = activation_name(call.operation)
    if name in _PROBABILITIES:
        value = lowering.grid_tensor(call)
        # The name is that of a layer's first call; this one may be of a tensor of another rank.
        shared = name == "softmax" and hasattr(call.operation, "axis")
        if shared and not is_last_axis(call.operation, len(value.shape)):
            raise NotExportable(_other_axis(call))
        wanted = lowering.emitter.name(call.name)
        tensor = ir.Tensor(wanted, value.shape, "int8", PROBABILITY_GRID.scale, -128)
        lowering.emitter.tensors[wanted] = tensor
        lowering.emitter.ops.append(_PROBABILITIES[name]((value.tensor,), wanted, call.name))
        return Probabilities(wanted, value.shape)
    return _activated(lowering.read(call), call, _owner(lowering, call))


def _owner(lowering, call):
    """The layer that an activation was written into: `quantize_model` made its own call of it."""
    layer = lowering.tensor_name(call.inputs[0])
    made = walk.plain(f"{layer}_{activation_name(call.operation)}")
    return layer if re.fullmatch(rf"{re.escape(made)}(_\d+)?", call.name) else call.name


def _batch_norm(lowering, call):
    layer = call.operation
    value = lowering.read(call)
    if layer.axis not in (-1, len(call.output.shape) - 1):
        raise NotExportable(
            f"{call.name}: batch norm must run over the last axis. Got axis={layer.axis}; build it "
            "with axis=-1, for images with their channels last"
        )
    variance = _numpy(layer.moving_variance)
    gain = 1.0 / np.sqrt(variance + layer.epsilon)
    if layer.scale:
        gain = gain * _numpy(layer.gamma)
    shift = -_numpy(layer.moving_mean) * gain
    if layer.center:
        shift = shift + _numpy(layer.beta)
    return _affine(value, gain, shift, call)


def _normalization(lowering, call):
    known = normalizing_of(call.operation)
    if known is None:
        raise NotExportable(
            f"{call.name}: only one mean and variance, or one a channel, can be exported. "
            f"Got axis={call.operation.axis}"
        )
    return _affine(lowering.read(call), *known, call)


def _affine(value, gain, shift, call):
    """`gain * value + shift`, numbers or one a channel, in the operation before or in a copy."""
    limit = getattr(value, "relu", None)
    if limit is not None and np.ndim(gain) == 0 and gain > 0 and not np.any(shift):
        # A positive factor may as well come before the clip.
        return replace(_affine(replace(value, relu=None), gain, shift, call), relu=limit * gain)
    channels = (value.shape[-1],)
    gain, shift = (np.broadcast_to(np.asarray(x, np.float64), channels) for x in (gain, shift))
    if isinstance(value, OnGrid) and value.relu is None:
        return identity(value, call.name).affine(gain, shift)
    if isinstance(value, Linear) and value.relu is None:
        return value.affine(gain, shift)
    raise NotExportable(
        f"{call.name}: what scales and shifts must follow a quantized layer or a tensor on a grid; "
        "put a Quantize and a Dequantize layer before it"
    )


def _rescaling(lowering, call):
    value = lowering.read(call)
    gain, shift = scaling_of(call)
    if not isinstance(value, Image):
        return _affine(value, gain, shift, call)
    if np.ndim(gain) or np.ndim(shift):
        raise NotExportable(f"{call.name}: an input can be rescaled by one number only")
    gain, shift = float(gain), float(shift)
    return replace(value, scale=value.scale * gain, offset=value.offset * gain + shift)


def _add(lowering, call):
    first, second = _two(lowering, call)
    if first.shape != second.shape:
        raise NotExportable(
            f"{call.name}: only equal shapes are added. Got {first.shape} and {second.shape}; "
            "repeat the smaller one, such as (1, 1, channels) with UpSampling2D"
        )
    return Elementwise(ir.Add, first, second, first.shape, call.name)


def _multiply(lowering, call):
    first, second = _two(lowering, call)
    if len(first.shape) != len(second.shape):
        raise NotExportable(
            f"{call.name}: tensors to multiply must have as many axes. Got {first.shape} and "
            f"{second.shape}; keep the axes (keepdims=True) or reshape"
        )
    return Elementwise(ir.Multiply, first, second, lowering.shape(call.output), call.name)


def _two(lowering, call):
    if len(call.inputs) != 2:
        raise NotExportable(f"{call.name}: expected two tensors. Got {len(call.inputs)}")
    return lowering.grid_tensor(call, 0), lowering.grid_tensor(call, 1)


def _numpy(variable):
    return np.asarray(ops.convert_to_numpy(variable), np.float64)


RULES = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "product": _product,
    "activation": _activation,
    "batch_norm": _batch_norm,
    "normalization": _normalization,
    "rescaling": _rescaling,
    "add": _add,
    "multiply": _multiply,
    "concatenate": moves.concatenate,
    "max_pool": moves.max_pool,
    "global_max_pool": moves.global_max_pool,
    "average_pool": moves.average_pool,
    "global_average_pool": moves.global_average_pool,
    "pad": moves.pad,
    "filled_pad": moves.pad,
    "upsample": moves.upsample,
    "reshape": moves.reshape,
    "dropout": moves.same,
    "augmentation": moves.same,
    "strided_slice": moves.strided_slice,
}
