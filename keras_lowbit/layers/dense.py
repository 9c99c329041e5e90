"""Quantized dense layer."""

from __future__ import annotations

import keras

from keras_lowbit.layers.product import PACKAGE, CodeProduct
from keras_lowbit.numerics import backend


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedDense(CodeProduct, keras.layers.Dense):
    """`keras.layers.Dense` on codes; the latent kernel stays float.

    Args:
        units: output features.
        kernel_quantizer: name, config, object or `None`; a name gives one scale a unit.
        input_quantizer: for a plain input tensor.
        output_quantizer: applied after the activation.
        **kwargs: the other arguments of `keras.layers.Dense`.

    Raises:
        ValueError: unknown quantizer.
    """

    def __init__(
        self,
        units,
        *,
        kernel_quantizer="lsq",
        input_quantizer=None,
        output_quantizer=None,
        **kwargs,
    ):
        kwargs["dtype"] = "float32"
        super().__init__(units, **kwargs)
        self._take_quantizers(
            kernels={"kernel_quantizer": (kernel_quantizer, -1)},
            activations={
                "input_quantizer": input_quantizer,
                "output_quantizer": output_quantizer,
            },
        )

    def call(self, inputs, training=None):
        """Reals; see the class."""
        codes, scale = self.split_input(inputs)
        kernel, kernel_scale = self.quantized_kernel(self.kernel, self.kernel_quantizer)
        outputs = backend.matmul(codes, kernel, self.unit(scale, kernel_scale))
        return self.finish(outputs, self.bias)
