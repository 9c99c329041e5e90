"""Data sets in one `.npz` file: `x_train, y_train, x_test, y_test`, and `classes` if wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_lowbit.data.dataset import Dataset
from keras_lowbit.whole_files import DAMAGE, first_line

KEYS = ("x_train", "y_train", "x_test", "y_test")

_WANTED = "Expected what np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...) writes"

# NumPy's reader of anything at all lets more through.
_DAMAGE = (*DAMAGE, MemoryError, RuntimeError, SyntaxError)


def read_npz(path: str | Path) -> Dataset:
    """Read a data set from a `.npz` file.

    Pickled arrays are refused, so a file cannot run code.

    Args:
        path: the file, with arrays as `Dataset` takes them.

    Returns:
        The data set, named after the file.

    Raises:
        ValueError: the file is damaged or lacks an array, or an array is not what `Dataset`
            takes.
    """
    path = Path(path)
    try:
        # A stream of our own is closed whatever NumPy makes of the file.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            single = isinstance(file, np.ndarray)
            found = [] if single else list(file.files)
            arrays = {key: file[key] for key in (*KEYS, "classes") if key in found}
    except _DAMAGE as error:
        why = first_line(error)
        raise ValueError(f"{path} cannot be read as .npz ({why}). {_WANTED}") from error
    if single:
        raise ValueError(f"{path} holds a single array. {_WANTED}")
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it has {found}. {_WANTED}")
    classes = tuple(str(c) for c in arrays.pop("classes", np.array([])).ravel())
    return Dataset(**arrays, classes=classes, name=path.name)
