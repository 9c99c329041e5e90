"""Soft choices that harden: the temperature of gradients, falling."""

from __future__ import annotations

import keras

from keras_lowbit.callbacks.schedules import cooled
from keras_lowbit.checks import checked_number
from keras_lowbit.quantizers import Levels, Ternary
from keras_lowbit.quantizers.sites import sites_of


class TemperatureAnnealing(keras.callbacks.Callback):
    """Lets `temperature` of quantizers fall by a half cosine, epoch by epoch.

        temperature = first + (last - first) * (1 - cos(pi * epoch / (epochs - 1))) / 2

    For what a gradient passes through: the softmax over levels of `Levels(mode="selector")`, and
    the sigmoid of `Ternary(gradient="sigmoid")`, for which `TernaryPhases` does it too. Codes never
    depend on it. It follows from the epoch alone, so a run that resumes goes on as if never killed.

    Args:
        first: in epoch 0, above 0.
        last: in the last epoch, above 0.

    Raises:
        ValueError: a temperature that is not positive; when training starts, a model without
            such quantizers.

    Reference:
        Liu, Liu, Hyperspherical Loss-Aware Ternary Quantization, 2022, arXiv:2212.12649: schedule
        reconstructed, only the abstract could be read.
    """

    def __init__(self, first: float = 1.0, last: float = 0.25):
        super().__init__()
        self.first = checked_number(first, who="TemperatureAnnealing: first", above=0)
        self.last = checked_number(last, who="TemperatureAnnealing: last", above=0)
        self._found = []

    def on_train_begin(self, logs=None):
        """Find the quantizers."""
        self._found = [s.quantizer for s in sites_of(self.model) if _has_one(s.quantizer)]
        if not self._found:
            raise ValueError(
                f"TemperatureAnnealing: no quantizer of {self.model.name} has a gradient with a "
                "temperature. Levels(mode='selector') and Ternary(gradient='sigmoid') have"
            )

    def at(self, epoch: int, epochs: int) -> float:
        """Temperature of an epoch of a `fit` that ends at `epochs`."""
        return cooled(self.first, self.last, epoch, epochs)

    def on_epoch_begin(self, epoch, logs=None):
        """Set the temperature of this epoch."""
        temperature = self.at(epoch, self.params.get("epochs") or epoch + 1)
        for quantizer in self._found:
            quantizer.temperature.assign(temperature)


def _has_one(quantizer):
    # Ternary quantizers have the variable with every gradient; levels in the selector's mode only.
    if isinstance(quantizer, Ternary):
        return quantizer.gradient == "sigmoid"
    return isinstance(quantizer, Levels) and hasattr(quantizer, "temperature")
