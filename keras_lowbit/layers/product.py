"""What the quantized layers share: quantizers around a product of codes."""

from __future__ import annotations

import functools
import operator

import keras
from keras import ops

from keras_lowbit import quantizers
from keras_lowbit.layers import packed_kernels

PACKAGE = "keras_lowbit"


class CodeProduct:
    """Mixin in front of a Keras layer with a kernel: products are computed on codes.

        y = activation(product(codes_x, codes_w) * (scale_x * scale_w) + bias)

    Integer-valued float32 tensors are multiplied and summed, exactly below 2^24, and the two
    scales are applied once. The layer takes a plain tensor, which its own `input_quantizer`
    (if any) quantizes, or the pair `(codes, scale)` of a `Quantize` layer.

    Under mixed precision the layer keeps float32: bfloat16 sums lose nearly all codes.
    """

    def _take_quantizers(self, *, kernels, activations):
        """Resolve `{argument: (identifier, axis)}` and `{argument: identifier}`."""
        if getattr(self, "data_format", "channels_last") != "channels_last":
            raise ValueError(f"{self.name}: only data_format='channels_last' is supported")
        for argument, (identifier, axis) in kernels.items():
            setattr(self, argument, quantizers.get(identifier, role="kernel", axis=axis))
        for argument, identifier in activations.items():
            setattr(self, argument, quantizers.get(identifier, role="activation"))
        self._quantizer_arguments = (*kernels, *activations)
        # Keras' spec describes one tensor; a pair has its own check in `split_input`.
        self.input_spec = None

    def build(self, input_shape):
        """Build the Keras layer, then its quantizers on the shapes they will see."""
        paired = is_pair(input_shape)
        super().build(input_shape[0] if paired else input_shape)
        self.input_spec = None
        shapes = self._quantizer_shapes(input_shape[0] if paired else input_shape)
        for argument, shape in shapes.items():
            quantizer = getattr(self, argument)
            if quantizer is not None and not quantizer.built:
                quantizer.build(shape)

    def _quantizer_shapes(self, input_shape):
        return {
            "input_quantizer": input_shape,
            "kernel_quantizer": tuple(self.kernel.shape),
            "output_quantizer": super().compute_output_shape(input_shape),
        }

    def compute_output_shape(self, input_shape):
        """Shape of the output, for a tensor or a `(codes, scale)` pair."""
        return super().compute_output_shape(input_shape[0] if is_pair(input_shape) else input_shape)

    def split_input(self, inputs):
        """`(codes, scale)`; the scale is `None` for an input that stays float."""
        if isinstance(inputs, (list, tuple)):
            if len(inputs) != 2:
                raise ValueError(
                    f"{self.name}: expected a tensor or the pair (codes, scale) of a Quantize "
                    f"layer. Got {len(inputs)} tensors"
                )
            return inputs[0], inputs[1]
        if self.input_quantizer is None:
            return inputs, None
        return self.input_quantizer.encode(inputs)

    def quantized_kernel(self, kernel, quantizer):
        """`(codes, scale)`; the scale is `None` for a kernel that stays float."""
        if quantizer is None:
            return ops.convert_to_tensor(kernel), None
        return quantizer.encode(ops.convert_to_tensor(kernel))

    def unit(self, *scales):
        """Reals per unit of a product: the product of the scales that are not `None`, or `None`."""
        known = [s for s in scales if s is not None]
        return functools.reduce(operator.mul, known) if known else None

    def finish(self, outputs, bias):
        """Add the bias, apply the activation and the output quantizer."""
        if bias is not None:
            outputs = outputs + ops.convert_to_tensor(bias)
        if self.activation is not None:
            outputs = self.activation(outputs)
        if self.output_quantizer is not None:
            outputs = self.output_quantizer(outputs)
        return outputs

    def save_own_variables(self, store):
        """Float latents; packed codes while `save_packed` writes."""
        if not packed_kernels.is_writing():
            super().save_own_variables(store)
            return
        packed_kernels.write(self, self._float_entry(), store)

    def load_own_variables(self, store):
        """Float latents, or packed codes, which become `code * scale`."""
        if packed_kernels.is_packed(store):
            store = packed_kernels.read(self, self._float_entry(), store)
        super().load_own_variables(store)

    def _float_entry(self):
        """What Keras stores for the layer, variables by key."""
        entry = {}
        super().save_own_variables(entry)
        return entry

    def get_config(self):
        """Arguments of the Keras layer and the quantizers, serialized."""
        config = super().get_config()
        config.pop("dtype", None)
        for argument in self._quantizer_arguments:
            quantizer = getattr(self, argument)
            config[argument] = (
                None if quantizer is None else keras.saving.serialize_keras_object(quantizer)
            )
        return config


def is_pair(input_shape) -> bool:
    """Whether `input_shape` describes `(codes, scale)` rather than one tensor."""
    return len(input_shape) > 0 and isinstance(input_shape[0], (list, tuple))
