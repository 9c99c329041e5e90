"""PACT: activations with a learned clip."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_number
from keras_lowbit.numerics import ranges, uniform
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE, PositiveScale


@keras.saving.register_keras_serializable(package=PACKAGE)
class PACT(Quantizer):
    """Parameterized clipping activation: the upper end of the grid, `alpha`, is learned.

        y = clip(x, 0, alpha)          code = round(y * hi / alpha)          out = code * alpha / hi

    For activations only. With `signed` the lower end is `lo * alpha / hi` instead of 0.

    Args:
        bits: width of a code, 1..16.
        signed: False after a ReLU.
        alpha: reals; clip until `calibrate` sets it from data.
        decay: strength of an L2 penalty on `alpha`, `decay * alpha^2` in the loss (the paper:
            that of the weights).

    Raises:
        ValueError: `alpha` not positive, `decay` negative, a role other than `"activation"`, or
            an `axis`.

    Gradient:
        To `x`: 1 for `0 <= x < alpha`, else 0. To `alpha`: 0 below, 1 for `x >= alpha`. Signed:
        `lo / hi` below the lower end.

    Reference:
        Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks, 2018,
        arXiv:1805.06085, eqs. 1-3. Deviations: signed grids; `alpha` from data, not 10.
    """

    roles = ("activation",)

    def __init__(self, bits=8, *, alpha=10.0, decay=0.0, role="activation", axis=None, **kwargs):
        if role == "kernel":
            raise ValueError("PACT clips activations. For kernels use 'lsq' or 'dorefa'")
        if axis is not None:
            raise ValueError(f"PACT: activations have one clip, axis=None. Got {axis!r}")
        super().__init__(bits, role=role, **kwargs)
        self._initial_alpha = checked_number(alpha, who="PACT: alpha", above=0)
        self.decay = checked_number(decay, who="PACT: decay", least=0)

    def build(self, input_shape):
        """Create `alpha`."""
        super().build(input_shape)
        self.alpha = self.add_state(
            "alpha",
            self._initial_alpha,
            trainable=True,
            constraint=PositiveScale(),
            regularizer=keras.regularizers.L2(self.decay) if self.decay else None,
        )

    def scale_in_use(self, lo, hi):
        """`alpha / hi`."""
        return ops.convert_to_tensor(self.alpha) / hi

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        lo, hi = self.bounds()
        alpha = ops.convert_to_tensor(self.alpha)
        scale = ops.stop_gradient(self.scale_in_use(lo, hi))
        inverse = 1.0 / scale
        codes = uniform.nearest(ops.stop_gradient(x) * inverse, lo, hi)
        above = ops.cast(x >= alpha, x.dtype)
        below = ops.cast(x < lo * scale, x.dtype)
        to_x = (1.0 - above - below) * inverse
        to_alpha = (above + below * (lo / hi)) * inverse
        return uniform.straight_through(codes, (x, to_x), (alpha, to_alpha)), scale

    def fit_scale(self, x, method="mse"):
        """Set `alpha` to the upper end of the grid that `method` finds."""
        lo, hi = self.static_bounds()
        self.alpha.assign(np.float32(ranges.scale_of(self.columns(x), lo, hi, method)[0] * hi))
        self.calibrated.assign(1.0)

    def get_config(self):
        """Arguments of the constructor."""
        config = super().get_config()
        config.pop("axis")
        return {**config, "alpha": self._initial_alpha, "decay": self.decay}
