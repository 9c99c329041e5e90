"""Trained thresholds: factors on calibrated ranges learn to give the float model's logits."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.callbacks.adam_reset import AdamResetCosine
from keras_lowbit.checks import checked_count
from keras_lowbit.kinds import kind_of
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.numerics import uniform
from keras_lowbit.progress import track
from keras_lowbit.quantizers import Threshold
from keras_lowbit.transform.batches import checked_batches
from keras_lowbit.transform.calibrate import activation_quantizers
from keras_lowbit.transform.ready import check_ready
from keras_lowbit.transform.snap_biases import snap_biases
from keras_lowbit.tuning import programs
from keras_lowbit.tuning.variables import standing_in

POINTWISE = (0.75, 1.25)


@dataclass(frozen=True)
class Tuning:
    """What `tune_thresholds` did.

    Args:
        before: root of the mean squared distance of logits to the float model's, on the tuning
            images.
        after: the same afterwards; never above `before`.
        history: the same after each epoch.
    """

    before: float
    after: float
    history: tuple[float, ...]

    def __str__(self):
        return (
            f"distance of logits: {self.before:.4f} before, {self.after:.4f} after "
            f"{len(self.history)} epochs"
        )


def rmse(wanted, got):
    """`sqrt(sum_i (z_i - y_i)^2 / N)`, N images."""
    return ops.sqrt(ops.mean(ops.sum(ops.square(wanted - got), axis=-1)) + 1e-12)


def smooth_l1(wanted, got):
    """`mean over images of sum sqrt((z - y)^2 + 1e-5)`."""
    return ops.mean(ops.sum(ops.sqrt(ops.square(wanted - got) + 1e-5), axis=-1))


LOSSES = {"rmse": rmse, "smooth_l1": smooth_l1}


def tune_thresholds(
    model: keras.Model,
    float_model: keras.Model,
    images,
    *,
    loss: str = "rmse",
    epochs: int = 6,
    learning_rate: float = 1e-3,
    pointwise_epochs: int = 0,
    batch_size: int = 32,
    period: int = 400,
    seed: int = 0,
    jit_compile: bool | None = None,
) -> Tuning:
    """Train the thresholds of a model to its float model's logits, without labels, in place.

    Nothing but the factors `alpha` and `shift` of `Threshold` quantizers is trained. With
    `pointwise_epochs` a second phase trains a factor in 0.75..1.25 for every weight and bias
    instead, which is then multiplied in. The best state seen at the end of an epoch is kept, the
    one before included; then biases move to the units of the new thresholds (`snap_biases`).

    Args:
        model: a calibrated model of `quantize_model`, with
            `Scheme(kernel="threshold", activation="threshold")` (`per_channel=False` for one
            threshold a kernel) on a model without batch norms (`fold_batchnorm`).
        float_model: the model that it was made from.
        images: images, as for `calibrate`.
        loss: `"rmse"` or `"smooth_l1"`, on logits.
        epochs: over the images, for thresholds.
        learning_rate: of Adam at the start (`callbacks.AdamResetCosine`).
        pointwise_epochs: epochs of the second phase; 0 leaves it out.
        batch_size: images a step.
        period: steps between resets of Adam.
        seed: of the order of images.
        jit_compile: as in `reconstruct`.

    Returns:
        A `Tuning`.

    Raises:
        ValueError: unknown loss, arguments out of range, no thresholds, batch norms, models that
            do not correspond, an uncalibrated model, quantizers that are switched off, images that
            do not fit.

    Reference:
        Goncharenko et al., ICANN 2019 (arXiv:1812.07872). Loss: the text's; `"smooth_l1"` is that
        of the authors' code.
    """
    epochs = checked_count(epochs, who="tune_thresholds: epochs", least=0)
    pointwise_epochs = checked_count(
        pointwise_epochs, who="tune_thresholds: pointwise_epochs", least=0
    )
    _check(loss, epochs + pointwise_epochs)
    quantized, floating = programs.pair(model, float_model)
    check_ready(model, who="tune_thresholds")
    norms = [c.name for c in quantized.calls if kind_of(c) == "batch_norm"]
    if norms:
        raise ValueError(
            f"tune_thresholds: {model.name} has batch norms ({norms[:3]}); the method is defined "
            "on folded models. Use fold_batchnorm before quantize_model"
        )
    thresholds = _thresholds(quantized)
    if epochs and not thresholds:
        raise ValueError(
            f"tune_thresholds: {model.name} has no Threshold quantizer. Quantize with "
            "Scheme(kernel='threshold', activation='threshold')"
        )
    quantized, floating = programs.logits(quantized), programs.logits(floating)
    if len(walk.refs(quantized.outputs)) != 1:
        raise ValueError(f"tune_thresholds: {model.name} must have one output")
    batches = checked_batches(quantized, images, batch_size)
    wanted = np.concatenate([programs.forward(floating, b)[0] for b in track(batches, "float")])
    images = [np.concatenate(column) for column in zip(*batches, strict=True)]
    if jit_compile is None:
        jit_compile = keras.backend.backend() == "jax"
    tuner = _Tuner(quantized, images, wanted, LOSSES[loss], batch_size, seed, jit_compile, period)
    start = _values(model.variables)
    before, history = tuner.distance(), []
    if epochs:
        history += tuner.tune([*thresholds], [], epochs, learning_rate, "tune thresholds")
    if pointwise_epochs:
        factors = [
            PointwiseFactor(call.name, kernel.latent, kernel.quantizer)
            for call in quantized.calls
            for kernel in kernels(call.operation)
            if kernel.quantizer is not None
        ]
        history += tuner.tune([], factors, pointwise_epochs, learning_rate, "tune weights")
    snap_biases(model)
    after = tuner.distance()
    if after > before:
        # Biases that fit the new scales may undo a gain of the last digit.
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)
        after = before
    return Tuning(before, after, tuple(history))


def _check(loss, total):
    if loss not in LOSSES:
        raise ValueError(f"tune_thresholds: loss must be one of {tuple(LOSSES)}. Got {loss!r}")
    if not total:
        raise ValueError("tune_thresholds: epochs and pointwise_epochs are both 0")


def _thresholds(program):
    """Trained variables of the `Threshold` quantizers, each once."""
    found = {}
    for call in program.calls:
        held = [k.quantizer for k in kernels(call.operation)]
        for quantizer in (*held, *activation_quantizers(call.operation)):
            if isinstance(quantizer, Threshold):
                found.update({id(v): v for v in quantizer.trainable_variables})
    return list(found.values())


class PointwiseFactor:
    """A factor in 0.75..1.25 on every weight of a kernel, in the place of its quantizer.

    Biases need no such object: they are trained themselves and kept within the same bounds.

    Args:
        layer_name: the layer's name.
        latent: the kernel.
        quantizer: its quantizer.

    Gradient:
        To the factor: `weight` times the gradient to the kernel, inside the range and at its ends.

    Reference:
        Goncharenko et al., ICANN 2019: pointwise scales of weights, in [0.75, 1.25].
    """

    def __init__(self, layer_name, latent, quantizer):
        self.latent, self.quantizer = latent, quantizer
        self.start = np.array(ops.convert_to_numpy(latent))
        self.factor = keras.Variable(
            np.ones(latent.shape, np.float32), name=f"{layer_name}_factor", trainable=True
        )
        self._encode = quantizer.encode

    def kernel(self):
        """The kernel with its factors."""
        factor = ops.convert_to_tensor(self.factor)
        fixed = ops.stop_gradient(factor)
        inside = ops.logical_and(fixed >= POINTWISE[0], fixed <= POINTWISE[1])
        start = ops.convert_to_tensor(self.start)
        value = ops.clip(fixed, *POINTWISE) * start
        return uniform.straight_through(value, (factor, ops.cast(inside, "float32") * start))

    def encode(self, _):
        """What the quantizer makes of the kernel with its factors."""
        return self._encode(self.kernel())

    def write(self):
        """Multiply the factors in."""
        factor = np.clip(ops.convert_to_numpy(self.factor), *POINTWISE)
        self.latent.assign(factor * self.start)


class _ProgramModel(keras.Model):
    """A program of which only some variables train; layers compute in inference mode."""

    def __init__(self, program, variables, states, loss):
        super().__init__(name="tuned")
        self.program, self.states, self.tuning_loss = program, states, loss
        self.tuned = list(variables)

    def build(self, input_shape=None):
        """All variables exist already."""
        self.built = True

    def call(self, inputs):
        """Logits."""
        feeds = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        with standing_in(self.states):
            values = walk.run(self.program, feeds, programs.execute)
        (ref,) = walk.refs(self.program.outputs)
        return values[ref.index]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The distance of logits."""
        return self.tuning_loss(ops.convert_to_tensor(y), y_pred)


