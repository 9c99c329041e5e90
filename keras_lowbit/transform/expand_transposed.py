"""Transposed convolutions as convolutions over zeros in between, which have an integer form."""

from __future__ import annotations

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.transform.copies import config_of, rebuilt, rebuilt_model, refuse_changed
from keras_lowbit.transform.layer_maker import LayerMaker

# Arguments that both layers take, as they are.
_KEPT = (
    *("filters", "kernel_size", "activation", "use_bias", "bias_initializer", "trainable", "dtype"),
    *("kernel_regularizer", "bias_regularizer", "activity_regularizer"),
    *("kernel_constraint", "bias_constraint"),
)


def expand_transposed(model: keras.Model, *, name: str | None = None) -> keras.Model:
    """A copy of a float model whose `Conv2DTranspose` layers are `Conv2D` layers of their names.

    Between the values that a transposed convolution with strides `s` reads, `s - 1` zeros are put
    along height and width, and as many around as make

        y[i] = sum over j of x[j] kernel[i - s j + before]

    a convolution without strides by the kernel turned round; outputs are the same up to float32
    rounding. Zeros are exact on any grid, so the copy trains, freezes and exports as other models
    do; it multiplies them, too: a layer takes `s^2` times the products of its transposed form.

    Quantize the copy, and give it to `reconstruct`, `Distiller` and the like as the float model.

    Args:
        model: functional, Sequential or nested float model of static image size; stays as it is.
        name: name of the new model.

    Returns:
        A functional model, nested ones opened.

    Raises:
        ValueError: no `Conv2DTranspose`, or one with dilation, an `output_padding`, channels first
            or images of unknown size; a model without a graph.
    """
    program = walk.flatten(model)
    refuse_changed(program)
    found = [c for c in program.calls if type(c.operation) is keras.layers.Conv2DTranspose]
    if not found:
        raise ValueError(f"expand_transposed: {model.name} has no Conv2DTranspose")
    for call in found:
        _check(call)
    layers: dict[int, keras.layers.Conv2D] = {}
    make = LayerMaker(program)

    def replace(call, args):
        original = call.operation
        if type(original) is not keras.layers.Conv2DTranspose:
            return None
        spread = _spread(args[0], original.strides, call.plain, make)
        around = _around(call)
        if any(map(any, around)):
            label = make.name(f"{call.plain}_around")
            pad = keras.layers.ZeroPadding2D(around, data_format="channels_last", name=label)
            spread = pad(spread)
        if id(original) in layers:
            return layers[id(original)](spread)
        layer = layers[id(original)] = _convolution(original, call.plain)
        results = layer(spread)
        layer.set_weights(_turned(original))
        return results

    return rebuilt_model(program, replace, walk.plain(name or f"{model.name}_expanded"))


def _check(call):
    layer, sizes = call.operation, call.inputs[0].shape[1:3]
    wrong = {
        f"dilation_rate={layer.dilation_rate}": max(layer.dilation_rate) > 1,
        f"output_padding={layer.output_padding}": layer.output_padding is not None,
        f"data_format={layer.data_format!r}": layer.data_format != "channels_last",
        f"images of unknown size {sizes}": None in sizes,
    }
    given = [text for text, is_wrong in wrong.items() if is_wrong]
    if given:
        raise ValueError(
            f"expand_transposed: {call.name} has {', '.join(given)}. UpSampling2D and Conv2D serve "
            "instead, or an image size in keras.Input"
        )


def _spread(x, strides, name, make):
    """`x` with zeros behind each value: sizes times strides.

    Along one axis at a time: built-in kernels pad at most 5 axes, the Edge TPU's compiler 4.
    """
    (h, w, c), (s, t) = x.shape[1:], strides
    if t > 1:
        x = keras.layers.Reshape((h * w, 1, c), name=make.name(f"{name}_apart"))(x)
        x = _widened(x, t, make.name(f"{name}_between"))
    if s > 1:
        x = keras.layers.Reshape((h, 1, w * t * c), name=make.name(f"{name}_rows"))(x)
        x = _widened(x, s, make.name(f"{name}_between_rows"))
    if max(strides) == 1:
        return x
    return keras.layers.Reshape((h * s, w * t, c), name=make.name(f"{name}_spread"))(x)


def _widened(x, width, name):
    """`x`, one value wide, with zeros behind each value."""
    around = ((0, 0), (0, width - 1))
    return keras.layers.ZeroPadding2D(around, data_format="channels_last", name=name)(x)


def _around(call):
    """Zeros before and behind, along height and width."""
    layer, widths = call.operation, []
    for n, k, s, wanted in zip(
        call.inputs[0].shape[1:3],
        layer.kernel_size,
        layer.strides,
        call.output.shape[1:3],
        strict=True,
    ):
        before = max(k - s, 0) // 2 if layer.padding == "same" else 0
        first = k - 1 - before
        widths.append((first, wanted + k - 1 - first - n * s))
    return tuple(widths)


def _convolution(original, name):
    config = config_of(original)
    kept = {key: config[key] for key in _KEPT}
    return rebuilt(original, {**kept, "padding": "valid", "name": name}, keras.layers.Conv2D)


def _turned(layer):
    """`[kernel, bias]`: from `(kh, kw, c_out, c_in)` turned round to `(kh, kw, c_in, c_out)`."""
    kernel, *bias = layer.get_weights()
    return [np.ascontiguousarray(kernel[::-1, ::-1].transpose(0, 1, 3, 2)), *bias]
