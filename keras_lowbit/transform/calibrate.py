"""Scales of activations from images."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.progress import track
from keras_lowbit.quantizers import Quantizer
from keras_lowbit.transform.kernels import fit_kernels
from keras_lowbit.transform.snap_biases import snap_biases

METHODS = ("mse", "minmax", "percentile")
# Values kept of each tensor for the search of its scale; more do not move 8-bit scales.
SAMPLES = 200_000
_ACTIVATION_QUANTIZERS = ("quantizer", "input_quantizer", "between_quantizer", "output_quantizer")


def calibrate(model, images, *, method="mse", batch_size=32, samples=SAMPLES, only_new=False):
    """Set the scales of all activation grids from images, in place.

    Images run through the model with quantized kernels and float activations (signs stay signs);
    each grid is then fitted to (a seeded sample of) the values that arrived at it. Kernels keep
    their scales, except that layers put in by hand, whose kernels have none yet, get theirs first.
    Last, biases move to the nearest that an exported file can hold (`snap_biases`).

    Args:
        model: a model of `quantize_model`, or one built from quantized layers.
        images: array `(n, ...)`, list of arrays for several inputs, or an iterable of batches.
        method: `"mse"`, `"minmax"` or `"percentile"`.
        batch_size: images at a time, for arrays.
        samples: values kept for each tensor.
        only_new: leave grids alone that have scales already, as in a trained model with a new
            head. They then quantize while the others look.

    Returns:
        The model.

    Raises:
        ValueError: no images, NaN, or shapes that are not the model's.
    """
    if method not in METHODS:
        raise ValueError(f"calibrate: method must be one of {METHODS}. Got {method!r}")
    program = walk.flatten(model)
    batches = checked_batches(program, images, batch_size)
    total = sum(len(b[0]) for b in batches)
    for call in program.calls:
        fit_kernels(call.operation)
    reservoir = _Reservoir(samples, total)
    with _observed(program, reservoir, only_new):
        for batch in track(batches, "calibrate"):
            feeds = [
                ops.convert_to_tensor(a.astype(ref.dtype))
                for a, ref in zip(batch, program.inputs, strict=True)
            ]
            walk.run(program, feeds, walk.infer)
    for quantizer, x in reservoir.collected():
        quantizer.fit_scale(x, method)
    return snap_biases(model)


def checked_batches(program, images, batch_size):
    """Lists of input arrays, checked against the model's inputs.

    Raises:
        ValueError: empty, of the wrong shape, or with NaN or infinite values.
    """
    shapes = [ref.shape for ref in program.inputs]
    if isinstance(images, np.ndarray) or hasattr(images, "shape"):
        images = [np.asarray(images)]
        batches = _cut(images, batch_size)
    elif isinstance(images, (list, tuple)) and images and all(hasattr(x, "shape") for x in images):
        batches = _cut([np.asarray(x) for x in images], batch_size)
    else:
        if isinstance(images, keras.utils.PyDataset):
            # Their `__getitem__` need not raise at the end, so iterating might never stop.
            images = (images[i] for i in range(len(images)))
        batches = [_inputs_of(b) for b in images]
    if not batches or not len(batches[0][0]):
        raise ValueError("No images: pass an array of at least one, or a data set that yields some")
    for batch in batches:
        if len(batch) != len(shapes):
            raise ValueError(f"The model has {len(shapes)} inputs. Got {len(batch)} arrays")
        for array, shape in zip(batch, shapes, strict=True):
            fits = len(array.shape) == len(shape) and all(
                want in (None, got) for want, got in zip(shape[1:], array.shape[1:], strict=True)
            )
            if not fits:
                raise ValueError(
                    f"Images must have shape {shape}, as the model's input. Got {array.shape}"
                )
            if not np.all(np.isfinite(array)):
                raise ValueError("Images contain NaN or infinite values")
    return batches


def _inputs_of(batch):
    """The inputs of a batch that may carry targets."""
    x = batch[0] if isinstance(batch, (list, tuple)) else batch
    return [np.asarray(a) for a in (x if isinstance(x, (list, tuple)) else [x])]


def _cut(arrays, batch_size):
    n = len(arrays[0])
    if any(len(a) != n for a in arrays):
        raise ValueError(f"All inputs need as many images. Got {[len(a) for a in arrays]}")
    return [[a[i : i + batch_size] for a in arrays] for i in range(0, n, batch_size)]


class _Reservoir:
    """A seeded sample of the values that reach each quantizer."""

    def __init__(self, samples, images):
        self.share = max(1, samples // max(images, 1))
        self.random = np.random.default_rng(0)
        self.kept = {}

    def add(self, quantizer, x):
        x = ops.convert_to_numpy(x)
        flat = x.reshape(len(x), -1)
        top = np.abs(flat).max()
        if not np.isfinite(top):
            raise ValueError(f"Values at {quantizer.name} are not finite: check the float model")
        if getattr(quantizer, "keeps_channels", False):
            self._add_rows(quantizer, x)
            return
        if flat.shape[1] > self.share:
            # Extremes are kept, so that minimum and maximum are those of all images.
            ends = np.stack([flat.min(axis=1), flat.max(axis=1)], axis=1)
            chosen = self.random.integers(0, flat.shape[1], self.share)
            flat = np.concatenate([flat[:, chosen], ends], axis=1)
        self.kept.setdefault(id(quantizer), (quantizer, []))[1].append(flat.reshape(-1))

    def _add_rows(self, quantizer, x):
        """Positions with all their channels, for quantizers that weigh channels."""
        channels = x.shape[-1]
        rows, wanted = x.reshape(len(x), -1, channels), max(1, self.share // channels)
        if rows.shape[1] > wanted:
            rows = rows[:, self.random.integers(0, rows.shape[1], wanted)]
        kept = self.kept.setdefault(id(quantizer), (quantizer, []))[1]
        kept.append(rows.reshape(-1, channels))

    def collected(self):
        for quantizer, parts in self.kept.values():
            yield quantizer, np.concatenate(parts)


@contextlib.contextmanager
def _observed(program, reservoir, only_new):
    """Inside the block activation quantizers let reals pass and show them to the reservoir."""
    found = [q for call in program.calls for q in activation_quantizers(call.operation)]
    # Signs have nothing to see, and sums behind them are of another size than those of reals.
    found = [q for q in found if q.fits_data]
    if only_new:
        found = [q for q in found if not q.is_calibrated]
    try:
        for quantizer in found:
            quantizer.observer = reservoir.add
        yield
    finally:
        for quantizer in found:
            quantizer.observer = None


def activation_quantizers(layer) -> list:
    """Quantizers of activations that a layer owns."""
    held = (getattr(layer, name, None) for name in _ACTIVATION_QUANTIZERS)
    return [q for q in held if isinstance(q, Quantizer)]


def uncalibrated(model: keras.Model) -> list[str]:
    """Names of layers with an activation quantizer that never saw data."""
    found = []
    for call in walk.flatten(model).calls:
        for quantizer in activation_quantizers(call.operation):
            if not quantizer.is_calibrated:
                found.append(call.name)
    return list(dict.fromkeys(found))
