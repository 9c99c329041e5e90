"""Learned step size quantization (LSQ): the scale is trained with the weights."""

from __future__ import annotations

import keras
from keras import ops

from keras_lowbit.checks import checked_choice, checked_number
from keras_lowbit.numerics import uniform
from keras_lowbit.numerics.bend import bend
from keras_lowbit.numerics.grid import code_bounds
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE, count_features

GRADIENTS = ("ste", "ewgs")


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
        gradient: `"ste"`, or `"ewgs"`, which scales the gradient to `x` by the distance of `x` from
            its code.
        delta: strength of that; a variable `delta`, so that a callback may move it.

    Raises:
        ValueError: `max_value` not positive, an unknown gradient, a negative delta.

    Gradient:
        To `x`: 1 for `lo - 0.5 <= x / scale <= hi + 0.5`, else 0 (1 bit: 1 for `|x| <= 1`).
        To the scale: `code - x / scale` inside, `code` outside, times `1 / sqrt(N * hi)`, above 4
        bits also times `(hi(4) / hi)^2`; N counts all weights of a kernel, whether or not they
        share the scale, or the features of one sample (not the batch). At 1 bit the scale gets
        none. `max_value` caps the scale's value, not its gradient.
        With `"ewgs"` the gradient `g` to `x`, as above, becomes

            g * (1 + delta * sign(g) * (x_n - x_q))

            x_n = (clip(x / scale, lo, hi) - lo) / (hi - lo)          x_q = (code - lo) / (hi - lo)

        so that weights of one bin do not all move alike. Binary kernels keep `g`.

    Reference:
        Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153: eqs. 1-3,
        gradient scale section 2.2. Deviations: scales start from least squares on data
        (`calibrate`), not from `2 mean|x| / sqrt(hi)` of the first batch; above 4 bits the scale's
        gradient is damped by `(hi(4) / hi)^2` more, so that the represented range moves by the
        same share at every width. The paper lowers the learning rate tenfold at 8 bits instead;
        in a descent from 8 bits, one rate serves all widths, and without the factor scales of
        8-bit kernels fell to zero within 20 steps.
        `"ewgs"`: Lee, Kim, Ham, Network Quantization with Element-wise Gradient Scaling, CVPR 2021,
        arXiv:2104.00903. Deviations: there the ends of the range are trained and feel the scaled
        gradient too, here the scale keeps LSQ's; delta from the loss's curvature is left to
        callbacks.
    """

    def __init__(self, bits=8, *, max_value=None, gradient="ste", delta=1e-3, **kwargs):
        super().__init__(bits, **kwargs)
        if max_value is not None:
            max_value = checked_number(max_value, who="LSQ: max_value", above=0)
        self.max_value = max_value
        self.gradient = checked_choice(gradient, GRADIENTS, who="LSQ: gradient")
        self._delta = checked_number(delta, who="LSQ: delta", least=0)

    def build(self, input_shape):
        """Create the scale, 1.0 until calibrated, and `delta` where a gradient asks for it."""
        super().build(input_shape)
        if self.role == "kernel":
            # All weights, as for one scale a tensor: a channel's scale, damped by its own few, is
            # moved by noise as much as it is large. At a rate of 0.02 4-bit scales of a ResNet-8
            # went to 0 and to eleven times their start within 130 steps, and stay in 0.7..1.3 so.
            self._features = count_features(input_shape, self.role)
        self.add_scale(input_shape, trainable=True)
        if self.gradient == "ewgs":
            self.delta = self.add_state("delta", self._delta)

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
        if self.gradient == "ewgs":
            x = bend(x, self._slope(x, scale, lo, hi))
        return self.uniform_codes(x, scale, lo, hi, self._damping(features, hi))

    def _slope(self, x, scale, lo, hi):
        """`delta * (x_n - x_q)`, 0 for binary kernels, without gradient."""
        ratio = ops.stop_gradient(x) * (1.0 / ops.stop_gradient(scale))
        off = ops.clip(ratio, lo, hi) - uniform.nearest(ratio, lo, hi)
        delta = ops.convert_to_tensor(self.delta)
        if self.signed and self.role == "kernel":
            delta = ops.where(ops.convert_to_tensor(self.bits_variable) < 1.5, 0.0, delta)
        return off * (delta / (hi - lo))

    def _damping(self, features, hi):
        """`1 / sqrt(N hi)`, and above 4 bits `(hi(4) / hi)^2` of that."""
        _, at_four_bits = code_bounds(4, signed=self.signed, role=self.role)
        shrink = ops.minimum(at_four_bits / hi, 1.0)
        return ops.rsqrt(features * hi) * shrink * shrink

    def get_config(self):
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "max_value": self.max_value,
            # Left out where it is the default, so that files are those of earlier versions.
            **({} if self.gradient == "ste" else {"gradient": self.gradient, "delta": self._delta}),
        }
