"""What of a recipe does not fit its data and its model, told before anything is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import tflite_export
from keras_lowbit.callbacks import BitDescent
from keras_lowbit.cli import measure
from keras_lowbit.cli.fitting import check_logits
from keras_lowbit.cli.pixels import range_of
from keras_lowbit.cli.recipe import Recipe
from keras_lowbit.transform import fold_batchnorm, quantize_model
from keras_lowbit.tuning.plan import plan
from tflite_export import runtime


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
        ValueError: nothing to train, a model that is no classifier of the images, a batch of more
            images than there are, a scheme that does not fit the model, blocks that reconstruction
            cannot find or tune, logits that are none, a `bit_descent` that finds nothing to lower,
            a file that cannot be written as `[export]` asks.
        ImportError: files without the `tflite` extra, which writes them.
    """
    _check_start(recipe)
    if recipe.scheme is not None and recipe.export.weights:
        _check_extra(recipe)
    name = recipe.model.architecture
    with of_section(recipe, "model"):
        measure.check_classes(name, measure.output_classes(model, name), dataset)
    for section in ("pretrain", "train"):
        part, images = getattr(recipe, section), len(dataset.x_train)
        if part.epochs and part.batch_size > images:
            raise ValueError(
                f"{recipe.name} [{section}]: batch_size must be at most {images}, the number of "
                f"training images. Got {part.batch_size}"
            )
    if recipe.train.epochs and recipe.train.distill:
        with of_section(recipe, "train"):
            check_logits(model)
    if recipe.scheme is not None:
        _check_student(recipe, dataset, fold_batchnorm(model) if recipe.model.fold else model)


def _check_start(recipe):
    """Refuse to quantize and measure random weights."""
    given = recipe.model
    trained = recipe.pretrain.epochs or recipe.train.epochs
    if not (trained or given.weights or Path(given.architecture).suffix):
        raise ValueError(
            f"{recipe.name}: nothing is trained, and {given.architecture} begins with random "
            "weights. Give --weights, a .keras file in [model], or epochs in [pretrain] or [train]"
        )


def _check_extra(recipe):
    try:
        runtime.require_extra()
    except ImportError as error:
        raise ImportError(
            f"{recipe.name}: [export] weights = [] trains and measures the model without files; "
            f"{error}"
        ) from error


def _check_student(recipe, dataset, model):
    """What becomes of the float model, batch norms folded where the recipe says so."""
    with of_section(recipe, "quantize"):
        trained, made = _quantized(recipe, dataset, model)
    _check_tuning(recipe, trained, model)
    if recipe.train.epochs and recipe.train.bit_descent and not recipe.methods.cycles:
        with of_section(recipe, "train"):
            descent = BitDescent(recipe.train.descent)
            descent.set_params({"epochs": recipe.train.epochs})
            descent.set_model(made)
            descent.on_train_begin()
    _check_files(recipe, made)


def _check_files(recipe, made):
    """Each of the files that are listed, with its containers and the types of its ends."""
    export = recipe.export
    options = {"input_type": export.input_type or None, "output_type": export.output_type}
    found = {
        weights: tflite_export.check(made, export.target, weights=weights, **options)
        for weights in export.weights
    }
    refused = [f"model_{weights}.tflite" for weights, objections in found.items() if objections]
    if refused:
        listed = "\n  ".join(dict.fromkeys(itertools.chain(*found.values())))
        raise ValueError(
            f"{recipe.name} [export]: {', '.join(refused)} cannot be written for {export.target}; "
            f"weights = [] trains and measures the model without:\n  {listed}"
        )


def _check_tuning(recipe, made, model):
    given = recipe.reconstruct
    if given.steps:
        with of_section(recipe, "reconstruct"):
            plan(made, model, **given.planned)
    if recipe.refine.steps:
        with of_section(recipe, "refine"):
            rates = recipe.refine.all_rates
            plan(made, model, steps=recipe.refine.steps, blocks=[], rates=rates)


def _quantized(recipe, dataset, model):
    """The quantized model as it is trained, and as it is exported."""
    scheme, images = recipe.scheme, range_of(dataset)
    made = quantize_model(model, scheme, input_range=images)
    if scheme.kernel != "levels":
        return made, made
    # Reals until they are snapped, behind training.
    snapped = dataclasses.replace(scheme, kernel="lsq", kernel_options={})
    return made, quantize_model(model, snapped, input_range=images)
