"""Keras' average pooling, with one meaning on every backend."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics.uniform import straight_through
from keras_lowbit.numerics.windows import positions_seen, same_padding


@keras.saving.register_keras_serializable(package="keras_lowbit")
class AveragePooling2D(keras.layers.AveragePooling2D):
    """`keras.layers.AveragePooling2D`: the same arguments, and what SAME means in files.

    A window over the border takes the mean of the positions that it sees:

        sum of the window, zeros around the image / positions of the image in it

    Keras 3.15 repeats the border on PyTorch where more is added behind an image than before it.
    `quantize_model` puts this layer in the place of Keras' own.

    With a `zero_point` the layer takes and gives codes: the mean is rounded back to the grid of
    what it reads, as AVERAGE_POOL_2D does it in files, half away from zero once `zero_point` is
    added. `quantize_model` asks for that where windows reach over the border; other means become
    sums, which round once, with the grid behind them. The reals that a quantizer lets pass while
    it is calibrated or switched off are told from codes by not being whole, and pooled as reals;
    whole ones, such as pixels that are black or white alone, pass for codes.

    Args:
        zero_point: the int8 code of code 0, 0 or -128; `None`: the layer pools reals.

    Gradient:
        Of the means; rounding passes it on.

    Raises:
        ValueError: another `zero_point`, or one without the layout or the image size that it
            needs: channels last, both sides known.
    """

    def __init__(self, *args, zero_point=None, **kwargs):
        super().__init__(*args, **kwargs)
        if zero_point not in (None, 0, -128):
            raise ValueError(
                f"AveragePooling2D: zero_point must be 0, -128 or None. Got {zero_point!r}"
            )
        self.zero_point = zero_point

    def build(self, input_shape):
        """Check what a pool of codes needs."""
        known = self.data_format == "channels_last" and None not in input_shape[1:3]
        if self.zero_point is not None and not known:
            raise ValueError(
                f"{self.name}: a pool of codes needs channels last and a known image size. "
                f"Got data_format={self.data_format!r} and shape {tuple(input_shape)}"
            )
        super().build(input_shape)

    def call(self, inputs):
        """Means of windows, of reals or of codes."""
        if self.zero_point is not None:
            return self._mean_codes(inputs)
        known = self.data_format == "channels_last" and None not in inputs.shape[1:3]
        return self._means(inputs) if known else super().call(inputs)

    def _means(self, inputs):
        pads = self._pads(inputs)
        if not np.any(pads):
            return super().call(inputs)
        padded = ops.pad(inputs, [(0, 0), *pads, (0, 0)])
        means = ops.average_pool(padded, self.pool_size, self.strides, "valid", "channels_last")
        share = np.prod(self.pool_size) / self._seen(inputs)
        return means * ops.convert_to_tensor(share, means.dtype)

    def _mean_codes(self, inputs):
        means = self._means(inputs)
        are_codes = ops.all(ops.equal(inputs, ops.round(inputs)))
        return ops.where(are_codes, self._rounded(means, inputs), means)

    def _rounded(self, means, codes):
        seen = ops.convert_to_tensor(self._seen(codes), means.dtype)
        # Whole sums again: a mean in floats may lie on either side of a half.
        sums = ops.round(ops.stop_gradient(means) * seen) + self.zero_point * seen
        # |sum| / seen + 1/2, rounded down, of whole numbers. Half of one too much keeps quotients
        # off whole numbers, where a compiler that multiplies by 1 / seen falls below.
        raw = ops.sign(sums) * ops.floor((2 * ops.abs(sums) + seen + 0.5) / (2 * seen))
        return straight_through(raw - self.zero_point, (means, 1.0))

    def _axes(self, inputs):
        return list(zip(inputs.shape[1:3], self.pool_size, self.strides, strict=True))

    def _pads(self, inputs):
        if self.padding != "same":
            return [(0, 0), (0, 0)]
        return [same_padding(*axis) for axis in self._axes(inputs)]

    def _seen(self, inputs):
        """Positions of the image in each window, shape `(height, width, 1)`."""
        padding = self.padding.upper()
        seen = [positions_seen(*axis, padding) for axis in self._axes(inputs)]
        return np.multiply.outer(*seen)[:, :, None]

    def get_config(self):
        """The configuration, `zero_point` where there is one."""
        config = super().get_config()
        return config if self.zero_point is None else {**config, "zero_point": self.zero_point}
