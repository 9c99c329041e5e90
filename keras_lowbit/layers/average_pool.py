"""Keras' average pooling, with one meaning on every backend."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics.windows import positions_seen, same_padding


@keras.saving.register_keras_serializable(package="keras_lowbit")
class AveragePooling2D(keras.layers.AveragePooling2D):
    """`keras.layers.AveragePooling2D`: the same arguments, and what SAME means in files.

    A window over the border takes the mean of the positions that it sees:

        sum of the window, zeros around the image / positions of the image in it

    Keras 3.15 repeats the border on PyTorch where more is added behind an image than before it.
    `quantize_model` puts this layer in the place of Keras' own.
    """

    def call(self, inputs):
        """Means of windows."""
        sizes = inputs.shape[1:3]
        if self.padding != "same" or self.data_format != "channels_last" or None in sizes:
            return super().call(inputs)
        axes = list(zip(sizes, self.pool_size, self.strides, strict=True))
        pads = [same_padding(*axis) for axis in axes]
        seen = np.multiply.outer(*(positions_seen(*axis, "SAME") for axis in axes))
        if not np.any(pads):
            return super().call(inputs)
        padded = ops.pad(inputs, [(0, 0), *pads, (0, 0)])
        means = ops.average_pool(padded, self.pool_size, self.strides, "valid", "channels_last")
        share = np.prod(self.pool_size) / seen[:, :, None]
        return means * ops.convert_to_tensor(share, means.dtype)
