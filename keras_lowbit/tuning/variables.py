"""What reconstruction trains, in units that suit one optimizer for all layers.

Kernels are trained in units of their codes, `v = w / s`, and all scales as logarithms:

    code = round(clip(v, lo, hi))                          w = code * s,   s = exp(log_s)
    d/dv      =  g s  inside the grid, else 0              (g: gradient to w)
    d/dlog_s  =  s sum g code

    code = round(clip(x / s, lo, hi))                      x: an activation
    d/dx      =  g    inside, else 0
    d/dlog_s  =  s sum g (code - x / s)  inside, s sum g code  outside

A step of `v` moves a code by the same share in every layer, whatever the layer's scale; `v` and
the scale are independent, so a scale that moves takes its codes along.
"""

from __future__ import annotations

import contextlib
import math

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics import uniform
from keras_lowbit.quantizers import Affine


class KernelInCodes:
    """A kernel in units of its codes and its log scales, in the place of its quantizer.

    `codes` is the only place where a kernel is rounded: another rounding goes in there.

    Args:
        layer_name: for messages.
        latent: the layer's float variable.
        quantizer: its quantizer, with a variable `scale`.
        add: `add(name, value)` makes a trainable variable.

    Raises:
        ValueError: a quantizer without a scale variable, or a binary kernel.
    """

    def __init__(self, layer_name, latent, quantizer, add):
        check_kernel(layer_name, quantizer)
        self.latent, self.quantizer = latent, quantizer
        self.bounds = quantizer.static_bounds()  # a compiled step could not read the variable
        scale = ops.convert_to_numpy(quantizer.scale)
        self.codes_variable = add("codes", ops.convert_to_numpy(latent) / scale)
        self.log_scale = add("log_scale", np.log(scale))

    def codes(self):
        """Whole numbers, with the gradient of the module."""
        lo, hi = self.bounds
        ratio = ops.convert_to_tensor(self.codes_variable)
        log_scale = ops.convert_to_tensor(self.log_scale)
        fixed = ops.stop_gradient(ratio)
        codes = uniform.nearest(fixed, lo, hi)
        inside = uniform.inside_mask(fixed, lo, hi)
        return uniform.straight_through(codes, (ratio, inside), (log_scale, codes))

    def encode(self, _):
        """`(codes, scale)`, as `Quantizer.encode` gives them for the latent kernel."""
        return self.codes(), ops.exp(ops.stop_gradient(ops.convert_to_tensor(self.log_scale)))

    def write(self):
        """Latent kernel and scale into the layer."""
        scale = np.exp(ops.convert_to_numpy(self.log_scale))
        self.quantizer.scale.assign(scale)
        self.latent.assign(ops.convert_to_numpy(self.codes_variable) * scale)


class ActivationScale:
    """The log scale of an activation grid, with elements left real at random.

    Args:
        layer_name: for messages.
        quantizer: its quantizer, with a variable `scale`.
        add: `add(name, value)` makes a trainable variable.
        drop: share of elements that stay real.
        seed: `keras.random.SeedGenerator` of the draws.

    Reference:
        Wei et al., QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
        Quantization, ICLR 2022, arXiv:2203.05740.
    """

    def __init__(self, layer_name, quantizer, add, drop, seed):
        check_scale(layer_name, quantizer)
        self.quantizer, self.drop, self.seed = quantizer, drop, seed
        self.bounds = quantizer.static_bounds()
        self.log_scale = add("log_scale", np.log(ops.convert_to_numpy(quantizer.scale)))

    def encode(self, x):
        """`(codes, scale)`; where dropped, `x / scale` for the code."""
        lo, hi = self.bounds
        log_scale = ops.convert_to_tensor(self.log_scale)
        fixed = ops.stop_gradient(log_scale)
        scale = ops.exp(fixed)
        limit = getattr(self.quantizer, "max_value", None)
        if limit is not None:
            scale = ops.minimum(scale, limit / hi)
        # A factor of exactly 1 carries the gradient, at the limit too: a scale may leave it again.
        codes = uniform.quantize(x, scale * ops.exp(log_scale - fixed), lo, hi)
        if self.drop:
            codes = ops.where(chosen(x, self.drop, self.seed), x * (1.0 / scale), codes)
        return codes, scale

    def write(self):
        """The scale into the quantizer."""
        self.quantizer.scale.assign(np.exp(ops.convert_to_numpy(self.log_scale)))


def check_scale(layer_name, quantizer):
    """Raise `ValueError` for a quantizer without a scale variable."""
    if quantizer.scale is None:
        raise ValueError(
            f"{layer_name}: {type(quantizer).__name__} keeps no scale variable that "
            "reconstruction could tune. Quantize with 'lsq' (or 'mse', 'percentile')"
        )


def check_kernel(layer_name, quantizer):
    """Raise `ValueError` for a kernel's quantizer without a scale variable, or of 1 bit."""
    check_scale(layer_name, quantizer)
    if quantizer.bits == 1:
        raise ValueError(
            f"{layer_name}: kernels of 1 bit have no scale of their own to tune; "
            "reconstruction needs 2 bits or more"
        )


def is_fixed(quantizer) -> bool:
    """Whether a grid is given from outside: that of the images."""
    return isinstance(quantizer, Affine)


def chosen(x, share, seed):
    """True for a random `share` of the elements of an image, the same in all images of `x`.

    Every step draws anew. A draw for each image of a step costs more than the block's products:
    random numbers come one after the other, in one thread.
    """
    return keras.random.uniform((1, *ops.shape(x)[1:]), seed=seed) < share


@contextlib.contextmanager
def standing_in(states):
    """Inside the block quantizers encode as `states` do."""
    # In the instance's dictionary, past Keras' tracking of attributes: it hides the method.
    for state in states:
        vars(state.quantizer)["encode"] = state.encode
    try:
        yield
    finally:
        for state in states:
            vars(state.quantizer).pop("encode", None)


def code_rate(bits: int, at_four: float, at_eight: float) -> float:
    """Learning rate of `v` at a width: measured at 4 and 8 bits, geometric between, level outside.

    A code moves by at least half a unit to matter, and an 8-bit grid has sixteen times as many of
    them under the same weights. 0 at either width is 0 at all.
    """
    if not at_four or not at_eight:
        return 0.0
    share = min(max((bits - 4) / 4, 0.0), 1.0)
    return math.exp((1 - share) * math.log(at_four) + share * math.log(at_eight))
