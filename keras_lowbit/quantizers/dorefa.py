"""DoReFa-Net: weights through a tanh, activations through a fixed clip."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_number
from keras_lowbit.numerics import ranges, uniform
from keras_lowbit.numerics.grid import MAGNITUDE_BITS, MAX_BITS, check_bits, code_bounds
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE

_TINY = 1e-12


@keras.saving.register_keras_serializable(package=PACKAGE)
class DoReFa(Quantizer):
    """The quantizers of DoReFa-Net, `n = 2^bits - 1`.

    Kernels, without a scale of their own (a batch norm is expected behind them):

        z = tanh(x) / (2 max|tanh(x)|) + 1/2          maximum over the whole tensor
        code = 2 round(n z) - n                       odd numbers -n..n, never 0
        scale = 1 / n

    and at 1 bit `code = sign(x)`, `scale = mean |x|` of the whole tensor. Activations:

        code = round(clip(x, 0, clip) * n / clip)     scale = clip / n

    or on `-clip..clip` when `signed`, with the library's signed codes.

    A kernel on its own output passes the tanh again, so the method is not idempotent for kernels.

    Args:
        bits: width of a code: kernels 1..7 (an 8-bit code would reach 255, past int8),
            activations 1..16.
        signed: activations: False after a ReLU.
        role: `"kernel"` or `"activation"`.
        axis: ignored: the paper has one maximum a tensor, and layers name an axis.
        clip: activations: reals, fixed; `None` starts at the paper's 1.0 and is set by
            `calibrate`.

    Raises:
        ValueError: more than 7 bits for a kernel, or `clip` not positive.

    Gradient:
        Kernels: that of `tanh(x) / max|tanh(x)|` with the maximum a constant; at 1 bit 1
        everywhere. Activations: 1 for `0 <= x <= clip` (signed: inside both ends), else 0.

    Reference:
        Zhou et al., DoReFa-Net, 2016, arXiv:1606.06160, sections 2.3 (weights) and 2.4.
        Deviations: the maximum carries no gradient; `clip` other than 1; signed activations.
    """

    breaks = frozenset({"idempotent"})

    def __init__(self, bits=MAGNITUDE_BITS, *, clip=None, axis=None, **kwargs):
        super().__init__(bits, **kwargs)
        self._check_kernel_bits(self._initial_bits)
        given = None if clip is None else checked_number(clip, who="DoReFa: clip", above=0)
        self._given_clip = given

    def build(self, input_shape):
        """Create the clip of activations."""
        super().build(input_shape)
        if self.role == "activation":
            self.clip = self.add_state("clip", self._given_clip or 1.0)

    @property
    def largest_bits(self) -> int:
        """Bits that `set_bits` takes at most."""
        return MAGNITUDE_BITS if self.role == "kernel" else MAX_BITS

    def _check_kernel_bits(self, bits):
        if bits > self.largest_bits:
            raise ValueError(
                f"DoReFa kernels take 1 to {MAGNITUDE_BITS} bits: codes reach 2^bits - 1, "
                f"which int8 must hold. Got {bits}. Use fewer bits, or 'lsq' for this layer"
            )

    def set_bits(self, bits):
        """Change the width; the range stays, whatever the width."""
        self._check_kernel_bits(check_bits(bits, who=self.name))
        super().set_bits(bits)

    def bounds(self):
        """Lowest and highest code as tensors."""
        return self._bounds(self.bits_variable)

    def static_bounds(self):
        """Lowest and highest code."""
        return self._bounds(self.bits)

    def _bounds(self, bits):
        if self.role == "activation":
            return code_bounds(bits, signed=self.signed, role=self.role)
        _, n = code_bounds(bits, signed=False, role=self.role)
        return -n, n

    def scale_in_use(self, lo, hi):
        """`1 / n` of kernels, `clip / hi` of activations."""
        return (1.0 if self.role == "kernel" else ops.convert_to_tensor(self.clip)) / hi

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        lo, hi = self.bounds()
        scale = self.scale_in_use(lo, hi)
        if self.role == "activation":
            inverse = 1.0 / scale
            codes = uniform.nearest(ops.stop_gradient(x) * inverse, lo, hi)
            inside = ops.logical_and(x >= lo * scale, x <= self.clip)
            slope = ops.cast(inside, x.dtype) * inverse
            return uniform.straight_through(codes, (x, slope)), ops.stop_gradient(scale)
        bent = ops.tanh(ops.stop_gradient(x))
        largest = ops.maximum(ops.max(ops.abs(bent)), _TINY)
        codes = 2.0 * ops.round(hi * (0.5 * (bent / largest) + 0.5)) - hi
        codes = uniform.straight_through(codes, (x, hi * (1.0 - bent * bent) / largest))
        signs, mean = uniform.signs(x, tuple(range(len(x.shape))), limit=None)
        binary = self.bits_variable < 1.5
        return ops.where(binary, signs, codes), ops.where(binary, mean, scale)

    def fit_scale(self, x, method="mse"):
        """Set the clip of activations that none was given for; kernels have nothing to set."""
        if self.role == "activation" and self._given_clip is None:
            lo, hi = self.static_bounds()
            self.clip.assign(np.float32(ranges.scale_of(self.columns(x), lo, hi, method)[0] * hi))
        self.calibrated.assign(1.0)

    def get_config(self):
        """Arguments of the constructor."""
        config = super().get_config()
        config.pop("axis")
        return {**config, "clip": self._given_clip}
