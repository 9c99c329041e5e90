"""MobileNetV1 and its variant for small images."""

from __future__ import annotations

import keras

from keras_lowbit.zoo.architectures.blocks import (
    Units,
    image_input,
    pooled,
    rescaled,
    scaled,
    with_top,
)

UNITS = Units(epsilon=1e-3, momentum=0.99, max_value=6.0)
# Output channels and stride of each block.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    *((1024, 2), (1024, 1)),
)


def mobilenet_v1(
    input_shape=(224, 224, 3), classes=1000, alpha=1.0, include_top=True, small=None
) -> keras.Model:
    """MobileNetV1: 4,231,976 parameters at 1,000 classes and `alpha=1`.

    Takes pixels 0..255 and rescales them to -1..1 inside; ends in logits. Depthwise 3x3 and
    pointwise convolutions in turn, each with batch norm and ReLU6. Padding is "same": equal to
    `keras.applications.MobileNet` where sizes stay even up to the last stride, as at its sizes.

    Args:
        input_shape: height, width, channels.
        classes: number of logits.
        alpha: width multiplier; channels become multiples of 8.
        include_top: `False` gives the pooled features `(n, channels)` that the head would read.
        small: strides for 32 pixels, which end as 4: the first two strides of 2 become 1; `None`
            chooses it up to 64 pixels.

    Raises:
        ValueError: arguments out of range.

    Reference:
        Howard et al., MobileNets, 2017, arXiv:1704.04861, table 1; its last "s2" is a stride of
        1, as the sizes in the same table ask for.
    """
    image, small = image_input(input_shape, alpha, small)
    x = rescaled(image)
    x = UNITS.conv(x, scaled(32, alpha), 3, "stem", strides=1 if small else 2)
    for i, (filters, strides) in enumerate(BLOCKS, 1):
        if small and i == 2:
            strides = 1
        x = UNITS.depthwise(x, 3, f"block{i}_depthwise", strides=strides)
        x = UNITS.conv(x, scaled(filters, alpha), 1, f"block{i}_pointwise")
    return with_top(image, pooled(x), classes, "mobilenet_v1", include_top=include_top)
