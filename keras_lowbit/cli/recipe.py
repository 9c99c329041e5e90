"""Recipes: strict TOML files that say how a model is made."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_lowbit.scheme import Scheme


@dataclass(frozen=True)
class Data:
    """`name`: what `data.load` takes. `holdout`: training images set aside for choices."""

    name: str = "digits"
    holdout: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Model:
    """`architecture`: a name of `keras_lowbit.zoo.build`. `weights`: a file with float weights."""

    architecture: str = "resnet8"
    weights: str = ""


@dataclass(frozen=True)
class Quantize:
    """Scheme, number of training images and method for calibration; `""` trains a float model."""

    scheme: str = "w8a8"
    calibration_images: int = 512
    method: str = "mse"


@dataclass(frozen=True)
class Train:
    """One `fit`: SGD with momentum, cosine schedule after a linear warm-up of `warmup` epochs.

    `bit_descent` maps an epoch (a string in TOML) to bits. `distill` mixes in the logits of the
    float model: loss = (1 - distill) * cross-entropy + distill * T^2 * KL(teacher, student).
    """

    epochs: int = 0
    batch_size: int = 128
    learning_rate: float = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    warmup: float = 0.0
    augment: bool = True
    bit_descent: dict[str, int] = field(default_factory=dict)
    distill: float = 0.0
    temperature: float = 1.0
    reestimate_batches: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Export:
    """Files to write: `weights` lists `"int8"`, `"int4"`, `"int4_all"`."""

    weights: tuple[str, ...] = ("int8", "int4")
    verify_images: int = 16


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; sections and keys are those of the TOML file."""

    name: str
    data: Data = Data()
    model: Model = Model()
    quantize: Quantize = Quantize()
    train: Train = Train()
    export: Export = Export()


_SECTIONS = {"data": Data, "model": Model, "quantize": Quantize, "train": Train, "export": Export}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a TOML file.

    Raises:
        ValueError: no such file, not TOML, an unknown section or key (the nearest is suggested),
            a value of the wrong type or out of range.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    parts = {}
    for section, values in raw.items():
        if section not in _SECTIONS:
            raise ValueError(f"{path}: unknown section [{section}].{_near(section, _SECTIONS)}")
        parts[section] = _section(values, _SECTIONS[section], f"{path} [{section}]")
    recipe = Recipe(path.stem, **parts)
    _check(recipe, path)
    return recipe


def _near(given, known):
    near = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {sorted(known)}"


def _section(values, cls, where):
    known = {f.name: f for f in dataclasses.fields(cls)}
    made: dict[str, Any] = {}
    default = cls()
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}.{_near(key, known)}")
        wanted = type(getattr(default, key))
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if wanted is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not wanted:
            raise ValueError(f"{where}: {key} must be {wanted.__name__}. Got {value!r}")
        made[key] = value
    return cls(**made)


def _check(recipe, path):
    if recipe.quantize.scheme:
        Scheme.of(recipe.quantize.scheme)
    train = recipe.train
    for key, low in (("epochs", 0), ("batch_size", 1), ("reestimate_batches", 0)):
        if getattr(train, key) < low:
            raise ValueError(
                f"{path} [train]: {key} must be at least {low}. Got {getattr(train, key)}"
            )
    if not train.learning_rate > 0:
        raise ValueError(
            f"{path} [train]: learning_rate must be positive. Got {train.learning_rate}"
        )
    if not 0 <= train.distill <= 1:
        raise ValueError(f"{path} [train]: distill must lie in 0..1. Got {train.distill}")
    for epoch, bits in train.bit_descent.items():
        if not epoch.isdigit() or int(epoch) >= max(train.epochs, 1):
            raise ValueError(
                f"{path} [train]: bit_descent: {epoch!r} is no epoch of 0..{train.epochs - 1}"
            )
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"{path} [train]: bit_descent: bits must be 1..8. Got {bits!r}")
