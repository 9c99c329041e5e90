"""A small descent that may be killed at a step: run by `test_resume`, also as a program."""

import json
import os
import signal
import sys

import keras
import numpy as np
from keras import ops

from keras_lowbit.callbacks import BatchNormReestimation, BitDescent, Resume
from tests.callbacks import tiny

PLAN = {0: 8, 1: 6, 3: 4}
EPOCHS = 4  # of 3 steps


class Kill(keras.callbacks.Callback):
    """SIGKILL, which nothing can catch, in the middle of step `at` of the whole run."""

    def __init__(self, at):
        super().__init__()
        self.at, self.step = at, 0

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.of = {}

    def on_epoch_end(self, epoch, logs=None):
        self.of[epoch] = logs["loss"], tiny.bits(self.model)


def backup(kind, directory):
    """One of the callbacks under test, by name."""
    if kind == "resume":
        return Resume(directory)
    return keras.callbacks.BackupAndRestore(directory)


def run(kind, directory, kill_at=None):
    """`(losses and bits by epoch, every variable by path)` of a run from a fresh model."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    # PyTorch's dropout draws from a generator of its own, which no Keras callback restores.
    random = kind == "resume" and keras.backend.backend() != "torch"
    model = tiny.model("w4a4", dropout=0.5 if random else 0.0)
    losses, descent = Losses(), BitDescent(PLAN)
    fresh = BatchNormReestimation(tiny.images()[0], after=descent, at_end=False)
    callbacks = [descent, fresh, losses]
    if kill_at is not None:
        callbacks.append(Kill(kill_at))
    if directory:
        callbacks.append(backup(kind, directory))
    tiny.train(model, callbacks, epochs=EPOCHS)
    variables = [*model.variables, *model.optimizer.variables]
    return losses.of, [np.array(ops.convert_to_numpy(v)) for v in variables]


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
