"""MnasNet-B1 and -A1 and their variants for small images."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_lowbit.zoo.architectures.blocks import (
    Units,
    image_input,
    inverted_residual,
    pooled,
    rescaled,
    scaled,
    with_top,
)

UNITS = Units(epsilon=1e-3, momentum=0.99)


@dataclass(frozen=True)
class Stage:
    """Blocks of one width: repeats, depthwise size, stride of the first, expansion, channels."""

    repeats: int
    size: int
    strides: int
    expansion: int
    filters: int
    squeezes: bool = False


B1 = (
    Stage(1, 3, 1, 1, 16),
    Stage(3, 3, 2, 3, 24),
    Stage(3, 5, 2, 3, 40),
    Stage(3, 5, 2, 6, 80),
    Stage(2, 3, 1, 6, 96),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
A1 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(3, 5, 2, 3, 40, squeezes=True),
    Stage(4, 3, 2, 6, 80),
    Stage(2, 3, 1, 6, 112, squeezes=True),
    Stage(3, 5, 2, 6, 160, squeezes=True),
    Stage(1, 3, 1, 6, 320),
)


def mnasnet_b1(
    input_shape=(224, 224, 3),
    classes=1000,
    alpha=1.0,
    include_top=True,
    small=None,
    dropout=0.2,
) -> keras.Model:
    """MnasNet-B1, without squeeze-and-excite: 4,383,312 parameters at 1,000 classes and `alpha=1`.

    Takes pixels 0..255 and rescales them to -1..1 inside (one number for all channels, so that
    256 pixel values stay 256 codes; the authors normalize by channel); ends in logits.

    Args:
        input_shape: height, width, channels.
        classes: number of logits.
        alpha: width multiplier; channels become multiples of 8, the last convolution keeps its
            1,280 channels.
        include_top: `False` gives the pooled features `(n, channels)` that the head would read.
        small: strides for 32 pixels, which end as 4: the first two strides of 2 become 1; `None`
            chooses it up to 64 pixels.
        dropout: share of the head's inputs dropped in training.

    Raises:
        ValueError: arguments out of range.

    Reference:
        Tan et al., MnasNet: Platform-Aware Neural Architecture Search for Mobile, CVPR 2019,
        arXiv:1807.11626; stages and rounding of widths as in the authors' TensorFlow code.
    """
    return _mnasnet("mnasnet_b1", B1, input_shape, classes, alpha, include_top, small, dropout)


def mnasnet_a1(
    input_shape=(224, 224, 3),
    classes=1000,
    alpha=1.0,
    include_top=True,
    small=None,
    dropout=0.2,
) -> keras.Model:
    """MnasNet-A1, with squeeze-and-excite: 3,887,038 parameters at 1,000 classes and `alpha=1`.

    The runtime's kernels round the multiply of squeeze-and-excite in two ways, on x86 and on Arm;
    exported files have scales on which both give the same codes
    (`numerics.fixed_point.settled_scale`).

    Arguments as for `mnasnet_b1`; the squeezed width is a quarter of the block's input.

    Reference:
        Tan et al., MnasNet, CVPR 2019, arXiv:1807.11626, figure 7; stages and squeezed widths as
        in the authors' TensorFlow code.
    """
    return _mnasnet("mnasnet_a1", A1, input_shape, classes, alpha, include_top, small, dropout)


def _mnasnet(name, stages, input_shape, classes, alpha, include_top, small, dropout):
    image, small = image_input(input_shape, alpha, small)
    x = rescaled(image)
    x = UNITS.conv(x, scaled(32, alpha), 3, "stem", strides=1 if small else 2)
    number = 0
    for position, stage in enumerate(stages):
        first = 1 if small and position == 1 else stage.strides
        for i in range(stage.repeats):
            x = inverted_residual(
                UNITS,
                x,
                scaled(stage.filters, alpha),
                f"block{number}",
                size=stage.size,
                strides=first if i == 0 else 1,
                expansion=stage.expansion,
                squeezed=max(1, x.shape[-1] // 4) if stage.squeezes else 0,
                skip=i > 0,
            )
            number += 1
    x = UNITS.conv(x, 1280, 1, "head")
    return with_top(image, pooled(x), classes, name, include_top=include_top, dropout=dropout)
