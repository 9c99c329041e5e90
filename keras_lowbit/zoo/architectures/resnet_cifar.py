"""Residual nets for 32-pixel images: ResNet-8 of MLPerf Tiny and ResNet-20/32/56 of the paper."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_count

K = keras.layers
# Mean and deviation of ImageNet's channels, on which the public CIFAR weights were trained.
PIXEL_MEAN = tuple(255.0 * m for m in (0.485, 0.456, 0.406))
PIXEL_DEVIATION = tuple(255.0 * d for d in (0.229, 0.224, 0.225))


def resnet8(input_shape=(32, 32, 3), classes=10, include_top=True) -> keras.Model:
    """ResNet-8 of the MLPerf Tiny benchmark; takes pixels 0..255; 78,666 parameters at 10 classes.

    Three residual blocks of 16, 32 and 64 filters; convolutions with biases; a 1x1 convolution on
    the shortcut where the size changes. Ends in logits, or with `include_top=False` in the pooled
    features `(n, channels)` that the head would read.

    Reference:
        Banbury et al., MLPerf Tiny Benchmark, 2021, arXiv:2106.07597 (image classification).
    """
    inputs = keras.Input(input_shape, name="image")

    def conv(x, filters, size, strides, name):
        return K.Conv2D(filters, size, strides=strides, padding="same", name=name)(x)

    x = conv(inputs, 16, 3, 1, "stem")
    x = K.BatchNormalization(name="stem_bn")(x)
    x = K.ReLU(name="stem_relu")(x)
    for i, filters in enumerate((16, 32, 64), 1):
        strides = 1 if i == 1 else 2
        y = conv(x, filters, 3, strides, f"block{i}_conv1")
        y = K.BatchNormalization(name=f"block{i}_bn1")(y)
        y = K.ReLU(name=f"block{i}_relu1")(y)
        y = conv(y, filters, 3, 1, f"block{i}_conv2")
        if i > 1:
            x = conv(x, filters, 1, strides, f"block{i}_shortcut")
        y = K.BatchNormalization(name=f"block{i}_bn2")(y)
        x = K.Add(name=f"block{i}_add")([x, y])
        x = K.ReLU(name=f"block{i}_relu2")(x)
    x = K.GlobalAveragePooling2D(name="pool")(x)
    if include_top:
        x = K.Dense(checked_count(classes, who="classes", least=1), name="logits")(x)
    return keras.Model(inputs, x, name="resnet8")


def resnet20(input_shape=(32, 32, 3), classes=10, include_top=True) -> keras.Model:
    """ResNet-20: 269,722 parameters with batch-norm statistics left out (0.27 M in the paper)."""
    return _resnet(3, "resnet20", input_shape, classes, include_top)


def resnet32(input_shape=(32, 32, 3), classes=10, include_top=True) -> keras.Model:
    """ResNet-32 (0.46 M parameters in the paper)."""
    return _resnet(5, "resnet32", input_shape, classes, include_top)


def resnet56(input_shape=(32, 32, 3), classes=10, include_top=True) -> keras.Model:
    """ResNet-56 (0.85 M parameters in the paper)."""
    return _resnet(9, "resnet56", input_shape, classes, include_top)


def _resnet(blocks, name, input_shape, classes, include_top) -> keras.Model:
    """Three groups of `blocks` residual blocks; shortcuts without parameters (option A).

    Takes pixels 0..255 and normalizes them inside. Convolutions of stride 2 pad by one on every
    side, as the public weights were trained.

    Reference:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385, 4.2.
    """
    if len(input_shape) != 3 or input_shape[-1] != len(PIXEL_MEAN):
        raise ValueError(
            f"{name} takes images (height, width, 3) in colour. Got input_shape={input_shape}"
        )
    inputs = keras.Input(input_shape, name="image")
    x = K.Normalization(
        mean=PIXEL_MEAN, variance=tuple(d * d for d in PIXEL_DEVIATION), name="normalize"
    )(inputs)
    x = K.Conv2D(16, 3, padding="same", use_bias=False, name="conv1")(x)
    x = K.BatchNormalization(epsilon=1e-5, momentum=0.9, name="bn1")(x)
    x = K.ReLU(name="relu1")(x)
    for group, filters in enumerate((16, 32, 64), 1):
        for block in range(blocks):
            strides = 2 if group > 1 and block == 0 else 1
            x = _basic_block(x, filters, strides, f"layer{group}_{block}")
    x = K.GlobalAveragePooling2D(name="pool")(x)
    if include_top:
        x = K.Dense(checked_count(classes, who="classes", least=1), name="linear")(x)
    return keras.Model(inputs, x, name=name)


def _basic_block(x, filters, strides, name):
    y = x
    if strides == 2:
        y = K.ZeroPadding2D(1, name=f"{name}_pad")(y)
    padding = "valid" if strides == 2 else "same"
    y = K.Conv2D(
        filters, 3, strides=strides, padding=padding, use_bias=False, name=f"{name}_conv1"
    )(y)
    y = K.BatchNormalization(epsilon=1e-5, momentum=0.9, name=f"{name}_bn1")(y)
    y = K.ReLU(name=f"{name}_relu1")(y)
    y = K.Conv2D(filters, 3, padding="same", use_bias=False, name=f"{name}_conv2")(y)
    y = K.BatchNormalization(epsilon=1e-5, momentum=0.9, name=f"{name}_bn2")(y)
    if strides == 2:
        missing = (filters - x.shape[-1]) // 2
        x = ops.pad(x[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), (missing, missing)))
    x = K.Add(name=f"{name}_add")([x, y])
    return K.ReLU(name=f"{name}_relu2")(x)


def load_torch_names(model: keras.Model, path: str) -> None:
    """Read an `.npz` with PyTorch names and OIHW kernels into a model of this file.

    Raises:
        ValueError: names or shapes that are not the model's.
    """
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)

    def take(key):
        if key not in arrays:
            raise ValueError(f"{path}: no array {key}. It has {sorted(arrays)[:5]} ...")
        return arrays[key]

    for layer in model.layers:
        key = layer.name.replace("_conv", ".conv").replace("_bn", ".bn")
        # layer1_0.conv1 -> layer1.0.conv1
        key = key.replace("_", ".", 1) if key.startswith("layer") else key
        if isinstance(layer, K.Conv2D):
            layer.kernel.assign(take(f"{key}.weight").transpose(2, 3, 1, 0))
        elif isinstance(layer, K.Dense):
            layer.kernel.assign(take(f"{key}.weight").T)
            layer.bias.assign(take(f"{key}.bias"))
        elif isinstance(layer, K.BatchNormalization):
            layer.gamma.assign(take(f"{key}.weight"))
            layer.beta.assign(take(f"{key}.bias"))
            layer.moving_mean.assign(take(f"{key}.running_mean"))
            layer.moving_variance.assign(take(f"{key}.running_var"))
