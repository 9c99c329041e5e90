"""Scales of activations from images."""

from __future__ import annotations

import contextlib
import warnings

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.checks import checked_choice, checked_count
from keras_lowbit.kinds import kind_of, walk_back
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.numerics.ranges import METHODS, SMALLEST_SCALE
from keras_lowbit.progress import track
from keras_lowbit.quantizers import Affine, Quantizer
from keras_lowbit.transform.batches import CheckedBatches
from keras_lowbit.transform.kernels import fit_kernels
from keras_lowbit.transform.leave_ties import leave_ties
from keras_lowbit.transform.plan import OF_IMAGES
from keras_lowbit.transform.reestimate import never_trained
from keras_lowbit.transform.snap_biases import snap_biases

# Values kept of each tensor for the search of its scale; more do not move 8-bit scales.
SAMPLES = 200_000
_ACTIVATION_QUANTIZERS = ("quantizer", "input_quantizer", "between_quantizer", "output_quantizer")


def calibrate(
    model: keras.Model,
    images,
    *,
    method: str = "mse",
    batch_size: int = 32,
    steps: int | None = None,
    samples: int = SAMPLES,
    only_new: bool = False,
) -> keras.Model:
    """Set the scales of all activation grids from images, in place.

    Images run through the model with quantized kernels and float activations (signs stay signs);
    each grid is then fitted to (a seeded sample of) the values that arrived at it. Kernels keep
    their scales, except that layers put in by hand, whose kernels have none yet, get theirs first.
    Last, what would make the model differ from its file moves: scales on which sums are ties
    (`leave_ties`), by a few thousandths of themselves at most, and biases to the nearest that a
    file can hold (`snap_biases`).

    Args:
        model: a model of `quantize_model`, or one built from quantized layers.
        images: array `(n, ...)`; a list of arrays, or arrays by input name, for several inputs; or
            an iterable of batches (of inputs, or of inputs and targets), read one by one.
        method: `"mse"`, `"minmax"` or `"percentile"` (99.99). The sample for the first two holds
            the least and the greatest value of each image, which so weigh more with `"mse"`.
        batch_size: images at a time, for arrays.
        steps: batches to look at; `None` for all. A generator's are held in memory without it.
        samples: values kept for each tensor.
        only_new: leave grids alone that have scales already, as in a trained model with a new
            head. They then quantize while the others look.

    Returns:
        The model.

    Raises:
        ValueError: a model without quantizers, no images, NaN, shapes or input names that are not
            the model's, numbers below 1, or a data set without end and no `steps`.

    Warns:
        UserWarning: batch norms that have never seen data, in front of grids below 8 bits: training
            makes other activations than those that arrive now. Or values fade away in a deep net.
    """
    checked_choice(method, METHODS, who="calibrate: method")
    checked_count(batch_size, who="calibrate: batch_size", least=1)
    checked_count(samples, who="calibrate: samples", least=1)
    program = walk.flatten(model)
    owners = (call.operation for call in program.calls)
    if not any(activation_quantizers(layer) or kernels(layer) for layer in owners):
        raise ValueError(
            f"calibrate: {model.name} has no quantizer. Pass what quantize_model(model) returns; "
            "frozen models have their scales"
        )
    batches = CheckedBatches(program, images, batch_size, steps)
    for call in program.calls:
        fit_kernels(call.operation)
    reservoir = _Reservoir(samples, batches.images, method)
    of_images = _image_grids(program)
    with _observed(program, reservoir, only_new, of_images):
        for batch in track(batches, "calibrate"):
            walk.forward(program, program.feeds(batch))
    collected = list(reservoir.collected())
    for quantizer, x in collected:
        if id(quantizer) in of_images:
            quantizer.check_images(x)
    collected = [(q, x) for q, x in collected if not (only_new and q.is_calibrated)]
    if not _warn_of_fading(program, collected):
        _warn_of_untrained(model.name, program, collected)
    for quantizer, x in collected:
        quantizer.fit_scale(x, method)
    leave_ties(model, [quantizer for quantizer, _ in collected])
    return snap_biases(model)


def _warn_of_untrained(name, program, collected):
    """Say it where scales fit what no training will see: few bits then never learn."""
    fresh = never_trained(program)
    if fresh and any(q.bits < 8 for q, _ in collected):
        warnings.warn(
            f"calibrate: batch norms of {name} never saw data ({fresh[:3]}: mean 0, "
            "variance 1), so scales fit activations that training will not make, and few bits may "
            "not learn from there. Train the float model first, or run "
            "keras_lowbit.reestimate_batchnorm(float_model, images) before quantize_model",
            stacklevel=3,
        )


