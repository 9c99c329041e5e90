"""Quantized kernels of a model by name, and the penalties on them."""

from __future__ import annotations

from collections.abc import Mapping

import keras

from keras_lowbit import walk
from keras_lowbit.callbacks.switches import models_of
from keras_lowbit.layers.packed_kernels import Kernel, kernels
from keras_lowbit.quantizers.sites import layers_of


def kernels_of(model: keras.Model) -> dict[str, Kernel]:
    """Kernels with a quantizer by layer name (`<name>/pointwise` for separable layers).

    Where two models inside have one name, as two students of one float model, the later one's
    layers are `<name>_2`.
    """
    found: dict[str, Kernel] = {}
    seen = set()
    for layer_name, layer in layers_of(model):
        for kernel in kernels(layer):
            if kernel.quantizer is None or id(kernel.latent) in seen:
                continue
            seen.add(id(kernel.latent))
            name = f"{layer_name}/{kernel.part}" if kernel.part else layer_name
            found[walk.unused(name, found)] = kernel
    return found


def kernels_with_bins(model: keras.Model) -> dict[str, Kernel]:
    """Those of `kernels_of` whose codes are whole numbers with `code * scale` amid their bin."""
    return {
        name: kernel
        for name, kernel in kernels_of(model).items()
        # Learned levels have no scale between them, and DoReFa bends the axis by a tanh.
        if not hasattr(kernel.quantizer, "code_table")
        and "idempotent" not in kernel.quantizer.breaks
    }


def attach_penalties(
    model: keras.Model,
    kernels: Mapping[str, Kernel],
    penalties: Mapping[str, keras.regularizers.Regularizer],
) -> dict[str, keras.regularizers.Regularizer]:
    """Put a penalty on each latent kernel, and drop steps compiled without it.

    A kernel that has one of the same class, moved by the same variable `strength`, keeps it.

    Args:
        model: the model that is trained.
        kernels: kernels by name.
        penalties: what each of them gets.

    Returns:
        The penalty that each kernel has now.

    Raises:
        ValueError: a kernel has a regularizer of another class; nothing is attached.
    """
    for name, penalty in penalties.items():
        known = kernels[name].latent.regularizer
        if known is not None and not isinstance(known, type(penalty)):
            raise ValueError(
                f"{name}: its kernel has the regularizer {known}; a kernel takes one. If it came "
                "with the float model, remove it there and let the optimizer decay weights. If a "
                "callback or an attach_ function put it there, save the model and load it: files "
                "hold no penalty"
            )
    attached = {}
    new = False
    for name, penalty in penalties.items():
        latent = kernels[name].latent
        if latent.regularizer is None or latent.regularizer.strength is not penalty.strength:
            latent.regularizer = penalty
            new = True
        attached[name] = latent.regularizer
    if new:
        for inner in models_of(model):
            inner.train_function = inner.test_function = None
    return attached
