"""One `fit` of a recipe: data, optimizer, callbacks, distillation."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_lowbit import data as datasets
from keras_lowbit import walk
from keras_lowbit.callbacks import BitDescent, Resume, ScaleGuard
from keras_lowbit.cli.files import write_text
from keras_lowbit.cli.interrupts import Interrupts
from keras_lowbit.cli.methods import (
    STAGE_BATCHES,
    Methods,
    SnapLevels,
    callbacks_of,
    stages_of,
)
from keras_lowbit.distillation import Distiller, MutualDistiller
from keras_lowbit.training import CyclicTraining, exclude_from_weight_decay
from keras_lowbit.transform import fold_batchnorm, reestimate_batchnorm
from keras_lowbit.transform.copies import twin


def fit(
    model,
    train,
    dataset,
    *,
    methods=None,
    teacher=None,
    held_out=None,
    history,
    backup,
    verbose=1,
):
    """Train in place as sections of a recipe say; a run killed before goes on.

    Args:
        model: float or quantized.
        train: `recipe.Train`.
        dataset: whose training images are used.
        methods: `methods.Methods`; `None` for none.
        teacher: float model to distill from, where `train.distill` is above 0.
        held_out: data set whose `x_test, y_test` are measured after each epoch; `None` for none.
        history: CSV file of the epochs.
        backup: folder for snapshots, which stay; `None` for none.
        verbose: as in `fit` of Keras.

    Raises:
        ValueError: fewer images than a batch; distillation from a model without logits.
        keras_lowbit.callbacks.scale_guard.ScaleError: a scale or a weight broke.
    """
    methods = methods or Methods()
    batches = _batches(train, dataset)
    logits = ends_in_logits(model)
    loss = keras.losses.SparseCategoricalCrossentropy
    if train.mixup:
        loss = keras.losses.CategoricalCrossentropy
    learner = model
    if train.distill and teacher is not None:
        check_logits(model)
        made = mutual_distiller if methods.mutual else distiller
        learner = made(teacher, model, train)
    validation = None
    if held_out is not None:
        targets = _targets(train, held_out.y_test, held_out.num_classes)
        validation = datasets.Batches(held_out.x_test, targets, train.batch_size)
    options = {"validation_data": validation, "verbose": verbose, "shuffle": False}
    compile_options = {
        "loss": loss(from_logits=logits),
        "metrics": ["accuracy"],
        "jit_compile": jit_compile_for(model, train.xla),
    }

    interrupts = Interrupts()

    def watching(_):
        return [interrupts, ScaleGuard(), batches.follow_epochs(), HistoryFile(history)]

    if methods.cycles:
        with interrupts:
            _fit_cycles(
                learner, batches, train, methods, watching, compile_options, backup, options
            )
    else:
        callbacks = [interrupts, ScaleGuard(), batches.follow_epochs()]
        callbacks += callbacks_of(methods, train, batches)
        if train.bit_descent:
            callbacks.append(BitDescent(train.descent, verbose=int(bool(verbose))))
        if methods.snap_epoch >= 0:
            callbacks.append(SnapLevels(model, methods.snap_epoch))
        callbacks.append(HistoryFile(history))  # behind what adds to the logs
        if backup is not None:
            # Kept: a kill after the last epoch and before the model is saved costs nothing.
            callbacks.append(Resume(backup, keep=True))
        learner.compile(optimizer=_optimizer(train, len(batches), learner), **compile_options)
        with interrupts:
            learner.fit(batches, epochs=train.epochs, callbacks=callbacks, **options)
    if train.reestimate_batches:
        # What training saw, shifted and mirrored: other statistics would move every feature. By
        # the number of epochs, so that a run that resumes behind the last one draws the same.
        batches.epoch = train.epochs
        reestimate_batchnorm(model, batches, steps=train.reestimate_batches)


def _fit_cycles(learner, batches, train, methods, watching, compile_options, backup, options):
    """Descents and what lies between them, each stage with a schedule of its own."""
    plan, between = stages_of(methods, train)

    def optimizer(visit):
        stage = dataclasses.replace(train, epochs=visit.stage.epochs)
        return _optimizer(stage, len(batches), learner)

    CyclicTraining(plan, methods.cycles, between, reestimate_batches=STAGE_BATCHES).fit(
        learner,
        batches,
        optimizer=optimizer,
        compile_options=compile_options,
        callbacks=watching,
        directory=backup,
        **options,
    )


def _batches(train, dataset):
    """Shuffled images, shifted, mirrored, cut and mixed if the recipe says so."""
    return datasets.AugmentedBatches(
        dataset.x_train,
        _targets(train, dataset.y_train, dataset.num_classes),
        train.batch_size,
        seed=train.seed,
        flip=train.augment and train.flip,
        pad=train.shift if train.augment else 0,
        drop_remainder=True,
        cutout=train.cutout,
        mixup=train.mixup,
    )


def _targets(train, labels, classes):
    """Labels, or for mixtures their probabilities `(n, classes)`."""
    return keras.utils.to_categorical(labels, classes) if train.mixup else labels


def _optimizer(train, epoch_steps, learner):
    optimizer = keras.optimizers.SGD(
        cosine(train, epoch_steps * train.epochs, epoch_steps),
        momentum=train.momentum,
        nesterov=train.nesterov and train.momentum > 0,
        weight_decay=train.weight_decay or None,
        global_clipnorm=train.clipnorm or None,
    )
    return exclude_from_weight_decay(optimizer, learner) if train.weight_decay else optimizer


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


def distiller(teacher, student, train):
    """A distiller around the student: frozen float teacher, logits."""
    # Its batch norms are constants: folded, the same logits come a quarter sooner.
    teacher = fold_batchnorm(teacher)
    teacher.trainable = False
    # The loss by name, Keras' default, becomes a function, which Keras then applies to raw logits:
    # only an instance of the class gets the probabilities of softmax(logits / temperature).
    loss = keras.losses.KLDivergence()
    return Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=keras.distillation.LogitsDistillation(train.temperature, loss),
        student_loss_weight=1.0 - train.distill,
    )


def mutual_distiller(float_model, student, train):
    """Both learn; the weights of the student's losses are those of `distiller`."""
    return MutualDistiller(
        twin(float_model),  # the model that others are compared with stays what it was
        [student],
        a_s=1.0 - train.distill,
        b_s=train.distill,
        temperature=train.temperature,
    )


