"""Finished blocks on disk, so that a killed run goes on behind them."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.transform.calibrate import activation_quantizers

_RUN = "run.json"


class Folder:
    """`run.json` says which run it is; `block_000.npz` and on hold variables of finished blocks.

    Files are written under another name and renamed when complete.
    """

    def __init__(self, path: Path | None):
        self.path = path

    @classmethod
    def open(cls, path, settings, float_model, model, images) -> Folder:
        """The folder of a run, made where absent; `None` keeps nothing.

        Raises:
            ValueError: the folder holds another run, or is a file.
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
            "float_weights": _checksum(float_model.get_weights()),
            "images": _checksum(images),
        }
        settings = json.loads(json.dumps(settings))
        file = path / _RUN
        if not file.exists():
            _replace(file, lambda target: target.write_text(json.dumps(settings, indent=1)))
            return cls(path)
        held = json.loads(file.read_text())
        odd = [key for key in settings if held.get(key) != settings[key]]
        if odd:
            key, was, now = odd[0], held.get(odd[0]), settings[odd[0]]
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
        """Set the variables of a finished block and give its error before training."""
        with np.load(self._file(i)) as held:
            for n, variable in enumerate(variables):
                variable.assign(held[f"v{n:04d}"])
            return float(held["before"])

    def save(self, i, variables, before) -> None:
        """Keep a finished block."""
        file = self._file(i)
        if file is None:
            return
        arrays = {f"v{n:04d}": ops.convert_to_numpy(v) for n, v in enumerate(variables)}

        def write(target):
            with target.open("wb") as stream:
                np.savez(stream, before=before, **arrays)

        _replace(file, write)

    def _file(self, i):
        return None if self.path is None else self.path / f"block_{i:03d}.npz"


def _replace(file, write):
    unfinished = file.with_name(file.name + ".unfinished")
    write(unfinished)
    os.replace(unfinished, file)


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


def _checksum(arrays):
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array), total)
    return total
