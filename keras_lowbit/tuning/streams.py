"""The values of one tensor for all images, kept in memory or on disk."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_lowbit import walk
from keras_lowbit.tuning import programs

_LARGEST_HALF = 6e4


class Stream:
    """An array `(images, ...)` in the smallest form that a budget asks for.

    float32 where that fits the budget, else float16 (relative rounding 2^-11, below any grid of 8
    bits), else float16 in a temporary file.

    Args:
        shape: of the whole.
        budget: bytes of memory.
    """

    def __init__(self, shape: Sequence[int], budget: float):
        count = math.prod(shape)
        self.place = "float32" if 4 * count <= budget else "float16"
        self._remove = None
        if self.place == "float16" and 2 * count > budget:
            self.place = "disk"
            folder = tempfile.mkdtemp(prefix="reconstruct_")
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            file = Path(folder) / "stream"
            self.array = np.memmap(file, np.float16, "w+", shape=tuple(shape))
        else:
            self.array = np.empty(tuple(shape), self.place)

    def write(self, start: int, values: np.ndarray) -> None:
        """Store the values of images `start`, `start + 1`, ...

        Raises:
            ValueError: values that float16 cannot hold.
        """
        if self.place != "float32" and not np.abs(values).max(initial=0) < _LARGEST_HALF:
            raise ValueError(
                "Activations reach 60,000 or are not finite, and the streams are kept as float16: "
                "check the float model, or raise `memory`"
            )
        self.array[start : start + len(values)] = values

    def __getitem__(self, rows):
        """Float32 values of some images."""
        return np.asarray(self.array[rows], np.float32)

    def __len__(self):
        return len(self.array)

    def close(self) -> None:
        """Give memory and file back."""
        del self.array
        if self._remove is not None:
            self._remove()


class Given:
    """The images themselves, as a stream that is not copied."""

    def __init__(self, array):
        self.array = array

    def __getitem__(self, rows):
        """Some images."""
        return np.asarray(self.array[rows])

    def __len__(self):
        return len(self.array)

    def close(self) -> None:
        """Nothing to give back."""


def propagate(
    program: walk.Program, streams, batch_size: int, budget: float, limit: int | None = None
) -> list[Stream]:
    """Streams of a program's outputs from those of its inputs: of all images, or the first ones."""
    made: list[Stream] = []
    count = _count(streams[0], limit)
    for start in range(0, count, batch_size):
        rows = slice(start, min(start + batch_size, count))
        outputs = programs.forward(program, [stream[rows] for stream in streams])
        if not made:
            made = [Stream((count, *out.shape[1:]), budget) for out in outputs]
        for stream, values in zip(made, outputs, strict=True):
            stream.write(start, values)
    return made


def variance(stream: Stream, rows: int = 32) -> float:
    """Variance of all values of a stream, in float64."""
    total = square = count = 0.0
    for start in range(0, len(stream), rows):
        values = stream[start : start + rows].astype(np.float64)
        total, square = total + values.sum(), square + (values**2).sum()
        count += values.size
    return max(square / count - (total / count) ** 2, 0.0)


def relative_error(
    wanted: list[Stream], got: list[Stream], variances, limit: int | None = None, rows: int = 32
) -> float:
    """Mean over outputs of `mean (got - wanted)^2 / variance`, of all images or the first."""
    errors = []
    for one, other, spread in zip(wanted, got, variances, strict=True):
        total = count = 0.0
        last = _count(one, limit)
        for start in range(0, last, rows):
            part = slice(start, min(start + rows, last))
            difference = one[part].astype(np.float64) - other[part]
            total, count = total + (difference**2).sum(), count + difference.size
        errors.append(total / count / spread)
    return float(np.mean(errors))


def _count(stream, limit):
    return len(stream) if limit is None else min(limit, len(stream))