class _Tuner:
    """Epochs over the images, the best state kept."""

    def __init__(self, program, images, wanted, loss, batch_size, seed, jit_compile, period):
        self.program, self.images, self.wanted, self.loss = program, images, wanted, loss
        self.batch_size, self.jit_compile, self.period = batch_size, jit_compile, period
        self.random = np.random.default_rng(seed)

    def distance(self):
        """Root of the mean squared distance of logits, over all images."""
        total = 0.0
        for start in range(0, len(self.wanted), self.batch_size):
            rows = slice(start, start + self.batch_size)
            (got,) = programs.forward(self.program, [image[rows] for image in self.images])
            total += float(((got.astype(np.float64) - self.wanted[rows]) ** 2).sum())
        return (total / len(self.wanted)) ** 0.5

    def tune(self, variables, factors, epochs, learning_rate, description):
        """Distances after each epoch; the model ends with the best state seen."""
        biases = self._biases() if factors else []
        starts = [np.array(ops.convert_to_numpy(v)) for v in biases]
        trained = [*variables, *(f.factor for f in factors), *biases]
        model = _ProgramModel(self.program, trained, factors, self.loss)
        model.compile(keras.optimizers.Adam(learning_rate), jit_compile=self.jit_compile)
        moved = [*variables, *(f.latent for f in factors), *biases]
        best, kept = self.distance(), _values(moved)
        steps = -(-len(self.wanted) // self.batch_size)
        bar = track(range(epochs * steps), description)
        history = []
        callback = AdamResetCosine(self.period)
        callback.set_model(model)
        callback.on_train_begin()
        try:
            for _ in range(epochs):
                order = self.random.permutation(len(self.wanted))
                for step in range(steps):
                    rows = np.sort(order[step * self.batch_size : (step + 1) * self.batch_size])
                    callback.on_train_batch_begin(step)
                    model.train_on_batch([x[rows] for x in self.images], self.wanted[rows])
                    for bias, start in zip(biases, starts, strict=True):
                        ends = np.sort([start * POINTWISE[0], start * POINTWISE[1]], axis=0)
                        bias.assign(np.clip(ops.convert_to_numpy(bias), *ends))
                    next(bar, None)
                for factor in factors:
                    factor.write()
                history.append(self.distance())
                if history[-1] < best:
                    best, kept = history[-1], _values(moved)
            next(bar, None)  # past the last step, so that the bar counts it
        finally:
            bar.close()
            for variable, value in zip(moved, kept, strict=True):
                variable.assign(value)
        return history

    def _biases(self):
        layers = {
            id(c.operation): c.operation for c in self.program.calls if kind_of(c) == "product"
        }
        return [layer.bias for layer in layers.values() if layer.use_bias]


def _values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]
