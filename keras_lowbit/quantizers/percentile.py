"""A fixed scale that covers all but the outliers of its data."""

from __future__ import annotations

import keras

from keras_lowbit.checks import checked_number
from keras_lowbit.numerics import ranges
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class Percentile(Quantizer):
    """Uniform quantizer whose scale covers a share of the values seen by `calibrate`.

        code = round(clip(x / scale, lo, hi))          out = scale * code

    Nothing in it is trained. Kernels at 1 bit take the binary branch (`numerics.uniform.signs`).

    Args:
        bits: width of a code, 1..16.
        signed: False after a ReLU.
        role: `"kernel"` or `"activation"`.
        axis: axes that keep a scale of their own.
        percentile: percent of the values below the upper end of the grid, and of those above the
            lower end; more than 50, at most 100.

    Raises:
        ValueError: `percentile` out of range.

    Gradient:
        To `x`: 1 for `lo - 0.5 <= x / scale <= hi + 0.5`, else 0.

    Reference:
        Wu et al., Integer Quantization for Deep Learning Inference: Principles and Empirical
        Evaluation, 2020, arXiv:2004.09602, its percentile calibration.
    """

    counts_shares = True

    def __init__(self, bits=8, *, percentile=99.99, **kwargs):
        super().__init__(bits, **kwargs)
        who = "Percentile: percentile"
        self.percentile = checked_number(percentile, who=who, above=50, most=100)

    def build(self, input_shape):
        """Create the scale, 1.0 until calibrated."""
        super().build(input_shape)
        self.add_scale(input_shape, trainable=False)

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        lo, hi = self.bounds()
        return self.uniform_codes(x, self.scale_in_use(lo, hi), lo, hi)

    def fit_scale(self, x, method="percentile"):
        """Cover `percentile` of `x`, whatever `method` says."""
        lo, hi = self.static_bounds()
        self.take_scale(ranges.scale_minmax(self.columns(x), lo, hi, self.percentile))

    def get_config(self):
        """Arguments of the constructor."""
        return {**super().get_config(), "percentile": self.percentile}
