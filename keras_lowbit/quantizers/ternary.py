"""Ternary kernels: codes -1, 0 and 1 with a scale for each filter."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_choice, checked_number
from keras_lowbit.numerics import ternary, uniform
from keras_lowbit.numerics.grid import check_bits
from keras_lowbit.numerics.ranges import SMALLEST_SCALE
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE, PositiveScale

BITS = 2
THRESHOLDS = ("twn", "quantile", "learned")
SCALES = ("least_squares", "learned")
GRADIENTS = ("ste", "sigmoid")


@keras.saving.register_keras_serializable(package=PACKAGE)
class Ternary(Quantizer):
    """Projects each filter on {-alpha, 0, alpha}.

        code = sign(x) where |x| > Delta, else 0          out = alpha * code

        Delta  = 0.7 mean |x|                             threshold="twn"
                 the magnitude below which the share `zeros` of the weights lies   "quantile"
                 ratio * mean |x|, ratio trained from 0.7                          "learned"
        alpha  = mean |x| over |x| > Delta                scale="least_squares"
                 trained, started there                                            "learned"

    Codes take 2 bits, at every time: a descent leaves ternary kernels alone by
    `BitDescent(targets="activations")`.

    Args:
        bits: 2.
        threshold: one of `THRESHOLDS`.
        scale: one of `SCALES`.
        gradient: `"ste"`, or `"sigmoid"` for gradients re-scaled by the sigmoid's derivative.
        temperature: start of the variable `temperature`, in units of Delta.
        floor: least factor of the re-scaled gradient; without one, weights far from the threshold
            stop learning.
        zeros: share of zero codes that `"quantile"` aims at.
        axis: axes that keep a threshold and a scale of their own.

    Raises:
        ValueError: bits other than 2, an unknown choice, a temperature not positive, a floor
            outside 0..1, a share of zeros outside 0..1 (1 excluded).

    Gradient:
        With `dq` the gradient to `out`, to `x`: `dq` for `"ste"`, `dq * r(x)` for `"sigmoid"`,

            r(x) = max(floor, min(1, 4 (g((x - Delta) / tau) + g((x + Delta) / tau))))
            g(z) = sigmoid(z) (1 - sigmoid(z)),   tau = temperature * Delta

        To a trained alpha: `sum dq * code`, and to a trained ratio, with the same bumps of the
        sigmoid, `-4 mean|x| sum dq (g((x - Delta) / tau) - g((x + Delta) / tau))`; both times
        `1 / sqrt(N)`, N the weights that share them (LSQ's factor at hi = 1).

    Reference:
        Liu, Liu, Hyperspherical Loss-Aware Ternary Quantization, 2022, arXiv:2212.12649, of which
        only the abstract could be read: threshold, factor and temperature are a reconstruction.
        Threshold and scale: Li et al., Ternary Weight Networks, 2016, arXiv:1605.04711, eqs. 5-6.
        Trained scale: Zhu et al., Trained Ternary Quantization, ICLR 2017, arXiv:1612.01064, with
        one scale for both signs, which integer kernels ask for.
    """

    roles = ("kernel",)
    moves_bits = False
    unsaved = frozenset({"switch"})

    def __init__(
        self,
        bits=BITS,
        *,
        threshold="twn",
        scale="least_squares",
        gradient="ste",
        temperature=1.0,
        floor=0.1,
        zeros=0.42,
        **kwargs,
    ):
        super().__init__(check_ternary_bits(bits), **kwargs)
        self.threshold = checked_choice(threshold, THRESHOLDS, who="Ternary: threshold")
        self.scale_rule = checked_choice(scale, SCALES, who="Ternary: scale")
        self.gradient = checked_choice(gradient, GRADIENTS, who="Ternary: gradient")
        self._temperature = checked_number(temperature, who="Ternary: temperature", above=0)
        self.floor = checked_number(floor, who="Ternary: floor", least=0, most=1)
        self.zeros = checked_number(zeros, who="Ternary: zeros", least=0, below=1)

    def build(self, input_shape):
        """Create `temperature` and `pull`, and what is trained of ratio and scale."""
        super().build(input_shape)
        self.temperature = self.add_state("temperature", self._temperature)
        # Unlike others (`add_pull`), ternary kernels have it from the start and in files.
        self.pull = self.add_state("pull", 0.0)
        if self.threshold == "learned":
            self.ratio = self.add_state(
                "ratio",
                ternary.TWN_RATIO,
                self.scale_shape(input_shape),
                trainable=True,
                constraint=PositiveScale(),
            )
        if self.scale_rule == "learned":
            self.add_scale(input_shape, trainable=True)

    def set_bits(self, bits):
        """Refuse another width than 2."""
        check_ternary_bits(check_bits(bits, who=self.name))

    def bounds(self):
        """-1 and 1 as tensors."""
        return -ops.ones(()), ops.ones(())

    def static_bounds(self):
        """-1 and 1."""
        return -1, 1

    def scale_in_use(self, lo, hi):
        """The trained scale."""
        if self.scale_rule == "least_squares":
            raise ValueError(
                f"{self.name}: a least-squares ternary scale is computed from the kernel: call "
                "encode(kernel) for codes and scale"
            )
        return ops.convert_to_tensor(self.scale)

    def delta(self, x):
        """The threshold on magnitudes of `x`, without gradient."""
        magnitude = ops.abs(ops.stop_gradient(x))
        axes = self.shared_axes(x)
        if self.threshold == "quantile":
            kept = tuple(x.shape)[len(axes) :]
            ordered = ops.sort(ops.reshape(magnitude, (-1, *kept)), axis=0)
            below = round(self.zeros * int(ordered.shape[0]))
            return ordered[below - 1] if below else ops.zeros_like(ordered[0])
        ratio = ternary.TWN_RATIO
        if self.threshold == "learned":
            ratio = ops.stop_gradient(ops.convert_to_tensor(self.ratio))
        return ratio * ops.mean(magnitude, axis=axes)

    def project(self, x):
        """Ternary codes of `x`, without gradient."""
        return ternary.codes_beyond(x, self.delta(x))

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        held, axes = ops.stop_gradient(x), self.shared_axes(x)
        delta = self.delta(x)
        codes = ternary.codes_beyond(x, delta)
        damping = float(self._features) ** -0.5
        if self.scale_rule == "learned":
            scale = ops.stop_gradient(self.scale_in_use(None, None))
        else:
            scale = ternary.least_squares_scale(x, codes, axes)
        inverse = 1.0 / scale
        tau = ops.convert_to_tensor(self.temperature) * delta
        right, left = ternary.sigmoid_window(held, delta, tau)
        slope = ops.ones_like(held)
        if self.gradient == "sigmoid":
            slope = ops.maximum(ops.minimum(right + left, 1.0), self.floor)
        slopes = [(x, slope * inverse)]
        if self.threshold == "learned":
            mean = ops.mean(ops.abs(held), axis=axes)
            to_ratio = (left - right) * (mean * inverse * damping)
            slopes.append((ops.convert_to_tensor(self.ratio), to_ratio))
        if self.scale_rule == "learned":
            slopes.append((ops.convert_to_tensor(self.scale), codes * (inverse * damping)))
        return uniform.straight_through(codes, *slopes), scale

    def fit_scale(self, x, method="mse"):
        """Start a trained scale at least squares; otherwise there is nothing to set."""
        if self.scale_rule == "learned":
            x = ops.convert_to_tensor(x, "float32")
            scale = ternary.least_squares_scale(x, self.project(x), self.shared_axes(x))
            self.take_scale(np.maximum(ops.convert_to_numpy(scale), SMALLEST_SCALE))
        self.calibrated.assign(1.0)

    def get_config(self):
        """Arguments of the constructor; `temperature` as it started."""
        return {
            **super().get_config(),
            "threshold": self.threshold,
            "scale": self.scale_rule,
            "gradient": self.gradient,
            "temperature": self._temperature,
            "floor": self.floor,
            "zeros": self.zeros,
        }


def check_ternary_bits(bits) -> int:
    """2, or `ValueError`."""
    if check_bits(bits, who="Ternary") != BITS:
        raise ValueError(
            f"Ternary: codes -1, 0, 1 take {BITS} bits. Got {bits}. Leave bits out, use 'lsq' for "
            "another width, or BitDescent(targets='activations') to keep kernels ternary"
        )
    return BITS
