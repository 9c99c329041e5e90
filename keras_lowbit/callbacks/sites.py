"""Where a model keeps its quantizers, and the check and the ramps that callbacks share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import keras

from keras_lowbit.quantizers import Quantizer


@dataclass(frozen=True)
class Site:
    """A quantizer in its place: `layer_name` leads back to the layer, `argument` names it there."""

    layer_name: str
    layer: keras.layers.Layer
    argument: str
    quantizer: Quantizer


def layers_of(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """`(name, layer)` of all layers, models inside (nested, wrapped) opened: `backbone/conv1`.

    Works for subclassed models too, so that a model under a distiller is found.
    """
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from layers_of(layer, f"{prefix}{layer.name}/")
        else:
            yield prefix + layer.name, layer


def sites_of(model: keras.Model) -> list[Site]:
    """Every quantizer of a model once, in the order of its layers."""
    found: dict[int, Site] = {}
    for name, layer in layers_of(model):
        for argument, quantizer in quantizers_of(layer):
            found.setdefault(id(quantizer), Site(name, layer, argument, quantizer))
    return list(found.values())


def quantizers_of(layer: keras.layers.Layer) -> list[tuple[str, Quantizer]]:
    """Arguments and quantizers of one layer."""
    # `dir`, not `vars`: on PyTorch Keras keeps sublayers outside of an object's `__dict__`.
    held = ((name, getattr(layer, name)) for name in dir(layer) if name.endswith("quantizer"))
    return [(name, one) for name, one in held if isinstance(one, Quantizer)]


def check_switch(callback: keras.callbacks.Callback, what: str) -> None:
    """`ValueError` if `callback.switch_epoch` lies past the end of the `fit` that begins.

    Args:
        callback: with its `params` set.
        what: what begins at that epoch.
    """
    epochs = callback.params.get("epochs")
    if epochs is not None and callback.switch_epoch >= epochs:
        raise ValueError(
            f"{type(callback).__name__}: {what} begins at epoch {callback.switch_epoch}, which "
            f"never comes: fit runs epochs 0 to {epochs - 1}. Switch earlier or train longer"
        )


def cooled(first: float, last: float, epoch: int, epochs: int) -> float:
    """A temperature along a half cosine, from `first` in epoch 0 to `last` in the last one."""
    passed = epoch / (epochs - 1) if epochs > 1 else 1.0
    return first + (last - first) * half_cosine(passed)


def half_cosine(share: float) -> float:
    """A ramp without corners: 0 at the share 0 of a schedule and before, 1 at 1 and after."""
    return 0.5 * (1.0 - math.cos(math.pi * min(max(share, 0.0), 1.0)))
