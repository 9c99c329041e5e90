"""The models of a recipe before they are trained."""

from __future__ import annotations

import numpy as np

from keras_lowbit import walk
from keras_lowbit.cli import files, measure
from keras_lowbit.cli.pixels import range_of
from keras_lowbit.kinds import kind_of
from keras_lowbit.transform import (
    calibrate,
    fold_batchnorm,
    quantize_model,
    reestimate_batchnorm,
    rescale_pairs,
)
from keras_lowbit.transform.copies import twin
from keras_lowbit.transform.reestimate import never_trained


def float_model(recipe, dataset):
    """The float model of a recipe, fit for the images.

    Raises:
        ValueError: an unknown architecture, weights that do not fit, images of another size.
    """
    name, weights = recipe.model.architecture, recipe.model.weights
    options = {"input_shape": dataset.image_shape, "classes": dataset.num_classes}
    model = files.build_float(name, weights, **options)
    shape = files.image_shape(model)
    if any(w not in (None, got) for w, got in zip(shape, dataset.image_shape, strict=True)):
        raise ValueError(f"{name} takes images {shape}; {dataset.name} has {dataset.image_shape}")
    measure.check_classes(name, measure.output_classes(model, name), dataset)
    return model


def folded(model, recipe, dataset):
    """The float model with its batch norms in the kernels, channels rescaled if the recipe says."""
    model = fold_batchnorm(_with_statistics(model, recipe, dataset))
    if not recipe.model.rescale:
        return model
    images = calibration_images(recipe, dataset)
    return rescale_pairs(model, images, method=recipe.model.rescale, batch_size=10)


def calibration_images(recipe, dataset):
    """The first training images, as many as the recipe says."""
    return np.asarray(dataset.x_train[: recipe.quantize.calibration_images])


def quantized(model, recipe, dataset):
    """The quantized, calibrated model of a recipe."""
    model = _with_statistics(model, recipe, dataset)
    images = calibration_images(recipe, dataset)
    made = quantize_model(model, recipe.scheme, input_range=range_of(dataset))
    return calibrate(made, images, method=recipe.quantize.method)


def _with_statistics(model, recipe, dataset):
    """A model whose batch norms have seen data; the one given, unless none of its has.

    From random weights scales would fit activations that no training makes, and folded kernels
    would have lost their norms. Trained statistics beside new ones, of a new head, stay.
    """
    program = walk.flatten(model)
    norms = {call.name for call in program.calls if kind_of(call) == "batch_norm"}
    if not norms or norms - set(never_trained(program)):
        return model
    return reestimate_batchnorm(twin(model), calibration_images(recipe, dataset))
