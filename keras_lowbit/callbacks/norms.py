"""Batch norms of what `fit` trains, which may be models under a distiller."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import keras

from keras_lowbit.callbacks.switches import models_of
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.transform.reestimate import reestimate_batchnorm


def graphs_of(model: keras.Model) -> list[keras.Model]:
    """The model, if its graph can be read; else the quantized models inside whose graph can."""
    if has_graph(model):
        return [model]
    found: list[keras.Model] = []
    for one in models_of(model):
        inside = any(one in models_of(outer) for outer in found)
        if not inside and has_graph(one) and sites_of(one):
            found.append(one)
    return found


def has_graph(model: keras.Model) -> bool:
    """Whether a model is functional or Sequential."""
    return isinstance(model, keras.Sequential) or bool(getattr(model, "inputs", None))


def kept(data, steps: int | None):
    """`data` that may be gone through again: of an iterator, a list of the batches in use.

    Args:
        data: as for `transform.reestimate_batchnorm`.
        steps: batches in use; `None` for all.
    """
    if not isinstance(data, Iterator):
        return data
    # A list of bare arrays would be one batch of a model with several inputs.
    return [
        batch if isinstance(batch, (list, tuple, Mapping)) else (batch,)
        for batch in itertools.islice(data, steps)
    ]


def reestimate(model: keras.Model, data, steps: int | None, batch_size: int) -> None:
    """Fresh batch-norm statistics for a model, or every quantized model inside a distiller.

    Args:
        model: what is trained.
        data: as for `transform.reestimate_batchnorm`.
        steps: batches; `None` for all.
        batch_size: images at a time, for arrays.
    """
    for one in graphs_of(model):
        reestimate_batchnorm(one, data, steps=steps, batch_size=batch_size)
