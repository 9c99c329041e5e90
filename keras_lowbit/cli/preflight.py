"""What of a recipe does not fit its data and its model, told before anything is trained."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import tflite_export
from keras_lowbit.callbacks import BitDescent
from keras_lowbit.cli.pixels import range_of
from keras_lowbit.cli.recipe import Recipe
from keras_lowbit.transform import fold_batchnorm, quantize_model


@contextlib.contextmanager
def of_section(recipe: Recipe, section: str) -> Iterator[None]:
    """A `ValueError` of the block names recipe and section."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{recipe.name} [{section}]: {error}") from error


def check(recipe: Recipe, dataset, model) -> None:
    """Refuse what cannot be trained, quantized or exported.

    Args:
        recipe: `recipe.Recipe`.
        dataset: whose training images are used.
        model: the float model.

    Raises:
        ValueError: a batch of more images than there are, a scheme that does not fit the model, a
            `bit_descent` that finds nothing to lower, a model that no file can hold.
    """
    for section in ("pretrain", "train"):
        part, images = getattr(recipe, section), len(dataset.x_train)
        if part.epochs and part.batch_size > images:
            raise ValueError(
                f"{recipe.name} [{section}]: batch_size must be at most {images}, the number of "
                f"training images. Got {part.batch_size}"
            )
    if recipe.scheme is None:
        return
    with of_section(recipe, "quantize"):
        made = _quantized(recipe, dataset, model)
    if recipe.train.epochs and recipe.train.bit_descent and not recipe.methods.cycles:
        with of_section(recipe, "train"):
            descent = BitDescent(recipe.train.descent)
            descent.set_params({"epochs": recipe.train.epochs})
            descent.set_model(made)
            descent.on_train_begin()
    export = recipe.export
    objections = tflite_export.check(made, export.target) if export.weights else []
    if objections:
        listed = "\n  ".join(objections)
        raise ValueError(
            f"{recipe.name}: no file can hold this model; [export] weights = [] trains "
            f"and measures it without:\n  {listed}"
        )


def _quantized(recipe, dataset, model):
    """The quantized model as it is when it is exported."""
    if recipe.model.fold:
        model = fold_batchnorm(model)
    scheme = recipe.scheme
    if scheme.kernel == "levels":  # reals until they are snapped, behind training
        quantize_model(model, scheme)
        scheme = dataclasses.replace(scheme, kernel="lsq", kernel_options={})
    return quantize_model(model, scheme, input_range=range_of(dataset))
