"""Adam with a rate for each variable."""

from __future__ import annotations

from collections.abc import Mapping

import keras


class RatedAdam(keras.optimizers.Adam):
    """`keras.optimizers.Adam` whose step is multiplied by a rate of each variable's own.

    Args:
        rates: `id` of a Keras variable to its rate; others get 1.
        **kwargs: arguments of Adam; `learning_rate` is the common factor, such as a schedule that
            starts at 1.
    """

    def __init__(self, rates: Mapping[int, float], **kwargs):
        super().__init__(**kwargs)
        self._rate_of = dict(rates)
        self._rates: list[float] = []

    def build(self, variables):
        """Put the rates in the order of the variables."""
        super().build(variables)
        self._rates = [self._rate_of.get(id(v), 1.0) for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        """Adam's step at the variable's rate."""
        rate = self._rates[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * rate)
