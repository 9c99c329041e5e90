"""Files that the commands read and write: one clear error, and nothing half-written."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import keras

from keras_lowbit import data as datasets
from keras_lowbit import packed, walk, zoo
from keras_lowbit.data.sources import is_folder
from keras_lowbit.integer.integer_op import IntegerOp
from keras_lowbit.kinds import kind_of
from keras_lowbit.paths import expanded
from keras_lowbit.whole_files import DAMAGE, first_line, replacing
from keras_lowbit.zoo.build import load_weights

# Keras' and HDF5's readers let more through.
_DAMAGE = (*DAMAGE, IndexError, AttributeError, RuntimeError)


def load_model(path: str | Path) -> keras.Model:
    """The model of a `.keras` file: float, quantized, packed or frozen.

    Raises:
        ValueError: no such file, another kind of file, or a damaged one.
    """
    path = expanded(path)
    if path.suffix != ".keras":
        raise ValueError(f"{path}: expected a .keras file")
    check_file(path, "a .keras file")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            manifest = packed.PACKAGE in json.loads(archive.read("metadata.json"))
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged or no .keras file ({first_line(error)})") from error
    if broken:
        raise ValueError(f"{path} is damaged: the checksum of {broken} differs")
    load = packed.load_packed if manifest else keras.models.load_model
    try:
        return load(path, compile=False)
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be loaded ({first_line(error)})") from error


def check_file(path: Path, wanted: str) -> None:
    """Raise `ValueError` where no file lies at `path`."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected {wanted}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")


def build_float(name: str, weights: str = "", **options) -> keras.Model:
    """A float model: an architecture of the zoo or a `.keras` file, with weights of a file.

    Args:
        name: architecture, or path of a `.keras` file.
        weights: path; empty for none.
        **options: `input_shape` and `classes`, for architectures.

    Raises:
        ValueError: an unknown name, a missing or damaged file, weights that do not fit.
    """
    weights = str(expanded(weights)) if weights else ""
    if weights and not Path(weights).is_file():
        raise ValueError(f"{weights}: no such file of weights")
    if weights.endswith((".npz", ".keras")) and not zipfile.is_zipfile(weights):
        raise ValueError(f"{weights} is damaged or no {Path(weights).suffix} file")
    if not name.endswith(".keras"):
        if name not in zoo.ARCHITECTURES and (os.sep in name or Path(name).exists()):
            raise ValueError(
                f"{name}: expected a .keras file or one of {sorted(zoo.ARCHITECTURES)}"
            )
        model = zoo.build(name, **options)
    else:
        model = load_model(name)
    if kind(model) != "float":
        raise ValueError(f"{name} is {kind(model)} already; give a float model")
    if weights:
        try:
            load_weights(model, weights)
        except _DAMAGE as error:
            raise ValueError(f"{weights} does not fit {name} ({first_line(error)})") from error
    return model


def build_teacher(name: str, float_model: keras.Model) -> keras.Model:
    """A model to distill from: one of the zoo or of a `.keras` file.

    Args:
        name: what `zoo.load` takes, or a path that ends in `.keras`.
        float_model: takes the same images and gives as many logits.

    Raises:
        ValueError: an unknown name, a missing or damaged file, a model that is not float, other
            images or outputs.
    """
    teacher = load_model(name) if name.endswith(".keras") else zoo.load(name)
    if kind(teacher) != "float":
        raise ValueError(f"teacher {name} is {kind(teacher)}; give a float model")
    fits = all(
        len(got) == len(wanted) and all(a in (None, b) for a, b in zip(got, wanted, strict=True))
        for got, wanted in (
            (teacher.input_shape, float_model.input_shape),
            (teacher.output_shape, float_model.output_shape),
        )
    )
    if not fits:
        raise ValueError(
            f"teacher {name} takes {teacher.input_shape} and gives {teacher.output_shape}; "
            f"the student takes {float_model.input_shape} and gives {float_model.output_shape}"
        )
    return teacher


def kind(model: keras.Model) -> str:
    """`"float"`, `"quantized"` or `"frozen"`."""
    if any(isinstance(layer, IntegerOp) for layer in model.layers):
        return "frozen"
    try:
        calls = walk.flatten(model).calls
    except ValueError:
        return "float"
    return "quantized" if any(kind_of(call) == "quantize" for call in calls) else "float"


def image_shape(model: keras.Model) -> tuple[int | None, ...]:
    """Height, width and channels that a model takes.

    Raises:
        ValueError: several inputs, or no images.
    """
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise ValueError(f"{model.name} must take one batch of images. Its inputs are {shapes}")
    return shapes[0][1:]


def load_data(source: str, shape: tuple[int | None, ...], what: str) -> datasets.Dataset:
    """A data set whose images fit a model; those of a folder are scaled and cropped to fit.

    Raises:
        ValueError: as `data.load`; images of another size.
    """
    wanted = {}
    if is_folder(source):
        wanted["size"] = tuple(shape[:2]) if None not in shape[:2] else None
        wanted["channels"] = shape[2] or 3
    dataset = datasets.load(source, **wanted)
    if any(want not in (None, got) for want, got in zip(shape, dataset.image_shape, strict=True)):
        given, wanted = ("x".join(map(str, s)) for s in (dataset.image_shape, shape))
        raise ValueError(f"{source} has images of {given} pixels; {what} takes {wanted}")
    return dataset


def read_tflite(path: str | Path) -> bytes:
    """Bytes of a `.tflite` file.

    Raises:
        ValueError: no such file, or no `.tflite`.
    """
    path = expanded(path)
    check_file(path, "a .tflite file")
    content = path.read_bytes()
    if content[4:8] != b"TFL3":
        raise ValueError(f"{path} is damaged or no .tflite file: it lacks the identifier TFL3")
    return content


def checked_output(path: str | Path, suffix: str, overwrite: bool) -> Path:
    """A path that can be written to, before work starts.

    Raises:
        ValueError: another ending, no such folder, or a file that is there already.
    """
    path = expanded(path)
    if path.suffix != suffix:
        raise ValueError(f"--out must end in {suffix}. Got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}. Make it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already. Give another --out, or --overwrite")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: the folder {path.parent} cannot be written to")
    return path


def save(model: keras.Model, path: Path) -> None:
    """`model.save` under a temporary name, then rename."""
    with replacing(Path(path)) as temporary:
        model.save(temporary)


def write_text(text: str, path: Path) -> None:
    """Text under a temporary name, then rename."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: dict, path: Path) -> None:
    """JSON under a temporary name, then rename."""
    write_text(json.dumps(content, indent=1, sort_keys=True, default=float) + "\n", path)


def read_json(path: Path) -> dict:
    """A JSON file of ours; empty where there is none.

    Raises:
        ValueError: a damaged file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}). Remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (no object). Remove it")
    return found
