"""Float ImageNet weights of `keras.applications` for the architectures that both have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_lowbit.zoo.architectures.resnet import PIXEL_DEVIATION

K = keras.layers


@dataclass(frozen=True)
class Twin:
    """The model of `keras.applications` with the same layers.

    Args:
        maker: its name there.
        rename: our layer name to the twin's.
        alphas: width multipliers with public weights; empty where the twin has no multiplier.
        sizes: image sizes with weights of their own; 224 serves all others.
        caffe: whether the twin takes pixels in the order BGR, without a deviation divided out.
    """

    maker: str
    rename: Callable[[str], str]
    alphas: tuple[float, ...] = ()
    sizes: tuple[int, ...] = ()
    caffe: bool = False

    def make(self, *, alpha, size=224, include_top=True, weights=None) -> keras.Model:
        """The twin; `weights="imagenet"` reads Keras' cache or the network."""
        options = {"alpha": alpha} if self.alphas else {}
        if include_top:
            options["classifier_activation"] = None
        return getattr(keras.applications, self.maker)(
            input_shape=(size, size, 3), include_top=include_top, weights=weights, **options
        )


def _resnet50_name(name):
    # conv2_block1_conv3_bn -> conv2_block1_3_bn; convolutions end in _conv there, _bn here.
    if name == "logits":
        return "predictions"
    stem, bn = re.fullmatch(r"(.*?)(_bn)?", name).groups()
    stem = re.sub(r"_conv(\d)$", r"_\1", stem).replace("_shortcut", "_0")
    return f"{stem}{bn or '_conv'}"


def _mobilenet_v1_name(name):
    fixed = {"stem": "conv1", "stem_bn": "conv1_bn", "logits": "conv_preds"}
    if name in fixed:
        return fixed[name]
    number, kind, bn = re.fullmatch(r"block(\d+)_(depth|point)wise(_bn)?", name).groups()
    return f"conv_{'dw' if kind == 'depth' else 'pw'}_{number}{bn or ''}"


def _mobilenet_v2_name(name):
    fixed = {
        "stem": "Conv1",
        "stem_bn": "bn_Conv1",
        "head": "Conv_1",
        "head_bn": "Conv_1_bn",
        "logits": "predictions",
    }
    if name in fixed:
        return fixed[name]
    name = re.sub(r"^block(\d+)_", r"block_\1_", name).replace("_bn", "_BN")
    return name.replace("block_0_", "expanded_conv_")


TWINS = {
    "mobilenet_v1": Twin(
        "MobileNet",
        _mobilenet_v1_name,
        alphas=(0.25, 0.5, 0.75, 1.0),
        sizes=(128, 160, 192, 224),
    ),
    "mobilenet_v2": Twin(
        "MobileNetV2",
        _mobilenet_v2_name,
        alphas=(0.35, 0.5, 0.75, 1.0, 1.3, 1.4),
        sizes=(96, 128, 160, 192, 224),
    ),
    "resnet50": Twin("ResNet50", _resnet50_name, caffe=True),
}


def load(model: keras.Model, *, alpha: float = 1.0) -> None:
    """Give a model of the zoo the ImageNet weights of its twin in `keras.applications`.

    Keras takes them from its cache (`~/.keras/models`) or the network. A head of another number
    of classes than 1,000 keeps its random weights.

    Args:
        model: of `zoo.build`, of an architecture in `TWINS`.
        alpha: the width multiplier it was built with.

    Raises:
        ValueError: Keras has no such weights, or they could not be had.
    """
    name = model.name
    if name not in TWINS:
        raise ValueError(
            f"keras.applications has no ImageNet weights of {name}; it has those of "
            f"{sorted(TWINS)}. Use weights=None, or the path of a file."
        )
    twin = TWINS[name]
    alphas = twin.alphas or (1.0,)
    if alpha not in alphas:
        raise ValueError(f"{name} has ImageNet weights for alpha in {alphas}. Got {alpha}")
    height, width = model.input_shape[1:3]
    size = height if height == width and height in twin.sizes else 224
    try:
        source = twin.make(
            alpha=alpha, size=size, include_top=_classes(model) == 1000, weights="imagenet"
        )
    except Exception as error:  # Keras raises a bare Exception where a download fails.
        raise ValueError(
            f"ImageNet weights of {name} are neither in Keras' cache (~/.keras/models) nor to be "
            f"had from the network ({error}). Where there is a network, run "
            f"keras.applications.{twin.maker}(weights='imagenet').save_weights"
            f"('{name}.weights.h5') and pass that file as weights="
        ) from error
    copy(source, model)


