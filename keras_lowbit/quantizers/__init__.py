"""Quantizers, one method a file, and the registry that finds them by name."""

from __future__ import annotations

import inspect

import keras

from keras_lowbit.checks import did_you_mean
from keras_lowbit.numerics.grid import ROLES
from keras_lowbit.quantizers.affine import Affine
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.channel_balanced import ChannelBalanced
from keras_lowbit.quantizers.dorefa import DoReFa
from keras_lowbit.quantizers.levels import Levels
from keras_lowbit.quantizers.lsq import LSQ
from keras_lowbit.quantizers.minmax import MinMax
from keras_lowbit.quantizers.mse import MSE
from keras_lowbit.quantizers.pact import PACT
from keras_lowbit.quantizers.percentile import Percentile
from keras_lowbit.quantizers.sign import Sign
from keras_lowbit.quantizers.ternary import Ternary
from keras_lowbit.quantizers.threshold import Threshold
from keras_lowbit.scheme import DECIDED

__all__ = [
    "LSQ",
    "MSE",
    "PACT",
    "Affine",
    "ChannelBalanced",
    "DoReFa",
    "Levels",
    "MinMax",
    "Percentile",
    "Quantizer",
    "Sign",
    "Ternary",
    "Threshold",
    "get",
    "names",
]

_BY_NAME = {
    "lsq": LSQ,
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": MSE,
    "dorefa": DoReFa,
    "pact": PACT,
    "affine": Affine,
    "sign": Sign,
    "ternary": Ternary,
    "levels": Levels,
    "channel_balanced": ChannelBalanced,
    "threshold": Threshold,
}


def names() -> tuple[str, ...]:
    """Names that `get` understands."""
    return tuple(_BY_NAME)


def get(identifier, **defaults):
    """A quantizer from a name, a serialized config or an object; `None` stays `None`.

    Args:
        identifier: `None`, a name of `names()`, a config of `keras.saving`, or a `Quantizer`.
        **defaults: constructor arguments used when `identifier` is a name. An object has its own;
            of them `role` must be this one. So has a config, which comes from a saved model and is
            taken as it is.

    Raises:
        ValueError: unknown name or argument (the nearest is suggested), another type, arguments of
            a wrong type, or a quantizer of kernels for activations and the reverse.
    """
    if identifier is None:
        return None
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
        if isinstance(identifier, Quantizer):
            return identifier
    if isinstance(identifier, Quantizer):
        role = defaults.get("role", identifier.role)
        if identifier.role != role:
            kind = type(identifier).__name__
            _check_role(type(identifier), role, kind)
            raise ValueError(
                f"{kind}: a quantizer with role={identifier.role!r} is given where role={role!r} "
                f"is needed: other ends of the grid. Make it as {kind}(..., role={role!r})"
            )
        return identifier
    if isinstance(identifier, str):
        key = identifier.lower()
        if key in _BY_NAME:
            _check_role(_BY_NAME[key], defaults.get("role"), f"Quantizer {key!r}")
            _check_arguments(key, defaults)
            try:
                return _BY_NAME[key](**defaults)
            except TypeError as error:
                raise ValueError(
                    f"Quantizer {key!r} cannot be made of {defaults}: {error}"
                ) from error
        hint = did_you_mean(key, _BY_NAME)
        raise ValueError(f"Unknown quantizer {identifier!r}; known: {sorted(_BY_NAME)}.{hint}")
    raise ValueError(
        "A quantizer is given as None, a name, a config or a Quantizer object. "
        f"Got {identifier!r} of type {type(identifier).__name__}"
    )


def _check_role(kind, role, who):
    if role in ROLES and role not in kind.roles:
        known = [name for name, other in _BY_NAME.items() if role in other.roles]
        raise ValueError(
            f"{who} quantizes {' and '.join(kind.roles)}s alone. For {role}s use one of {known}"
        )


def _check_arguments(key, given):
    """Unknown ones are told before Keras does, who names neither the known nor the nearest."""
    own, others = set(), set()
    for parent in _BY_NAME[key].__mro__:
        if "__init__" in vars(parent):
            found = own if issubclass(parent, Quantizer) else others
            found |= {*inspect.signature(parent.__init__).parameters} - {"self", "kwargs"}
    options = sorted(own - {*DECIDED})
    for name in given:
        if name not in own | others:
            raise ValueError(
                f"Quantizer {key!r} has no option {name!r}. It has {options}."
                f"{did_you_mean(name, options)}"
            )
