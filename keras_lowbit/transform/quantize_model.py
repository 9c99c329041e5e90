"""From a float Keras model to a quantized one.

`transform.plan` says which tensors get a grid; here the model is rebuilt with a `Quantize` layer
for each. Calls that only move codes (`kinds.TRANSPARENT`) pass a grid on.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import keras

from keras_lowbit import layers, quantizers, walk
from keras_lowbit.integer.elementwise import check_axes
from keras_lowbit.kinds import (
    CLIPS,
    OF_TWO_TENSORS,
    TRANSPARENT,
    activation_name,
    kind_of,
)
from keras_lowbit.named_outputs import model_of
from keras_lowbit.scheme import SIGN, Scheme
from keras_lowbit.transform.composed import activated, joined
from keras_lowbit.transform.copies import (
    config_of,
    inputs_like,
    rebuilt,
    refuse_changed,
    set_weights,
)
from keras_lowbit.transform.image_grids import ImageGrids
from keras_lowbit.transform.kernels import absorb_offset, copy_weights, fit_kernels
from keras_lowbit.transform.layer_maker import LayerMaker
from keras_lowbit.transform.plan import STREAM_BITS, Plan
from keras_lowbit.transform.tensors import Entry, Tensors, quantizer_of

# Layers of what takes two tensors at a time.
_OF_TWO = {"add": keras.layers.Add, "multiply": keras.layers.Multiply}

_QUANTIZED = {
    keras.layers.Conv2D: layers.QuantizedConv2D,
    keras.layers.DepthwiseConv2D: layers.QuantizedDepthwiseConv2D,
    keras.layers.SeparableConv2D: layers.QuantizedSeparableConv2D,
    keras.layers.Dense: layers.QuantizedDense,
}

_POOLS = ("average_pool", "global_average_pool")
_HALVES = ("float16", "bfloat16")

# The same layer, sooner done, or with one meaning on all backends.
_IN_PLACE_OF = {
    keras.layers.AveragePooling2D: layers.AveragePooling2D,
    keras.layers.BatchNormalization: layers.BatchNormalization,
}


def quantize_model(
    model: keras.Model, scheme="w8a8", *, input_range=None, name: str | None = None
) -> keras.Model:
    """A quantized copy of a functional, Sequential or nested model.

    Kernels start on scales of least squared error; activations wait for `calibrate`. The model
    given stays as it is.

    Args:
        model: float Keras model, channels last, with static image size.
        scheme: `"w4a4"`, a `Scheme`, or a mapping of layer-name patterns
            (`{"*": "w4a4", "head": "w8a8", "attention*": None}`; `None` stays float).
        input_range: reals of pixel 0 and pixel 255 when images arrive preprocessed, such as
            `(-1, 1)`: every pixel value then keeps a code of its own. A model that starts with
            `Rescaling` needs none for pixels 0..255; without either, `calibrate` takes the range
            from its images. Of several inputs a pair is meant for those of height, width and
            channels; a mapping of input names to pairs says it one by one.
        name: name of the new model.

    Returns:
        A functional model with the inputs and outputs of the given one, names included;
        `keras_lowbit.summary` lists what stayed float, and why.

    Raises:
        ValueError: unknown scheme or key, a model without a graph, nothing to quantize, channels
            first, a layer that cannot be copied, an exception pattern that matches no layer, an
            `input_range` that is no rising pair or names no input, `x + y` or `x * y` of tensors
            whose numbers of axes differ.
    """
    program = walk.flatten(model)
    scheme = Scheme.of(scheme)
    _check(program, scheme, model.name)
    builder = _Builder(program, scheme, input_range)
    return builder.build(name or f"{model.name}_quantized")


def _check(program, scheme, model_name):
    names = [call.name for call in program.calls if kind_of(call) == "product"]
    if any(kind_of(call) == "quantize" for call in program.calls):
        raise ValueError(f"{model_name} is quantized already. Pass the float model.")
    if not names:
        raise ValueError(
            f"{model_name} has no layer to quantize: expected Conv2D, DepthwiseConv2D, "
            "SeparableConv2D or Dense."
        )
    refuse_changed(program)
    first = [
        call.name
        for call in program.calls
        if kind_of(call) == "product"
        and getattr(call.operation, "data_format", "channels_last") != "channels_last"
    ]
    if first:
        raise ValueError(
            f"{', '.join(dict.fromkeys(first))}: images must have their channels last, as in "
            "files. Build the model with data_format='channels_last'"
        )
    unused = scheme.unused_exceptions(names)
    if unused:
        raise ValueError(f"Scheme patterns {unused} match no layer. Layers: {names}")


class _Builder:
    """Rebuilds a program call by call, putting grids where readers ask for them."""

    def __init__(self, program, scheme, input_range):
        self.program = program
        self.scheme = scheme
        self.plan = Plan(program, scheme)
        self.images = ImageGrids(self.plan, input_range)
        self.clones: dict[int, Any] = {}
        self.make = LayerMaker(program)
        self.tensors = Tensors(self.plan, self.images, self.make)

    def build(self, name):
        inputs = inputs_like(self.program)
        for ref, tensor in zip(self.program.inputs, inputs, strict=True):
            self.tensors.entries[ref.index] = Entry(values=tensor)
        for call in self.program.calls:
            self._call(call)
        outputs = keras.tree.map_structure(
            lambda r: self.tensors.output(r) if isinstance(r, walk.Ref) else r, self.program.outputs
        )
        return model_of(
            inputs if len(inputs) > 1 else inputs[0],
            outputs,
            walk.plain(name),
            self.program.output_names,
        )

    # --- one call -----------------------------------------------------------------------------

    def _call(self, call):
        kind = kind_of(call)
        if kind == "product":
            entry = self._product(call)
        elif kind in _OF_TWO:
            entry = Entry(values=self._two_at_a_time(call, _OF_TWO[kind]))
        elif kind in TRANSPARENT and self.tensors.on_grid(call.inputs[0]):
            source = self.tensors.entries[call.inputs[0].index]
            if kind == "pad" and source.offset and not self.images.holds_zero(call.inputs[0]):
                source = self.tensors.centred(call.inputs[0])
            codes = self._clone(call, {call.inputs[0].index: source.pair[0]})
            pair = (codes, source.pair[1])
            entry = dataclasses.replace(source, values=None, pair=pair, centred=None, made={})
        elif self.plan.reaches_over_border(call):
            entry = self._mean_on_grid(call)
        elif self.plan.takes_two_tensors(call):
            values = self.tensors.centred_values(call.inputs[0])
            entry = Entry(values=activated(self.make, call.operation, values, call.name))
        elif self.plan.reads_logits(call):
            read = {r.index: self.tensors.logits(r) for r in call.inputs}
            entry = Entry(values=self._clone(call, read))
        else:
            look = self.tensors.centred_values if kind in _POOLS else self.tensors.values
            read = {r.index: look(r) for r in call.inputs}
            made = self._clone(call, read)
            flat = keras.tree.flatten(made)
            for ref, tensor in zip(walk.refs(call.outputs), flat, strict=True):
                self.tensors.entries[ref.index] = Entry(values=tensor)
            return
        self.tensors.entries[call.output.index] = entry

    def _product(self, call):
        ref = call.inputs[0]
        widths = self.plan.widths(call)
        if widths is None:
            return Entry(values=self._clone(call, {ref.index: self.tensors.values(ref)}))
        pair = self.tensors.grid(ref, widths.activation_bits)
        offset = self.tensors.entries[ref.index].offset
        if offset and not self.images.absorbs(call.operation):
            pair, offset = self.tensors.centred(ref).pair, 0.0
        bits = 8 if self.plan.is_image(ref) else widths.activation_bits
        layer, activation, fresh = self._quantized_layer(
            call, widths, needs_bias=bool(offset), signs=self.scheme.activation_of(bits)[0] == SIGN
        )
        outputs = layer(pair)
        if fresh:
            copy_weights(call.operation, layer)
            if offset:
                absorb_offset(layer, offset)
            fit_kernels(layer)
        if activation is not None:
            self.tensors.entries[call.output.index] = Entry(values=outputs)
            quantized = self.tensors.quantized(
                call.output, outputs, STREAM_BITS, name=layer.name, signed=True
            )
            outputs = activation(self.make.dequantized(quantized, layer.name))
        return Entry(values=outputs)

    def _mean_on_grid(self, call):
        """The mean of a padded pool on the grid of what it reads, where the runtime leaves it."""
        operation, ref = call.operation, call.inputs[0]
        if self.plan.is_image(ref):
            (codes, scale), nonnegative = self._image_to_pool(ref)
        else:
            codes, scale = self.tensors.grid(ref, STREAM_BITS)
            nonnegative = self.tensors.entries[ref.index].nonnegative
            if nonnegative is None:
                nonnegative, _ = self.plan.sign_and_limit(ref)
        pool = layers.AveragePooling2D(
            operation.pool_size,
            operation.strides,
            "same",
            zero_point=-128 if nonnegative else 0,
            name=self.make.own_name(call),
            dtype="float32",  # codes, whatever the policy
        )
        return Entry(pair=(pool(codes), scale), bits=STREAM_BITS, nonnegative=nonnegative)

    def _image_to_pool(self, ref):
        """`(pair, whether no code is negative)` of an image, on a grid of known zero point.

        An image's own grid serves where it begins at 0.0; elsewhere a symmetric one is put behind
        it, or `calibrate` would decide how the runtime rounds the mean.
        """
        grid = self.images.grid(ref)
        begins_at_zero = grid is not None and grid[1:] == (0, 0.0)
        if begins_at_zero:
            return self.tensors.grid(ref, STREAM_BITS), True
        nonnegative = grid is not None and grid[1] == 0
        entry = self.tensors.entries[ref.index]
        if entry.centred is None:
            entry.centred = self.tensors.recentred(ref, signed=not nonnegative)
        return entry.centred.pair, nonnegative

    def _two_at_a_time(self, call, layer):
        """What the runtime adds or multiplies by twos; each partial result needs its own grid."""
        if not isinstance(call.operation, keras.layers.Layer):
            # Of tensors of different ranks an operator lines up the last axes, batch and all; the
            # layer in its place keeps batches together, and would compute something else.
            check_axes(call.name, [ref.shape for ref in call.inputs])
        tensors = [self.tensors.centred_values(r) for r in call.inputs]
        if len(tensors) == 2:
            return layer(name=self.make.own_name(call), dtype="float32")(tensors)
        return joined(self.make, layer, tensors, call.name)

    # --- making layers ------------------------------------------------------------------------

    def _clone(self, call, read):
        operation = self.clones.get(id(call.operation))
        original = call.operation
        if operation is None:
            config = config_of(original)
            if isinstance(original, keras.layers.Layer):
                config["name"] = self.make.own_name(call)
                if kind_of(call) not in (None, "product") and original.compute_dtype in _HALVES:
                    # What stands between grids has to tell neighbouring codes apart.
                    config["dtype"] = "float32"
            operation = rebuilt(original, config, _IN_PLACE_OF.get(type(original)))
            if not isinstance(original, keras.layers.Layer):
                # Keras counts on from names in use, which may be those of copied layers.
                operation.name = self.make.own_name(call)
            self.clones[id(original)] = operation
        results = operation(
            *walk.substitute(call.args, read), **walk.substitute(dict(call.kwargs), read)
        )
        if isinstance(original, keras.layers.Layer) and original.weights:
            set_weights(operation, original.get_weights())
        return results

    def _quantized_layer(self, call, widths, needs_bias, signs):
        """`(layer, activation to apply after the logits' grid or None, whether it is new)`."""
        known = self.clones.get(id(call.operation))
        if known is not None:
            return (*known, False)
        original = call.operation
        config = config_of(original)
        config["name"] = self.make.own_name(call)
        config["use_bias"] = config["use_bias"] or needs_bias
        name = activation_name(original)
        after = None
        if name not in CLIPS:
            config["activation"] = None
            after = self._activation_after(original, call.name)
        for key in ("kernel_regularizer", "depthwise_regularizer", "dtype"):
            if config.get(key) is None:
                config.pop(key, None)
        config.pop("dtype", None)
        if signs and not isinstance(original, keras.layers.Dense):
            config["pad_code"] = quantizers.Sign.pad_code
        config |= self._kernel_quantizers(type(original), widths)
        layer = rebuilt(original, config, _QUANTIZED[type(original)])
        self.clones[id(original)] = (layer, after)
        return layer, after, True

    def _activation_after(self, original, name):
        """What computes a product's activation from its logits."""
        kind = activation_name(original)
        if kind in OF_TWO_TENSORS:
            return functools.partial(activated, self.make, original, name=f"{name}_{kind}")
        return self.make.exact(keras.layers.Activation, f"{name}_{kind}", original.activation)

    def _kernel_quantizers(self, cls, widths):
        name = widths.kernel or self.scheme.kernel
        options = self.scheme.kernel_options if name == self.scheme.kernel else {}

        def make(axis):
            axis = axis if self.scheme.per_channel else None
            return quantizer_of("kernel", name, options, bits=widths.kernel_bits, axis=axis)

        if cls is keras.layers.SeparableConv2D:
            method, more = self.scheme.activation_of(widths.activation_bits)
            between = quantizer_of("activation", method, more, bits=widths.activation_bits)
            return {
                "depthwise_quantizer": make((-2, -1)),
                "pointwise_quantizer": make(-1),
                "between_quantizer": between,
            }
        return {"kernel_quantizer": make((-2, -1) if cls is keras.layers.DepthwiseConv2D else -1)}
