"""Learned levels onto an integer grid, so that the model has codes."""

from __future__ import annotations

import keras

from keras_lowbit import walk
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.quantizers import Levels


def snap_levels(model: keras.Model) -> keras.Model:
    """Round the levels of all `Levels` kernels to int8 codes, in place.

        scale = max |v| / 127,   v <- scale * round(v / scale)

    for each set of levels. From then on levels rest and the model exports exactly; latent weights,
    batch norms and activation scales go on training, so a last epoch or two makes up for the
    rounding (at most 0.4 % of the largest level). Compiled steps see the change. Snapping twice
    changes nothing.

    Args:
        model: a model of `quantize_model` with learned levels.

    Returns:
        The model.

    Raises:
        ValueError: no kernel has learned levels.
    """
    found = [
        kernel.quantizer
        for call in walk.flatten(model).calls
        for kernel in kernels(call.operation)
        if isinstance(kernel.quantizer, Levels)
    ]
    if not found:
        raise ValueError(
            f"{model.name} has no kernel with learned levels. Quantize the float model by "
            "Scheme(kernel_bits=2, kernel='levels')"
        )
    for quantizer in {id(q): q for q in found}.values():
        if not quantizer.is_snapped:
            quantizer.snap()
    return model
