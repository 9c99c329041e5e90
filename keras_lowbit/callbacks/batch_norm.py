"""Batch-norm statistics that belong to the weights at hand, while `fit` runs."""

from __future__ import annotations

import keras

from keras_lowbit.callbacks.bit_descent import BitDescent
from keras_lowbit.callbacks.norms import graphs_of, kept, reestimate
from keras_lowbit.checks import checked_count
from keras_lowbit.optimizers import averages
from keras_lowbit.whole_files import checksum


class BatchNormReestimation(keras.callbacks.Callback):
    """Re-estimates the moving statistics of batch norms (`transform.reestimate_batchnorm`).

    Moving averages trail behind weights on a coarse grid, which jump. Where an epoch has
    validation, the statistics are fresh before it. Under a distiller the quantized models inside
    are re-estimated. Where the optimizer averages weights (`use_ema`), the averages replace the
    weights when training ends, and get statistics of their own.

    List it before callbacks that save at the end of an epoch (`ModelCheckpoint`,
    `BackupAndRestore`, `Resume`), and behind `EarlyStopping(restore_best_weights=True)`, whose
    earlier weights get statistics of their own then. Beside `FreezeBatchNorm` give `at_end=False`,
    or the end undoes the freeze.

    Args:
        data: what trains the model, as for `reestimate_batchnorm`: the same augmented batches. Of
            an iterator (a generator) the first `steps` batches are read once and kept.
        steps: batches to use; `None` for all.
        every: after every so many epochs; `None` for never.
        at_end: after the last epoch, also where training stops early.
        after: a `BitDescent` of the same `fit`; statistics are fresh before the first step of
            each epoch that it begins with other bits.
        batch_size: images at a time, for arrays.

    Raises:
        ValueError: counts below 1, `after` is no `BitDescent`, or nothing to do; when training
            starts, a subclassed model without a functional quantized model inside.
    """

    ends_each_fit = True  # of a training in stages: acts on the last epoch of each

    def __init__(
        self,
        data,
        steps: int | None = None,
        every: int | None = None,
        at_end: bool = True,
        after: BitDescent | None = None,
        batch_size: int = 128,
    ):
        super().__init__()
        steps, every = (
            value
            if value is None
            else checked_count(value, who=f"BatchNormReestimation: {name}", least=1)
            for name, value in (("steps", steps), ("every", every))
        )
        if after is not None and not isinstance(after, BitDescent):
            raise ValueError(f"BatchNormReestimation: after must be a BitDescent. Got {after!r}")
        if every is None and not at_end and after is None:
            raise ValueError("BatchNormReestimation: nothing to do; set every, at_end or after")
        self.data, self.steps, self.every, self.at_end, self.after = (
            data,
            steps,
            every,
            at_end,
            after,
        )
        self.batch_size = checked_count(
            batch_size, who="BatchNormReestimation: batch_size", least=1
        )
        self._due_at_start = self._due_at_end = False
        self._stepped = False
        self._fresh: int | None = None

    def on_train_begin(self, logs=None):
        """Refuse a model whose batch norms cannot be found, before any step."""
        self._stepped = False
        if not graphs_of(self.model):
            raise ValueError(
                f"BatchNormReestimation: {self.model.name} has no graph to read, nor a quantized "
                "model inside that has one. Train a functional or Sequential model"
            )

    def on_epoch_begin(self, epoch, logs=None):
        """Note when in this epoch statistics are due."""
        last = self.at_end and epoch + 1 == self.params.get("epochs")
        self._due_at_end = last or (self.every is not None and (epoch + 1) % self.every == 0)
        self._due_at_start = self.after is not None
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        """Before the first step: new statistics if the bits have changed."""
        # Here and not in `on_epoch_begin`, where `after` may not have had its turn yet.
        if self._due_at_start and self.after.changed_in == self._epoch:
            self._reestimate()
        self._due_at_start, self._stepped = False, True

    def on_test_begin(self, logs=None):
        """Before validation."""
        if self._due_at_end:
            self._reestimate()
            self._due_at_end = False

    def on_epoch_end(self, epoch, logs=None):
        """After an epoch without validation."""
        self.on_test_begin()

    def on_train_end(self, logs=None):
        """Where weights are others than at the last re-estimation.

        Training stopped early, averages (`use_ema`) or an earlier epoch have replaced the weights.
        """
        # Averages replace weights behind a run that resumes past its last step, too.
        moved = self._stepped or bool(averages(self.model.optimizer))
        if self.at_end and moved and self._fresh != checksum(self.model.get_weights()):
            self._reestimate()

    def _reestimate(self):
        self.data = kept(self.data, self.steps)
        reestimate(self.model, self.data, self.steps, self.batch_size)
        self._fresh = checksum(self.model.get_weights())
