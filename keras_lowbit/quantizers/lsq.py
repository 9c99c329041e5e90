"""Learned step size quantization (LSQ): the scale is trained with the weights."""

from __future__ import annotations

import keras
from keras import ops

from keras_lowbit.numerics import uniform
from keras_lowbit.numerics.grid import code_bounds
from keras_lowbit.quantizers.base import PACKAGE, Quantizer


@keras.saving.register_keras_serializable(package=PACKAGE)
class LSQ(Quantizer):
    """Uniform quantizer whose step (scale) is learned.

        code = round(clip(x / scale, lo, hi))          out = scale * code

    One graph serves 16..1 bits: kernels at 1 bit take the binary branch,
    `code = sign(x)` (never 0) with `scale = mean |x|` over the weights that share it.

    Args:
        bits: width of a code, 1..16.
        signed: False after a ReLU.
        role: `"kernel"` or `"activation"`.
        axis: axes that keep a scale of their own (kernels: the output channels).
        max_value: reals; the scale in use never exceeds `max_value / hi`, so that a ReLU6
            (`max_value=6`) in front clips nothing that the grid would not. `None`: no limit.

    Gradient:
        To `x`: 1 for `lo - 0.5 <= x / scale <= hi + 0.5`, else 0 (1 bit: 1 for `|x| <= 1`).
        To the scale: `code - x / scale` inside, `code` outside, times `1 / sqrt(N * hi)`, above 4
        bits also times `(hi(4) / hi)^2`; N counts the weights that share a scale, or the features
        of one sample (not the batch). At 1 bit the scale gets none. `max_value` caps the scale's
        value, not its gradient.

    Reference:
        Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153: eqs. 1-3,
        gradient scale section 2.2. Deviations: scales start from least squares on data
        (`calibrate`), not from `2 mean|x| / sqrt(hi)` of the first batch; above 4 bits the scale's
        gradient is damped by `(hi(4) / hi)^2` more, so that the represented range moves by the
        same share at every width. The paper lowers the learning rate tenfold at 8 bits instead;
        in a descent from 8 bits, one rate serves all widths, and without the factor scales of
        8-bit kernels fell to zero within 20 steps.
    """

    def __init__(self, bits=8, *, max_value=None, **kwargs):
        super().__init__(bits, **kwargs)
        if max_value is not None and not max_value > 0:
            raise ValueError(f"LSQ: max_value must be positive or None. Got {max_value!r}")
        self.max_value = max_value

    def build(self, input_shape):
        """Create the scale, 1.0 until calibrated."""
        super().build(input_shape)
        self.add_scale(input_shape, trainable=True)

    def scale_in_use(self, lo, hi):
        """The learned scale, at most `max_value / hi`."""
        scale = ops.convert_to_tensor(self.scale)
        if self.max_value is None:
            return scale
        # ops.divide: PyTorch computes `number / tensor` as number * (1 / tensor), another last bit.
        cap = ops.divide(self.max_value, hi)
        # The gradient passes the cap: a scale that once rose above it must find its way down.
        return uniform.straight_through(ops.minimum(scale, cap), (scale, 1.0))

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        features = self._features
        if features is None:
            features = ops.cast(ops.prod(ops.shape(x)[1:]), "float32")
        lo, hi = self.bounds()
        scale = self.scale_in_use(lo, hi)
        return self.uniform_codes(x, scale, lo, hi, self._damping(features, hi))

    def _damping(self, features, hi):
        """`1 / sqrt(N hi)`, and above 4 bits `(hi(4) / hi)^2` of that."""
        _, at_four_bits = code_bounds(4, signed=self.signed, role=self.role)
        shrink = ops.minimum(at_four_bits / hi, 1.0)
        return ops.rsqrt(features * hi) * shrink * shrink

    def get_config(self):
        """Arguments of the constructor."""
        return {**super().get_config(), "max_value": self.max_value}
