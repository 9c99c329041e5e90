"""Finished blocks on disk, so that a killed run goes on behind them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.transform.calibrate import activation_quantizers
from keras_lowbit.whole_files import (
    checksum,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)

_RUN = "run.json"


class Folder:
    """`run.json` says which run it is; `block_000.npz` and on hold variables of finished blocks.

    Files are whole at any moment (`whole_files`).
    """

    def __init__(self, path: Path | None):
        self.path = path

    @classmethod
    def open(cls, path, settings, float_model, model, images) -> Folder:
        """The folder of a run, made where absent; `None` keeps nothing.

        Raises:
            ValueError: the folder holds another run or a damaged file, or is a file.
        """
        if path is None:
            return cls(None)
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"reconstruct: {path} is a file; give a folder")
        path.mkdir(parents=True, exist_ok=True)
        settings = {
            **settings,
            "quantizers": _grids(model),
            "float_weights": checksum(float_model.get_weights()),
            "images": checksum(images),
        }
        settings = json.loads(json.dumps(settings))
        file = path / _RUN
        held = read_json(file, {})
        if not held:
            write_json(settings, file)
            return cls(path)
        odd = [key for key in settings if held.get(key) != settings[key]]
        if odd:
            if odd[0] not in held:
                raise ValueError(
                    f"reconstruct: {path} holds a run of an earlier version, which did not note "
                    f"{odd[0]}. Use another folder, or remove this one"
                )
            key, was, now = odd[0], held[odd[0]], settings[odd[0]]
            if isinstance(was, dict) and isinstance(now, dict):  # of layers: the first will do
                name = next(n for n in (*now, *was) if was.get(n) != now.get(n))
                key, was, now = f"{key} of {name}", was.get(name), now.get(name)
            raise ValueError(
                f"reconstruct: {path} holds another run: {key} was {was} and is {now} now. Use "
                "another folder, or remove this one"
            )
        return cls(path)

    def holds(self, i) -> bool:
        """Whether block `i` is finished."""
        file = self._file(i)
        return file is not None and file.exists()

    def load(self, i, variables) -> float:
        """Set the variables of a finished block and give its error before training.

        Raises:
            ValueError: a damaged file.
        """
        held = read_arrays(self._file(i))
        for n, variable in enumerate(variables):
            variable.assign(held[f"v{n:04d}"])
        return float(held["before"])

    def save(self, i, variables, before) -> None:
        """Keep a finished block."""
        file = self._file(i)
        if file is not None:
            arrays = {f"v{n:04d}": ops.convert_to_numpy(v) for n, v in enumerate(variables)}
            write_arrays(file, {"before": np.float64(before), **arrays})

    def _file(self, i):
        return None if self.path is None else self.path / f"block_{i:03d}.npz"


def _grids(model):
    """`{layer: [class, bits and shape of the scale of each quantizer]}`."""
    found = {}
    for call in walk.flatten(model).calls:
        held = [k.quantizer for k in kernels(call.operation)]
        held += activation_quantizers(call.operation)
        if held:
            found[call.name] = [q and [type(q).__name__, q.bits, _shape(q.scale)] for q in held]
    return found


def _shape(scale):
    return None if scale is None else list(scale.shape)
