"""Time of one training step of each training method over plain LSQ at w4a4.

    KERAS_BACKEND=tensorflow python tests/benchmarks/method_step.py [--methods Levels Threshold]
        [--net resnet20] [--rounds 7] [--batch 128] [--jit auto] [--json OUT]

All models lie in one process and step in turn, callbacks included; medians, on an idle machine. A
method is timed in the second of four epochs: behind its switch, and inside the ramp of stochastic
precision, whose draws end with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import keras
import numpy as np

import keras_lowbit as klb
from keras_lowbit.progress import table
from tests.benchmarks.clock import WARM, alternate, processor
from tests.benchmarks.training_step import NETS, float_net

PLAIN = "LSQ w4a4"
EPOCHS = 4
TERNARY = klb.Scheme(activation_bits=4, kernel="ternary", kernel_options={"gradient": "sigmoid"})


def quantized(scheme="w4a4", method="mse"):
    """Makes a calibrated model from a float one and images."""

    def make(net, images):
        return klb.calibrate(klb.quantize_model(net, scheme), images, method=method)

    return make


def distilled(frozen):
    """Makes a student under its float teacher."""

    def make(net, images):
        return klb.distillation.MutualDistiller(
            net, [quantized()(net, images)], frozen_teacher=frozen
        )

    return make


# What makes the model, and what makes the callbacks.
METHODS = {
    PLAIN: (quantized(), list),
    "TwoStage": (quantized(), lambda: [klb.callbacks.TwoStage(1)]),
    "StochasticPrecision": (quantized(), lambda: [klb.callbacks.StochasticPrecision()]),
    "BitDescent": (quantized(), lambda: [klb.callbacks.BitDescent({0: 8, 1: 6, 2: 4})]),
    "CyclicPrecision": (
        quantized(),
        lambda: [klb.callbacks.CyclicPrecision(low=4, high=8, cycles=1, epochs=EPOCHS)],
    ),
    "distillation, frozen teacher": (distilled(True), list),
    "MutualDistiller": (distilled(False), list),
    "Levels": (quantized(klb.Scheme(4, 4, kernel="levels")), list),
    "ChannelBalanced": (
        quantized(klb.Scheme(4, 4, activation="channel_balanced")),
        lambda: [klb.callbacks.ChannelBalanceDecay()],
    ),
    "Ternary with regularizer": (
        quantized(TERNARY),
        lambda: [klb.callbacks.TernaryPhases(1)],
    ),
    # Its range is the data's, and only a share of it is trained.
    "Threshold": (
        quantized(klb.Scheme(4, 4, kernel="threshold", activation="threshold"), "minmax"),
        list,
    ),
}


def step_of(model, callbacks, x, y, steps):
    """One step as `fit` takes it: `train_on_batch` between the callbacks of a batch."""
    listed = keras.callbacks.CallbackList(callbacks, model=model, epochs=EPOCHS, steps=steps)
    listed.on_train_begin()
    for epoch in range(2):
        if epoch:
            listed.on_epoch_end(epoch - 1, {})
        listed.on_epoch_begin(epoch)
    done = 0

    def step():
        nonlocal done
        listed.on_train_batch_begin(done)
        model.train_on_batch(x, y)
        listed.on_train_batch_end(done)
        done += 1

    return step


def measure(names, net, batch, rounds, jit):
    """Median seconds of a step by method."""
    shape, _ = NETS[net]
    random = np.random.default_rng(1)
    x = random.integers(0, 256, (batch, *shape)).astype("float32")
    y = random.integers(0, 10, batch)
    steps = {}
    for name in names:
        make, callbacks = METHODS[name]
        model = make(float_net(net), x[:16])
        model.compile(
            optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile={"auto": "auto", "on": True, "off": False}[jit],
        )
        steps[name, jit] = step_of(model, callbacks(), x, y, rounds + WARM)
    return {name: seconds for (name, _), seconds in alternate(steps, rounds).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    # Nets that end in logits.
    parser.add_argument("--net", default="resnet20", choices=["resnet20"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--jit", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--json")
    given = parser.parse_args()
    batch = given.batch or NETS[given.net][1]
    names = list(dict.fromkeys([PLAIN, *given.methods]))
    found = measure(names, given.net, batch, given.rounds, given.jit)
    kept = {
        "backend": keras.backend.backend(),
        "processor": processor(),
        "net": given.net,
        "batch": batch,
        "jit": given.jit,
        "ms": {name: round(1000 * seconds, 2) for name, seconds in found.items()},
        "ratio": {name: round(seconds / found[PLAIN], 3) for name, seconds in found.items()},
    }
    rows = [(name, f"{kept['ms'][name]:.0f}", f"{kept['ratio'][name]:.2f}") for name in names]
    title = f"one training step of {given.net} on {kept['backend']}, {kept['processor']}"
    print(table(title, ("method", "ms", f"time over {PLAIN}"), rows))
    if given.json:
        Path(given.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
