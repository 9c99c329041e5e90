"""Recipes: strict TOML files that say how a model is made."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_lowbit.cli.methods import Methods
from keras_lowbit.cli.recipe_checks import checked, near
from keras_lowbit.paths import expanded
from keras_lowbit.scheme import Scheme
from keras_lowbit.tuning.block_model import Rates
from keras_lowbit.tuning.refine import RATES as REFINE_RATES


@dataclass(frozen=True)
class Data:
    """The images, as `data.load` takes them.

    Args:
        name: of a data set, an `.npz` file or a folder of images.
        holdout: training images set aside for choices.
        seed: which images are set aside follows from it.
        size: height and width in pixels of images from folders, 0 for as they are; other images
            must have the size that is given.
        channels: of images from folders, 3 or 1; other images must be grey for 1.
        about: what a reader of figures must know of the images.
    """

    name: str = "digits"
    holdout: int = 0
    seed: int = 0
    size: int = 0
    channels: int = 3
    about: str = ""


@dataclass(frozen=True)
class Model:
    """The float model that is quantized.

    Args:
        architecture: a name of `keras_lowbit.zoo.build` or a float `.keras` file.
        weights: a file with float weights; empty for random ones, or those of the `.keras` file.
        fold: put batch norms into the kernels before quantization (`fold_batchnorm`).
        rescale: equalize channels of folded layers that follow each other (`rescale_pairs`):
            `"fat"`, `"cle"` or `"activations"`; empty for as they are.
    """

    architecture: str = "resnet8"
    weights: str = ""
    fold: bool = False
    rescale: str = ""


@dataclass(frozen=True)
class Quantize:
    """The scheme (`Scheme`), and how scales are found (`calibrate`).

    Args:
        scheme: bits of kernels and activations, `"w4a8"`, or `"wta8"`; empty for a float model.
        kernel: quantizer of kernels, a name; `"wta8"` has its own, `"ternary"`.
        activation: quantizer of activations, a name.
        per_channel: one kernel scale for each output channel; false for one a kernel.
        ends_bits: bits of the first and the last layer, 0 to treat them like the others.
        exceptions: layer-name pattern to a scheme, or to `"float"` for a layer that stays float.
        binary_activation: what 1-bit activations are, `"heaviside"` or `"sign"`.
        kernel_options: more arguments of the quantizer of kernels.
        activation_options: more arguments of the quantizer of activations.
        calibration_images: training images that `calibrate` looks at, the first ones.
        method: how `calibrate` finds scales: `"mse"`, `"minmax"` or `"percentile"` (99.99).
    """

    scheme: str = "w8a8"
    kernel: str = "lsq"
    activation: str = "lsq"
    per_channel: bool = True
    ends_bits: int = 8
    exceptions: dict[str, str] = field(default_factory=dict)
    binary_activation: str = Scheme.binary_activation
    kernel_options: dict[str, Any] = field(default_factory=dict)
    activation_options: dict[str, Any] = field(default_factory=dict)
    calibration_images: int = 512
    method: str = "mse"

    def __post_init__(self):
        for key in ("kernel", "activation"):
            object.__setattr__(self, key, getattr(self, key).lower())


@dataclass(frozen=True)
class Reconstruct:
    """Block reconstruction before `[train]`, without labels (`tuning.reconstruct`).

    Args:
        steps: for each block, 0 for none.
        block_steps: steps of blocks whose names match a pattern (`{ "block[0-3]_*" = 100 }`).
        batch_size: images a step.
        drop: share of elements that stay real meanwhile.
        images: the first so many training images, 0 for all.
        views: random views of each image beside it (`data.zoomed_views`).
        zoom: least share of both sides that a view shows.
        rounding: where kernels start, `"nearest"` or `"data"`.
        logit_weight: of the divergence of the logits beside a block's own error.
        logit_blocks: how many of the last blocks are trained as one, for the logits.
        match_means: bring channel means of blocks' outputs in order (`tuning.means`).
        rates: learning rates by name (`tuning.Rates`), those left out as there.
        block_rates: rates of blocks whose names match a pattern, those left out as in `rates`.
        memory: gibibytes for activations.
    """

    steps: int = 0
    block_steps: dict[str, int] = field(default_factory=dict)
    batch_size: int = 20
    drop: float = 0.5
    images: int = 0
    views: int = 0
    zoom: float = 0.6
    rounding: str = "nearest"
    logit_weight: float = 0.0
    logit_blocks: int = 1
    match_means: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    block_rates: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: float = 1.0

    @property
    def all_rates(self) -> tuple[Rates, dict[str, Rates]]:
        """Rates of most blocks, and by pattern."""
        others = {k: Rates(**{**self.rates, **v}) for k, v in self.block_rates.items()}
        return Rates(**self.rates), others

    @property
    def planned(self) -> dict[str, Any]:
        """What blocks, their steps and rates follow from: for `reconstruct`, and its plan alone."""
        rates, block_rates = self.all_rates
        return {
            "steps": self.steps,
            "block_steps": self.block_steps,
            "logit_weight": self.logit_weight,
            "logit_blocks": self.logit_blocks,
            "rates": rates,
            "block_rates": block_rates,
        }


@dataclass(frozen=True)
class Refine:
    """Distillation of the whole model behind `[reconstruct]`, on its images (`tuning.refine`).

    Args:
        steps: optimizer steps, 0 for none.
        batch_size: images a step.
        rates: learning rates by name (`tuning.Rates`), those left out as in `refine`.
    """

    steps: int = 0
    batch_size: int = 10
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def all_rates(self) -> Rates:
        """Rates of everything."""
        return dataclasses.replace(REFINE_RATES, **self.rates)


@dataclass(frozen=True)
class Train:
    """One `fit`: SGD with momentum, a linear warm-up and a cosine schedule.

    Args:
        epochs: passes over the training images, 0 for none.
        batch_size: images a step.
        learning_rate: the highest, from which the cosine falls to 0.
        momentum: of SGD.
        nesterov: whether momentum is Nesterov's.
        weight_decay: share of a weight that a step of learning rate 1 takes away; Keras decouples
            it, so with momentum 0.9 PyTorch's value is a tenth of it.
        clipnorm: largest norm of all gradients together, 0 for no limit.
        warmup: epochs, whole or not, in which the learning rate rises.
        augment: shift and, with `flip`, mirror images at random.
        flip: whether half of the images are mirrored, where `augment` is on.
        shift: pixels by which images are shifted at most, where `augment` is on.
        cutout: side in pixels of a square set to zero, 0 for none.
        mixup: parameter of the beta distribution by which two images and their targets are mixed,
            0 for none.
        bit_descent: bits from an epoch on; epochs are strings in TOML (`{ "0" = 4, "5" = 2 }`).
        distill: share of the teacher's logits in the loss: (1 - distill) * cross-entropy +
            distill * T^2 * KL(teacher, student).
        teacher: whose logits these are, a name of `zoo.load` or a `.keras` file; empty for the
            recipe's own float model. With it a float model is distilled into, too.
        temperature: T in the loss of `distill`.
        reestimate_batches: batches, augmented as in training, from which batch norms take their
            statistics after the last epoch; 0 for none.
        xla: on TensorFlow (JAX always compiles, PyTorch never): `"auto"` leaves the choice to
            Keras, except for depthwise convolutions, which XLA makes slow on a CPU; `"on"`;
            `"off"`, with which short runs are done sooner.
        seed: start of all randomness.
    """

    epochs: int = 0
    batch_size: int = 128
    learning_rate: float = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    clipnorm: float = 0.0
    warmup: float = 0.0
    augment: bool = True
    flip: bool = True
    shift: int = 4
    cutout: int = 0
    mixup: float = 0.0
    bit_descent: dict[str, int] = field(default_factory=dict)
    distill: float = 0.0
    teacher: str = ""
    temperature: float = 1.0
    reestimate_batches: int = 0
    xla: str = "auto"
    seed: int = 0

    @property
    def descent(self) -> dict[int, int]:
        """`bit_descent` by number of the epoch."""
        return {int(epoch): bits for epoch, bits in self.bit_descent.items()}


@dataclass(frozen=True)
class Export:
    """Files to write (`tflite_export.convert`).

    Args:
        weights: a file for each of `"int8"`, `"int4"`, `"int4_all"` that is listed.
        target: `"android"`, `"builtin"` (also tflite-runtime 2.14) or `"coral"` (Edge TPU).
        input_type: `"float32"`, `"uint8"` or `"int8"`; empty for what the model allows.
        output_type: `"float32"`, `"uint8"` or `"int8"`.
        verify_images: training images on which every tensor of a file is compared with the
            reference, 0 for none.
    """

    weights: tuple[str, ...] = ("int8", "int4")
    target: str = "android"
    input_type: str = ""
    output_type: str = "float32"
    verify_images: int = 16


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; sections and keys are those of the TOML file.

    `pretrain` is a `fit` of the float model; `reconstruct` tunes the quantized one without labels,
    then `train` is a `fit` of it, by `methods`.
    """

    name: str
    data: Data = Data()
    model: Model = Model()
    pretrain: Train = Train()
    quantize: Quantize = Quantize()
    reconstruct: Reconstruct = Reconstruct()
    refine: Refine = Refine()
    train: Train = Train()
    methods: Methods = field(default_factory=Methods)
    export: Export = Export()

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of the `[quantize]` section; `None` for a float model."""
        given = self.quantize
        if not given.scheme:
            return None
        named = Scheme.of(given.scheme)
        return dataclasses.replace(
            named,
            # "wta8" names its quantizer; elsewhere the section's own key does.
            kernel=given.kernel if named.kernel == Scheme.kernel else named.kernel,
            activation=given.activation,
            binary_activation=given.binary_activation,
            kernel_options=given.kernel_options,
            activation_options=given.activation_options,
            per_channel=given.per_channel,
            ends_bits=given.ends_bits or None,
            exceptions=given.exceptions,
        )


_SECTIONS = {
    "data": Data,
    "model": Model,
    "pretrain": Train,
    "quantize": Quantize,
    "reconstruct": Reconstruct,
    "refine": Refine,
    "train": Train,
    "methods": Methods,
    "export": Export,
}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a TOML file.

    Raises:
        ValueError: no such file, not TOML, an unknown section or key (the nearest is suggested),
            a value of the wrong type or out of range.
    """
    path = expanded(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    parts = {}
    for section, values in raw.items():
        if section not in _SECTIONS:
            raise ValueError(f"{path}: unknown section [{section}].{near(section, _SECTIONS)}")
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {section} must be a section, [{section}]. Got {values!r}")
        parts[section] = _section(values, _SECTIONS[section], f"{path} [{section}]")
    recipe = checked(Recipe(path.stem, **parts), str(path))
    # Here alone, as a key that was left out looks like its default later.
    _check_kernel(recipe, raw.get("quantize", {}), f"{path} [quantize]")
    return recipe


def changed(recipe: Recipe, *, epochs=None, seed=None, xla=None, data=None, weights=None) -> Recipe:
    """A recipe with what the command line says in place of the file's values; `None` keeps."""
    wanted = {
        ("train", "epochs"): epochs,
        ("train", "seed"): seed,
        ("pretrain", "seed"): seed,
        ("train", "xla"): xla,
        ("pretrain", "xla"): xla,
        ("data", "name"): data,
        ("model", "weights"): weights,
    }
    for (section, key), value in wanted.items():
        if value is not None:
            part = dataclasses.replace(getattr(recipe, section), **{key: value})
            recipe = dataclasses.replace(recipe, **{section: part})
    told = [f"--{name} {v}" for name, v in (("epochs", epochs), ("seed", seed)) if v is not None]
    return checked(recipe, " ".join([recipe.name, *told]))


def without_folders(metrics: dict) -> dict:
    """A copy of a run's metrics whose recipe names files alone, not where they lay."""
    recipe = {
        name: dict(part) if isinstance(part, dict) else part
        for name, part in metrics["recipe"].items()
    }
    for section, key in (("data", "name"), ("model", "weights"), ("train", "teacher")):
        recipe[section][key] = Path(recipe[section].get(key, "")).name
    return {**metrics, "recipe": recipe}


def refines_codes(section: dict) -> bool:
    """Whether the `[refine]` of a recipe, as metrics hold it, trained codes of kernels too.

    Those of before `rates` did.
    """
    return "rates" not in section or bool(section["rates"].get("codes_4bit"))


def _check_kernel(recipe, given, where):
    """Refuse a quantizer of kernels beside a scheme that names another one."""
    scheme, kernel = recipe.scheme, given.get("kernel")
    if scheme is not None and kernel is not None and kernel.lower() != scheme.kernel:
        raise ValueError(
            f"{where}: scheme {recipe.quantize.scheme!r} names its quantizer of kernels, "
            f"{scheme.kernel!r}; beside it kernel = {kernel!r} does nothing. Leave kernel out, or "
            "give the scheme in bits, such as 'w2a8'"
        )


def _section(values, cls, where):
    known = {f.name: f for f in dataclasses.fields(cls)}
    made: dict[str, Any] = {}
    default = cls()
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}.{near(key, known)}")
        wanted = type(getattr(default, key))
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not wanted:
            name = {"dict": "a table", "tuple": "a list"}.get(wanted.__name__, wanted.__name__)
            raise ValueError(f"{where}: {key} must be {name}. Got {value!r}")
        made[key] = value
    return cls(**made)
