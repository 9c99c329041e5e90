"""A model's variables from a Keras weights file, found by the file's paths.

Keras walks all attributes of all objects of a model and looks each up in the file. Here the file is
walked and each of its entries looked up in the model, which takes a third of the time.
"""

from __future__ import annotations

import io
import re
from typing import Any

import keras
import numpy as np

_VALUES = "vars"
_CONTAINERS = (list, tuple, dict)


class Unknown(ValueError):
    """The model has nothing at a path of the file, or the file holds what Keras alone can read."""


def fill(model: keras.Model, content: bytes) -> None:
    """Fill a built model's variables.

    Args:
        model: made from the config that was saved with the weights.
        content: the bytes of `model.weights.h5`.

    Raises:
        Unknown: the file asks for Keras' own reader; some variables may have been filled.
        ValueError: an entry does not fit its layer.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, values in _entries(content):
        folder, _, key = path.rpartition("/")
        found.setdefault(folder, {})[key] = values
    known: dict[str, dict[str, Any]] = {}
    for path, values in found.items():
        *steps, last = path.split("/")
        if last != _VALUES:
            raise Unknown(f"{path} is no entry of Keras")
        target = _at(model, steps, known)
        if not hasattr(target, "load_own_variables"):
            raise Unknown(f"{path} has no variables in the model")
        target.load_own_variables(values)


def _entries(content):
    """`(path, values)` of all datasets.

    By h5py's low-level interface: its objects of groups and datasets take as long again.
    """
    import h5py  # comes with Keras

    with h5py.File(io.BytesIO(content)) as file:
        names: list[bytes] = []
        file.id.links.visit(names.append)
        for name in names:
            item = h5py.h5o.open(file.id, name)
            if not isinstance(item, h5py.h5d.DatasetID):
                continue
            path = name.decode()
            if h5py.h5a.exists(item, b"dtype"):  # a type that HDF5 does not have
                raise Unknown(f"{path} is {file[path].attrs['dtype']}")
            values = np.empty(item.shape, item.dtype)
            item.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
            yield path, values


def _at(model, steps, known):
    """What Keras calls `steps`: attributes, and members of containers by their classes."""
    found, path = model, ""
    for step in steps:
        if isinstance(found, _CONTAINERS):
            if path not in known:
                known[path] = _named(found)
            found = known[path].get(step)
        else:
            found = getattr(found, step, None)
        path = f"{path}/{step}"
        if found is None:
            raise Unknown(f"the model has no {path}")
    return found


def _named(container):
    """The members of a container under the names that Keras gives them."""
    counts: dict[str, int] = {}
    found = {}
    for member in container.values() if isinstance(container, dict) else container:
        nested = isinstance(member, _CONTAINERS)
        name = "container" if nested else _snake_case(type(member).__name__)
        counts[name] = counts.get(name, -1) + 1
        found[f"{name}_{counts[name]}" if counts[name] else name] = member
    return found


def _snake_case(name):
    """`QuantizedConv2D` -> `quantized_conv2_d`, as Keras names classes in files."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
