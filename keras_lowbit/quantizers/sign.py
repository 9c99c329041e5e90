"""Binary activations: the sign, with a polynomial's derivative for its gradient."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics import uniform
from keras_lowbit.numerics.grid import Grid, check_bits
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.state import PACKAGE

BITS = 1


@keras.saving.register_keras_serializable(package=PACKAGE)
class Sign(Quantizer):
    """Binary activations, -1 or 1.

        code = 1 where x >= 0, else -1          scale = 1

    0.0 has no code: SAME padding of a layer behind puts -1 around the tensor (`pad_code`), in
    training and in files. A ReLU in front would leave only ones, a batch norm belongs there. Files
    hold `h = (code + 1) / 2`, 0 or 1 (`grid`).

    Args:
        bits: 1.

    Raises:
        ValueError: bits other than 1, another role than `"activation"`, or `signed=False`.

    Gradient:
        To `x`: that of `2x + x^2` for `-1 <= x < 0` and of `2x - x^2` for `0 <= x <= 1`,

            2 + 2x  on [-1, 0)          2 - 2x  on [0, 1]          0 elsewhere

        so it is largest at 0, and reals beyond -1..1 stop learning.

    Reference:
        Liu et al., Bi-Real Net, ECCV 2018, arXiv:1808.00278; Liu et al., ReActNet, ECCV 2020,
        arXiv:2003.03488, whose learned shift in front of the sign is a batch norm's `beta` here.
    """

    roles = ("activation",)
    moves_bits = False
    fits_data = False
    pad_code = -1

    def __init__(self, bits=BITS, *, axis=None, **kwargs):
        super().__init__(_check_one_bit(bits, "Sign"), **{"role": "activation", **kwargs})
        if not self.signed:
            raise ValueError(
                "Sign: signs of tensors without negative values are all 1. Take the ReLU in front "
                "away, or 'lsq', whose 1-bit codes are 0 and 1"
            )

    def build(self, input_shape):
        """Nothing to create, and nothing to learn from data."""
        super().build(input_shape)
        self.calibrated.assign(1.0)

    def set_bits(self, bits):
        """Refuse another width than 1."""
        _check_one_bit(bits, self.name)

    def scale_in_use(self, lo, hi):
        """1."""
        return ops.ones(())

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        slope = ops.maximum(2.0 - 2.0 * ops.abs(ops.stop_gradient(x)), 0.0)
        return uniform.straight_through(ops.where(x >= 0, 1.0, -1.0), (x, slope)), ops.ones(())

    def fit_scale(self, x, method="mse"):
        """Nothing to set."""

    def grid(self):
        """The grid of files: 0 stands for -1, 1 for 1."""
        self._check_enabled()
        return Grid(np.float32(2.0), 0, 1, BITS, signs=True)

    def get_config(self):
        """Arguments of the constructor."""
        config = super().get_config()
        config.pop("axis")
        return config


def _check_one_bit(bits, who):
    if check_bits(bits, who=who) != BITS:
        raise ValueError(
            f"{who}: signs take {BITS} bit. Got {bits}. Use 'lsq' for another width; "
            "Scheme(binary_activation='sign') takes signs only where activations have 1 bit"
        )
    return BITS
