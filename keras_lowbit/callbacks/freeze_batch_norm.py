"""Batch norms that stop following the batches."""

from __future__ import annotations

import keras

from keras_lowbit.checks import checked_count
from keras_lowbit.quantizers.sites import layers_of


class FreezeBatchNorm(keras.callbacks.Callback):
    """From an epoch on, batch norms train on their moving statistics.

        y = gamma * (x - moving_mean) / sqrt(moving_variance + epsilon) + beta

    The statistics stay where they are; gamma and beta go on training. Late in low-bit training
    this takes the noise of the batches out of what is exported. Batch norms that were not
    trainable before are left alone.

    How: Keras runs a batch norm with `trainable=False` in inference mode, and variables keep a
    flag of their own. So while a step runs, the layer is marked frozen and its gamma and beta
    trainable: the optimizer sees the same variables as before. Between steps all flags are as the
    user set them, so files saved meanwhile hold ordinary batch norms. The step is traced once more
    when the freeze begins, and again by the next `fit`. A `fit` that ends in an exception or by the
    keyboard amid a step leaves the marks on: the next `fit` with this callback takes them off, or
    call `on_train_end()`.

    List it behind a `BatchNormReestimation(after=...)`, which finds nothing to do in frozen layers.

    Args:
        epoch: the first frozen epoch, from 0.

    Raises:
        ValueError: a negative epoch; when training starts, one that never comes, or a model
            without trainable batch norms.
    """

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = checked_count(epoch, who="FreezeBatchNorm: epoch", least=0)
        self._frozen = False
        self._flags: list[tuple[keras.layers.BatchNormalization, list]] = []

    def on_train_begin(self, logs=None):
        """Find the batch norms."""
        self.on_train_end()  # what an interrupted `fit` left
        model, epochs = self.model, self.params.get("epochs")
        if epochs is not None and self.epoch >= epochs:
            raise ValueError(
                f"FreezeBatchNorm: epoch {self.epoch} never comes: fit runs epochs 0 to "
                f"{epochs - 1}. Give an earlier epoch, or leave the callback out"
            )
        norms = [
            layer
            for _, layer in layers_of(model)
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        ]
        if not norms:
            raise ValueError(f"FreezeBatchNorm: {model.name} has no trainable batch norm")
        self._flags = [
            (n, [(v, v.trainable) for v in (n.gamma, n.beta) if v is not None]) for n in norms
        ]

    def on_epoch_begin(self, epoch, logs=None):
        """Begin the freeze."""
        if epoch >= self.epoch and not self._frozen:
            self._frozen = True
            self.model.make_train_function(force=True)

    def on_train_batch_begin(self, batch, logs=None):
        """Mark the layers while a step runs."""
        if self._frozen:
            self._mark(trainable=False)

    def on_train_batch_end(self, batch, logs=None):
        """Take the marks off."""
        if self._frozen:
            self._mark(trainable=True)

    def on_train_end(self, logs=None):
        """Leave a model that trains as before."""
        if self._frozen:
            self._mark(trainable=True)
            self._frozen = False
            # The compiled step is that of the freeze; another `fit` must not find it.
            self.model.make_train_function(force=True)

    def _mark(self, *, trainable):
        for norm, variables in self._flags:
            norm.trainable = trainable
            for variable, flag in variables:
                variable.trainable = flag
