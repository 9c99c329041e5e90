"""Pulls latent weights towards the middle of their bins."""

from __future__ import annotations

import keras
from keras import ops

from keras_lowbit.checks import checked_number


class Dampening(keras.regularizers.Regularizer):
    """The squared error of a quantizer's values against its clipped latent weights.

        R(w) = strength * sum (q(w) - clip(w, lo * scale, hi * scale))^2

    Weights that sit at the border of two bins, where they hop from one to the other, are pulled to
    the middle of the one they are in; clipped ones cost nothing.

    A quantizer is no part of a config: attach the penalty again after loading
    (`callbacks.attach_dampening`).

    Args:
        quantizer: of the kernel, with `to_codes` and `bounds`.
        strength: a number, or a scalar Keras variable that a schedule moves. A variable must belong
            to a layer of the model, or compiled steps on JAX keep its first value.

    Raises:
        ValueError: a negative strength.

    Gradient:
        With q(w) and the scale constants, `-2 strength (q(w) - w)` inside the grid, 0 outside.

    Reference:
        Nagel, Fournarakis, Bondarenko, Blankevoort, Overcoming Oscillations in Quantization-Aware
        Training, ICML 2022, arXiv:2203.11086: oscillation dampening.
    """

    def __init__(self, quantizer, strength=0.1):
        if not isinstance(strength, keras.Variable):
            checked_number(strength, who="Dampening: strength", least=0)
        self.quantizer, self.strength = quantizer, strength

    def __call__(self, x):
        """The penalty of a kernel."""
        x = ops.convert_to_tensor(x)
        codes, scale = self.quantizer.to_codes(ops.stop_gradient(x))
        codes, scale = ops.stop_gradient(codes), ops.stop_gradient(scale)
        lo, hi = self.quantizer.bounds()
        # At an end q(w) is the end too, so whatever half `clip` says of its slope is times 0.
        error = codes * scale - ops.clip(x, lo * scale, hi * scale)
        return ops.convert_to_tensor(self.strength) * ops.sum(ops.square(error))
