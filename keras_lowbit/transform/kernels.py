"""Latent kernels of quantized layers: copied from float layers, fitted, shifted."""

from __future__ import annotations

import numpy as np
from keras import ops

from keras_lowbit import layers


def kernels_of(layer):
    """`[(latent kernel variable, its quantizer)]` of a quantized layer."""
    if isinstance(layer, layers.QuantizedSeparableConv2D):
        return [
            (layer.depthwise_kernel, layer.depthwise_quantizer),
            (layer.pointwise_kernel, layer.pointwise_quantizer),
        ]
    return [(layer.kernel, layer.kernel_quantizer)]


def fit_kernels(layer, method="mse"):
    """Set a quantized layer's kernel scales from its latent kernels."""
    for kernel, quantizer in kernels_of(layer):
        if quantizer is not None:
            quantizer.fit_scale(ops.convert_to_numpy(kernel), method)


def copy_weights(original, layer):
    """Kernels and bias of a float layer into the quantized one."""

    # Through NumPy: a variable assigned to another shares its array on JAX, and a training step
    # that donates its buffers would take the original's away.
    def copy(name):
        getattr(layer, name).assign(ops.convert_to_numpy(getattr(original, name)))

    if isinstance(layer, layers.QuantizedSeparableConv2D):
        copy("depthwise_kernel")
        copy("pointwise_kernel")
    else:
        copy("kernel")
    if original.use_bias:
        copy("bias")


def absorb_offset(layer, offset):
    """Put `offset * sum(kernel)` into the bias, for codes that stand for `x - offset`."""
    kernel = ops.convert_to_numpy(layer.kernel)
    if isinstance(layer, layers.QuantizedDepthwiseConv2D):
        total = kernel.sum(axis=(0, 1)).reshape(-1)
    else:
        total = kernel.reshape(-1, kernel.shape[-1]).sum(axis=0)
    layer.bias.assign(ops.convert_to_numpy(layer.bias) + np.float32(offset) * total)
