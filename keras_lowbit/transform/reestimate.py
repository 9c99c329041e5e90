"""Moving statistics of batch norms, computed instead of averaged along the way."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.checks import checked_count
from keras_lowbit.numerics import backend
from keras_lowbit.numerics.arrays import float64_of
from keras_lowbit.progress import track
from keras_lowbit.transform.batches import checked_batches


def reestimate_batchnorm(
    model: keras.Model, data, *, steps: int | None = None, batch_size: int = 32
) -> keras.Model:
    """Set moving means and variances of batch norms from data, in place.

        moving_mean = mean over batches of mean(batch)
        moving_variance = mean over batches of variance(batch)       (of N, not of N - 1)

    Every batch weighs the same; sums are kept in float64, so the result is exact to a float32
    rounding. Batch norms normalize with the batch, as in training; everything else (dropout)
    is in inference mode. Batch norms with `trainable=False`, or called with `training=False`, keep
    what they have. A model without batch norms comes back as it is.

    Give it the batches that trained the model, augmented as they were: layers learned to read
    features that were normalized so, and with the statistics of plain images a 2-bit ResNet-8 lost
    3.3 points.

    Args:
        model: functional or Sequential Keras model.
        data: array `(n, ...)`, list of arrays for several inputs, a `keras.utils.PyDataset`, or an
            iterable of batches, with or without targets.
        steps: batches to use, the first ones; `None` for all.
        batch_size: images at a time, for arrays.

    Returns:
        The model.

    Raises:
        ValueError: no data, NaN, shapes that are not the model's, `steps` below 1. The model is
            then as it was.
    """
    if steps is not None:
        steps = checked_count(steps, who="reestimate_batchnorm: steps", least=1)
    program = walk.flatten(model)
    norms = {id(c.operation): c.operation for c in program.calls if _learns_statistics(c)}
    if not norms:
        return model
    batches = checked_batches(program, data, batch_size, steps)
    sums = {key: _Sums() for key in norms}
    order = []  # keys of the calls whose statistics `statistics` returns

    def statistics(feeds):
        seen = []
        order.clear()

        def execute(call, args, kwargs):
            norm = norms.get(id(call.operation))
            if norm is None or kwargs.get("training") is False:
                return walk.infer(call, args, kwargs)
            outputs = norm(*args, **{**kwargs, "training": True})
            order.append(id(norm))
            # Copies: where a layer is shared, its next call writes into the same variables.
            seen.append((ops.copy(norm.moving_mean), ops.copy(norm.moving_variance)))
            return outputs

        walk.forward(program, feeds, execute)
        return seen

    with _showing_batches(norms.values()):
        compiled = backend.compiled(statistics)
        for batch in track(batches, "re-estimate batch norms"):
            for key, (mean, variance) in zip(order, compiled(program.feeds(batch)), strict=True):
                sums[key].add(mean, variance)
        means = {key: total.means() for key, total in sums.items()}
    for key, norm in norms.items():
        mean, variance = means[key]
        norm.moving_mean.assign(mean)
        norm.moving_variance.assign(variance)
    return model


def never_trained(program: walk.Program) -> list[str]:
    """Names of batch norms that are as they were made: gain 1, shift 0, mean 0 and variance 1."""
    found = {}
    for call in program.calls:
        norm = call.operation
        if not isinstance(norm, keras.layers.BatchNormalization):
            continue
        ones = [norm.moving_variance, *([norm.gamma] if norm.scale else [])]
        zeros = [norm.moving_mean, *([norm.beta] if norm.center else [])]
        fresh = all((float64_of(v) == 1).all() for v in ones)
        if fresh and not any(float64_of(v).any() for v in zeros):
            found[call.name] = None
    return list(found)


def _learns_statistics(call):
    norm = isinstance(call.operation, keras.layers.BatchNormalization)
    return norm and call.operation.trainable and call.kwargs.get("training") is not False


@contextlib.contextmanager
def _showing_batches(norms):
    """Inside the block a call in training mode leaves the batch's own statistics in the layer."""
    saved = [
        (
            n,
            n.momentum,
            ops.convert_to_numpy(n.moving_mean),
            ops.convert_to_numpy(n.moving_variance),
        )
        for n in norms
    ]
    saved = [(n, m, np.array(mean), np.array(variance)) for n, m, mean, variance in saved]
    try:
        for norm, _, mean, variance in saved:
            norm.momentum = 0.0
            # Zero times NaN is NaN: broken statistics must not reach the new ones.
            norm.moving_mean.assign(np.zeros_like(mean))
            norm.moving_variance.assign(np.zeros_like(variance))
        yield
    finally:
        for norm, momentum, mean, variance in saved:
            norm.momentum = momentum
            norm.moving_mean.assign(mean)
            norm.moving_variance.assign(variance)


class _Sums:
    """Running sums of one layer's batch statistics; a shared layer adds once a call."""

    def __init__(self):
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def add(self, mean, variance):
        self.count += 1
        self.mean = self.mean + float64_of(mean)
        self.variance = self.variance + float64_of(variance)

    def means(self):
        return np.float32(self.mean / self.count), np.float32(self.variance / self.count)
