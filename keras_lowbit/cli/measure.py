"""Accuracy of Keras models and of exported files, with its interval."""

from __future__ import annotations

import contextlib
import math

import keras
import numpy as np

from keras_lowbit.cli.pixels import Intake
from keras_lowbit.data.answers import top_class
from keras_lowbit.progress import track
from tflite_export import runtime

Z95 = 1.959964  # normal quantile of 97.5 %
_FLIGHT = 1 << 26  # bytes of float32 pixels in flight


def keras_accuracy(model: keras.Model, x, y, batch_size: int = 250) -> float:
    """Share of right answers of a Keras model."""
    return float((keras_answers(model, x, batch_size) == np.asarray(y)).mean())


def keras_answers(model: keras.Model, x, batch_size: int = 250, what: str = "") -> np.ndarray:
    """Class with the largest output, for each image; images may be read on demand.

    Raises:
        ValueError: one output only, or images of another range than the model's.
    """
    # Batches of one size, the last one filled up: TensorFlow traces each size anew.
    batches = max(1, math.ceil(len(x) / min(batch_size, _fitting(x))))
    batch_size = max(1, math.ceil(len(x) / batches))
    fit = Intake.of_model(model).reader(np.asarray(x[: _fitting(x)]))
    answers = []
    with _without_xla(model):
        for part in _parts(x, 2 * batch_size, what or f"run {model.name}"):
            part, count = _filled(fit(part), batch_size), len(part)
            outputs = model.predict(part, batch_size=batch_size, verbose=0)
            answers.append(top_class(outputs[:count]))
    return np.concatenate(answers)


@contextlib.contextmanager
def _without_xla(model):
    """Keras' own choice on TensorFlow; it takes minutes to compile an integer model on a CPU."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    before, model.jit_compile = model.jit_compile, False
    try:
        yield
    finally:
        model.jit_compile = before


def file_answers(
    session: runtime.Session, x, what: str = "run the file", *, intake: Intake
) -> np.ndarray:
    """Class with the largest output of a `.tflite`, for each image, by running the file.

    Args:
        session: of the file.
        x: images, which may be read on demand.
        what: shown meanwhile.
        intake: `Intake.of_file`.

    Raises:
        ValueError: several inputs or outputs, one output value only, images of another size or
            range.
    """
    if len(session.inputs) != 1 or len(session.outputs) != 1:
        raise ValueError(
            f"Accuracy needs one input and one output. The file has {list(session.inputs)} and "
            f"{list(session.outputs)}"
        )
    (name,) = session.inputs
    batch, *shape = _input_shape(session)
    if tuple(shape) != tuple(x.shape[1:]):
        given, wanted = ("x".join(map(str, s)) for s in (x.shape[1:], shape))
        raise ValueError(f"The images have {given} pixels; the file takes {wanted}")
    fit = intake.reader(np.asarray(x[: _fitting(x)]))
    answers = []
    for part in _parts(x, max(1, min(500, _fitting(x)) // batch) * batch, what):
        part, count = _filled(fit(part), batch), len(part)
        outputs = session.run({name: part})
        answers.append(top_class(next(iter(outputs.values()))[:count]))
    return np.concatenate(answers)


def file_shape(session: runtime.Session) -> tuple[int, ...]:
    """Height, width and channels that a `.tflite` takes.

    Raises:
        ValueError: it takes no single batch of images.
    """
    _, *shape = _input_shape(session)
    return tuple(shape)


def check_classes(what, outputs: int, dataset, by_name: bool = False) -> None:
    """See that labels may be compared with what `what`, a model or its file, answers.

    Args:
        what: for the error.
        outputs: of `what`, `output_classes` or `file_classes`.
        dataset: with the labels.
        by_name: whether those are the places of names among each other, as in a folder of images.

    Raises:
        ValueError: one output only; fewer outputs than classes; by name also more, as names behind
            one that is missing have moved up.
    """
    if outputs < 2:
        raise ValueError(
            f"{what} has {outputs} output and {dataset.name} {dataset.num_classes} classes; "
            "accuracy is counted by the largest of two outputs or more. Give images of two classes "
            "or more, and a model with an output for each"
        )
    if outputs < dataset.num_classes:
        raise ValueError(
            f"{what} tells {outputs} classes apart; {dataset.name} has {dataset.num_classes}"
        )
    if by_name and outputs > dataset.num_classes:
        raise ValueError(
            f"{what} tells {outputs} classes apart; {dataset.name} has folders of "
            f"{dataset.num_classes}, and labels are the places of their names. Give a folder of "
            "all classes, or a .npz with the labels that the model was trained on"
        )


def output_classes(model: keras.Model, what) -> int:
    """Classes that a model's output tells apart.

    Args:
        model: any Keras model.
        what: for the error.

    Raises:
        ValueError: several outputs, or none of one vector an image.
    """
    return _classes(what, [tuple(tensor.shape) for tensor in model.outputs])


def file_classes(session: runtime.Session, what) -> int:
    """Likewise of a `.tflite`."""
    return _classes(what, list(session.output_shapes.values()))


def _classes(what, shapes):
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise _no_vector(what, shapes)
    return shapes[0][1]


def _no_vector(what, given):
    return ValueError(
        f"{what} gives {' and '.join(map(str, given))}; accuracy is of one output (batch, "
        "classes). Give a model that ends in one vector for each image"
    )


def _input_shape(session):
    shapes = list(session.input_shapes.values())
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise ValueError(f"the file must take one batch of images. Its inputs are {shapes}")
    return shapes[0]


def file_accuracy(content: bytes, x, y) -> float:
    """Share of right answers of a `.tflite`, by running the file."""
    answers = file_answers(runtime.Session(content), x, intake=Intake.of_file(content))
    return float((answers == np.asarray(y)).mean())


def score(answers: np.ndarray, y: np.ndarray) -> dict:
    """Right answers, accuracy and its 95 % Wilson interval, for a JSON file."""
    right, n = int((answers == np.asarray(y)).sum()), len(y)
    return {"accuracy": right / n, "right": right, "images": n, "interval": wilson(right, n)}


def wilson(right: int, n: int, z: float = Z95) -> list[float]:
    """Wilson's interval of the share `p = right / n`.

        (p + z^2 / 2n -+ z * sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    p, square = right / n, z * z / n
    middle = p + square / 2
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    # 0 and 1 themselves come out a rounding error beyond.
    ends = ((middle - half) / (1 + square), (middle + half) / (1 + square))
    return [min(max(0.0, end), 1.0) for end in ends]


def shown(scored: dict) -> str:
    """`91.40 % (90.83..91.93)`."""
    low, high = scored["interval"]
    return f"{scored['accuracy']:.2%} ({100 * low:.2f}..{100 * high:.2f})"


def _fitting(x):
    return max(1, _FLIGHT // (4 * math.prod(x.shape[1:])))


def _filled(part, batch):
    """Whole batches: the last image again and again behind the others."""
    return np.concatenate([part, np.repeat(part[-1:], -len(part) % batch, axis=0)])


def _parts(x, size, what):
    for start in track(range(0, len(x), size), what):
        yield np.asarray(x[start : start + size])
