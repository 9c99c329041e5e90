"""Optimizers of Keras with a rate for each variable."""

from __future__ import annotations

import re
from collections.abc import Mapping

import keras

from keras_lowbit.checks import checked_number

PACKAGE = "keras_lowbit"

__all__ = ["Rated", "RatedAdam", "RatedSGD"]


def averages(optimizer) -> list[tuple[keras.Variable, keras.Variable]]:
    """`(variable, its average)` of an optimizer that averages weights (`use_ema`), else nothing.

    Args:
        optimizer: `None`, or one of Keras, inside a `LossScaleOptimizer` or not.
    """
    own = unwrapped(optimizer)
    if not getattr(own, "use_ema", False) or not own.built:
        return []
    # Keras has no public way from a variable to its average; both lists are in one order.
    return list(zip(own._trainable_variables, own._model_variables_moving_average, strict=True))


def velocities(optimizer) -> list[tuple[keras.Variable, keras.Variable]]:
    """`(variable, its velocity)` of SGD with momentum, in the variable's unit a step, else nothing.

    Args:
        optimizer: `None`, or one of Keras, inside a `LossScaleOptimizer` or not.
    """
    own = unwrapped(optimizer)
    if not isinstance(own, keras.optimizers.SGD) or not own.built or not own.momentum:
        return []
    return list(zip(own._trainable_variables, own.momentums, strict=True))


def unwrapped(optimizer):
    """What a `LossScaleOptimizer`, which mixed precision brings, makes its steps with."""
    return getattr(optimizer, "inner_optimizer", optimizer)


class Rated:
    """Mixin in front of a Keras optimizer: steps at a rate of each variable's own.

        learning rate of a variable = learning_rate * rates[pattern]

    The pattern is the first that is found in the variable's `path`; variables that none fits keep
    the optimizer's rate. `training.quantizer_rates` writes the patterns for a model's quantizers.
    Weight decay goes by the optimizer's rate alone (`training.exclude_from_weight_decay`).

    Args:
        *args: those of the optimizer.
        rates: regular expression to a factor, 0 or more.
        **kwargs: those of the optimizer.

    Raises:
        ValueError: a negative factor; when the optimizer is built, a pattern that fits no variable.
    """

    def __init__(self, *args, rates: Mapping[str, float], **kwargs):
        super().__init__(*args, **kwargs)
        self.rates = dict(rates)
        self._factors: list[float] = []
        for pattern, rate in self.rates.items():
            checked_number(rate, who=f"{type(self).__name__}: the rate of {pattern!r}", least=0)

    def build(self, variables):
        """Put the rates in the order of the variables."""
        super().build(variables)
        idle = [p for p in self.rates if not any(re.search(p, v.path) for v in variables)]
        if idle:
            raise ValueError(
                f"{type(self).__name__}: no trainable variable has {idle[:3]} in its path. Paths "
                f"are such as {[v.path for v in variables[:3]]}"
            )
        self._factors = [self.rate_of(v) for v in variables]

    def rate_of(self, variable) -> float:
        """The factor of a variable."""
        fits = (rate for p, rate in self.rates.items() if re.search(p, variable.path))
        return next(fits, 1.0)

    def update_step(self, gradient, variable, learning_rate):
        """The optimizer's step at the variable's rate."""
        factor = self._factors[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * factor)

    def get_config(self):
        """Arguments of the constructor."""
        return {**super().get_config(), "rates": dict(self.rates)}


@keras.saving.register_keras_serializable(package=PACKAGE)
class RatedSGD(Rated, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with `rates`; see `Rated`."""


@keras.saving.register_keras_serializable(package=PACKAGE)
class RatedAdam(Rated, keras.optimizers.Adam):
    """`keras.optimizers.Adam` with `rates`; see `Rated`."""
