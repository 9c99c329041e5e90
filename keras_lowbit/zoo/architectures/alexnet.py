"""AlexNet with batch norm and its variant for small images."""

from __future__ import annotations

import keras

from keras_lowbit.zoo.architectures.blocks import (
    Units,
    image_input,
    rescaled,
    scaled,
    with_top,
)

K = keras.layers
UNITS = Units(epsilon=1e-5, momentum=0.9)


def alexnet_bn(
    input_shape=(224, 224, 3),
    classes=1000,
    alpha=1.0,
    include_top=True,
    small=None,
    dropout=0.5,
) -> keras.Model:
    """AlexNet with batch norm: 61,110,184 parameters at 1,000 classes and 224 pixels.

    The single-tower AlexNet of "One weird trick" in torchvision's widths (64, 192, 384, 256, 256
    filters, two dense layers of 4,096), with a batch norm in the place of the bias behind each
    convolution and each hidden dense layer, and no local response normalization. Other papers'
    AlexNets differ: two towers, or 96, 256, 384, 384, 256 filters.

    Takes pixels 0..255 and rescales them to -1..1 inside; ends in logits. The first dense layer
    reads every pixel of the last feature map, so weights belong to one image size.

    Args:
        input_shape: height, width, channels; at least 63 pixels a side unless `small`.
        classes: number of logits.
        alpha: width multiplier of convolutions and hidden dense layers; multiples of 8.
        include_top: `False` gives the features `(n, channels)` that the head would read.
        small: a variant of our own for 32 pixels: 3x3 stem of stride 1, max pools of 2 (32 pixels
            end as 4), hidden dense layers of 1,024; `None` chooses it up to 64 pixels.
        dropout: share of each dense layer's inputs dropped in training.

    Raises:
        ValueError: arguments out of range, or an image that three pools leave nothing of.

    Reference:
        Krizhevsky, One weird trick for parallelizing convolutional neural networks, 2014,
        arXiv:1404.5997; Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167.
    """
    image, small = image_input(input_shape, alpha, small)
    least = 8 if small else 63
    if min(image.shape[1:3]) < least:
        raise ValueError(
            f"alexnet_bn with small={small} takes images of {least} pixels a side or more. "
            f"Got {tuple(input_shape)}"
        )
    size = 2 if small else 3

    def conv(x, filters, kernel, name, **options):
        return UNITS.conv(x, scaled(filters, alpha), kernel, name, **options)

    def pool(x, name):
        return K.MaxPooling2D(size, 2, name=name)(x)

    x = rescaled(image)
    x = conv(x, 64, 3, "conv1") if small else conv(x, 64, 11, "conv1", strides=4, pad=2)
    x = pool(x, "pool1")
    x = pool(conv(x, 192, 5, "conv2"), "pool2")
    x = conv(x, 384, 3, "conv3")
    x = conv(x, 256, 3, "conv4")
    x = pool(conv(x, 256, 3, "conv5"), "pool5")
    x = K.Flatten(name="flatten")(x)
    for name in ("dense1", "dense2"):
        if dropout:
            x = K.Dropout(dropout, name=f"{name}_dropout")(x)
        units = scaled(1024 if small else 4096, alpha)
        x = UNITS.normalized(K.Dense(units, use_bias=False, name=name)(x), name)
    return with_top(image, x, classes, "alexnet_bn", include_top=include_top)
