"""Ternary projection: thresholds, codes, scales and the cosine between reals and their codes.

`axes` are the axes of a kernel whose weights share a threshold: the leading ones, or all.
"""

from __future__ import annotations

from keras import ops

from keras_lowbit.numerics.ranges import SMALLEST_SCALE

# Threshold over the mean magnitude. For Gaussian weights it leaves 42 % zeros and a cosine of
# 0.899; the best ratio, 0.76, gives 0.900.
TWN_RATIO = 0.7


def codes_beyond(x, threshold):
    """Ternary codes: `sign(x)` where `|x| > threshold`, else 0. No gradient."""
    x = ops.stop_gradient(x)
    return ops.where(ops.abs(x) > threshold, ops.sign(x), ops.zeros_like(x))


def least_squares_scale(x, codes, axes):
    """The scale of least squared error, without gradient.

        scale = <x, codes> / <codes, codes> = mean |x| over the kept entries

    It is computed as the largest magnitude plus the mean distance to it, so that equal magnitudes
    give themselves to the last bit, whatever the order of the sum: kernels that are reloaded as
    `code * scale` get their scale back.
    """
    magnitude, kept = ops.abs(ops.stop_gradient(x)), ops.abs(ops.stop_gradient(codes))
    largest = ops.max(magnitude, axis=axes)
    distance = ops.sum((magnitude - largest) * kept, axis=axes)
    mean = largest + distance / ops.maximum(ops.sum(kept, axis=axes), 1.0)
    return ops.maximum(mean, SMALLEST_SCALE)


def cosine(x, codes, axes):
    """Cosine of the angle between `x` and its codes, a value for each group of weights.

        cos = <x, T> / (|x| |T|)                       min over a of |x - a T|^2 = |x|^2 (1 - cos^2)

    A group of zeros counts as ternary: 1, without gradient.

    Gradient:
        To `x` only: `(T / |T| - cos * x / |x|) / |x|`, orthogonal to `x`.
    """
    codes = ops.stop_gradient(codes)
    squares = ops.sum(x * x, axis=axes)
    kept = ops.sum(codes * codes, axis=axes)
    alive = ops.logical_and(squares > 0, kept > 0)
    # Twice `where`: the gradient of the branch not taken must be finite too.
    norms = ops.sqrt(ops.where(alive, squares * kept, 1.0))
    return ops.where(alive, ops.sum(x * codes, axis=axes) / norms, 1.0)


def sigmoid_window(x, threshold, temperature):
    """Two bumps of the sigmoid's derivative, at `-threshold` and `+threshold`, each 1 high.

        a = 4 g((x - threshold) / temperature),  b = 4 g((x + threshold) / temperature)
        g(z) = sigmoid(z) (1 - sigmoid(z))

    `a + b` is `4 temperature S'(x)` of the soft projection
    `S(x) = sigmoid((x - threshold) / temperature) - sigmoid((-x - threshold) / temperature)`,
    and `-(a - b)` its derivative to the threshold, in the same units.

    Returns:
        `(a, b)`.
    """
    temperature = ops.maximum(temperature, SMALLEST_SCALE)

    def bump(z):
        soft = ops.sigmoid(z)
        return 4.0 * soft * (1.0 - soft)

    return bump((x - threshold) / temperature), bump((x + threshold) / temperature)
