"""The pull towards balanced channels, falling."""

from __future__ import annotations

import keras

from keras_lowbit.callbacks.schedules import half_cosine
from keras_lowbit.checks import checked_count
from keras_lowbit.quantizers import ChannelBalanced
from keras_lowbit.quantizers.sites import sites_of


class ChannelBalanceDecay(keras.callbacks.Callback):
    """Lets `balance` of `ChannelBalanced` quantizers fall by a half cosine, epoch by epoch.

        balance = weight * (1 + cos(pi * epoch / epochs)) / 2,      0 from `epochs` on

    It follows from the epoch alone, so a run that resumes goes on as if never killed.

    Args:
        epochs: the first epoch without it; `None` for as many as `fit` runs, whose last epoch
            then has the little that is left.

    Raises:
        ValueError: `epochs` below 1; when training starts, a model without such quantizers.
    """

    def __init__(self, epochs: int | None = None):
        super().__init__()
        if epochs is not None:
            epochs = checked_count(epochs, who="ChannelBalanceDecay: epochs", least=1)
        self.epochs = epochs
        self._found = []

    def on_train_begin(self, logs=None):
        """Find the quantizers."""
        self._found = [
            s.quantizer for s in sites_of(self.model) if isinstance(s.quantizer, ChannelBalanced)
        ]
        if not self._found:
            raise ValueError(
                f"ChannelBalanceDecay: {self.model.name} has no channel-balanced activations. "
                "Quantize it by Scheme(2, 2, activation='channel_balanced')"
            )

    def on_epoch_begin(self, epoch, logs=None):
        """Set the balance of this epoch."""
        epochs = self.epochs or self.params.get("epochs") or epoch + 1
        for quantizer in self._found:
            quantizer.balance.assign(quantizer.weight * (1.0 - half_cosine(epoch / epochs)))
