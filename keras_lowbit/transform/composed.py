"""What the runtime computes from two tensors at a time, each partial result on its own grid."""

from __future__ import annotations

import keras

from keras_lowbit import layers, quantizers
from keras_lowbit.kinds import FIXED_SCALES, GATES, activation_name, slope_of
from keras_lowbit.transform.plan import STREAM_BITS


def joined(maker, layer, tensors, name):
    """Sum or product of three tensors and more, by twos.

    Args:
        maker: a `LayerMaker`.
        layer: `keras.layers.Add` or `Multiply`.
        tensors: the reals to join, of shapes that broadcast.
        name: what the new layers' names begin with.
    """
    total = tensors[0]
    for i, other in enumerate(tensors[1:], 1):
        total = maker.exact(layer, f"{name}_{i}")([total, other])
        if i < len(tensors) - 1:
            step = layers.Quantize(bits=STREAM_BITS, name=maker.name(f"{name}_{i}_q"))
            total = maker.dequantized(step(total), f"{name}_{i}")
    return total


def activated(maker, operation, values, name):
    """An activation of `values` on a grid: `x * gate(x)`, or a sum of two parts of `x`.

    Args:
        maker: a `LayerMaker`.
        operation: the float model's layer or operation, of a kind in `kinds.OF_TWO_TENSORS`.
        values: reals, dequantized from a grid of 8 bits.
        name: what the new layers' names begin with.
    """
    kind = activation_name(operation)
    if kind == "leaky_relu":
        return _leaky(maker, slope_of(operation), values, name)
    return _gated(maker, GATES[kind], values, name)


def _leaky(maker, slope, values, name):
    """`slope * x + (1 - slope) * relu(x)`."""
    part = maker.exact(keras.layers.ReLU, f"{name}_part")(values)
    parts = []
    for suffix, factor, tensor in (("slope", slope, values), ("rest", 1.0 - slope, part)):
        scaled = maker.exact(keras.layers.Rescaling, f"{name}_{suffix}", factor)(tensor)
        signed = suffix == "slope"
        quantizer = quantizers.get("lsq", bits=STREAM_BITS, signed=signed, role="activation")
        pair = maker.quantized(scaled, quantizer, f"{name}_{suffix}")
        parts.append(maker.dequantized(pair, f"{name}_{suffix}"))
    return maker.exact(keras.layers.Add, f"{name}_sum")(parts)


def _gated(maker, kind, values, name):
    """`x * gate(x)`; the gate has the grid that its range gives."""
    gate = maker.exact(keras.layers.Activation, f"{name}_gate", kind)(values)
    quantizer = quantizers.Affine(STREAM_BITS, scale=FIXED_SCALES[kind])
    pair = maker.quantized(gate, quantizer, f"{name}_gate")
    gate = maker.dequantized(pair, f"{name}_gate")
    return maker.exact(keras.layers.Multiply, f"{name}_gated")([values, gate])
