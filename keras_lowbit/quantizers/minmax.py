"""Scales that cover all values: of a kernel as it is, of activations as they ran by."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_number
from keras_lowbit.numerics.ranges import SMALLEST_SCALE
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class MinMax(Quantizer):
    """Uniform quantizer whose grid covers the smallest and the largest value.

        scale = max(high / hi, low / lo)               low <= 0 <= high
        code = round(clip(x / scale, lo, hi))          out = scale * code

    Kernels: `low` and `high` are those of the kernel in each call, for each channel of `axis`; at
    1 bit they take the binary branch (`numerics.uniform.signs`). Activations: they come from
    `calibrate`, and while the variable `update_ranges` is 1.0 each call moves them first,

        high' = momentum * high + (1 - momentum) * max(x)         low' likewise

    where the first such call of a quantizer that was never calibrated takes its batch's range as
    it is. `update_ranges` starts at 0.0: set it for training steps, not for evaluation.

    Args:
        bits: width of a code, 1..16.
        signed: False after a ReLU.
        role: `"kernel"` or `"activation"`.
        axis: axes that keep a scale of their own (kernels only).
        momentum: share of the old range that a call keeps, 0 <= momentum < 1.

    Raises:
        ValueError: `momentum` out of range, or `axis` for activations.

    Gradient:
        To `x`: 1 for `lo - 0.5 <= x / scale <= hi + 0.5`, else 0. None through the range.

    Reference:
        Jacob et al., Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, CVPR 2018, arXiv:1712.05877, section 3.1.
        Deviation: grids are symmetric or start at 0; `Affine` has a zero point.
    """

    def __init__(self, bits=8, *, momentum=0.99, **kwargs):
        super().__init__(bits, **kwargs)
        if self.role == "activation" and self.axis is not None:
            raise ValueError(f"MinMax: activations have one range, axis=None. Got {self.axis}")
        self.momentum = checked_number(momentum, who="MinMax: momentum", least=0, below=1)

    def build(self, input_shape):
        """Create the range of activations, `[-1, 1]` or `[0, 1]` until calibrated."""
        super().build(input_shape)
        self.scale_shape(input_shape)  # refuses axes that do not broadcast
        if self.role == "activation":
            self.low = self.add_state("low", -1.0 if self.signed else 0.0, aggregation="mean")
            self.high = self.add_state("high", 1.0, aggregation="mean")
            self.update_ranges = self.add_state("update_ranges", 0.0)

    def scale_in_use(self, lo, hi):
        """The scale that covers the running range."""
        if self.role == "kernel":
            raise ValueError(
                f"{self.name}: a min-max kernel's scale is computed from the kernel: call "
                "encode(kernel) for codes and scale"
            )
        return self._covering(
            ops.convert_to_tensor(self.low), ops.convert_to_tensor(self.high), lo, hi
        )

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        shared = self.shared_axes(x)
        seen = ops.stop_gradient(x)
        low, high = ops.min(seen, axis=shared), ops.max(seen, axis=shared)
        if self.role == "activation":
            low, high = self._moved(low, high)
        lo, hi = self.bounds()
        return self.uniform_codes(x, self._covering(low, high, lo, hi), lo, hi)

    def _moved(self, low, high):
        """The range after a batch, stored; as it was while `update_ranges` is 0.0."""
        if self.resting:
            return ops.convert_to_tensor(self.low), ops.convert_to_tensor(self.high)
        update = self.update_ranges > 0.5
        keep = ops.where(self.calibrated > 0.5, self.momentum, 0.0)
        ranges = []
        for variable, seen in ((self.low, low), (self.high, high)):
            old = ops.convert_to_tensor(variable)
            new = ops.where(update, keep * old + (1.0 - keep) * seen, old)
            variable.assign(new)
            ranges.append(new)
        self.calibrated.assign(ops.maximum(self.calibrated, ops.cast(update, "float32")))
        return ranges

    def _covering(self, low, high, lo, hi):
        scale = ops.maximum(high, 0.0) / hi
        if self.signed:
            scale = ops.maximum(scale, ops.minimum(low, 0.0) / lo)
        # As in `ranges.scale_minmax`: where all is 0.0, any scale fits.
        return ops.where(scale > 0.0, ops.maximum(scale, SMALLEST_SCALE), 1.0 / hi)

    def fit_scale(self, x, method="minmax"):
        """Take the range of `x`, whatever `method` says; a kernel's is taken in each call."""
        if self.role == "activation":
            self.low.assign(np.float32(x.min()))
            self.high.assign(np.float32(x.max()))
        self.calibrated.assign(1.0)

    def get_config(self):
        """Arguments of the constructor."""
        return {**super().get_config(), "momentum": self.momentum}
