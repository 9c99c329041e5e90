"""The models of a recipe before they are trained."""

from __future__ import annotations

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.cli import files, measure
from keras_lowbit.cli.pixels import range_of
from keras_lowbit.transform import (
    calibrate,
    fold_batchnorm,
    quantize_model,
    reestimate_batchnorm,
    rescale_pairs,
)
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
    model = fold_batchnorm(model)
    if not recipe.model.rescale:
        return model
    images = calibration_images(recipe, dataset)
    return rescale_pairs(model, images, method=recipe.model.rescale, batch_size=10)


def calibration_images(recipe, dataset):
    """The first training images, as many as the recipe says."""
    return np.asarray(dataset.x_train[: recipe.quantize.calibration_images])


def quantized(model, recipe, dataset):
    """The quantized, calibrated model of a recipe.

    Of a model from random weights that has batch norms they get their statistics from the images
    first, or the scales would fit activations that no training makes.
    """
    images = calibration_images(recipe, dataset)
    if never_trained(walk.flatten(model)):
        weights = model.get_weights()
        model = keras.models.clone_model(model)
        model.set_weights(weights)
        reestimate_batchnorm(model, images)
    made = quantize_model(model, recipe.scheme, input_range=range_of(dataset))
    return calibrate(made, images, method=recipe.quantize.method)