def check_logits(model) -> None:
    """See that a model's logits can be distilled into.

    Raises:
        ValueError: it ends in probabilities.
    """
    if not ends_in_logits(model):
        raise ValueError(
            "distill needs a model that ends in logits; this one ends in softmax. Build it without"
        )


def ends_in_logits(model) -> bool:
    """Whether a model's outputs are logits rather than probabilities."""
    image = [1 if size is None else size for size in model.input_shape[1:]]
    probe = ops.convert_to_numpy(model(np.zeros((1, *image), "float32")))
    return not (np.all(probe >= 0) and abs(float(probe.sum()) - 1.0) < 1e-3)


def jit_compile_for(model, wanted="auto"):
    """What `compile` gets: `False` for depthwise convolutions on TensorFlow, else Keras' choice.

    XLA's depthwise convolutions are several times slower on a CPU.
    """
    if keras.backend.backend() != "tensorflow":
        return "auto"
    if wanted != "auto":
        return wanted == "on"
    kinds = {type(call.operation).__name__ for call in walk.flatten(model).calls}
    slow = any("Depthwise" in kind or "Separable" in kind for kind in kinds)
    return False if slow else "auto"


class HistoryFile(keras.callbacks.Callback):
    """Writes the logs of each epoch to a CSV file, whole at any moment.

    A resumed run takes the rows of the epochs that it keeps from the file, so each epoch has one
    row. Numbers are written so that they read back exactly.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = Path(path)

    def on_epoch_end(self, epoch, logs=None):
        """Add a row, and drop those of this epoch and later ones."""
        rows = [row for row in read_history(self.path) if row["epoch"] < epoch]
        rows.append({"epoch": epoch, **{k: float(v) for k, v in (logs or {}).items()}})
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(text.getvalue(), self.path)


def read_history(path: Path) -> list[dict]:
    """Rows of a history file; none where there is no file.

    Raises:
        ValueError: a damaged file.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            {"epoch": int(row["epoch"])}
            | {k: float(v) for k, v in row.items() if k != "epoch" and v}
            for row in rows
        ]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Remove it") from error
