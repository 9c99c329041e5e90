"""Float models by name."""

from __future__ import annotations

import difflib

import keras

from keras_lowbit.zoo.architectures.resnet_cifar import resnet8, resnet20, resnet32, resnet56

ARCHITECTURES = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
}


def build(name: str, *, weights=None, **options) -> keras.Model:
    """A float model, with random weights or those of a file.

    Args:
        name: one of `ARCHITECTURES`.
        weights: `None`, or a path: `.weights.h5` or `.keras` of the same architecture, or an
            `.npz` with PyTorch names where the architecture can read one.
        **options: arguments of the architecture, such as `input_shape` and `classes`.

    Raises:
        ValueError: an unknown name (the nearest is suggested), or weights that do not fit.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown architecture {name!r}; known: {sorted(ARCHITECTURES)}.{hint}")
    model = ARCHITECTURES[name](**options)
    if weights is not None:
        load_weights(model, str(weights))
    return model


def load_weights(model: keras.Model, path: str) -> None:
    """Read weights of the same architecture into `model`; `ValueError` if they do not fit."""
    if path.endswith(".npz"):
        from keras_lowbit.zoo.architectures.resnet_cifar import load_torch_names

        load_torch_names(model, path)
    elif path.endswith((".keras", ".h5")) and not path.endswith(".weights.h5"):
        source = keras.models.load_model(path, compile=False)
        model.set_weights(source.get_weights())
    else:
        model.load_weights(path)
