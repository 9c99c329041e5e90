"""Images in all the forms that users hold them in, as checked lists of input arrays."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping

import keras
import numpy as np

from keras_lowbit.checks import checked_count

INFINITE = -1  # what `cardinality` of an endless `tf.data.Dataset` gives


class CheckedBatches:
    """Checked batches, read one by one: iterate once.

    Args:
        program: of `walk.flatten`; its inputs say what fits.
        images: array, list or mapping of arrays (several inputs), or an iterable of batches, each
            of which is inputs or `(inputs, targets)`.
        batch_size: images at a time, for arrays; `None` for all. A model of a fixed batch size
            takes that.
        steps: batches at most; `None` for all.

    Attributes:
        count: batches to come, at most.
        images: images to come; where batches are not in memory, as many as if all were as large
            as the first.

    Raises:
        ValueError: nothing in it, batches without end, or inputs of the wrong number, names or
            shape, with NaN or infinite values: when they are read.
    """

    def __init__(self, program, images, batch_size, steps=None):
        if steps is not None:
            steps = checked_count(steps, who="steps", least=1)
        self.program = program
        arrays = self._arrays(images)
        if arrays is not None:
            fixed = {ref.shape[0] for ref in program.inputs} - {None}
            batches = _cut(arrays, min(fixed, default=batch_size))[:steps]
            self.count, self.images = len(batches), sum(len(b[0]) for b in batches)
            self._start(batches)
            return
        batches, count = _iterator(images, steps)
        if count is None:
            batches = [self._inputs_of(batch) for batch in batches]
            self.count, self.images = len(batches), sum(len(b[0]) for b in batches)
        else:
            batches, self.count = (self._inputs_of(batch) for batch in batches), count
            self.images = None
        self._start(batches)

    def _start(self, batches):
        rest = iter(batches)
        first = next(rest, None)
        if first is None or not len(first[0]):
            raise ValueError(
                "No images: pass an array of at least one, or a data set that yields some"
            )
        _check(self.program, first)
        if self.images is None:
            self.images = self.count * len(first[0])
        self._batches = itertools.chain([first], rest)

    def __len__(self):
        return self.count

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for batch in self._batches:
            _check(self.program, batch)
            yield batch

    def _arrays(self, images):
        """One array an input, where all images are in memory; else `None`."""
        if isinstance(images, Mapping):
            return self._by_name(images)
        if hasattr(images, "shape"):
            return [np.asarray(images)]
        listed = isinstance(images, (list, tuple)) and images
        return [np.asarray(x) for x in images] if listed and _are_arrays(images) else None

    def _by_name(self, images):
        names = self.program.input_names
        missing = [name for name in names if name not in images]
        if missing:
            raise ValueError(f"The model has inputs {list(names)}. Got {list(images)}")
        return [np.asarray(images[name]) for name in names]

    def _inputs_of(self, batch):
        """The inputs of a batch that may carry targets."""
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        if isinstance(x, Mapping):
            return self._by_name(x)
        return [np.asarray(a) for a in (x if isinstance(x, (list, tuple)) else [x])]


def checked_batches(program, images, batch_size, steps=None) -> list[list[np.ndarray]]:
    """All `CheckedBatches` at once, for what goes through them several times.

    Raises:
        ValueError: as `CheckedBatches`.
    """
    return list(CheckedBatches(program, images, batch_size, steps))


def _are_arrays(images):
    return all(hasattr(x, "shape") for x in images)


def _iterator(images, steps):
    """Batches not in memory, and how many; `None` where that shows at their end only."""
    if isinstance(images, keras.utils.PyDataset):
        # Their `__getitem__` need not raise at the end, so iterating might never stop.
        # Amid a pass of `fit` an `AugmentedBatches` counts what is asked for: not here.
        read = getattr(images, "batch_at", images.__getitem__)
        chosen = range(_finite(images.num_batches, steps))[:steps]
        return map(read, chosen), len(chosen)
    cardinality = getattr(images, "cardinality", None)
    if cardinality is not None and int(cardinality()) == INFINITE:
        _finite(None, steps)
    if isinstance(images, (list, tuple)):
        return images[:steps], None
    readable = hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    if isinstance(images, (str, bytes)) or not readable:
        raise ValueError(
            "images must be an array (n, ...), arrays by input, or an iterable of batches. "
            f"Got {images!r:.80} ({type(images).__name__})"
        )
    try:
        known = len(images)
    except TypeError:  # no length, or no end
        return itertools.islice(images, steps), steps
    # The greatest length is grain's for what repeats without end.
    known = _finite(None if known >= sys.maxsize else known, steps)
    return itertools.islice(images, steps), known if steps is None else min(known, steps)


def _finite(known, steps):
    """`known` batches, or of a data set without end, `None`, as many as asked for."""
    if known is None and steps is None:
        raise ValueError("The data set has no end: say how many batches to read by steps=")
    return steps if known is None else known


def _cut(arrays, batch_size):
    n = len(arrays[0])
    if any(len(a) != n for a in arrays):
        raise ValueError(f"All inputs need as many images. Got {[len(a) for a in arrays]}")
    size = batch_size or max(n, 1)
    return [[a[i : i + size] for a in arrays] for i in range(0, n, size)]


def _check(program, batch):
    shapes = [ref.shape for ref in program.inputs]
    if len(batch) != len(shapes):
        raise ValueError(f"The model has {len(shapes)} inputs. Got {len(batch)} arrays")
    for array, shape in zip(batch, shapes, strict=True):
        fits = len(array.shape) == len(shape) and all(
            want in (None, got) for want, got in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"Images must have shape {shape}, as the model's input. Got {array.shape}"
            )
        if not np.all(np.isfinite(array)):
            raise ValueError("Images contain NaN or infinite values")
