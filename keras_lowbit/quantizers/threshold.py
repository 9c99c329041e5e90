"""Trained thresholds (FAT): a calibrated range, and a factor on it that is trained."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics import ranges, uniform
from keras_lowbit.numerics.grid import code_bounds
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class Threshold(Quantizer):
    """Uniform quantizer of a fixed range and a trained share of it.

    Symmetric (and unsigned), with `hi` the highest code:

        T_adj = clip(alpha, low, high) * T_max        alpha trained, 1 at the start
        scale = T_adj / hi                            code = round(clip(x / scale, lo, hi))

    Asymmetric, for signed activations whose calibrated range is `T_left .. T_right`,
    `R = T_right - T_left`:

        T_left' = T_left + clip(shift, -0.2, 0.4) * R         shift trained, 0 at the start
        R' = clip(alpha, low, high) * R                       scale = R' / (2^bits - 1)
        code = round(clip(x / scale, z, z + 2^bits - 1)),     z = round(T_left' / scale) <= 0

    Only 8-bit asymmetric grids can be exported: nothing in a file clips narrower ones.

    The range is state and moves by calibration only; what is trained is relative to it, so layers
    whose ranges differ by orders share a learning rate. It should cover the data: calibrate with
    `method="minmax"`.

    Args:
        bits: width of a code.
        symmetric: `False` for a zero point, `z`; ignored for unsigned grids, which start at 0.
        alpha_range: `(low, high)` of `alpha`, around 1.
        **kwargs: `signed`, `role`, `axis` (one threshold a filter; `None`: one for the tensor),
            as in `Quantizer`.

    Raises:
        ValueError: an empty `alpha_range`, or `symmetric=False` for kernels or per channel.

    Gradient:
        To `x`: 1 inside (half a code beyond the ends included), else 0. To `alpha`, inside
        `alpha_range` (bounds included, else 0), symmetric: `T_max / hi` times
        `code - x / scale` inside and `code` outside: LSQ's gradient of the scale, undamped.
        Asymmetric: to `alpha`, `R` times `(code - x / scale) / (2^bits - 1)` inside, 0 below, 1
        above; to `shift`, `R` times 0 inside, 1 outside. Rounding `z` counts as the identity.

    Reference:
        Goncharenko et al., On Practical Approach to Uniform Quantization of Non-redundant Neural
        Networks, ICANN 2019 (Fast Adjustable Threshold, arXiv:1812.07872). Deviations: the printed
        scale `(2^n - 1) / T` for signed codes would clip half the range, so signed grids use
        `(2^(n-1) - 1) / T`; `alpha` reaches to 1.3, as in the authors' code, not to 1.0; a value in
        the last half code before saturation counts as saturated from half a code on, as elsewhere
        here.
    """

    shift_range = (-0.2, 0.4)

    def __init__(self, bits=8, *, symmetric=True, alpha_range=(0.5, 1.3), **kwargs):
        super().__init__(bits, **kwargs)
        low, high = alpha_range
        if not 0 < low <= 1 <= high < math.inf:
            raise ValueError(
                "Threshold: alpha_range must hold 1 and be positive and finite. "
                f"Got {tuple(alpha_range)}"
            )
        if not symmetric and (self.role == "kernel" or self.axis is not None):
            raise ValueError(
                "Threshold: symmetric=False is for activations with one range; kernels have no "
                f"zero point in a TFLite file. Got role={self.role!r}, axis={self.axis}"
            )
        self.symmetric = bool(symmetric)
        self.alpha_range = (float(low), float(high))

    @property
    def is_shifted(self) -> bool:
        """Whether the grid has a zero point."""
        return self.signed and not self.symmetric

    def build(self, input_shape):
        """Create the range, and `alpha` and `shift` that are trained."""
        super().build(input_shape)
        shape = self.scale_shape(input_shape)
        self.threshold = self.add_state("threshold", 1.0, shape)
        self.alpha = self.add_state("alpha", 1.0, shape, trainable=True)
        if self.is_shifted:
            self.left = self.add_state("left", -1.0)
            self.shift = self.add_state("shift", 0.0, trainable=True)

    def fit_scale(self, x, method="minmax"):
        """Take the range of `x` and put `alpha` to 1 and `shift` to 0.

        Asymmetric grids take minimum and maximum, whatever `method` says.
        """
        if not self.is_shifted:
            super().fit_scale(x, method)
            return
        left, right = ranges.ends_around_zero(x)
        self.left.assign(left)
        self.shift.assign(0.0)
        self._take(np.float32(max(right - left, ranges.SMALLEST_SCALE)))

    def take_scale(self, scale):
        """The threshold of a scale, `scale * hi`."""
        _, hi = self.static_bounds()
        self._take(np.reshape(scale, self.threshold.shape) * np.float32(hi))

    def _take(self, threshold):
        self.threshold.assign(threshold)
        self.alpha.assign(np.ones(self.alpha.shape, np.float32))
        self.calibrated.assign(1.0)

    def scale_in_use(self, lo, hi):
        """Reals per code; for an asymmetric grid of `lo..hi` its range over `hi - lo`."""
        width = hi - lo if self.is_shifted else hi
        return self._adjusted(self.alpha, self.alpha_range, self.threshold) / width

    def _adjusted(self, variable, limits, unit):
        """`clip(variable, limits) * unit`, with a gradient of `unit` at the limits too."""
        given, unit = ops.convert_to_tensor(variable), ops.convert_to_tensor(unit)
        fixed = ops.stop_gradient(given)
        inside = ops.logical_and(fixed >= limits[0], fixed <= limits[1])
        value = ops.clip(fixed, *limits) * unit
        return uniform.straight_through(value, (given, ops.cast(inside, given.dtype) * unit))

    def _left_end(self):
        """Reals of the lowest code before it is rounded."""
        moved = self._adjusted(self.shift, self.shift_range, self.threshold)
        return ops.convert_to_tensor(self.left) + moved

    def bounds(self):
        """Lowest and highest code as tensors."""
        lo, hi = super().bounds()
        if not self.is_shifted:
            return lo, hi
        _, levels = code_bounds(self.bits_variable, signed=False, role=self.role)
        scale = ops.stop_gradient(self.scale_in_use(0.0, levels))
        zero = ops.round(ops.stop_gradient(self._left_end()) / scale)
        zero = ops.clip(zero, -levels, 0.0)
        return zero, zero + levels

    def static_bounds(self):
        """Lowest and highest code as ints."""
        if not self.is_shifted or not self.built:
            return super().static_bounds()
        lo, hi = self.bounds()
        return int(ops.convert_to_numpy(lo)), int(ops.convert_to_numpy(hi))

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        lo, hi = self.bounds()
        if not self.is_shifted:
            return self.uniform_codes(x, self.scale_in_use(lo, hi), lo, hi, 1.0)
        width = self.scale_in_use(lo, hi) * (hi - lo)
        scale = ops.stop_gradient(width) / (hi - lo)
        inverse = 1.0 / scale
        ratio = ops.stop_gradient(x) * inverse
        codes = uniform.nearest(ratio, lo, hi)
        inside = uniform.inside_mask(ratio, lo, hi)
        above = ops.cast(ratio > hi + 0.5, ratio.dtype)
        to_width = (inside * (codes - ratio) / (hi - lo) + above) * inverse
        to_left = (1.0 - inside) * inverse
        codes = uniform.straight_through(
            codes, (x, inside * inverse), (width, to_width), (self._left_end(), to_left)
        )
        return codes, scale

    def get_config(self):
        """Arguments of the constructor."""
        own = {"symmetric": self.symmetric, "alpha_range": list(self.alpha_range)}
        return {**super().get_config(), **own}
