"""Keras' batch normalization, by a faster form where the backend has one."""

from __future__ import annotations

import keras

from keras_lowbit.numerics import backend


@keras.saving.register_keras_serializable(package="keras_lowbit")
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`: the same arguments, weights and values.

    Keras computes the moments of a batch and the normalization by separate operations, each a pass
    over the activations on TensorFlow and PyTorch. Here the two are one operation wherever
    `numerics.backend.batch_norm` covers it: images, channels last, in float32, without mask,
    renormalization or synchronization. `quantize_model` puts this layer in the place of Keras' own.

    Reference:
        Ioffe and Szegedy, Batch Normalization, ICML 2015, arXiv:1502.03167, algorithm 1.
    """

    def call(self, inputs, training=None, mask=None):
        """Normalized `inputs`, same shape; in training by the moments of the batch."""
        found = None
        if training and self.trainable and mask is None and self._is_plain(inputs):
            found = backend.batch_norm(inputs, self.gamma, self.beta, self.epsilon)
        if found is None:
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance = found
        for moving, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + new * (1.0 - self.momentum))
        return outputs

    def _is_plain(self, inputs):
        """Whether nothing but the usual is asked for."""
        dtypes = {inputs.dtype, self.compute_dtype, self.variable_dtype}
        return (
            len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.epsilon > 0
            and not (self.renorm or self.synchronized)
            and {keras.backend.standardize_dtype(dtype) for dtype in dtypes} == {"float32"}
        )
