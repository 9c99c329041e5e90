"""Running a recipe: data, float model, quantization, `fit`, files and metrics."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_lowbit import data as datasets
from keras_lowbit import zoo
from keras_lowbit.callbacks import BitDescent, Resume, ScaleGuard
from keras_lowbit.transform import calibrate, quantize_model, reestimate_batchnorm


def run_recipe(recipe, out: str | Path, *, data="", weights="", resume=True, verbose=1) -> dict:
    """Make the model of a recipe in folder `out` and return its metrics.

    Writes `model.keras` (latents included), the exported files, `history.csv` and `metrics.json`.
    A killed run goes on where it was when started again with the same folder.

    Args:
        recipe: `recipe.Recipe`.
        out: folder for results; made if absent.
        data: overrides `recipe.data.name`.
        weights: overrides `recipe.model.weights`.
        resume: keep snapshots to go on from.
        verbose: as in `fit`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(recipe.train.seed)
    dataset = datasets.load(data or recipe.data.name)
    if recipe.data.holdout:
        dataset = datasets.holdout(dataset, recipe.data.holdout, recipe.data.seed)
    options = {"input_shape": dataset.image_shape, "classes": dataset.num_classes}
    model = zoo.build(
        recipe.model.architecture, weights=weights or recipe.model.weights or None, **options
    )
    teacher = None
    if recipe.quantize.scheme:
        teacher = model
        model = quantized(model, recipe, dataset)
    started = time.perf_counter()
    if recipe.train.epochs:
        fit(model, teacher, recipe, dataset, out, resume=resume, verbose=verbose)
    seconds = time.perf_counter() - started
    save(model, out / "model.keras")
    metrics = {"recipe": asdict(recipe), "train_seconds": round(seconds, 1)}
    metrics["backend"] = keras.backend.backend()
    write_json(metrics, out / "metrics.json")
    return metrics


def quantized(model, recipe, dataset):
    """The quantized, calibrated model of a recipe."""
    quantized_model = quantize_model(model, recipe.quantize.scheme)
    images = dataset.x_train[: recipe.quantize.calibration_images]
    return calibrate(quantized_model, np.asarray(images), method=recipe.quantize.method)


def fit(model, teacher, recipe, dataset, out, *, resume, verbose):
    """Train in place, with the recipe's callbacks."""
    train = recipe.train
    if train.augment:
        batches = datasets.AugmentedBatches(
            dataset.x_train, dataset.y_train, train.batch_size, seed=train.seed, drop_remainder=True
        )
    else:
        batches = datasets.Batches(dataset.x_train, dataset.y_train, train.batch_size)
    steps = len(batches) * train.epochs
    optimizer = keras.optimizers.SGD(
        cosine(train, steps, len(batches)),
        momentum=train.momentum,
        nesterov=train.nesterov,
        weight_decay=train.weight_decay or None,
    )
    # Scales and batch norm keep their size: decay would only fight what they fit.
    kept = ["scale", "gamma", "beta", "bias"]
    if train.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=kept)
    callbacks = [keras.callbacks.CSVLogger(str(out / "history.csv"), append=True), ScaleGuard()]
    if train.augment:
        callbacks.append(batches.follow_epochs())
    if train.bit_descent:
        plan = {int(epoch): bits for epoch, bits in train.bit_descent.items()}
        callbacks.append(BitDescent(plan, verbose=1))
    if resume:
        callbacks.append(Resume(out / "backup"))
    learner = model
    if train.distill and teacher is not None:
        learner = distiller(teacher, model, train)
    learner.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=ends_in_logits(model)),
        metrics=["accuracy"],
        jit_compile=jit_compile_for(model),
    )
    learner.fit(
        batches,
        epochs=train.epochs,
        validation_data=validation(recipe, dataset),
        callbacks=callbacks,
        verbose=verbose,
        shuffle=False,
    )
    if train.reestimate_batches:
        count = train.reestimate_batches * train.batch_size
        reestimate_batchnorm(model, dataset.x_train[:count], batch_size=train.batch_size)


def validation(recipe, dataset):
    """Batches of the images set aside for choices, or `None`: test images are not for choosing."""
    if not recipe.data.holdout:
        return None
    return datasets.Batches(dataset.x_test, dataset.y_test, recipe.train.batch_size)


def distiller(teacher, student, train):
    """Keras' distiller around the student: frozen float teacher, logits."""
    teacher.trainable = False
    return keras.distillation.Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=keras.distillation.LogitsDistillation(temperature=train.temperature),
        distillation_loss_weights=1.0,
        student_loss_weight=1.0 - train.distill,
    )


def cosine(train, steps, epoch_steps):
    """Cosine to zero after a linear warm-up."""
    warmup = math.floor(train.warmup * epoch_steps)
    if not warmup:
        return keras.optimizers.schedules.CosineDecay(train.learning_rate, steps)
    return keras.optimizers.schedules.CosineDecay(
        train.learning_rate / 10,
        steps - warmup,
        warmup_target=train.learning_rate,
        warmup_steps=warmup,
    )


def ends_in_logits(model) -> bool:
    """Whether a model's outputs are logits rather than probabilities."""
    probe = ops.convert_to_numpy(model(np.zeros((1, *model.input_shape[1:]), "float32")))
    return not (np.all(probe >= 0) and abs(float(probe.sum()) - 1.0) < 1e-3)


def jit_compile_for(model):
    """`False` for nets with depthwise convolutions on TensorFlow, else Keras' own choice.

    XLA's depthwise convolutions are several times slower on a CPU.
    """
    depthwise = any("Depthwise" in type(layer).__name__ for layer in model.layers)
    return False if depthwise and keras.backend.backend() == "tensorflow" else "auto"


def save(model, path: Path) -> None:
    """Save under a temporary name, then rename: a crash leaves the old file."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        model.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: dict, path: Path) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True, default=float) + "\n")
    os.replace(temporary, path)
