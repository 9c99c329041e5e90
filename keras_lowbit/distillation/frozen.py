"""A student under a frozen teacher, with the penalties of the student's layers."""

from __future__ import annotations

import keras
from keras import ops

from keras_lowbit.distillation.task_loss import KeepsTaskLoss


@keras.saving.register_keras_serializable(package="keras_lowbit")
class Distiller(KeepsTaskLoss, keras.distillation.Distiller):
    """`keras.distillation.Distiller` whose loss holds what the student's layers add.

        loss = (1 - w) sum of distillation losses + w CE(student, y) + the student's penalties

    with `w = student_loss_weight`. Keras' own leaves the last sum out, so penalties that train
    quantizers or kernels (`ChannelBalanced`, `PACT`, `attach_cosine`, `attach_dampening`, weight
    regularizers) would do nothing. A saved one goes on where it was, compiled and with its
    optimizer's state, which Keras' own does not. Arguments and errors are those of Keras. Sample
    weights are not used, as there: `MutualDistiller(frozen_teacher=True)` minds them.
    """

    def compile(self, optimizer="adam", loss=None, metrics=None, **kwargs):
        """As Keras' `compile`; `loss` is CE above, of the student's outputs.

        Args:
            optimizer: for the student.
            loss: a loss, its name, or a structure of them like the student's outputs.
            metrics: of the student's outputs.
            **kwargs: those of `keras.Model.compile`.

        Raises:
            ValueError: no loss.
        """
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)
        self.task_loss = loss

    def _assert_same_dtype(self, teacher_dtype, student_dtype, context):
        # Under mixed precision a float teacher ends in halves, a quantized student in float32.
        if not all("float" in dtype for dtype in (teacher_dtype, student_dtype)):
            super()._assert_same_dtype(teacher_dtype, student_dtype, context)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss above."""
        if y_pred is None:
            y_pred = self(x, training=training)
        # Those of this pass through the student alone, which teacher and feature extractors have
        # not followed yet. From `self`: on JAX the model that fits has the losses of a step.
        penalties = list(self.losses)
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + sum(ops.sum(ops.cast(one, "float32")) for one in penalties)
