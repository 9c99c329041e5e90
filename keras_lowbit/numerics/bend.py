"""Gradients that are scaled by a factor which depends on their own sign."""

from __future__ import annotations

from keras import ops


@ops.custom_gradient
def bend(x, slope):
    """`x`, with a gradient that is larger towards one side.

    The only rule here that stop-gradient algebra cannot say: it is not linear in the gradient.

    Args:
        x: any tensor.
        slope: of the same shape, taken as a constant.

    Gradient:
        To `x`: `g * (1 + slope * sign(g)) = g + slope * |g|`; none to `slope`.
    """

    def gradient(*arguments, upstream=None):
        # PyTorch hands over the inputs too, and the gradient by its name.
        g = arguments[0] if upstream is None else upstream
        return g + slope * ops.abs(g), ops.zeros_like(slope)

    return x, gradient
