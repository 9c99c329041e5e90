"""ResNet-18, -34 and -50 of ImageNet, and their variants for small images."""

from __future__ import annotations

import keras

from keras_lowbit.zoo.architectures.blocks import (
    Units,
    image_input,
    pooled,
    scaled,
    with_top,
)

K = keras.layers
# Means as the public Keras weights subtract them: zeros padded behind make them part of the net.
PIXEL_MEAN = (123.68, 116.779, 103.939)
PIXEL_DEVIATION = tuple(255.0 * d for d in (0.229, 0.224, 0.225))
FILTERS = (64, 128, 256, 512)
UNITS = Units(epsilon=1.001e-5, momentum=0.9)


def resnet18(
    input_shape=(224, 224, 3), classes=1000, alpha=1.0, include_top=True, small=None
) -> keras.Model:
    """ResNet-18: 11,689,512 parameters at 1,000 classes.

    Takes pixels 0..255 and normalizes them inside; ends in logits. Convolutions of stride 2 pad by
    one on every side; a 1x1 convolution with batch norm stands on the shortcut where shapes change.

    Args:
        input_shape: height, width and 3 channels.
        classes: number of logits.
        alpha: width multiplier; channels become multiples of 8.
        include_top: `False` gives the pooled features `(n, channels)` that the head would read.
        small: a 3x3 stem of stride 1 and no max pool, so that 32 pixels end as 4; `None` chooses
            it up to 64 pixels.

    Raises:
        ValueError: arguments out of range.

    Reference:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385,
        table 1.
    """
    return _resnet(
        "resnet18", _basic, (2, 2, 2, 2), input_shape, classes, alpha, include_top, small
    )


def resnet34(
    input_shape=(224, 224, 3), classes=1000, alpha=1.0, include_top=True, small=None
) -> keras.Model:
    """ResNet-34: 21,797,672 parameters at 1,000 classes; arguments as for `resnet18`."""
    return _resnet(
        "resnet34", _basic, (3, 4, 6, 3), input_shape, classes, alpha, include_top, small
    )


def resnet50(
    input_shape=(224, 224, 3), classes=1000, alpha=1.0, include_top=True, small=None
) -> keras.Model:
    """ResNet-50: 25,557,032 parameters at 1,000 classes; arguments as for `resnet18`.

    Blocks are bottlenecks whose first 1x1 convolution has the stride, as in the paper and in
    `keras.applications` (not in its 3x3 convolution, as in PyTorch). Keras' model has 26,560
    parameters more: biases of convolutions in front of a batch norm, which do nothing there.
    """
    return _resnet(
        "resnet50", _bottleneck, (3, 4, 6, 3), input_shape, classes, alpha, include_top, small
    )


def _resnet(name, block, repeats, input_shape, classes, alpha, include_top, small):
    image, small = image_input(input_shape, alpha, small)
    if image.shape[-1] != 3:
        raise ValueError(f"{name} takes RGB images (height, width, 3). Got {tuple(input_shape)}")
    x = K.Normalization(
        mean=PIXEL_MEAN, variance=tuple(d * d for d in PIXEL_DEVIATION), name="normalize"
    )(image)
    if small:
        x = UNITS.conv(x, scaled(64, alpha), 3, "conv1")
    else:
        x = UNITS.conv(x, scaled(64, alpha), 7, "conv1", strides=2, pad=3)
        x = K.ZeroPadding2D(1, name="pool1_pad")(x)
        x = K.MaxPooling2D(3, 2, name="pool1")(x)
    for stage, (filters, count) in enumerate(zip(FILTERS, repeats, strict=True), 2):
        for i in range(1, count + 1):
            strides = 2 if stage > 2 and i == 1 else 1
            x = block(x, scaled(filters, alpha), strides, i == 1, f"conv{stage}_block{i}")
    return with_top(image, pooled(x), classes, name, include_top=include_top)


def _basic(x, filters, strides, first, name):
    pad = 1 if strides == 2 else None
    y = UNITS.conv(x, filters, 3, f"{name}_conv1", strides=strides, pad=pad)
    y = UNITS.conv(y, filters, 3, f"{name}_conv2", relu=False)
    return _sum(x, y, strides, strides == 2, name)


def _bottleneck(x, filters, strides, first, name):
    y = UNITS.conv(x, filters, 1, f"{name}_conv1", strides=strides, pad=0)
    y = UNITS.conv(y, filters, 3, f"{name}_conv2")
    y = UNITS.conv(y, 4 * filters, 1, f"{name}_conv3", relu=False)
    return _sum(x, y, strides, first, name)


def _sum(x, y, strides, projected, name):
    if projected:
        x = UNITS.conv(x, y.shape[-1], 1, f"{name}_shortcut", strides=strides, pad=0, relu=False)
    return UNITS.relu(K.Add(name=f"{name}_add")([x, y]), f"{name}_relu")
