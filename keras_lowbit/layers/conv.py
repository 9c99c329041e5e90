"""Quantized convolutions: `Conv2D`, `DepthwiseConv2D`, `SeparableConv2D`."""

from __future__ import annotations

import keras
from keras import ops

from keras_lowbit.layers.padding import SamePadding
from keras_lowbit.layers.product import PACKAGE, CodeProduct
from keras_lowbit.numerics import backend

_CHANNELS_LAST = "channels_last"


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedConv2D(SamePadding, CodeProduct, keras.layers.Conv2D):
    """`keras.layers.Conv2D` on codes; the latent kernel stays float.

    Takes every argument of the Keras layer (stride, dilation, groups, SAME or VALID, bias,
    activation) and three more.

    Args:
        filters: output channels.
        kernel_size: height and width, or one number.
        kernel_quantizer: name, config, object or `None`; a name gives one scale a filter.
        input_quantizer: for a plain input tensor; unused when the input is a
            `(codes, scale)` pair.
        output_quantizer: applied after the activation.
        pad_code: code that SAME padding puts around the input: -1 for a pair of signs, else 0;
            `None`: what the input quantizer says.
        **kwargs: the other arguments of `keras.layers.Conv2D`.

    Raises:
        ValueError: unknown quantizer, or `data_format` other than `"channels_last"`.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        *,
        kernel_quantizer="lsq",
        input_quantizer=None,
        output_quantizer=None,
        pad_code=None,
        **kwargs,
    ):
        kwargs["dtype"] = "float32"
        kwargs.setdefault("data_format", _CHANNELS_LAST)
        super().__init__(filters, kernel_size, **kwargs)
        self._take_pad_code(pad_code)
        self._take_quantizers(
            kernels={"kernel_quantizer": (kernel_quantizer, -1)},
            activations={
                "input_quantizer": input_quantizer,
                "output_quantizer": output_quantizer,
            },
        )

    def call(self, inputs):
        """Reals; see the class."""
        codes, scale = self.split_input(inputs)
        kernel, kernel_scale = self.quantized_kernel(self.kernel, self.kernel_quantizer)
        codes, padding = self.padded(codes, kernel)
        outputs = backend.conv(
            codes,
            kernel,
            self.unit(scale, kernel_scale),
            strides=self.strides,
            padding=padding,
            dilation_rate=self.dilation_rate,
        )
        return self.finish(outputs, self.bias)


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedDepthwiseConv2D(SamePadding, CodeProduct, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` on codes; one scale for each output channel.

    Args:
        kernel_size: height and width, or one number.
        kernel_quantizer: name, config, object or `None`.
        input_quantizer: for a plain input tensor.
        output_quantizer: applied after the activation.
        pad_code: code that SAME padding puts around the input: -1 for a pair of signs, else 0;
            `None`: what the input quantizer says.
        **kwargs: the other arguments of `keras.layers.DepthwiseConv2D`.

    Raises:
        ValueError: unknown quantizer, or `data_format` other than `"channels_last"`.
    """

    def __init__(
        self,
        kernel_size,
        *,
        kernel_quantizer="lsq",
        input_quantizer=None,
        output_quantizer=None,
        pad_code=None,
        **kwargs,
    ):
        kwargs["dtype"] = "float32"
        kwargs.setdefault("data_format", _CHANNELS_LAST)
        super().__init__(kernel_size, **kwargs)
        self._take_pad_code(pad_code)
        self._take_quantizers(
            kernels={"kernel_quantizer": (kernel_quantizer, (-2, -1))},
            activations={
                "input_quantizer": input_quantizer,
                "output_quantizer": output_quantizer,
            },
        )

    def call(self, inputs):
        """Reals; see the class."""
        codes, scale = self.split_input(inputs)
        kernel, kernel_scale = self.quantized_kernel(self.kernel, self.kernel_quantizer)
        if kernel_scale is not None and len(kernel_scale.shape):
            kernel_scale = ops.reshape(kernel_scale, (-1,))
        codes, padding = self.padded(codes, kernel)
        outputs = backend.depthwise_conv(
            codes,
            kernel,
            self.unit(scale, kernel_scale),
            strides=self.strides,
            padding=padding,
            dilation_rate=self.dilation_rate,
        )
        return self.finish(outputs, self.bias)


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedSeparableConv2D(SamePadding, CodeProduct, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` on codes: depthwise, a grid between, pointwise.

    Args:
        filters: output channels.
        kernel_size: height and width of the depthwise kernel, or one number.
        depthwise_quantizer: quantizer of the depthwise kernel.
        pointwise_quantizer: quantizer of the pointwise kernel.
        between_quantizer: grid of the tensor between the two products.
        input_quantizer: for a plain input tensor.
        output_quantizer: applied after the activation.
        pad_code: code that SAME padding puts around the input: -1 for a pair of signs, else 0;
            `None`: what the input quantizer says.
        **kwargs: the other arguments of `keras.layers.SeparableConv2D`.

    Raises:
        ValueError: unknown quantizer, or `data_format` other than `"channels_last"`.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        *,
        depthwise_quantizer="lsq",
        pointwise_quantizer="lsq",
        between_quantizer="lsq",
        input_quantizer=None,
        output_quantizer=None,
        pad_code=None,
        **kwargs,
    ):
        kwargs["dtype"] = "float32"
        kwargs.setdefault("data_format", _CHANNELS_LAST)
        super().__init__(filters, kernel_size, **kwargs)
        self._take_pad_code(pad_code)
        self._take_quantizers(
            kernels={
                "depthwise_quantizer": (depthwise_quantizer, (-2, -1)),
                "pointwise_quantizer": (pointwise_quantizer, -1),
            },
            activations={
                "between_quantizer": between_quantizer,
                "input_quantizer": input_quantizer,
                "output_quantizer": output_quantizer,
            },
        )

    def _quantizer_shapes(self, input_shape):
        output = keras.layers.SeparableConv2D.compute_output_shape(self, input_shape)
        between = (*output[:-1], input_shape[-1] * self.depth_multiplier)
        return {
            "input_quantizer": input_shape,
            "depthwise_quantizer": tuple(self.depthwise_kernel.shape),
            "between_quantizer": between,
            "pointwise_quantizer": tuple(self.pointwise_kernel.shape),
            "output_quantizer": output,
        }

    def call(self, inputs):
        """Reals; see the class."""
        codes, scale = self.split_input(inputs)
        kernel, kernel_scale = self.quantized_kernel(
            self.depthwise_kernel, self.depthwise_quantizer
        )
        if kernel_scale is not None and len(kernel_scale.shape):
            kernel_scale = ops.reshape(kernel_scale, (-1,))
        codes, padding = self.padded(codes, kernel)
        between = backend.depthwise_conv(
            codes,
            kernel,
            self.unit(scale, kernel_scale),
            strides=self.strides,
            padding=padding,
            dilation_rate=self.dilation_rate,
        )
        scale = None
        if self.between_quantizer is not None:
            between, scale = self.between_quantizer.encode(between)
        kernel, kernel_scale = self.quantized_kernel(
            self.pointwise_kernel, self.pointwise_quantizer
        )
        outputs = backend.conv(between, kernel, self.unit(scale, kernel_scale))
        return self.finish(outputs, self.bias)
