"""The models of a recipe before they are trained."""

from __future__ import annotations

import numpy as np

from keras_lowbit.cli import files, measure
from keras_lowbit.cli.pixels import range_of
from keras_lowbit.transform import calibrate, fold_batchnorm, quantize_model, rescale_pairs


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
    model = fold_batchnorm(model)
    if not recipe.model.rescale:
        return model
    images = calibration_images(recipe, dataset)
    return rescale_pairs(model, images, method=recipe.model.rescale, batch_size=10)


def calibration_images(recipe, dataset):
    """The first training images, as many as the recipe says."""
    return np.asarray(dataset.x_train[: recipe.quantize.calibration_images])


def quantized(model, recipe, dataset):
    """The quantized, calibrated model of a recipe."""
    images = calibration_images(recipe, dataset)
    made = quantize_model(model, recipe.scheme, input_range=range_of(dataset))
    return calibrate(made, images, method=recipe.quantize.method)
