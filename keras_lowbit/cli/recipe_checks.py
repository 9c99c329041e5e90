"""What a recipe must keep to: values in range, and sections that go together."""

from __future__ import annotations

import dataclasses
import math

from keras_lowbit import quantizers
from keras_lowbit.checks import did_you_mean
from keras_lowbit.cli.methods import check_methods
from keras_lowbit.integer.build import TYPES, WEIGHTS
from keras_lowbit.numerics.ranges import METHODS
from keras_lowbit.transform.rescale_depthwise import METHODS as RESCALINGS
from keras_lowbit.tuning.block_model import Rates
from keras_lowbit.tuning.reconstruct import ROUNDINGS
from tflite_export.targets import TARGETS

XLA = ("auto", "on", "off")
_FIT = {
    "epochs": 0,
    "batch_size": 1,
    "weight_decay": 0.0,
    "clipnorm": 0.0,
    "warmup": 0.0,
    "shift": 0,
    "cutout": 0,
    "mixup": 0.0,
    "reestimate_batches": 0,
    "seed": 0,
}
_SEEDS = 2**32  # of NumPy and Keras
_AT_LEAST = {
    "data": {"holdout": 0, "seed": 0, "size": 0},
    "pretrain": _FIT,
    "quantize": {"calibration_images": 1, "ends_bits": 0},
    "reconstruct": {
        "steps": 0,
        "batch_size": 1,
        "drop": 0.0,
        "images": 0,
        "views": 0,
        "logit_weight": 0.0,
        "logit_blocks": 1,
    },
    "refine": {"steps": 0, "batch_size": 1},
    "train": _FIT,
    "export": {"verify_images": 0},
}
_ONE_OF = {
    ("data", "channels"): (1, 3),
    ("model", "rescale"): ("", *RESCALINGS),
    ("quantize", "method"): METHODS,
    ("reconstruct", "rounding"): ROUNDINGS,
    ("pretrain", "xla"): XLA,
    ("train", "xla"): XLA,
    ("export", "target"): tuple(TARGETS),
    ("export", "input_type"): ("", *TYPES),
    ("export", "output_type"): TYPES,
}


def checked(recipe, path: str):
    """The `recipe.Recipe`, or `ValueError` naming file, section and key of what is wrong.

    Args:
        recipe: sections whose values have the right types.
        path: the file, as errors name it.
    """
    scheme = _checked_scheme(recipe, f"{path} [quantize]")
    _check_ranges(recipe, path)
    _check_model(recipe.model, f"{path} [model]")
    _check_reconstruct(recipe.reconstruct, f"{path} [reconstruct]")
    _check_rates(recipe.refine, f"{path} [refine]")
    _check_pretrain(recipe.pretrain, f"{path} [pretrain]")
    _check_train(recipe, scheme, f"{path} [train]")
    _check_export(recipe.export, f"{path} [export]")
    for section in ("reconstruct", "refine"):
        if getattr(recipe, section).steps and scheme is None:
            raise ValueError(f"{path} [{section}]: needs a [quantize] scheme")
    check_methods(recipe, f"{path} [methods]")
    return recipe


def near(given, known) -> str:
    """What an unknown word may have meant, else all that is known."""
    return did_you_mean(given, known) or f" Known: {sorted(known)}"


def _checked_scheme(recipe, where):
    try:
        scheme = recipe.scheme
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if scheme is None:
        _check_unused(recipe.quantize, where)
    for key in ("kernel", "activation") if scheme else ():
        named = getattr(scheme, key)
        if named not in quantizers.names():
            raise ValueError(
                f"{where}: {key} is no quantizer. Got {named!r}.{near(named, quantizers.names())}"
            )
    return scheme


def _check_unused(quantize, where):
    kept = ("scheme", "calibration_images")  # a float model is rescaled by these images too
    plain = vars(type(quantize)())
    for name, given in vars(quantize).items():
        if name not in kept and given != plain[name]:
            raise ValueError(
                f"{where}: {name} does nothing without a scheme: a float model is made. "
                f"Got {name} = {given!r}; give a scheme, such as 'w8a8', or leave it out"
            )


