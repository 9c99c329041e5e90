"""Uniform quantization to codes, with the gradient of the learned step.

Low-bit products are computed on codes: `conv(codes_x, codes_w) * stop_gradient(scale_x * scale_w)`.
So a quantizer hands out codes, and everything that its scale should feel, the multiplication
behind the product included, is in the gradient of the codes. The convention, for a gradient `g`
with respect to a code whose reader multiplies by `stop_gradient(scale)` (so `g / scale` is the
gradient with respect to the value `scale * code`):

    d/dx      =  (g / scale) * 1[inside]
    d/dscale  =  sum (g / scale) * (code - x / scale)   inside
                 sum (g / scale) * code                 outside

`inside` is `lo - 0.5 <= x / scale <= hi + 0.5`: our own mask, the same at the bounds on every
backend.
"""

from __future__ import annotations

from keras import ops

from keras_lowbit.numerics import backend
from keras_lowbit.numerics.ranges import SMALLEST_SCALE


def straight_through(codes, *slopes):
    """Values of `codes`, and for each `(x, slope)` the gradient `slope` to `x`.

        out = codes + sum (x - x) * slope                 one x and all else without gradient

    `x - stop_gradient(x)` is exactly zero, so codes stay whole numbers. Two nearby forms are not
    exact: `surrogate + stop_gradient(codes - surrogate)` leaves the grid when many values
    saturate, and in `x * slope - stop_gradient(x * slope)` XLA may fuse one product with the
    difference and leave its rounding error.
    """
    out = ops.stop_gradient(codes)
    for x, slope in slopes:
        slope = ops.stop_gradient(ops.convert_to_tensor(slope))
        out = out + (x - ops.stop_gradient(x)) * slope
    return out


def inside_mask(ratio, lo, hi):
    """1.0 where `lo - 0.5 <= ratio <= hi + 0.5`, else 0.0."""
    inside = ops.logical_and(ratio >= lo - 0.5, ratio <= hi + 0.5)
    return ops.cast(inside, ratio.dtype)


def nearest(ratio, lo, hi):
    """`round(clip(ratio, lo, hi))`, half to even: clipped first, so no code passes an end."""
    return ops.round(ops.clip(ratio, lo, hi))


def quantize(x, scale, lo, hi, gradient_scale=1.0):
    """Codes of `x` on a uniform grid.

        code = round(clip(x / scale, lo, hi)),   half to even

    Args:
        x: finite reals, any shape; what infinities become differs between backends.
        scale: reals per code, positive, broadcastable to `x`.
        lo: lowest code.
        hi: highest code.
        gradient_scale: factor on the scale's gradient; `None` where the scale gets none.

    Returns:
        Whole numbers in the dtype of `x`.

    Gradient:
        As the module says; the scale's gradient is multiplied by `gradient_scale`.

    Reference:
        Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153, eqs. 1-3.
        Deviation: the mask reaches half a code past the ends, where rounding still gives the end
        code.
    """
    scale = ops.convert_to_tensor(scale)
    fast = backend.quantize(x, scale, lo, hi, gradient_scale)
    return plain_quantize(x, scale, lo, hi, gradient_scale) if fast is None else fast


def plain_quantize(x, scale, lo, hi, gradient_scale=1.0):
    """`quantize` in `keras.ops` alone: what the fast forms of backends are measured against."""
    scale = ops.convert_to_tensor(scale)
    inverse = 1.0 / ops.stop_gradient(scale)
    ratio = ops.stop_gradient(x) * inverse
    codes = nearest(ratio, lo, hi)
    inside = inside_mask(ratio, lo, hi)
    to_x = (x, inside * inverse)
    if gradient_scale is None:
        return straight_through(codes, to_x)
    to_scale = (scale, (codes - inside * ratio) * inverse * gradient_scale)
    return straight_through(codes, to_x, to_scale)


def signs(x, axes, limit=1.0):
    """`(codes, scale)` of binary weights.

        code = 1 where x >= 0, else -1          scale = mean |x| over `axes`

    Args:
        x: reals, any shape.
        axes: axes whose weights share a scale; the leading ones, or all.
        limit: reals beyond which no gradient passes; `None` for everywhere.

    Gradient:
        To `x`: 1 where `|x| <= limit`, in the convention of the module; the scale is a constant.

    Reference:
        Rastegari et al., XNOR-Net, ECCV 2016, arXiv:1603.05279, section 3.1.
    """
    scale = ops.maximum(ops.stop_gradient(ops.mean(ops.abs(x), axis=axes)), SMALLEST_SCALE)
    inside = 1.0 if limit is None else ops.cast(ops.abs(x) <= limit, x.dtype)
    return straight_through(ops.where(x >= 0, 1.0, -1.0), (x, inside / scale)), scale