def read(model: keras.Model, path: str, *, alpha: float = 1.0) -> None:
    """Read a weights file of the twin, with or without its head.

    Raises:
        ValueError: the file is neither.
    """
    twin = TWINS[model.name]
    for include_top in (True, False):
        source = twin.make(alpha=alpha, include_top=include_top)
        try:
            # Keras warns of what does not fit, and raises after that.
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                source.load_weights(path)
        except (ValueError, KeyError) as error:
            reason = error
        else:
            return copy(source, model)
    raise ValueError(
        f"{path} holds neither weights of {model.name} nor of keras.applications.{twin.maker} "
        f"with alpha={alpha} ({reason})"
    ) from reason


def copy(source: keras.Model, model: keras.Model) -> None:
    """Map the weights of a twin onto a model of the zoo, layer by layer.

    Equal outputs up to float rounding, for pixels 0..255 here and preprocessed ones there: biases
    in front of a batch norm go into its mean, `mean - bias`; the order of colours and the divided
    deviation go into the first kernel. The head is left alone where the numbers of classes differ
    or the twin has none.

    Args:
        source: a model of `keras.applications`.
        model: of `zoo.build`, of an architecture in `TWINS`.

    Raises:
        ValueError: shapes that differ, as with another width multiplier or the small stem.
    """
    twin = TWINS[model.name]
    known = {layer.name: layer for layer in source.layers}
    first = True
    for layer in model.layers:
        theirs = known.get(twin.rename(layer.name)) if layer.weights else None
        if isinstance(layer, K.Dense):
            _copy_head(theirs, layer)
        elif isinstance(layer, (K.Conv2D, K.DepthwiseConv2D)):
            kernel = _array(theirs.kernel)
            if first and twin.caffe:
                kernel = kernel[:, :, ::-1] * np.float32(PIXEL_DEVIATION)[:, None]
            _assign(layer, "kernel", kernel)
            first = False
        elif isinstance(layer, K.BatchNormalization):
            _copy_batch_norm(theirs, known[twin.rename(layer.name.removesuffix("_bn"))], layer)


def _copy_head(theirs, layer):
    if theirs is None:
        return
    # MobileNet's head is a 1x1 convolution there.
    kernel = _array(theirs.kernel)
    kernel = kernel.reshape(kernel.shape[-2:])
    if kernel.shape[-1] == layer.units:
        _assign(layer, "kernel", kernel)
        _assign(layer, "bias", _array(theirs.bias))


def _copy_batch_norm(theirs, conv, layer):
    mean = _array(theirs.moving_mean)
    if conv.bias is not None:
        mean = mean - _array(conv.bias)
    _assign(layer, "gamma", _array(theirs.gamma))
    _assign(layer, "beta", _array(theirs.beta))
    _assign(layer, "moving_mean", mean)
    _assign(layer, "moving_variance", _array(theirs.moving_variance))


def _assign(layer, attribute, value):
    variable = getattr(layer, attribute)
    if tuple(variable.shape) != value.shape:
        raise ValueError(
            f"{layer.name}.{attribute} has the shape {tuple(variable.shape)}, the weights of "
            f"keras.applications {value.shape}. Build with the same alpha, and ResNets with "
            "small=False"
        )
    variable.assign(value)


def _classes(model):
    return next((layer.units for layer in model.layers if layer.name == "logits"), None)


def _array(variable):
    return ops.convert_to_numpy(variable)
