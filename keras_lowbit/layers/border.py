"""The borders between reals and codes in a model: `Quantize` and `Dequantize`."""

from __future__ import annotations

import keras
from keras import ops

from keras_lowbit import quantizers

PACKAGE = "keras_lowbit"


@keras.saving.register_keras_serializable(package=PACKAGE)
class Quantize(keras.layers.Layer):
    """Puts a tensor on its grid: reals in, the pair `(codes, scale)` out.

    A grid belongs to a tensor, so there is one such layer for each tensor and grid, and all
    readers take its pair: a quantized layer multiplies the codes, `Dequantize` gives reals back.

    Args:
        quantizer: name, config or object; built with `role="activation"` from a name.
        bits: width of a code when `quantizer` is a name.
        signed: False after a ReLU, when `quantizer` is a name.

    Call arguments:
        inputs: reals, any shape.

    Returns:
        `codes`, whole numbers of the input's shape, and `scale`, a scalar without gradient.
    """

    def __init__(self, quantizer="lsq", *, bits=8, signed=True, **kwargs):
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.quantizer = quantizers.get(quantizer, bits=bits, signed=signed, role="activation")

    def build(self, input_shape):
        """Build the quantizer for the tensor's shape."""
        if not self.quantizer.built:
            self.quantizer.build(input_shape)

    def call(self, inputs):
        """The pair `(codes, scale)`."""
        codes, scale = self.quantizer.encode(inputs)
        return codes, scale

    def compute_output_shape(self, input_shape):
        """Shapes of the codes and of the scalar scale."""
        return tuple(input_shape), ()

    def get_config(self):
        """Arguments of the constructor."""
        config = super().get_config()
        config.pop("dtype", None)
        quantizer = keras.saving.serialize_keras_object(self.quantizer)
        return {**config, "quantizer": quantizer}


@keras.saving.register_keras_serializable(package=PACKAGE)
class Dequantize(keras.layers.Layer):
    """Reals of a pair: `scale * code + offset`.

    Gradient: to the codes, times the scale; none to the scale (the codes carry it).

    Args:
        offset: reals that code 0 stands for, as of the `Affine` quantizer in front.
    """

    def __init__(self, *, offset=0.0, **kwargs):
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.offset = float(offset)

    def call(self, inputs):
        """`scale * code + offset` for `inputs = (codes, scale)`."""
        codes, scale = inputs
        reals = codes * ops.stop_gradient(scale)
        return reals + self.offset if self.offset else reals

    def compute_output_shape(self, input_shape):
        """The shape of the codes."""
        return tuple(input_shape[0])

    def get_config(self):
        """Arguments of the constructor; `offset` where it is not 0, as in earlier versions."""
        config = super().get_config()
        config.pop("dtype", None)
        return {**config, "offset": self.offset} if self.offset else config
