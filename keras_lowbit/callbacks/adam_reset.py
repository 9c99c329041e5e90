"""Cosine learning rates with Adam's memory reset at the end of each period."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_count, checked_number
from keras_lowbit.optimizers import unwrapped


class AdamResetCosine(keras.callbacks.Callback):
    """Anneals the learning rate step by step and resets Adam every `period` steps.

        rate(t) = base * exp(-decay * t) * |cos(pi / 4 * r / period)| + floor,   r = t mod period

    Steps count from epoch 0, so `initial_epoch=`, `BackupAndRestore` and `Resume` go on with the
    rates that an unbroken run has, where the number of steps an epoch is known. At `r = 0` the
    optimizer's moments and count of steps are set to zero, and averages of weights (`use_ema`)
    begin anew; the scale of a loss (`LossScaleOptimizer`) stays. With `pi / 4` the cosine falls to
    0.71.

    A `fit` that ends in an exception or by the keyboard leaves the rate of its last step: the next
    `fit` with this callback gives the base rate back first, or call `on_train_end()`.

    Args:
        period: steps between two resets, from 1.
        decay: of the base rate, a step.
        floor: smallest rate.

    Raises:
        ValueError: arguments out of range; when training starts, an optimizer whose learning rate
            is a schedule, or a model compiled with `steps_per_execution` above 1, where steps share
            a rate.

    Reference:
        Goncharenko et al., Fast Adjustable Threshold, arXiv:1812.07872: cosine annealing with
        resets of Adam in the text; this formula and its numbers are those of the authors' code.
    """

    def __init__(self, period: int = 400, decay: float = 1e-4, floor: float = 1e-7):
        super().__init__()
        self.period = checked_count(period, who="AdamResetCosine: period", least=1)
        self.decay = checked_number(decay, who="AdamResetCosine: decay", least=0)
        self.floor = checked_number(floor, who="AdamResetCosine: floor", least=0)
        self._base, self._step, self._running = 0.0, 0, False

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        phase = math.pi / 4 * (step % self.period) / self.period
        return self._base * math.exp(-self.decay * step) * abs(math.cos(phase)) + self.floor

    def on_train_begin(self, logs=None):
        """Note the base rate."""
        optimizer = self.model.optimizer
        rate = optimizer.learning_rate
        if not hasattr(rate, "assign"):
            raise ValueError(
                "AdamResetCosine sets the learning rate itself: compile with a number, not a "
                f"schedule. Got {type(rate).__name__}"
            )
        if self.model.steps_per_execution != 1:
            raise ValueError(
                "AdamResetCosine sets the rate of every step: compile with steps_per_execution=1. "
                f"Got {self.model.steps_per_execution}"
            )
        self.on_train_end()
        self._base, self._step = float(ops.convert_to_numpy(rate)), 0
        self._running = True

    def on_epoch_begin(self, epoch, logs=None):
        """Count the steps of epochs that another run made."""
        if self.params.get("steps"):
            self._step = epoch * self.params["steps"]

    def on_train_batch_begin(self, batch, logs=None):
        """Set the rate; at a period's start clear the moments."""
        if hasattr(self.model, "jax_state_sync"):
            # On JAX a running `fit` holds the values; what is assigned meanwhile would be lost.
            self.model.jax_state_sync()
        optimizer = self.model.optimizer
        optimizer.learning_rate.assign(self.rate(self._step))
        if self._step and self._step % self.period == 0:
            for variable in unwrapped(optimizer).variables:  # not the scale of the loss
                if variable is not optimizer.learning_rate:
                    variable.assign(np.zeros(variable.shape, variable.dtype))
        self._step += 1

    def on_train_end(self, logs=None):
        """Give the base rate back."""
        if self._running:
            self.model.optimizer.learning_rate.assign(self._base)
            self._running = False
