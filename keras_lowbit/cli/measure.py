"""Accuracy of Keras models and of exported files."""

from __future__ import annotations

import keras
import numpy as np

from keras_lowbit.progress import track
from tflite_export import runtime


def keras_accuracy(model: keras.Model, x, y, batch_size: int = 250) -> float:
    """Share of right answers of a Keras model."""
    found = keras_answers(model, x, batch_size)
    return float((found == np.asarray(y)).mean())


def keras_answers(model, x, batch_size=250) -> np.ndarray:
    """Class with the largest output, for each image."""
    outputs = model.predict(np.asarray(x).astype("float32"), batch_size=batch_size, verbose=0)
    return outputs.argmax(-1)


def file_answers(content: bytes, x) -> np.ndarray:
    """Class with the largest output of a `.tflite`, for each image, by running the file."""
    session = runtime.Session(content)
    if len(session.inputs) != 1:
        raise ValueError(f"The file has the inputs {list(session.inputs)}; accuracy needs one")
    ((name, dtype),) = session.inputs.items()
    answers = []
    x = np.asarray(x)
    for start in track(range(0, len(x), 500), "run the file"):
        outputs = session.run({name: x[start : start + 500].astype(dtype)})
        answers.append(next(iter(outputs.values())).argmax(-1))
    return np.concatenate(answers)


def file_accuracy(content: bytes, x, y) -> float:
    """Share of right answers of a `.tflite`, by running the file."""
    return float((file_answers(content, x) == np.asarray(y)).mean())
