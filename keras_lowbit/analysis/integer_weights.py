"""The integers of a quantized model's kernels, as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.kinds import kind_of
from keras_lowbit.layers.packed_kernels import kernels


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """One kernel: `codes * scale` is the quantized kernel, float32 for float32.

    Args:
        codes: int8 (int16 above 8 bits), the kernel's shape.
        scale: float32; broadcasts over `codes`: shape `()`, `(channels,)`, or
            `(channels, multiplier)` for depthwise kernels.
        bits: width of a code.
        bias: float32 by output channel; `None` without one.
    """

    codes: np.ndarray
    scale: np.ndarray
    bits: int
    bias: np.ndarray | None


def integer_weights(model: keras.Model) -> dict[str, LayerCodes]:
    """Codes and scales of all quantized kernels, by layer name.

    Layers in nested models are named with the models in front (`backbone/conv1`). A separable
    layer gives two entries, `<name>/depthwise` (no bias) and `<name>/pointwise`. A layer that is
    called several times appears once, and one whose kernel stays float does not appear.

    Raises:
        ValueError: a model without a graph.
    """
    found: dict[str, LayerCodes] = {}
    seen = set()
    for call in walk.flatten(model).calls:
        layer = call.operation
        if kind_of(call) != "product" or id(layer) in seen:
            continue
        seen.add(id(layer))
        for kernel in kernels(layer):
            if kernel.quantizer is None:
                continue
            codes, scale = kernel.codes()
            last = kernel.part != "depthwise" and layer.bias is not None
            bias = np.asarray(ops.convert_to_numpy(layer.bias), np.float32) if last else None
            name = f"{call.name}/{kernel.part}" if kernel.part else call.name
            found[name] = LayerCodes(codes, scale, kernel.quantizer.bits, bias)
    return found
