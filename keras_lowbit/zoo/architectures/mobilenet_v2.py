"""MobileNetV2 and its variant for small images."""

from __future__ import annotations

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

UNITS = Units(epsilon=1e-3, momentum=0.99, max_value=6.0)
# Repeats, stride of the first, expansion and output channels of each stage.
STAGES = (
    (1, 1, 1, 16),
    (2, 2, 6, 24),
    (3, 2, 6, 32),
    (4, 2, 6, 64),
    (3, 1, 6, 96),
    (3, 2, 6, 160),
    (1, 1, 6, 320),
)


def mobilenet_v2(
    input_shape=(224, 224, 3), classes=1000, alpha=1.0, include_top=True, small=None
) -> keras.Model:
    """MobileNetV2: 3,504,872 parameters at 1,000 classes and `alpha=1`.

    Takes pixels 0..255 and rescales them to -1..1 inside; ends in logits. Inverted residuals with
    linear bottlenecks; the layers are those of `keras.applications.MobileNetV2`.

    Args:
        input_shape: height, width, channels.
        classes: number of logits.
        alpha: width multiplier; channels become multiples of 8, the last convolution keeps its
            1,280 channels below 1.
        include_top: `False` gives the pooled features `(n, channels)` that the head would read.
        small: strides for 32 pixels, which end as 4: the first two strides of 2 become 1; `None`
            chooses it up to 64 pixels.

    Raises:
        ValueError: arguments out of range.

    Reference:
        Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018,
        arXiv:1801.04381, table 2.
    """
    image, small = image_input(input_shape, alpha, small)
    x = rescaled(image)
    x = UNITS.conv(x, scaled(32, alpha), 3, "stem", strides=1 if small else 2)
    number = 0
    for stage, (repeats, first, expansion, filters) in enumerate(STAGES):
        if small and stage == 1:
            first = 1
        for i in range(repeats):
            x = inverted_residual(
                UNITS,
                x,
                scaled(filters, alpha),
                f"block{number}",
                strides=first if i == 0 else 1,
                expansion=expansion,
            )
            number += 1
    x = UNITS.conv(x, scaled(1280, max(1.0, alpha)), 1, "head")
    return with_top(image, pooled(x), classes, "mobilenet_v2", include_top=include_top)
