"""A trained model for another image size or for other classes."""

from __future__ import annotations

import keras

from keras_lowbit.checks import checked_count
from keras_lowbit.layers import Dequantize, Quantize
from keras_lowbit.named_outputs import model_of
from keras_lowbit.quantizers.sites import quantizers_of
from keras_lowbit.transform.copies import set_weights
from keras_lowbit.transform.kernels import fit_kernels

_BEHIND = (Quantize, Dequantize, keras.layers.Softmax, keras.layers.Activation)


def with_input_shape(model: keras.Model, shape) -> keras.Model:
    """The same weights for images of another size.

    Args:
        model: a functional model of one input that no layer ties to an image size.
        shape: height, width, channels.

    Raises:
        ValueError: the channels differ, or a layer does not fit the size.
    """
    before = tuple(model.input_shape[1:])
    if not isinstance(shape, (tuple, list)):
        raise ValueError(f"input_shape is height, width and channels in pixels. Got {shape!r}")
    shape = tuple(
        checked_count(n, who=f"input_shape={shape!r}: each of its numbers", least=1) for n in shape
    )
    if shape == before:
        return model
    if len(shape) != 3 or shape[-1] != before[-1]:
        raise ValueError(
            f"{model.name} takes images (height, width, {before[-1]}). Got input_shape={shape}"
        )
    image = keras.Input(shape, dtype=model.inputs[0].dtype, name=model.inputs[0].name)
    try:
        resized = keras.models.clone_model(model, input_tensors=image)
        set_weights(resized, model.get_weights())
        resized.output_names = list(model.output_names)
    except ValueError as error:
        raise ValueError(f"{model.name} cannot take images of {shape}: {error}") from error
    return resized


def without_top(model: keras.Model) -> keras.Model:
    """The model up to the tensor that its last dense layer reads, as reals `(n, features)`.

    Raises:
        ValueError: the model does not end in a dense layer.
    """
    head, _ = _head(model)
    reals = _read_by(head)
    if isinstance(reals, list):
        reals = Dequantize(name=f"{head.name}_features")(reals)
    return keras.Model(model.inputs, reals, name=f"{model.name}_features")


def with_classes(model: keras.Model, classes: int) -> keras.Model:
    """The model with a fresh head for `classes` outputs; all other weights are kept.

    The new head's kernel is random and, of a low-bit model, the grid of its logits has seen no
    data: `calibrate(model, images, only_new=True)` gives it a scale and leaves the others as they
    are. The output keeps its name.

    Raises:
        ValueError: fewer than 1 class, or the model does not end in a dense layer.
    """
    classes = checked_count(classes, who="classes", least=1)
    head, after = _head(model)
    renamed = {"name": f"{head.name}_{classes}", "units": classes}
    x = _again(head, renamed)(_read_by(head))
    for layer in after:
        x = _again(layer, {"name": f"{layer.name}_{classes}"})(x)
    adapted = model_of(model.inputs, x, model.name, model.output_names)
    fit_kernels(adapted.get_layer(renamed["name"]))
    return adapted


def _again(layer, changes):
    """An unbuilt layer of the same configuration with `changes`, its quantizers unbuilt too."""
    config = {**layer.get_config(), **changes}
    for argument, quantizer in quantizers_of(layer):
        # The serialized form remembers the shape it was built for, which may change here.
        config[argument] = type(quantizer).from_config(quantizer.get_config())
    return type(layer).from_config(config)


def _read_by(head):
    """The reals that a dense layer reads, or `[codes, scale]`."""
    return list(head.input) if isinstance(head.input, (list, tuple)) else head.input


def _head(model):
    """The last dense layer and the layers behind it, which keep its shape."""
    layers = model.layers
    places = [i for i, layer in enumerate(layers) if isinstance(layer, keras.layers.Dense)]
    behind = layers[places[-1] + 1 :] if places else []
    if not places or not all(isinstance(layer, _BEHIND) for layer in behind):
        raise ValueError(
            f"{model.name} does not end in a dense layer, so its head cannot be changed"
        )
    return layers[places[-1]], behind
