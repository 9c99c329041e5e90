"""Blocks that are quantized by chance, ever more of them."""

from __future__ import annotations

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.callbacks.switches import add_switches
from keras_lowbit.checks import checked_count, checked_number
from keras_lowbit.kinds import kind_of
from keras_lowbit.quantizers import Quantizer
from keras_lowbit.quantizers.sites import quantizers_of


class StochasticPrecision(keras.callbacks.Callback):
    """Quantizes a random part of the network in each step, the rest computes in float.

        y = m q(x) + (1 - m) x       on kernels and activations of a unit, m ~ Bernoulli(p), no
                                     gradient through m
        p(t) = p0 + (p1 - p0) min(t / ramp, 1)       t: share of the training that is done, 0..1

    A unit is a residual block: what lies between two additions of the graph. In a plain net it is
    one layer: a product and the quantizers before it. One m is drawn for a unit and a batch.
    Evaluation, validation and the model between epochs are fully quantized.

    Draws come from a generator seeded with `(seed, epoch, batch)`: the same on every backend, and a
    run that resumes repeats them without any state. Each m is put in the `switch` variable of the
    unit's quantizers before the step, which costs little while p < 1 and nothing after.

    It draws for quantizers that are on when an epoch's first step begins: those that another
    callback holds back (`TwoStage`), or a float stage, stay off. A `fit` that ends in an exception
    or by the keyboard amid an epoch leaves what was off in that step off, which the next `fit` with
    this callback mends; without one call `on_train_end()`.

    List it before callbacks that save, export or keep weights (`EarlyStopping`) at the end of an
    epoch. A model saved amid one is quantized as a whole. Batch norms see the deployed network in
    the last part of the training only: add a `BatchNormReestimation`. The model keeps the switches
    that this puts in (`Quantizer.add_switch`): lists of `get_weights()` get longer.

    Args:
        p0: probability at the start, 0..1.
        p1: probability after the ramp, `p0`..1. Below 1 the network never trains as a whole.
        ramp: share of the training that the ramp takes, above 0 and at most 1.
        unit: `"block"`, or `"layer"` for one layer in residual nets too.
        seed: of the draws.

    Raises:
        ValueError: a probability outside 0..1 or falling, a ramp outside 0..1, an unknown unit;
            when training starts, a model without quantizers, or compiled with
            `steps_per_execution` above 1, where steps share a draw.

    Reference:
        Zhuang et al., Effective Training of Convolutional Neural Networks with Low-bitwidth Weights
        and Activations, TPAMI 2022, arXiv:1908.04680, of which the abstract only names stochastic
        precision: unit, probability and ramp are a reconstruction.
    """

    def __init__(
        self,
        p0: float = 0.5,
        p1: float = 1.0,
        ramp: float = 0.6,
        unit: str = "block",
        seed: int = 0,
    ):
        super().__init__()
        for name, value in (("p0", p0), ("p1", p1), ("ramp", ramp)):
            who = f"StochasticPrecision: {name}"
            setattr(self, name, checked_number(value, who=who, least=0, most=1))
        if p1 < p0:
            raise ValueError(
                f"StochasticPrecision: p1 must be at least p0, or quantization fades. "
                f"Got p0={p0}, p1={p1}"
            )
        if ramp == 0:
            raise ValueError("StochasticPrecision: ramp must be above 0. Use p0=1 for no ramp")
        if unit not in ("block", "layer"):
            raise ValueError(f"StochasticPrecision: unit must be 'block' or 'layer'. Got {unit!r}")
        self.unit = unit
        self.seed = checked_count(seed, who="StochasticPrecision: seed", least=0)
        self.units: list[list[Quantizer]] = []
        self._drawn_for: list[list[Quantizer]] = []

    def probability(self, done: float) -> float:
        """The probability after the share `done` of the training."""
        return self.p0 + (self.p1 - self.p0) * min(done / self.ramp, 1.0)

    def draw(self, epoch: int, batch: int) -> np.ndarray:
        """Which units are quantized in a step."""
        steps, epochs = self.params.get("steps"), self.params["epochs"]
        # A data set of unknown length ramps by epochs.
        within = batch / steps if steps else 0.0
        p = self.probability((epoch + within) / epochs)
        random = np.random.default_rng((self.seed, epoch, batch))
        return random.random(len(self.units)) < p

    def set_model(self, model):
        """Find the units, and give their quantizers switches before the step is compiled."""
        super().set_model(model)
        self.units = units_of(model, self.unit)
        add_switches(model, [quantizer for unit in self.units for quantizer in unit])

    def on_train_begin(self, logs=None):
        """Check the model."""
        model = self.model
        if not self.units:
            raise ValueError(
                f"StochasticPrecision: {model.name} has no quantizer. Quantize it first, such as "
                "quantize_model(model, 'w4a4')"
            )
        if model.steps_per_execution != 1:
            raise ValueError(
                "StochasticPrecision draws for every step: compile with steps_per_execution=1. "
                f"Got {model.steps_per_execution}"
            )
        self.on_train_end()

    def on_epoch_begin(self, epoch, logs=None):
        """Note the epoch."""
        self._epoch, self._fresh = epoch, True

    def on_train_batch_begin(self, batch, logs=None):
        """Draw."""
        if self._fresh:  # all callbacks have had their turn at the epoch's beginning
            _ = self.model  # On JAX this hands the step's state back, so that variables can move.
            self._drawn_for = [[q for q in unit if q.enabled] for unit in self.units]
            self._fresh = False
        self._put(self.draw(self._epoch, batch))

    def on_test_begin(self, logs=None):
        """Evaluation is quantized as far as the epoch is."""
        self._put(np.ones(len(self._drawn_for), bool))

    def on_epoch_end(self, epoch, logs=None):
        """And so is what others find between epochs."""
        self.on_test_begin()

    def on_train_end(self, logs=None):
        """Switch on what a draw has left off."""
        self._drawn_for = self.units
        self.on_test_begin()

    def _put(self, drawn):
        for unit, on in zip(self._drawn_for, drawn, strict=True):
            for quantizer in unit:
                # What a draw has switched off bears a mark, so that nobody else's switch is moved.
                if quantizer.off_for_a_step == on:
                    _ = self.model  # as above
                    quantizer.set_enabled(bool(on))
                    quantizer.off_for_a_step = not on


def units_of(model: keras.Model, unit: str = "block") -> list[list[Quantizer]]:
    """Quantizers of a model by units, in the order of its graph.

    Args:
        model: a quantized model, or one that holds some (a distiller).
        unit: `"block"`: cut behind every addition, or behind every product where there is none.
            `"layer"`: behind every product.
    """
    units, known = [], set()
    for program in _programs(model):
        adds = any(kind_of(call) == "add" for call in program.calls)
        last = "add" if adds and unit == "block" else "product"
        current: list[Quantizer] = []
        for call in program.calls:
            for _, quantizer in quantizers_of(call.operation):
                if id(quantizer) not in known:
                    known.add(id(quantizer))
                    current.append(quantizer)
            if kind_of(call) == last:
                units.append(current)
                current = []
        units.append(current)
    return [found for found in units if found]


def _programs(model):
    """The graph of a model, or those of the models inside one that has none to read."""
    try:
        return [walk.flatten(model)]
    except ValueError:
        inner = (layer for layer in model.layers if isinstance(layer, keras.Model))
        return [program for one in inner for program in _programs(one)]
