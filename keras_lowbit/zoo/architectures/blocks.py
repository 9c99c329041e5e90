"""Pieces that several architectures share: arguments, widths, units, heads."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_lowbit.checks import checked_count, checked_number

K = keras.layers
# Images of at most this many pixels a side get an architecture's small variant.
SMALL_PIXELS = 64


def image_input(input_shape, alpha, small):
    """The model's input and whether to build the small variant.

    Args:
        input_shape: height, width, channels.
        alpha: width multiplier.
        small: `None` decides by the longer side: small up to 64 pixels.

    Raises:
        ValueError: arguments that no architecture takes.
    """
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"input_shape must be (height, width, channels), whole and positive. Got {input_shape}"
        )
    checked_number(alpha, who="alpha, the width multiplier,", above=0)
    if small is None:
        small = max(shape[:2]) <= SMALL_PIXELS
    return keras.Input(shape, name="image"), bool(small)


def rescaled(image):
    """Pixels 0..255 to -1..1, by one number: each of 256 pixel values keeps a code of its own."""
    return K.Rescaling(1 / 127.5, offset=-1.0, name="rescale")(image)


def scaled(filters: int, alpha: float) -> int:
    """`alpha * filters` as a multiple of 8, at least 8 and at least 90 % of the product.

    Reference:
        Sandler et al., MobileNetV2, CVPR 2018: the rounding of the authors' code.
    """
    wanted = filters * alpha
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def he_normal():
    """Kernels whose outputs keep their variance through depthwise layers too.

        kernel ~ N(0, 2 / (height * width * output channels))

    Keras' default counts all channels of a depthwise kernel as inputs, and through some twenty
    such layers batch norm's epsilon outweighs what is left of the signal. A new object for each
    layer: one that is used twice gives the same numbers twice.

    Reference:
        He et al., Delving Deep into Rectifiers, ICCV 2015, arXiv:1502.01852, equation 14.
    """
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


@dataclass(frozen=True)
class Units:
    """Convolution without bias, batch norm, ReLU: layers `name`, `name_bn` and `name_relu`.

    Args:
        epsilon: of the batch norms.
        momentum: of the batch norms; has no part in the outputs of a trained model.
        max_value: limit of the ReLU, such as 6; `None` for none.
    """

    epsilon: float
    momentum: float
    max_value: float | None = None

    def conv(self, x, filters, size, name, *, strides=1, pad=None, relu=True):
        """`Conv2D`; `pad` zeros on every side in place of Keras' "same"."""
        x, padding = _padded(x, pad, name)
        layer = K.Conv2D(
            filters,
            size,
            strides,
            padding,
            use_bias=False,
            kernel_initializer=he_normal(),
            name=name,
        )
        return self.normalized(layer(x), name, relu=relu)

    def depthwise(self, x, size, name, *, strides=1):
        """`DepthwiseConv2D`, padding "same"."""
        layer = K.DepthwiseConv2D(
            size,
            strides,
            "same",
            use_bias=False,
            depthwise_initializer=he_normal(),
            name=name,
        )
        return self.normalized(layer(x), name)

    def normalized(self, x, name, *, relu=True):
        """Batch norm and ReLU."""
        x = K.BatchNormalization(epsilon=self.epsilon, momentum=self.momentum, name=f"{name}_bn")(x)
        return self.relu(x, f"{name}_relu") if relu else x

    def relu(self, x, name):
        """The ReLU alone."""
        return K.ReLU(self.max_value, name=name)(x)


def _padded(x, pad, name):
    if pad is None:
        return x, "same"
    return (K.ZeroPadding2D(pad, name=f"{name}_pad")(x) if pad else x), "valid"


def inverted_residual(
    units, x, filters, name, *, size=3, strides=1, expansion=6, squeezed=0, skip=True
):
    """Expand, filter each channel, project without activation; add the input where shapes agree.

    Args:
        units: `Units`.
        x: input.
        filters: output channels.
        name: in front of the layers' names.
        size: of the depthwise kernel.
        strides: of the depthwise convolution.
        expansion: inner channels to input channels; at 1 there is no expanding convolution.
        squeezed: channels between the two convolutions of squeeze-and-excite; 0 for none.
        skip: whether the input may be added.

    Reference:
        Sandler et al., MobileNetV2, CVPR 2018, arXiv:1801.04381, section 3.3 and table 1.
    """
    channels = x.shape[-1]
    y = x
    if expansion != 1:
        y = units.conv(y, expansion * channels, 1, f"{name}_expand")
    y = units.depthwise(y, size, f"{name}_depthwise", strides=strides)
    if squeezed:
        y = _squeeze_and_excite(y, squeezed, f"{name}_se")
    y = units.conv(y, filters, 1, f"{name}_project", relu=False)
    if skip and strides == 1 and channels == filters:
        y = K.Add(name=f"{name}_add")([x, y])
    return y


def _squeeze_and_excite(x, squeezed, name):
    """Each channel times a factor 0..1 that its image's channel means decide.

    Reference:
        Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, arXiv:1709.01507, section 3.
    """
    y = K.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool")(x)
    y = K.Conv2D(squeezed, 1, name=f"{name}_reduce")(y)
    y = K.ReLU(name=f"{name}_relu")(y)
    y = K.Conv2D(x.shape[-1], 1, name=f"{name}_expand")(y)
    y = K.Activation("sigmoid", name=f"{name}_sigmoid")(y)
    return K.Multiply(name=f"{name}_multiply")([x, y])


def pooled(x):
    """Means over height and width."""
    return K.GlobalAveragePooling2D(name="pool")(x)


def with_top(image, features, classes, name, *, include_top, dropout=0.0):
    """The model that ends in logits, or in what its head would read.

    Raises:
        ValueError: fewer than 1 class.
    """
    x = features
    if include_top:
        if dropout:
            x = K.Dropout(dropout, name="dropout")(x)
        x = K.Dense(checked_count(classes, who="classes", least=1), name="logits")(x)
    return keras.Model(image, x, name=name)
