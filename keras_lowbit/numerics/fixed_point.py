"""The constants of the runtime's fixed-point arithmetic, as pure NumPy functions.

Both the NumPy reference and the Keras form of the arithmetic take their constants from here, so
that they can only differ in the integer operations themselves.
"""

from __future__ import annotations

import math

import numpy as np

CODE_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}

_REAL_BOUNDS = {
    "none": (-math.inf, math.inf),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "relu_n1_to_1": (-1.0, 1.0),
}


def product_multiplier(scale_in: float, kernel_scale, scale_out: float) -> np.ndarray:
    """What one unit of a sum of products is worth in output codes.

        m[c] = (scale_in * kernel_scale[c]) / scale_out         each step rounded to float32

    Args:
        scale_in: reals per code of the input.
        kernel_scale: reals per code of the kernel; any shape, usually `(channels,)`.
        scale_out: reals per code of the output.

    Returns:
        float32 array of the shape of `kernel_scale`.
    """
    product = np.float32(scale_in) * np.asarray(kernel_scale, np.float32)
    return np.asarray(product / np.float32(scale_out), np.float32)


def add_parameters(scale_a: float, scale_b: float, scale_out: float) -> tuple[int, int, int]:
    """Integer multipliers and shift of a sum of two tensors.

        r_a = float32(scale_a / scale_out)         r_b likewise
        shift = 20 - floor(log2(max(r_a, r_b)))
        k = rint(r * 2^shift)                      half to even; the larger k is in [2^20, 2^21]

    Returns:
        `(k_a, k_b, shift)`.

    Raises:
        ValueError: if a ratio leaves `[2^-10, 2^8)`, where the runtime computes otherwise.
    """
    ratios = [np.float32(s) / np.float32(scale_out) for s in (scale_a, scale_b)]
    if not all(2.0**-10 <= r < 2.0**8 for r in ratios):
        raise ValueError(
            "An addition needs input scale / output scale in [2^-10, 2^8). Got "
            f"{scale_a:g} / {scale_out:g} and {scale_b:g} / {scale_out:g}. Bring the scales of the "
            "added tensors closer together."
        )
    # frexp returns a mantissa in [0.5, 1), so its exponent is floor(log2) + 1, exactly.
    shift = 21 - math.frexp(max(ratios))[1]
    k_a, k_b = (int(np.rint(np.ldexp(np.float64(r), shift))) for r in ratios)
    return k_a, k_b, shift


# |code - zero_point| of two 8-bit tensors is at most 255.
_LARGEST_PRODUCT = 255 * 255
# Units in the last place that a scale may move: one or two settle all that was tried, and eight are
# less than the 1e-6 that other arithmetic takes for the same scale.
_SETTLING_STEPS = 7


def settled_scale(scale_a: float, scale_b: float, scale_out: float) -> float:
    """The scale nearest to `scale_out` on which processors agree about all products of two codes.

    With `m = product_multiplier(...)` kernels on x86 round the float32 product, half to even, and
    those on Arm the exact one, half up:

        rint(float32(p * m)) == floor(p * m + 1/2)         for each |p| <= 255^2

    which ties, and products that float32 takes for one, break. A scale some units in the last
    place off has none: far less than training resolves.

    Args:
        scale_a: reals per code of the first tensor.
        scale_b: of the second.
        scale_out: of the result.

    Raises:
        ValueError: no such scale within seven units in the last place.
    """
    products = np.arange(-_LARGEST_PRODUCT, _LARGEST_PRODUCT + 1, dtype=np.float64)
    bits = np.float32(scale_out).view(np.int32)
    for step in sorted(range(-_SETTLING_STEPS, _SETTLING_STEPS + 1), key=abs):
        scale = (bits + np.int32(step)).view(np.float32)
        m = product_multiplier(scale_a, scale_b, scale)
        exact = products * np.float64(m)  # 17 bits times 24: float64 holds them
        # Beyond int8 both are clipped alike.
        exact = exact[np.abs(exact) <= 256.0]
        if np.array_equal(np.rint(exact.astype(np.float32)), np.floor(exact + 0.5)):
            return float(scale)
    raise ValueError(
        f"No scale near {scale_out:g} settles the products of {scale_a:g} and {scale_b:g}"
    )


def activation_bounds(
    activation: str, scale: float, zero_point: int, dtype: str = "int8"
) -> tuple[int, int]:
    """Smallest and largest code that a fused activation leaves.

        code(v) = rint(float32(v / scale) + zero_point), clipped to the range of `dtype`

    Args:
        activation: `"none"`, `"relu"`, `"relu6"` or `"relu_n1_to_1"`.
        scale: reals per code of the output.
        zero_point: code of 0.0 of the output.
        dtype: `"int8"` or `"uint8"`.

    Returns:
        `(lo, hi)`, both included.

    Raises:
        ValueError: for another activation or dtype.
    """
    if activation not in _REAL_BOUNDS:
        raise ValueError(f"activation must be one of {tuple(_REAL_BOUNDS)}. Got {activation!r}")
    if dtype not in CODE_RANGES:
        raise ValueError(f"dtype must be one of {tuple(CODE_RANGES)}. Got {dtype!r}")
    codes = np.float32(_REAL_BOUNDS[activation]) / np.float32(scale) + np.float32(zero_point)
    lo, hi = np.rint(np.clip(codes, *CODE_RANGES[dtype]))
    return int(lo), int(hi)


def logistic_codes(scale: float, zero_point: int) -> np.ndarray:
    """`rint(256 sigmoid(x)) - 128` of every int8 code, with `x = scale * (code - zero_point)`.

    Args:
        scale: reals per code of the input.
        zero_point: the input's code of 0.

    Returns:
        int32 array of shape `(256,)`, -128..127, for the codes -128..127 in order.
    """
    x = np.float32(scale) * (np.arange(-128, 128) - zero_point).astype(np.float32)
    share = 1.0 / (1.0 + np.exp(-np.maximum(x, np.float32(-80.0)).astype(np.float64)))
    return np.minimum(np.rint(256.0 * share) - 128, 127).astype(np.int32)


def softmax_powers(scale: float) -> np.ndarray:
    """`exp(-scale * d)` for a code that is `d` below the largest, `d` = 0..255.

    Args:
        scale: reals per code of the input.

    Returns:
        float32 array of shape `(256,)`.
    """
    exponents = -np.float32(scale) * np.arange(256, dtype=np.float32)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