def _check_ranges(recipe, path):
    for section, limits in _AT_LEAST.items():
        for key, low in limits.items():
            value = getattr(getattr(recipe, section), key)
            if not value >= low or math.isinf(value):
                raise ValueError(f"{path} [{section}]: {key} must be at least {low}. Got {value}")
    for section in ("data", "pretrain", "train"):
        seed = getattr(recipe, section).seed
        if seed >= _SEEDS:
            raise ValueError(
                f"{path} [{section}]: seed must be at most {_SEEDS - 1}, 2**32 - 1. Got {seed}"
            )
    for (section, key), allowed in _ONE_OF.items():
        value = getattr(getattr(recipe, section), key)
        if value not in allowed:
            raise ValueError(f"{path} [{section}]: {key} must be one of {allowed}. Got {value!r}")


def _check_model(model, where):
    if model.rescale and not model.fold:
        raise ValueError(f"{where}: rescale needs fold = true, batch norms in the kernels")


def _check_reconstruct(reconstruct, where):
    if reconstruct.drop > 1:
        raise ValueError(f"{where}: drop must lie in 0..1. Got {reconstruct.drop}")
    if not 0 < reconstruct.zoom <= 1:
        raise ValueError(f"{where}: zoom must lie above 0 and up to 1. Got {reconstruct.zoom}")
    if not 0 < reconstruct.memory < math.inf:
        raise ValueError(f"{where}: memory must be positive. Got {reconstruct.memory}")
    if any(type(n) is not int or n < 1 for n in reconstruct.block_steps.values()):
        raise ValueError(
            f"{where}: block_steps must be whole numbers, at least 1. Got {reconstruct.block_steps}"
        )
    _check_rates(reconstruct, where)


def _check_rates(section, where):
    try:
        section.all_rates  # noqa: B018 - made to see whether they can be
    except (TypeError, ValueError) as error:
        known = [f.name for f in dataclasses.fields(Rates)]
        raise ValueError(f"{where}: rates are of {known}. {error}") from error


def _check_pretrain(pretrain, where):
    _check_fit(pretrain, where)
    if pretrain.bit_descent or pretrain.distill or pretrain.teacher:
        raise ValueError(f"{where}: bit_descent, distill and teacher belong to [train]")


def _check_train(recipe, scheme, where):
    train = recipe.train
    _check_fit(train, where)
    if scheme is None and train.bit_descent:
        raise ValueError(f"{where}: bit_descent needs a [quantize] scheme below 8 bits")
    if scheme is None and train.distill and not train.teacher:
        raise ValueError(
            f"{where}: distill needs a [quantize] scheme, a quantized student, or a teacher"
        )
    if train.teacher and not (train.distill and train.epochs):
        raise ValueError(f"{where}: teacher needs distill and epochs above 0")
    if train.teacher and recipe.methods.mutual:
        raise ValueError(f"{where}: teacher is frozen; mutual trains the float model")


def _check_export(export, where):
    weights = export.weights
    if any(w not in WEIGHTS for w in weights) or len(set(weights)) < len(weights):
        raise ValueError(
            f"{where}: weights must list some of {WEIGHTS}, each once. Got {list(weights)}"
        )


def _check_fit(train, where):
    for key in ("learning_rate", "temperature"):
        value = getattr(train, key)
        if not 0 < value < math.inf:
            raise ValueError(f"{where}: {key} must be positive. Got {value}")
    for key in ("momentum", "distill"):
        value = getattr(train, key)
        if not 0 <= value <= 1:
            raise ValueError(f"{where}: {key} must lie in 0..1. Got {value}")
    if train.epochs and train.warmup >= train.epochs:
        raise ValueError(
            f"{where}: warmup must be shorter than the {train.epochs} epochs. Got {train.warmup}"
        )
    if (train.cutout or train.mixup) and not train.augment:
        raise ValueError(f"{where}: cutout and mixup need augment = true")
    for epoch, bits in train.bit_descent.items():
        if not epoch.isdecimal() or int(epoch) >= max(train.epochs, 1):
            raise ValueError(
                f"{where}: bit_descent: {epoch!r} is no epoch of 0..{max(train.epochs, 1) - 1}"
            )
        if type(bits) is not int or not 1 <= bits <= 8:
            raise ValueError(f"{where}: bit_descent: bits must be 1..8. Got {bits!r}")
