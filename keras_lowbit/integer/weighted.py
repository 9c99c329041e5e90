"""Rules for layers with kernels: what each becomes in integers."""

from __future__ import annotations

import numpy as np

from keras_lowbit import layers
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.activations import activated
from keras_lowbit.integer.grids import grid_of, on_grid
from keras_lowbit.integer.products import kernel_codes
from keras_lowbit.integer.values import Linear, NotExportable, OnGrid
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.numerics.arrays import float64_of
from keras_lowbit.numerics.windows import same_padding


def product(lowering, call):
    """Sums of products with a kernel, the layer's own grids and activation included."""
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
        value = on_grid(lowering, call, value, layer.input_quantizer)
    if isinstance(layer, layers.QuantizedSeparableConv2D):
        value = _separable(lowering, call, value)
    else:
        (kernel,) = kernels(layer)
        value = _linear(lowering, call, value, kernel, bias=layer.bias)
    value = activated(value, call, call.name)
    if layer.output_quantizer is not None:
        value = lowering.emitter.put(
            value, grid_of(lowering, call, layer.output_quantizer), call.name
        )
    return value


def _separable(lowering, call, value):
    layer = call.operation
    if layer.between_quantizer is None:
        raise NotExportable(f"{call.name}: between_quantizer=None leaves a float tensor inside")
    depthwise, pointwise = kernels(layer)
    spatial = _conv_shape(value.shape, layer, depthwise.latent.shape)
    shape = (*spatial, value.shape[-1] * layer.depth_multiplier)
    first = _linear(lowering, call, value, depthwise, shape=shape)
    between = lowering.emitter.put(
        first, grid_of(lowering, call, layer.between_quantizer), f"{call.name}/depthwise"
    )
    return _linear(lowering, call, between, pointwise, bias=layer.bias)


def _conv_shape(shape, layer, kernel_shape):
    sizes = []
    for n, k, s, d in zip(
        shape[1:3], kernel_shape[:2], layer.strides, layer.dilation_rate, strict=True
    ):
        reach = (k - 1) * d + 1
        sizes.append(-(-n // s) if layer.padding == "same" else (n - reach) // s + 1)
    return (shape[0], *sizes)


def _linear(lowering, call, value, kernel, *, bias=None, shape=None):
    """A product with one kernel (`packed_kernels.Kernel`); `shape` where it is not the call's."""
    layer = call.operation
    if not isinstance(value, OnGrid):
        raise NotExportable(f"{call.name}: its input has no grid; put a Quantize layer before it")
    codes, scale, bits = kernel_codes(layer, kernel)
    attributes = {}
    if isinstance(layer, layers.QuantizedDense):
        op = ir.FullyConnected
    elif kernel.part == "pointwise":
        op = ir.Conv2D
        attributes = {"padding": "VALID"}
    else:
        op = ir.DepthwiseConv2D if kernel.depthwise else ir.Conv2D
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
        bias=np.zeros(channels) if bias is None else float64_of(bias),
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
