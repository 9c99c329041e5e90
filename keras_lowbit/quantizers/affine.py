"""A fixed affine grid: the border where images come in."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_number
from keras_lowbit.numerics import ranges
from keras_lowbit.numerics.grid import check_bits, code_bounds
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class Affine(Quantizer):
    """8-bit quantizer with a zero point; nothing in it is trained.

        code = round(clip((x - offset) / scale, lo, lo + 2^bits - 1)),   lo <= 0

    `offset` lets every one of 256 pixel values keep a code of its own where 0.0 is no pixel
    (pixels rescaled to -1..1 have 0.0 between 127 and 128): codes then stand for `x - offset`,
    and whoever inserts such a quantizer puts `offset * sum(kernel)` into the next bias.

    Args:
        bits: width of a code.
        scale: reals per code; `None` until calibrated.
        lo: lowest centred code, -(2^bits - 1)..0.
        offset: reals that code 0 stands for before the shift.

    Raises:
        ValueError: `lo` out of range, a scale that is not positive, a role other than
            `"activation"`, an axis.

    Gradient:
        To `x`: 1 inside (half a code beyond the ends included), 0 outside.

    Reference:
        Jacob et al., Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, CVPR 2018, arXiv:1712.05877, eq. 1.
    """

    roles = ("activation",)

    def __init__(self, bits=8, *, scale=None, lo=0, offset=0.0, **kwargs):
        if kwargs.get("axis") is not None:
            raise ValueError(
                f"Affine: one grid serves the whole tensor. Got axis={kwargs['axis']!r}"
            )
        super().__init__(bits, **{"role": "activation", **kwargs})
        if not -(2**self._initial_bits - 1) <= lo <= 0:
            raise ValueError(
                f"Affine: lo must lie in {-(2**self._initial_bits - 1)}..0. Got {lo!r}"
            )
        if scale is not None:
            checked_number(scale, who="Affine: scale", above=0)
        self.offset = checked_number(offset, who="Affine: offset")
        self._initial_scale, self._initial_lo = scale, int(lo)

    def build(self, input_shape):
        """Create `scale` and `lo`."""
        super().build(input_shape)
        known = self._initial_scale is not None

        self.scale = self.add_state("scale", self._initial_scale if known else 1.0)
        self.lo = self.add_state("lo", self._initial_lo)
        if known:
            self.calibrated.assign(1.0)

    def static_bounds(self):
        """Lowest and highest code."""
        lo = int(ops.convert_to_numpy(self.lo)) if self.built else self._initial_lo
        return lo, lo + 2**self.bits - 1

    def bounds(self):
        """Lowest and highest code as tensors."""
        lo = ops.convert_to_tensor(self.lo)
        return lo, lo + code_bounds(self.bits_variable, signed=False, role=self.role)[1]

    def set_bits(self, bits):
        """Change the width; the ends of the grid keep their reals, `lo` rounded to a code."""
        bits = check_bits(bits, who=self.name)
        wider = (2**self.bits - 1) / (2**bits - 1)
        lo = round(self.static_bounds()[0] / wider)
        if self._initial_scale is not None:
            self._initial_scale *= wider
        self._initial_lo, self._initial_bits = lo, bits
        if self.built:
            self.scale.assign(ops.convert_to_numpy(self.scale) * np.float32(wider))
            self.lo.assign(float(lo))
            self.bits_variable.assign(float(bits))

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        lo, hi = self.bounds()
        return self.uniform_codes(x - self.offset, self.scale_in_use(lo, hi), lo, hi)

    def fit_scale(self, x, method="minmax"):
        """Cover the values of `x`, 0.0 included; a scale given at construction stays."""
        if self._initial_scale is not None:
            return
        bottom, top = ranges.ends_around_zero(x)
        levels = 2**self.bits - 1
        scale = max((top - bottom) / levels, ranges.SMALLEST_SCALE)
        self.lo.assign(float(np.clip(np.rint(bottom / scale), -levels, 0)))
        self.take_scale(np.asarray(scale, np.float32))

    def check_images(self, x):
        """See that `x`, values of images, is of the range that a given scale was made for.

        Raises:
            ValueError: reals between at most 4 codes, or 16 times as far apart as the codes reach.
        """
        if self._initial_scale is None:
            return
        codes = (x - self.offset) / self._initial_scale
        span, levels = float(codes.max() - codes.min()), 2**self.bits - 1
        between = float(np.abs(codes - np.rint(codes)).mean()) > 0.05
        if (span < 4 and between) or span > 16 * levels:
            raise ValueError(
                f"{self.path or self.name}: the images span {span:.3g} codes of a grid of "
                f"{levels + 1}. Behind a Rescaling it is meant for pixels 0..255: give "
                "quantize_model(..., input_range=(0, 1)), say, the range that your images have"
            )

    def get_config(self):
        """Arguments of the constructor."""
        config = super().get_config()
        for key in ("role", "axis"):
            config.pop(key)
        own = {"scale": self._initial_scale, "lo": self._initial_lo, "offset": self.offset}
        return {**config, **own}
