"""CPU seconds of depthwise products on JAX: XLA's, and `numerics.backend_jax`'s in their place.

    PYTHONPATH=. python tests/benchmarks/depthwise.py [--runs 5]

On JAX, whatever `KERAS_BACKEND` says. Prints a row for each shape, forward alone and with
gradients; then a training step of the zoo's MobileNetV2 of 32 pixels at w4a4 (batch 32) and its
calibration.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ["KERAS_BACKEND"] = "jax"  # before Keras: these products are of that backend

import jax
import keras
import numpy as np
from keras import ops

from keras_lowbit import calibrate, quantize_model, zoo
from keras_lowbit.numerics import backend_jax
from keras_lowbit.progress import table

# Batch, pixels a side, channels, kernel, stride: layers of MobileNetV2 and MnasNet.
SHAPES = (
    (32, 32, 96, 3, 1),
    (32, 16, 144, 3, 2),
    (32, 8, 384, 3, 1),
    (32, 4, 960, 3, 1),
    (32, 16, 72, 5, 2),
    (8, 112, 32, 3, 1),
)


def seconds(function, *arguments, runs):
    """Fewest CPU seconds of a call, the first left out."""
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(runs):
        start = time.process_time()
        jax.block_until_ready(function(*arguments))
        found.append(time.process_time() - start)
    return min(found)


def of_shape(n, side, channels, size, stride, runs):
    """Cells of a shape's row."""
    random = np.random.default_rng(0)
    x = random.normal(size=(n, side, side, channels)).astype(np.float32)
    kernel = random.normal(size=(size, size, channels, 1)).astype(np.float32)
    strides = (stride, stride)

    def plain(x, kernel):
        return ops.depthwise_conv(x, kernel, strides, "same", "channels_last")

    def shifted(x, kernel):
        return backend_jax.depthwise(x, kernel, strides, "same", (1, 1))

    cells = [f"{n}x{side}x{side}x{channels}, {size}x{size}, stride {stride}"]
    for wrap in (lambda f: f, lambda f: jax.grad(lambda x, k: (f(x, k) ** 2).sum(), (0, 1))):
        slow, fast = (seconds(jax.jit(wrap(f)), x, kernel, runs=runs) for f in (plain, shifted))
        cells += [f"{1e3 * slow:.1f}", f"{1e3 * fast:.1f}", f"{slow / fast:.1f}"]
    return cells


def of_net():
    """CPU seconds of calibration and of a step, by whether the fast form is used."""
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (32, 32, 32, 3)).astype(np.float32), np.arange(32)
    fast, found = backend_jax.depthwise, {}
    for name in ("XLA's", "shifted"):
        backend_jax.depthwise = fast if name == "shifted" else (lambda *_: None)
        model = quantize_model(zoo.build("mobilenet_v2", input_shape=(32, 32, 3)), "w4a4")
        start = time.process_time()
        calibrate(model, x)
        fitted = time.process_time() - start
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-3), loss)
        step = seconds(lambda model=model: model.train_on_batch(x, y), runs=3)
        found[name] = (fitted, step)
    backend_jax.depthwise = fast
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of which the fastest counts")
    runs = parser.parse_args().runs
    columns = ("shape", "XLA's ms", "shifted ms", "ratio")
    columns += ("with gradients: XLA's ms", "shifted ms", "ratio")
    print(table("Depthwise products", columns, [of_shape(*shape, runs) for shape in SHAPES]))
    rows = [(name, f"{a:.1f}", f"{b:.2f}") for name, (a, b) in of_net().items()]
    print(table("MobileNetV2, 32 pixels, w4a4", ("products", "calibrate s", "step s"), rows))


if __name__ == "__main__":
    main()
