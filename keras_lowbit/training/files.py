"""Files of a training in stages: whole at any moment."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.whole_files import damaged, read_arrays, read_json, write_arrays, write_json


def write_state(model: keras.Model, path: Path) -> None:
    """All variables of a model, random states included, optimizer excluded.

    Neither those that callbacks add to quantizers while `fit` runs (switches, pulls): stages and
    callbacks set them, and a model that has met its callbacks must read what another wrote.
    """
    arrays = [np.asarray(ops.convert_to_numpy(v)) for v in _kept(model)]
    write_arrays(path, {f"{i:06d}": array for i, array in enumerate(arrays)})


def read_state(model: keras.Model, path: Path) -> None:
    """Put back what `write_state` wrote.

    Raises:
        ValueError: the file is damaged, or belongs to another model.
    """
    arrays = list(read_arrays(path).values())
    shapes = [tuple(array.shape) for array in arrays]
    variables = _kept(model)
    if shapes != [tuple(v.shape) for v in variables]:
        raise ValueError(
            f"{path} belongs to another model than {model.name}. Give each training a directory "
            "of its own"
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def _kept(model):
    quantizers = [site.quantizer for site in sites_of(model)]
    late = {id(getattr(one, name, None)) for one in quantizers for name in one.unsaved}
    return [variable for variable in model.variables if id(variable) not in late]


def read_epochs(path: Path) -> list[dict]:
    """The rows of an `EpochLog`; none where there is no file.

    Raises:
        ValueError: a damaged file, or one of something else.
    """
    rows = read_json(path, [])
    if not all(isinstance(row, dict) and {"epoch", "stage"} <= row.keys() for row in rows):
        raise damaged(path, ValueError("no rows of epochs"))
    return rows


def read_stages(path: Path) -> dict | None:
    """`{"plan": ..., "stages": rows}` of a training; `None` where there is no file.

    Raises:
        ValueError: a damaged file, or one of something else.
    """
    stored = read_json(path, None)
    whole = isinstance(stored, dict) and "plan" in stored and type(stored.get("stages")) is list
    if stored is not None and not whole:
        raise damaged(path, ValueError("no log of stages"))
    return stored


class EpochLog(keras.callbacks.Callback):
    """Adds the logs of each epoch to a JSON file; a repeated epoch replaces its row.

    Args:
        path: the file, a list of rows.
        stage: index of the stage, written to each row.
    """

    def __init__(self, path: Path, stage: int):
        super().__init__()
        self.path, self.stage = Path(path), stage

    def on_epoch_end(self, epoch, logs=None):
        """Add a row, and drop those of this epoch and later ones."""
        rows = [row for row in read_epochs(self.path) if row["epoch"] < epoch]
        # Some metrics are a number for each class.
        numbers = {k: np.array(ops.convert_to_numpy(v)).tolist() for k, v in (logs or {}).items()}
        write_json([*rows, {"epoch": epoch, "stage": self.stage, **numbers}], self.path)


def plain(content):
    """`content` as it reads back from JSON: tuples as lists."""
    return json.loads(json.dumps(content))
