"""A small training in two cycles that may be killed at a step: also run as a program."""

import json
import os
import signal
import sys

import keras
import numpy as np
from keras import ops

from keras_lowbit.training import CyclicTraining, Stage, StagePlan
from tests.callbacks import tiny

PLAN = StagePlan(
    (
        Stage("kernels", 2, None, 1, 1e-3),
        Stage("both", 2, 2, 2, 5e-4, frozen=("bn1",)),
    )
)
RETURN = Stage("float", None, None, 1, 1e-4)
# Epochs of 3 steps: kernels 0, both 1-2, float 3, kernels 4, both 5-6.
EPOCHS = 7


class Kill(keras.callbacks.Callback):
    """SIGKILL, which nothing can catch, in the middle of step `at` of the whole run."""

    step = 0

    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_train_batch_end(self, batch, logs=None):
        Kill.step += 1
        if Kill.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Visits(keras.callbacks.Callback):
    """Epochs that ran, by stage."""

    def __init__(self, visit, seen):
        super().__init__()
        self.visit, self.seen = visit, seen

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append((self.visit.index, epoch))


def run(directory, kill_at=None, monitor=None):
    """`(result, epochs that ran, variables)` of a training of a fresh model."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    # PyTorch's dropout draws from a generator of its own, which nothing here restores.
    model = tiny.model(
        "w2a2", dropout=0.0 if keras.backend.backend() == "torch" else 0.5, compiled=False
    )
    seen = []

    def callbacks(visit):
        kill = [] if kill_at is None else [Kill(kill_at)]
        return [Visits(visit, seen), *kill]

    x, y = tiny.images()
    result = CyclicTraining(PLAN, 2, RETURN, reestimate_batches=2, monitor=monitor).fit(
        model,
        x,
        y,
        optimizer=lambda visit: keras.optimizers.Adam(visit.stage.learning_rate),
        compile_options={
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "jit_compile": keras.backend.backend() == "jax",
            # Tracing every stage anew is most of the time on TensorFlow, and no claim here.
            "run_eagerly": keras.backend.backend() == "tensorflow",
        },
        callbacks=callbacks,
        directory=directory,
        batch_size=8,
        shuffle=False,
    )
    return result, seen, [np.array(ops.convert_to_numpy(v)) for v in model.variables]


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
