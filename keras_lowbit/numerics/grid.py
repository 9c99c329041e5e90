"""The integer codes a tensor may take, by bits, sign and role.

Inside the library codes are *centred*: `real = scale * code`, with 0.0 at code 0, whatever the
zero point of the container. A grid of 8-bit activations may reach from any `lo <= 0` to `lo + 255`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_lowbit.numerics import backend

MAX_BITS = 16
# What files hold, and so the most that schemes, stages and callbacks ask for.
MAX_EXPORT_BITS = 8
# Of a magnitude that int8 holds beside its sign: 2^7 - 1 = 127.
MAGNITUDE_BITS = 7
ROLES = ("kernel", "activation")


def check_bits(bits: int, *, who: str) -> int:
    """Return `bits` as an int, or raise `ValueError` naming `who`."""
    return checked_width(bits, who=f"{who}: bits", most=MAX_BITS)


def checked_width(bits: Any, *, who: str, most: int = MAX_EXPORT_BITS) -> int:
    """`bits` as an int, if it is a whole number from 1 to `most`.

    Args:
        bits: what was given.
        who: what it was given for, such as `"Scheme: ends_bits"`; the error begins with it.
        most: largest allowed.

    Raises:
        ValueError: anything else.
    """
    number = isinstance(bits, (int, float, np.integer, np.floating)) and not isinstance(bits, bool)
    if not number or not float(bits).is_integer() or not 1 <= bits <= most:
        raise ValueError(f"{who} must be a whole number from 1 to {most}. Got {bits!r}")
    return int(bits)


def code_bounds(bits, *, signed: bool, role: str):
    """Lowest and highest centred code of a grid.

        unsigned            0 .. 2^b - 1
        kernel, b >= 4      -(2^(b-1) - 1) .. 2^(b-1) - 1    (narrow: TFLite asks for it at 8)
        kernel, b = 2, 3    -2^(b-1) .. 2^(b-1) - 1          (LSQ's full range)
        activation, b < 8   -(2^(b-1) - 1) .. 2^(b-1) - 1    (what a fused RELU_N1_TO_1 can clip)
        activation, b >= 8  -2^(b-1) .. 2^(b-1) - 1          (what int8 itself clips)
        signed, b = 1       -1 .. 1                          (kernels: signs, never 0)

    Args:
        bits: an int, or a scalar tensor of whole numbers.
        signed: whether negative codes exist.
        role: `"kernel"` or `"activation"`.

    Returns:
        Two ints for an int, two float32 scalars for a tensor, by the same formula.
    """
    if isinstance(bits, (int, np.integer)):
        if not signed:
            return 0, 2 ** int(bits) - 1
        full = bits < 4 if role == "kernel" else bits >= 8
        hi = max(2 ** (int(bits) - 1) - 1, 1)
        return -hi - int(full and bits > 1), hi
    number = backend.known(bits)
    if number is not None:
        ends = code_bounds(int(number), signed=signed, role=role)
        return tuple(ops.convert_to_tensor(float(end)) for end in ends)
    bits = ops.cast(bits, "float32")
    # Rounded: a backend's power() may be one unit in the last place off a whole number.
    if not signed:
        return ops.zeros_like(bits), ops.round(ops.power(2.0, bits)) - 1.0
    hi = ops.maximum(ops.round(ops.power(2.0, bits - 1.0)) - 1.0, 1.0)
    full = (bits < 3.5) if role == "kernel" else (bits > 7.5)
    full = ops.cast(ops.logical_and(full, bits > 1.5), "float32")
    return -hi - full, hi


@dataclass(frozen=True)
class Grid:
    """A static grid, for export: centred codes `lo..hi`, `real = scale * code`.

    Args:
        scale: reals per code; a float, or an array with one value a channel.
        lo: lowest code, at most 0.
        hi: highest code, at least 0.
        bits: width of a code.
        signs: whether 0.0 has no code: 0 and 1 stand for `-scale / 2` and `scale / 2`.
    """

    scale: float | np.ndarray
    lo: int
    hi: int
    bits: int
    signs: bool = False

    def __post_init__(self):
        if self.signs and (self.lo, self.hi) != (0, 1):
            raise ValueError(f"Grid: codes of signs are 0 and 1. Got {self.lo}..{self.hi}")
        if not self.lo <= 0 <= self.hi:
            raise ValueError(f"Grid: codes must include 0. Got {self.lo}..{self.hi}")
        if not np.all(np.isfinite(self.scale)) or not np.all(np.asarray(self.scale) > 0):
            raise ValueError(f"Grid: scale must be positive and finite. Got {self.scale}")

    @property
    def signed(self) -> bool:
        """Whether negative codes exist."""
        return self.lo < 0

    @property
    def offset(self) -> float:
        """Reals that code 0 stands for."""
        return -0.5 * float(self.scale) if self.signs else 0.0

    @property
    def zero_point(self) -> int:
        """The int8 code of code 0: symmetric grids sit at 0, all others start at -128."""
        symmetric = self.lo in (-self.hi, -self.hi - 1)
        return 0 if symmetric else -128 - self.lo

    def same_as(self, other: Grid) -> bool:
        """Whether both grids give the same real to the same code."""
        ends = (self.lo, self.hi, self.signs) == (other.lo, other.hi, other.signs)
        return ends and np.array_equal(np.float32(self.scale), np.float32(other.scale))
