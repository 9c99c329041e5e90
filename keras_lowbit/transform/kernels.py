"""Latent kernels of quantized layers: copied from float layers, fitted, shifted."""

from __future__ import annotations

import numpy as np
from keras import ops

from keras_lowbit.layers.packed_kernels import kernels


def fit_kernels(layer):
    """Set kernel scales of least squared error from the latents, where no data set them yet."""
    for kernel in kernels(layer):
        quantizer = kernel.quantizer
        if quantizer is not None and not quantizer.is_calibrated:
            quantizer.fit_scale(ops.convert_to_numpy(kernel.latent))


def copy_weights(original, layer):
    """Kernels and bias of a float layer into the quantized one."""

    # Through NumPy: a variable assigned to another shares its array on JAX, and a training step
    # that donates its buffers would take the original's away.
    def copy(name):
        getattr(layer, name).assign(ops.convert_to_numpy(getattr(original, name)))

    for kernel in kernels(layer):
        copy(f"{kernel.part}_kernel" if kernel.part else "kernel")
    if original.use_bias:
        copy("bias")


def absorb_offset(layer, offset):
    """Put `offset * sum(kernel)` into the bias, for codes that stand for `x - offset`."""
    total = None
    for kernel in kernels(layer):
        latent = ops.convert_to_numpy(kernel.latent)
        if kernel.depthwise:
            total = latent.sum(axis=(0, 1)).reshape(-1)
        else:
            # A pointwise kernel behind a depthwise one weighs the sums of that.
            sums = latent.reshape(-1, latent.shape[-1])
            total = sums.sum(axis=0) if total is None else total @ sums
    layer.bias.assign(ops.convert_to_numpy(layer.bias) + np.float32(offset) * total)
