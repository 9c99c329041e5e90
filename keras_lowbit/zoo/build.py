"""Float models by name."""

from __future__ import annotations

import inspect
import warnings

import keras

from keras_lowbit.checks import did_you_mean
from keras_lowbit.paths import expanded
from keras_lowbit.transform.copies import set_weights
from keras_lowbit.zoo.architectures import imagenet
from keras_lowbit.zoo.architectures.alexnet import alexnet_bn
from keras_lowbit.zoo.architectures.mnasnet import mnasnet_a1, mnasnet_b1
from keras_lowbit.zoo.architectures.mobilenet_v1 import mobilenet_v1
from keras_lowbit.zoo.architectures.mobilenet_v2 import mobilenet_v2
from keras_lowbit.zoo.architectures.resnet import resnet18, resnet34, resnet50
from keras_lowbit.zoo.architectures.resnet_cifar import (
    load_torch_names,
    resnet8,
    resnet20,
    resnet32,
    resnet56,
)

ARCHITECTURES = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mnasnet_a1": mnasnet_a1,
    "mnasnet_b1": mnasnet_b1,
    "alexnet_bn": alexnet_bn,
}


def build(name: str, *, weights=None, **options) -> keras.Model:
    """A float model, with random weights, those of ImageNet, or those of a file.

    Args:
        name: one of `ARCHITECTURES`.
        weights: `None`; `"imagenet"`, for the weights of `keras.applications` (MobileNetV1, V2 and
            ResNet-50, from Keras' cache or the network; a head of other than 1,000 classes stays
            random); or a path, see `load_weights`.
        **options: arguments of the architecture, such as `input_shape`, `classes`, `alpha`,
            `include_top` and `small`.

    Returns:
        A functional model that takes pixels 0..255 and ends in logits.

    Raises:
        ValueError: an unknown name or option (the nearest is suggested), an option out of range,
            weights that do not fit or cannot be had.
    """
    _check("architecture", name, ARCHITECTURES)
    allowed = inspect.signature(ARCHITECTURES[name]).parameters
    for option in options:
        _check(f"option of {name}", option, allowed)
    model = ARCHITECTURES[name](**options)
    alpha = options.get("alpha", 1.0)
    if weights == "imagenet":
        imagenet.load(model, alpha=alpha)
    elif weights is not None:
        load_weights(model, str(weights), alpha=alpha)
    return model


def load_weights(model: keras.Model, path: str, *, alpha: float = 1.0) -> None:
    """Read weights of the same architecture into `model`.

    Args:
        model: of `build`.
        path: `.weights.h5` or `.keras` of the same model; `.weights.h5` or `.h5` of its twin in
            `keras.applications`, where there is one; `.npz` with PyTorch names (CIFAR ResNets).
        alpha: width multiplier of the twin.

    Raises:
        ValueError: weights that do not fit, a `~` without a home folder.
    """
    path = str(expanded(path))
    if path.endswith(".npz"):
        load_torch_names(model, path)
        return
    try:
        # Keras warns of what does not fit, and raises after that.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            _read(model, path)
    except (ValueError, KeyError):
        if model.name not in imagenet.TWINS or not path.endswith(".h5"):
            raise
        imagenet.read(model, path, alpha=alpha)


def _read(model, path):
    if path.endswith((".keras", ".h5")) and not path.endswith(".weights.h5"):
        source = keras.models.load_model(path, compile=False)
        set_weights(model, source.get_weights())
    else:
        model.load_weights(path)


def _check(what, name, known):
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"Unknown {what} {name!r}; known: {sorted(known)}.{hint}")
