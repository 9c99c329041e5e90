"""A fixed scale of least squared error."""

from __future__ import annotations

import keras

from keras_lowbit.checks import checked_count
from keras_lowbit.numerics import ranges
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class MSE(Quantizer):
    """Uniform quantizer whose scale has the least squared error on what `calibrate` saw.

        code = round(clip(x / scale, lo, hi))          out = scale * code
        scale = argmin mean (out - x)^2                over shrinkages of the covering scale

    Nothing in it is trained. Kernels at 1 bit take the binary branch (`numerics.uniform.signs`).

    Args:
        bits: width of a code, 1..16.
        signed: False after a ReLU.
        role: `"kernel"` or `"activation"`.
        axis: axes that keep a scale of their own.
        candidates: scales tried, at least 1.

    Raises:
        ValueError: `candidates` below 1.

    Gradient:
        To `x`: 1 for `lo - 0.5 <= x / scale <= hi + 0.5`, else 0.

    Reference:
        Banner et al., Post Training 4-bit Quantization of Convolutional Networks for
        Rapid-Deployment, NeurIPS 2019, arXiv:1810.05723 (the error minimized).
        Deviation: a search on the data, no assumed distribution.
    """

    def __init__(self, bits=8, *, candidates=100, **kwargs):
        super().__init__(bits, **kwargs)
        self.candidates = checked_count(candidates, who="MSE: candidates", least=1)

    def build(self, input_shape):
        """Create the scale, 1.0 until calibrated."""
        super().build(input_shape)
        self.add_scale(input_shape, trainable=False)

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        lo, hi = self.bounds()
        return self.uniform_codes(x, self.scale_in_use(lo, hi), lo, hi)

    def fit_scale(self, x, method="mse"):
        """Minimize the squared error on `x`, whatever `method` says."""
        lo, hi = self.static_bounds()
        self.take_scale(ranges.scale_mse(self.columns(x), lo, hi, self.candidates))

    def get_config(self):
        """Arguments of the constructor."""
        return {**super().get_config(), "candidates": self.candidates}
