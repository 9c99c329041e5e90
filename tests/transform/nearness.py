"""How far an 8-bit model may be from the float model that it was made from."""

import numpy as np

from keras_lowbit.layers import Quantize
from keras_lowbit.layers.packed_kernels import kernels


def rounding_noise(quantized, expected):
    """Five deviations of what all roundings do to an output, and what its grid may clip.

        step = max |expected| / 127                     8 bits for both signs
        step * (5 * sqrt(n / 12) + N / 762)             n: grids and kernels, N: values

    A rounding of a tensor or a kernel is evenly spread over a step of its own grid, so its
    deviation is `step / sqrt(12)`. A grid is fitted to the largest value on it, and layers scale
    values and errors alike: each rounding arrives as one of a step of the output. They are
    independent, so squares add. Five deviations hold for thousands of outputs.

    Least squared error clips the largest of N values by k steps where finer steps save as much:
    `k^2 <= N (1 - (1 - k / 127)^2) / 12`, so `k <= N / 762`.
    """
    grids = sum(isinstance(layer, Quantize) for layer in quantized.layers)
    held = [k for layer in quantized.layers for k in kernels(layer) if k.quantizer is not None]
    step = np.abs(expected).max() / 127
    return step * (5 * ((grids + len(held)) / 12) ** 0.5 + expected.size / 762)
