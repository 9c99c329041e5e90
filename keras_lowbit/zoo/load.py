"""Trained models by name."""

from __future__ import annotations

import os
from pathlib import Path

import keras

from keras_lowbit.zoo import adapt, files, registry


def load(
    name: str,
    *,
    input_shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    include_top: bool = True,
    url: str | None = None,
    cache: str | Path | None = None,
) -> keras.Model:
    """A trained model; needs no network for models that ship with the package.

    The model takes pixels 0..255 and normalizes inside. It predicts, trains on with `fit` and the
    quantization callbacks, and exports with `tflite_export.convert`. Float models, which
    `zoo.info(name).scheme` tells, are for `quantize_model` to start from.

    Args:
        name: one of `zoo.list()`.
        input_shape: height, width, channels, where other than the trained one.
        classes: outputs of a fresh head, for transfer learning, also where the trained model has as
            many; the rest keeps its weights. Run
            `calibrate(model, images, only_new=True)` before training a low-bit model: the head's
            logits have no grid yet.
        include_top: `False` gives the features `(n, channels)` that the head would read.
        url: base of checkpoints that do not ship; see `zoo.files.find`.
        cache: folder of downloaded checkpoints.

    Returns:
        An uncompiled functional model.

    Raises:
        ValueError: an unknown name (the nearest are listed), a damaged file, a shape or a number
            of classes that does not fit, `classes` without a top, a cache that is no path.
        OSError: a download failed.
    """
    entry = registry.info(name)
    if not isinstance(cache, (str, os.PathLike, type(None))):
        raise ValueError(f"zoo.load: cache must be the path of a folder. Got {cache!r}")
    if classes is not None and not include_top:
        raise ValueError("zoo.load: classes needs include_top=True. Give one of the two")
    model = files.read(files.find(entry, url=url, cache=cache), entry.scheme)
    if input_shape is not None:
        model = adapt.with_input_shape(model, input_shape)
    if not include_top:
        return adapt.without_top(model)
    if classes is not None:
        model = adapt.with_classes(model, classes)
    return model
