"""Adam with a rate for each variable."""

from __future__ import annotations

from collections.abc import Mapping

import keras

from keras_lowbit.optimizers import Rated


class RatedByIdentity(Rated, keras.optimizers.Adam):
    """`keras.optimizers.Adam` whose step is multiplied by a rate of each variable's own.

    By `id`, not by path as in `optimizers.RatedAdam`: variables made for a block share names.

    Args:
        rates: `id` of a Keras variable to its rate; others get 1.
        **kwargs: arguments of Adam; `learning_rate` is the common factor, such as a schedule that
            starts at 1.
    """

    def __init__(self, rates: Mapping[int, float], **kwargs):
        super().__init__(rates={}, **kwargs)
        self._rate_of = dict(rates)

    def rate_of(self, variable):
        """The rate of a variable."""
        return self._rate_of.get(id(variable), 1.0)
