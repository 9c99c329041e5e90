"""Pulls the directions of filters towards ternary ones."""

from __future__ import annotations

import keras
from keras import ops

from keras_lowbit.checks import checked_number
from keras_lowbit.numerics import ternary

PACKAGE = "keras_lowbit"


@keras.saving.register_keras_serializable(package=PACKAGE)
class CosineTernaryRegularizer(keras.regularizers.Regularizer):
    """The mean over filters of `1 - cos(w, T(w))`, times `strength`.

        R(w) = mean_f (1 - <w_f, T_f> / (|w_f| |T_f|))          T = sign(w) 1[|w| > Delta]

    `min_a |w - a T|^2 = |w|^2 (1 - cos^2)`: R is the ternary error without the magnitude. It cannot
    be lowered by shrinking weights, and does not fight weight decay.

    Args:
        strength: a number, or a scalar Keras variable that a schedule moves. A variable must belong
            to a layer of the model, or compiled steps on JAX keep its first value.
        axis: axis or axes of the kernel whose entries are filters; `None` for one filter.
        threshold: Delta over `mean_f |w|`.
        projection: `kernel -> codes` in place of the threshold, such as `Ternary.project`; not
            kept by a config.

    Raises:
        ValueError: a negative strength, or a threshold not positive.

    Gradient:
        With T a constant, `strength / filters * -(T / |T| - cos w / |w|) / |w|`: orthogonal to each
        filter. A filter of zeros gets none.

    Reference:
        Liu, Liu, Hyperspherical Loss-Aware Ternary Quantization, 2022, arXiv:2212.12649: a
        reconstruction, only the abstract could be read.
    """

    def __init__(self, strength=1.0, axis=-1, threshold=ternary.TWN_RATIO, projection=None):
        if not isinstance(strength, keras.Variable):
            checked_number(strength, who="CosineTernaryRegularizer: strength", least=0)
        checked_number(threshold, who="CosineTernaryRegularizer: threshold", above=0)
        self.strength = strength
        self.axis = (axis,) if isinstance(axis, int) else None if axis is None else tuple(axis)
        self.threshold = float(threshold)
        self.projection = projection

    def cosines(self, w):
        """Cosine of each filter with its ternary codes, shape of the axes that are kept."""
        w = ops.convert_to_tensor(w)
        axes = tuple(range(len(w.shape) - len(self.axis or ())))
        if self.projection is not None:
            return ternary.cosine(w, self.projection(w), axes)
        magnitude = ops.mean(ops.abs(ops.stop_gradient(w)), axis=axes)
        return ternary.cosine(w, ternary.codes_beyond(w, self.threshold * magnitude), axes)

    def __call__(self, x):
        """The penalty of a kernel."""
        return ops.convert_to_tensor(self.strength) * ops.mean(1.0 - self.cosines(x))

    def get_config(self):
        """Arguments of the constructor; a variable strength as the number it is now."""
        return {
            "strength": float(ops.convert_to_numpy(self.strength)),
            "axis": None if self.axis is None else list(self.axis),
            "threshold": self.threshold,
        }
