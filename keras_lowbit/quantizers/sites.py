"""Where a model keeps its quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import keras

from keras_lowbit.quantizers.base import Quantizer


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
