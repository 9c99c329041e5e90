"""Switching quantizers of a model on and off, so that compiled steps see it."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_lowbit.quantizers import Quantizer


def add_switches(model: keras.Model, quantizers: Iterable[Quantizer]) -> None:
    """Give quantizers a switch (`Quantizer.add_switch`) and drop steps compiled without it.

    Args:
        model: the model that is trained; those inside it forget their steps too.
        quantizers: built quantizers of the model. Those with a switch keep it as it is.
    """
    new = [quantizer.add_switch() for quantizer in quantizers]
    if any(new):
        for inner in models_of(model):
            inner.train_function = inner.test_function = inner.predict_function = None


def models_of(model: keras.Model) -> list[keras.Model]:
    """A model and every model inside it, each once."""
    found, waiting = {}, [model]
    while waiting:
        one = waiting.pop(0)
        if id(one) not in found:
            found[id(one)] = one
            waiting.extend(layer for layer in one.layers if isinstance(layer, keras.Model))
    return list(found.values())