def _warn_of_fading(program, collected):
    """Say it where values do not reach the end of the finest grid, and are not all zero."""
    fading = {}
    for quantizer, x in collected:
        top = float(np.abs(x).max(initial=0))
        if 0 < top < SMALLEST_SCALE * quantizer.static_bounds()[1]:
            fading[id(quantizer)] = top
    # In the order of the model: where it begins, its cause is near.
    for call in program.calls:
        for quantizer in activation_quantizers(call.operation):
            if id(quantizer) in fading:
                warnings.warn(
                    f"calibrate: values at {call.name} are at most {fading[id(quantizer)]:.1e}, "
                    f"below the finest grid, as at {len(fading)} tensors of the model. Untrained "
                    "batch norms let values fade from layer to layer: train the float model first, "
                    "or run keras_lowbit.reestimate_batchnorm(float_model, images) before "
                    "quantize_model",
                    stacklevel=3,
                )
                return True
    return False


def _image_grids(program) -> set[int]:
    """Identities of the quantizers that read inputs, moved about or rescaled at most."""
    producers, found = program.producers(), set()
    for call in program.calls:
        quantizer = getattr(call.operation, "quantizer", None)
        if kind_of(call) != "quantize" or not isinstance(quantizer, Affine):
            continue
        if walk_back(producers, call.inputs[0], OF_IMAGES) is None:
            found.add(id(quantizer))
    return found


class _Reservoir:
    """A seeded sample of the values that reach each quantizer."""

    def __init__(self, samples, images, method):
        self.share = max(1, samples // max(images, 1))
        self.counts_shares = method == "percentile"
        self.random = np.random.default_rng(0)
        self.kept = {}
        self.ends = {}  # least and greatest value so far, where they are not in the sample

    def add(self, quantizer, x):
        x = ops.convert_to_numpy(x)
        flat = x.reshape(len(x), -1)
        top = np.abs(flat).max()
        if not np.isfinite(top):
            raise ValueError(
                f"Values at {quantizer.path or quantizer.name} are not finite: check images and "
                "weights of the float model"
            )
        if quantizer.keeps_channels:
            self._add_rows(quantizer, x)
            return
        if flat.shape[1] > self.share:
            chosen = self.random.integers(0, flat.shape[1], self.share)
            low, high = flat.min(axis=1), flat.max(axis=1)
            if self.counts_shares or quantizer.counts_shares:
                # Those of every image would be far more than their share of the values.
                least, greatest = self.ends.get(id(quantizer), (np.inf, -np.inf))
                self.ends[id(quantizer)] = min(least, low.min()), max(greatest, high.max())
                flat = flat[:, chosen]
            else:
                # Extremes are kept, so that minimum and maximum are those of all images. Least
                # squares start 2-bit nets better with them, 4-bit ones a little worse.
                flat = np.concatenate([flat[:, chosen], np.stack([low, high], axis=1)], axis=1)
        self.kept.setdefault(id(quantizer), (quantizer, []))[1].append(flat.reshape(-1))

    def look(self, quantizer, x):
        """`add`, and True: the values then go on their grid all the same."""
        self.add(quantizer, x)
        return True

    def _add_rows(self, quantizer, x):
        """Positions with all their channels, for quantizers that weigh channels."""
        channels = x.shape[-1]
        rows, wanted = x.reshape(len(x), -1, channels), max(1, self.share // channels)
        if rows.shape[1] > wanted:
            rows = rows[:, self.random.integers(0, rows.shape[1], wanted)]
        kept = self.kept.setdefault(id(quantizer), (quantizer, []))[1]
        kept.append(rows.reshape(-1, channels))

    def collected(self):
        for key, (quantizer, parts) in self.kept.items():
            if key in self.ends:
                parts = [*parts, np.float32(self.ends[key])]
            yield quantizer, np.concatenate(parts)


@contextlib.contextmanager
def _observed(program, reservoir, only_new, of_images):
    """Inside the block activation quantizers let reals pass and show them to the reservoir.

    With `only_new` those that have scales quantize; of them grids of images show what they get.
    """
    found = [q for call in program.calls for q in activation_quantizers(call.operation)]
    # Signs have nothing to see, and sums behind them are of another size than those of reals.
    found = [q for q in found if q.fits_data]
    try:
        for quantizer in found:
            if not (only_new and quantizer.is_calibrated):
                quantizer.observer = reservoir.add
            elif id(quantizer) in of_images:
                quantizer.observer = reservoir.look
        yield
    finally:
        for quantizer in found:
            quantizer.observer = None


def activation_quantizers(layer) -> list:
    """Quantizers of activations that a layer owns."""
    held = (getattr(layer, name, None) for name in _ACTIVATION_QUANTIZERS)
    return [q for q in held if isinstance(q, Quantizer)]
